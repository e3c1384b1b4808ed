"""One rule for loading: local files, safetensors only; a transformer without the rest of its pipeline."""

import ast
import stat
from pathlib import Path

import pytest
import torch

import qvgen
from qvgen.checkpoint.pipeline import PipelineFolder, holding, load_parts, load_pipeline, load_transformer
from qvgen.models.family import IMAGES
from qvgen.models.registry import load_family
from qvgen.models.tiny import TINY_CLIP, TINY_PROMPT, tiny_pipeline
from qvgen.tensors import save_tensors

ROOT = Path(__file__).parents[3]
PACKAGES = ("qvgen", "stages", "comparison", "pipelines", "bench")
FACES = ("qvgen", "qvgen.models", "qvgen.checkpoint", "qvgen.sampling")


@pytest.mark.parametrize("family", ["wan", "cogvideox"])
def test_a_transformer_needs_no_other_component(tmp_path: Path, family: str) -> None:
    folder = tiny_pipeline(family, tmp_path / "model")
    whole, alone = load_pipeline(folder).transformer.state_dict(), load_transformer(folder)
    assert not alone.training and alone.state_dict().keys() == whole.keys()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in alone.state_dict().items())
    for other in ("text_encoder", "vae", "tokenizer"):
        for path in (folder / other).iterdir():
            path.unlink()
    assert load_transformer(folder, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize(("family", "options"), [("wan", {}), ("cogvideox", {"temporal_patch": True}), ("flux", {})])
@torch.no_grad()
def test_a_pipeline_with_some_of_its_models_encodes_as_the_whole_one(tmp_path: Path, family: str, options: dict) -> None:
    """As stage prepare loads them, one after the other: the files of the others are not even there."""
    folder = tiny_pipeline(family, tmp_path / "model", **options)
    adapter, whole = load_family(folder), load_pipeline(folder, device="cpu")
    frames = 1 if adapter.task == IMAGES else TINY_CLIP.frames
    clips = torch.rand(1, 3, frames, TINY_CLIP.height, TINY_CLIP.width) * 2 - 1
    wanted = adapter.encode_text(whole, [TINY_PROMPT], 8), adapter.encode_clips(whole, clips)
    for path in (folder / "transformer").glob("*.safetensors"):
        path.unlink()
    for part, others in (("text_encoder", "vae"), ("vae", "text_encoder")):
        pipeline = load_parts(folder, (part,), "cpu")
        assert getattr(pipeline, others) is None and pipeline.transformer.device.type == "meta"
        assert (getattr(pipeline, "text_encoder_2", None) is None) == (family != "flux" or part == "vae")
        if part == "vae":
            assert torch.equal(adapter.encode_clips(pipeline, clips), wanted[1])
        else:
            assert torch.equal(adapter.encode_text(pipeline, [TINY_PROMPT], 8), wanted[0])


def test_a_pickle_is_never_read(tmp_path: Path) -> None:
    folder = tiny_pipeline("wan", tmp_path / "model")
    (path,) = (folder / "transformer").glob("*.safetensors")
    path.rename(path.with_suffix(".bin"))
    with pytest.raises(OSError, match="safetensors"):
        load_transformer(folder)


def test_every_from_pretrained_reads_local_safetensors() -> None:
    calls = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "from_pretrained":
                    given = {word.arg: getattr(word.value, "value", None) for word in node.keywords}
                    calls[f"{path.relative_to(ROOT)}:{node.lineno}"] = given
    assert any(place.startswith("qvgen/checkpoint/pipeline.py") for place in calls), "no call was found: nothing was checked"
    careless = [
        place for place, given in calls.items() if not (given.get("use_safetensors") and given.get("local_files_only"))
    ]
    assert careless == []


def test_no_file_is_written_past_the_umask() -> None:
    """safetensors' own save_file makes files that only their owner can read; one helper writes tensors."""
    importers = [
        str(path.relative_to(ROOT))
        for package in ("qvgen", "stages", "comparison", "pipelines")
        for path in (ROOT / package).rglob("*.py")
        if any(
            isinstance(node, ast.ImportFrom) and any(alias.name == "save_file" for alias in node.names)
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        )
    ]
    assert importers == []


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_tensors_have_the_mode_of_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    import os

    before = os.umask(umask)
    try:
        save_tensors(tmp_path / "a.safetensors", {"x": torch.arange(6).view(2, 3).T}, {"step": "1"})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == mode
    from safetensors.torch import load_file

    assert torch.equal(load_file(tmp_path / "a.safetensors")["x"], torch.arange(6).view(2, 3).T)


@pytest.mark.parametrize("name", FACES)
def test_faces(name: str) -> None:
    import importlib

    package = importlib.import_module(name)
    for exported in package.__all__:
        assert getattr(package, exported).__doc__, f"{name}.{exported} does not say what it is"
    with pytest.raises(AttributeError, match="nowhere"):
        package.nowhere  # noqa: B018


def test_import_qvgen_is_light() -> None:
    import subprocess
    import sys

    code = "import sys, qvgen, qvgen.models, qvgen.checkpoint, qvgen.sampling; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    assert qvgen.load_transformer is load_transformer


@pytest.mark.parametrize("tiling", [False, True])
def test_the_vae_works_in_tiles_where_that_is_asked_for(tmp_path: Path, tiling: bool) -> None:
    folder = tiny_pipeline("wan", tmp_path / "model")
    with holding(PipelineFolder(folder, torch.device("cpu"), tiling=tiling), "vae") as pipeline:
        assert pipeline.vae.use_tiling == tiling
