"""What packed files record of themselves: a flipped bit of a tensor and a changed field of config.json are refused by name."""

import copy
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

import qvgen.integrations.diffusers as integration
from pipelines.cli import app
from qvgen.checkpoint.packed import export_pipeline, verify_folder
from qvgen.checkpoint.pipeline import load_pipeline, load_transformer
from qvgen.models.registry import load_family
from qvgen.models.tiny import tiny_pipeline
from qvgen.nn.swap import convert_, prepare_
from qvgen.packing.record import model_fields, verify
from qvgen.quant.scheme import QuantScheme
from qvgen.tensors import save_tensors

WEIGHTS = "diffusion_pytorch_model.safetensors"
SCHEME = QuantScheme(timestep_groups=2)
Q = "blocks.1.attn1.to_q"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("record")
    source = tiny_pipeline("wan", root / "source")
    transformer = load_transformer(source)
    prepare_(transformer, SCHEME, default_targets=load_family(source).default_targets)
    convert_(transformer)
    export_pipeline(source, transformer, SCHEME, root / "packed", torch.bfloat16)
    return root / "packed"


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "packed"))


@pytest.fixture(autouse=True)
def not_told() -> Iterator[None]:
    integration._told.clear()
    yield
    integration._told.clear()


def load(transformer: Path, **options: Any) -> Any:
    return diffusers.WanTransformer3DModel.from_pretrained(transformer, **options)


