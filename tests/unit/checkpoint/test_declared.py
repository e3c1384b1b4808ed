"""config.json of a packed transformer is compared with its files before a model is built; whatever stands in it, the answer
is a sentence."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qvgen.checkpoint.packed import export_pipeline, load_packed_transformer
from qvgen.checkpoint.pipeline import load_pipeline, load_transformer
from qvgen.models.registry import load_family
from qvgen.models.tiny import tiny_pipeline
from qvgen.nn.swap import convert_, prepare_
from qvgen.quant.scheme import QuantScheme

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
LOADERS: list[Callable[[Path], Any]] = [load_packed_transformer, load_transformer, load_pipeline]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed folder whose files record nothing, as those of earlier versions: the checks below have no record to go by."""
    root = tmp_path_factory.mktemp("declared")
    source = tiny_pipeline("wan", root / "source")
    transformer = load_transformer(source)
    scheme = QuantScheme(timestep_groups=2)
    prepare_(transformer, scheme, default_targets=load_family(source).default_targets)
    convert_(transformer)
    export_pipeline(source, transformer, scheme, root / "packed", torch.bfloat16)
    shutil.copytree(root / "packed", root / "recorded")
    save_file(load_file(root / "packed" / WEIGHTS), root / "packed" / WEIGHTS, metadata={"format": "pt"})
    return root / "packed"


@pytest.fixture
def folder(packed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed, tmp_path / "packed"))


def edit(folder: Path, path: str, value: Any) -> None:
    file = folder / "transformer" / "config.json"
    config = json.loads(file.read_text())
    *parents, last = path.split("/")
    node = config
    for name in parents:
        node = node[name]
    node[last] = value
    file.write_text(json.dumps(config))


G = "quantization_config/config_groups"
VALUES: list[tuple[str, Any]] = [
    *(("num_layers", value) for value in ("", None, 2**31, -1, 1.5, [2])),
    *(("patch_size", value) for value in ([2**31, 2, 2], [1, 2], "x", 7, None)),
    *(("num_attention_heads", value) for value in (2**33, -1, "2")),
    *(("rope_max_seq_len", value) for value in (2**33, "x", None)),
    *(("in_channels", value) for value in ([4], {"a": 1}, 10**400)),
    *(("quantization_config/ignore", value) for value in (0.5, None, [1], True)),
    *(("quantization_config/format_version", value) for value in (1.0, True, "1")),
    *((G, value) for value in (None, [], 5, {"group_0": 3})),
    *((f"{G}/group_0/{name}", 2**62) for name in ("num_targets", "timestep_groups", "weights", "targets")),
    ("_class_name", 3),
    ("_class_name", "Linear"),
]


@pytest.mark.parametrize(("path", "value"), VALUES, ids=lambda part: f"{part!r:.40}")
def test_every_answer_is_a_sentence(folder: Path, path: str, value: Any) -> None:
    edit(folder, path, value)
    for load in LOADERS:
        with pytest.raises(ValueError, match=r"\w+ \w+") as caught:
            load(folder)
        assert "Traceback" not in str(caught.value) and len(str(caught.value)) < 3000


def test_sizes_are_refused_before_anything_is_built(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import diffusers

    monkeypatch.setattr(diffusers.WanTransformer3DModel, "__init__", lambda *_, **__: pytest.fail("a model was built"))
    edit(folder, "rope_max_seq_len", 2**33)
    for load in LOADERS:
        with pytest.raises(ValueError, match=r"rope_max_seq_len = 8589934592, but the weights beside it are \d+ tensors of"):
            load(folder)


def test_a_recorded_config_is_compared_before_anything_is_built(packed: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(packed.parent / "recorded", tmp_path / "packed"))
    edit(folder, "rope_max_seq_len", 32.0)
    for load in LOADERS:
        with pytest.raises(ValueError, match=r"rope_max_seq_len = 32\.0, the weights beside it were written for 32"):
            load(folder)


@pytest.mark.parametrize("stale", [False, True])
def test_a_shard_that_is_not_there_is_named(folder: Path, stale: bool) -> None:
    """Also where a single file is left over: diffusers takes the index."""
    if not stale:
        (folder / WEIGHTS).unlink()
    (folder / f"{WEIGHTS}.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": {"proj_out.bias": "a.safetensors"}})
    )
    with pytest.raises(ValueError, match=r"a\.safetensors does not exist, but the index beside it names it"):
        load_transformer(folder)
