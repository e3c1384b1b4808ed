"""Packed transformers that go through pickle, torch.save or a copy, as spawned workers and Ray send them."""

import copy
import io
import multiprocessing
import pickle
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from qvgen.checkpoint.packed import export_pipeline, load_packed_transformer
from qvgen.checkpoint.pipeline import load_transformer
from qvgen.integrations.projections import JointProjections
from qvgen.models.registry import load_family
from qvgen.models.tiny import tiny_pipeline
from qvgen.nn.packed_linear import PackedLinear, packed_layers
from qvgen.nn.swap import convert_, prepare_
from qvgen.quant.scheme import QuantScheme
from tests.support.packed_model import predict

pytestmark = pytest.mark.integration

SCHEME = QuantScheme(timestep_groups=4)
SECONDS = 120  # a new interpreter imports torch and diffusers


@pytest.fixture(scope="module", params=["wan", "cogvideox"])
def packed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A loaded packed transformer, its family, and what it predicts."""
    root: Path = tmp_path_factory.mktemp("copies")
    source = tiny_pipeline(request.param, root / "source")
    family, model = load_family(source), load_transformer(source)
    prepare_(model, SCHEME, default_targets=family.default_targets)
    convert_(model)
    export_pipeline(source, model, SCHEME, root / "packed", torch.float32)
    loaded = load_packed_transformer(root / "packed")
    return loaded, family, predict(family, loaded)


def saved_and_loaded(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved_and_loaded,
    "deepcopy": copy.deepcopy,
    "twice": lambda model: pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(model)))),
}


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_is_whole_and_its_own(packed: Any, how: str) -> None:
    model, family, expected = packed
    twin = COPIES[how](model)
    layers, copies = dict(packed_layers(model)), dict(packed_layers(twin))
    assert all(layer._prepared is not None for layer in layers.values())  # a backend has them
    assert copies.keys() == layers.keys()
    assert all(torch.equal(copies[name].weight_packed, layer.weight_packed) for name, layer in layers.items())
    assert not any(copies[name] is layer for name, layer in layers.items())
    for layer in layers.values():  # a copy that called blocks of the original would notice
        layer.weight_scale.mul_(2)
    try:
        torch.testing.assert_close(predict(family, twin), expected, rtol=1e-5, atol=1e-5)  # other addresses, other roundings
    finally:
        for layer in layers.values():
            layer.weight_scale.div_(2)
    assert torch.equal(predict(family, model), expected)


@pytest.mark.slow
def test_a_spawned_worker_computes_the_same(packed: Any) -> None:
    model, family, expected = packed
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=worker, args=(there, pickle.dumps((model, family))), daemon=True)
    process.start()
    try:
        assert here.poll(SECONDS), "the worker does not answer"
        result = here.recv()
    finally:
        process.kill()
        process.join()
    assert not isinstance(result, str), result
    torch.testing.assert_close(torch.from_numpy(result), expected, rtol=1e-5, atol=1e-5)


def worker(results: Connection, sent: bytes) -> None:
    try:
        model, family = pickle.loads(sent)
        results.send(predict(family, model).numpy())
    except Exception as error:
        results.send(f"{type(error).__name__}: {error}")


def test_a_copied_layer_belongs_to_no_backend(packed: Any) -> None:
    _, layer = next(packed_layers(packed[0]))
    twin = copy.deepcopy(layer)
    assert isinstance(twin, PackedLinear) and layer.backend is not None and twin.backend is None
    assert twin.state_dict().keys() == layer.state_dict().keys()


def test_joined_projections_call_the_packed_layers(packed: Any) -> None:
    model, family, expected = packed
    twin = copy.deepcopy(model)  # unfusing leaves CogVideoX another processor
    before = twin.state_dict().keys()
    twin.fuse_qkv_projections()
    twin.fuse_qkv_projections()
    joint = [name for name, module in twin.named_modules() if isinstance(module, JointProjections)]
    assert len(joint) == {"wan": 4, "cogvideox": 2}[family.name]
    again = pickle.loads(pickle.dumps(twin))
    again.get_submodule(joint[0]).attention.to_v.bias.data.add_(1)  # its own attention's layers, whatever they are now
    assert float((predict(family, again) - expected).abs().max()) > 1e-3
    torch.testing.assert_close(predict(family, twin), expected, rtol=1e-5, atol=1e-5)
    assert twin.state_dict().keys() == before  # so that a joined model saves and loads
    twin.unfuse_qkv_projections()
    torch.testing.assert_close(predict(family, twin), expected, rtol=1e-5, atol=1e-5)