def entries(path: Path) -> dict[str, tuple[int, int]]:
    """Where each tensor lies in a file, in bytes."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__")
    return {name: (start + e["data_offsets"][0], start + e["data_offsets"][1]) for name, e in header.items()}


def flip(path: Path, at: int, bit: int = 0) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1 << bit]))


def edit_config(transformer: Path, **changes: Any) -> None:
    path = transformer / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_flipped_bit_of_any_tensor_is_named(folder: Path) -> None:
    path = folder / "transformer" / WEIGHTS
    places = entries(path)
    assert verify([path]) == len(places) > 100
    for number, (name, (begin, end)) in enumerate(places.items()):
        at = begin + (number * 7919) % (end - begin)
        flip(path, at, number % 8)
        with pytest.raises(ValueError, match=f"^{name}: sha256 is"):
            verify([path])
        flip(path, at, number % 8)
    assert verify([path]) == len(places)


@pytest.mark.parametrize(
    "name",
    [
        f"{Q}.weight_scale",
        f"{Q}.weight_zero_point",
        f"{Q}.bias",
        f"{Q}.input_clip_lower",
        "proj_out.weight",
        "blocks.0.norm2.bias",
    ],
)
def test_every_way_of_loading_refuses_it(folder: Path, name: str) -> None:
    path = folder / "transformer" / WEIGHTS
    flip(path, entries(path)[name][0])  # the lowest bit: no other check can find it
    for read in (lambda: load(folder / "transformer"), lambda: load_transformer(folder), lambda: verify_folder(folder)):
        with pytest.raises(ValueError, match=f"^{name}: sha256 is"):
            read()
    with pytest.raises(ValueError, match=f"^{name}: sha256 is"):
        load_pipeline(folder)
    with pytest.raises(ValueError, match=f"^{name}: sha256 is"):
        diffusers.WanPipeline.from_pretrained(folder)


def test_another_dtype_or_name_in_the_header_is_refused(folder: Path) -> None:
    path = folder / "transformer" / WEIGHTS
    data = path.read_bytes()
    at = data.index(b'"proj_out.weight":{"dtype":"BF16"')
    path.write_bytes(data[:at] + data[at:].replace(b'"dtype":"BF16"', b'"dtype":"U16" ', 1).replace(b"U16", b"F16", 1))
    with pytest.raises(ValueError, match=r"^proj_out\.weight: sha256 is"):
        load(folder / "transformer")
    path.write_bytes(data.replace(b'"proj_out.bias":{', b'"proj_out.bjas":{'))
    with pytest.raises(ValueError, match=r"'proj_out\.bjas' is not among the tensors it was written with"):
        load(folder / "transformer")


def changed(value: Any) -> Any:
    return not value if isinstance(value, bool) else value * 2 + 1


def test_every_changed_number_of_the_config_is_named(folder: Path) -> None:
    transformer = folder / "transformer"
    config = json.loads((transformer / "config.json").read_text())
    numbers = {name for name, value in model_fields(config).items() if isinstance(value, int | float)}
    assert {"eps", "rope_max_seq_len", "num_layers"} <= numbers
    for name in numbers:
        edit_config(transformer, **config | {name: changed(config[name])})
        with pytest.raises(ValueError, match=rf"config\.json: {name} = .* were written for "):
            verify([transformer / WEIGHTS])


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda c: c.update(eps=1e-5), r"eps = 1e-05, the weights beside it were written for 1e-06"),
        (lambda c: c.update(rope_max_seq_len=64), r"rope_max_seq_len = 64, .* for 32"),
        (lambda c: c.update(eps=1), r"eps = 1, .* for 1e-06"),
        (lambda c: c.update(patch_size=[1, 2, 1]), r"patch_size\[2\] = 1, .* for 2"),
        (lambda c: c.pop("eps"), r"eps is missing"),
        (lambda c: c.update(pos_embed_seq_len=None, new=1), r"new is not among the recorded fields"),
        (
            lambda c: c["quantization_config"]["config_groups"]["group_0"].update(timestep_groups=1),
            r"quantization_config\.config_groups\.group_0\.timestep_groups = 1, .* for 2",
        ),
    ],
)
def test_a_changed_config_is_refused_by_diffusers(folder: Path, edit: Callable[[dict[str, Any]], Any], says: str) -> None:
    path = folder / "transformer" / "config.json"
    config = json.loads(path.read_text())
    edit(config)
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=says):
        load(folder / "transformer")


def test_other_spelling_of_the_same_config_is_accepted(folder: Path) -> None:
    edit_config(folder / "transformer", _diffusers_version="9.9", _name_or_path="elsewhere")
    load(folder / "transformer")


def test_verification_can_be_turned_off(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "transformer" / WEIGHTS
    flip(path, entries(path)["proj_out.weight"][0])
    monkeypatch.setenv("QVGEN_VERIFY", "0")
    load(folder / "transformer")
    monkeypatch.setenv("QVGEN_VERIFY", "no")
    with pytest.raises(ValueError, match="QVGEN_VERIFY='no' must be 1"):
        load(folder / "transformer")


def test_a_folder_of_an_earlier_version_is_loaded_and_told_of_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = folder / "transformer" / WEIGHTS
    save_file(load_file(path), path, metadata={"format": "pt"})
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            load(folder / "transformer")
    (said,) = (record.getMessage() for record in caplog.records if "record no hashes" in record.getMessage())
    assert said.startswith(f"the packed files {path} record no hashes: an earlier version wrote them")


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "10KB"}, {"variant": "fp16"}], ids=["one", "shards", "variant"])
def test_saving_again_records_again(folder: Path, tmp_path: Path, options: dict[str, str]) -> None:
    model = load(folder / "transformer", torch_dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "again", **options)
    files = sorted((tmp_path / "again").glob("*.safetensors"))
    assert (len(files) > 1) == ("max_shard_size" in options)
    assert verify(files) == len(model.state_dict())
    variant = {"variant": "fp16"} if "variant" in options else {}
    twice = load(tmp_path / "again", torch_dtype=torch.bfloat16, **variant)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in twice.state_dict().items())
    name, (begin, _) = list(entries(files[-1]).items())[-1]
    flip(files[-1], begin)
    with pytest.raises(ValueError, match=f"^{name}: sha256 is"):
        load(tmp_path / "again", **variant)
    if len(files) > 1:
        flip(files[-1], begin)
        save_file(load_file(files[0]), files[0], metadata={"format": "pt"})
        with pytest.raises(ValueError, match=f"{files[0].name} records no hashes, files beside it do"):
            load(tmp_path / "again")


def test_exported_shards_are_verified(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qvgen.checkpoint.packed._MAX_SHARD_SIZE", "20KB")
    export_pipeline(whole, load_transformer(whole), SCHEME, tmp_path / "out", torch.bfloat16)
    files = sorted((tmp_path / "out" / "transformer").glob("*.safetensors"))
    assert len(files) > 1 and verify(files) == sum(len(load_file(file)) for file in files)
    verify_folder(tmp_path / "out")


def test_metadata_are_written_in_one_order(tmp_path: Path) -> None:
    metadata: dict[str, str] = dict.fromkeys(("z", "format", "qvgen", "a"), 'a "quoted" \\ é')
    tensors = {"x": torch.arange(5), "y": torch.ones(3, 2, dtype=torch.bfloat16)}
    for number in range(8):
        save_tensors(tmp_path / str(number), tensors, metadata)
    assert len({(tmp_path / str(number)).read_bytes() for number in range(8)}) == 1
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in load_file(tmp_path / "0").items())


def test_the_command(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    found = CliRunner().invoke(app, ["verify", str(folder)])
    assert found.exit_code == 0 and "20 packed layers, " in found.output and "as they were written" in found.output
    monkeypatch.setenv("QVGEN_VERIFY", "0")
    assert "not compared: QVGEN_VERIFY=0" in CliRunner().invoke(app, ["verify", str(folder)]).output
    path = folder / "transformer" / WEIGHTS
    save_file(load_file(path), path, metadata={"format": "pt"})
    monkeypatch.delenv("QVGEN_VERIFY")
    assert "record no hashes" in CliRunner().invoke(app, ["verify", str(folder)]).output


def test_a_setting_changed_after_loading_is_recorded_as_it_is_saved(folder: Path, tmp_path: Path) -> None:
    model = copy.deepcopy(load(folder / "transformer"))
    model.register_to_config(eps=1e-5)
    model.save_pretrained(tmp_path / "again")
    assert load(tmp_path / "again").config.eps == 1e-5
