"""A model source is refused unless it is whole, safe to load and what its record says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub.utils import filter_repo_objects
from safetensors.numpy import save_file

from qvgen.models.files import SourceError, check_safetensors
from qvgen.models.hashes import check_hashes, hash_files, recorded_hashes
from qvgen.models.source import DOWNLOADED, read_pipeline, resolve_source

ROOT = Path(__file__).parents[3]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
INDEX = {
    "_class_name": "WanPipeline",
    "_diffusers_version": "0.42.0",
    "boundary_ratio": None,
    "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "tokenizer": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "transformer_2": [None, None],
    "vae": ["diffusers", "AutoencoderKLWan"],
}


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def make_pipeline(folder: Path) -> Path:
    write_json(folder / "model_index.json", INDEX)
    write_json(folder / "scheduler" / "scheduler_config.json", {})
    write_json(folder / "tokenizer" / "tokenizer_config.json", {})
    for component in ("text_encoder", "transformer", "vae"):
        write_json(folder / component / "config.json", {})
        weights = {"weight": np.arange(6, dtype=np.float32).reshape(2, 3), "bias": np.ones(2, dtype=np.float16)}
        save_file(weights, folder / component / "model.safetensors")
    (folder / "README.md").write_text("# Model card")
    (folder / "train").mkdir()
    (folder / "train" / "vae.py").write_text("raise SystemExit")
    return folder


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    return make_pipeline(tmp_path / "model")


def refusal(folder: Path) -> str:
    with pytest.raises(SourceError) as caught:
        read_pipeline(folder)
    return str(caught.value)


def test_a_pipeline_is_its_components_and_its_card(pipeline: Path) -> None:
    found = read_pipeline(pipeline)
    assert found.pipeline_class == "WanPipeline"
    assert found.components == ("scheduler", "text_encoder", "tokenizer", "transformer", "vae")
    assert found.files == (
        "README.md",
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/tokenizer_config.json",
        "transformer/config.json",
        "transformer/model.safetensors",
        "vae/config.json",
        "vae/model.safetensors",
    )


def test_both_families_are_accepted(pipeline: Path) -> None:
    write_json(pipeline / "model_index.json", INDEX | {"_class_name": "CogVideoXPipeline"})
    assert read_pipeline(pipeline).pipeline_class == "CogVideoXPipeline"


def test_another_pipeline_is_refused(pipeline: Path) -> None:
    write_json(pipeline / "model_index.json", INDEX | {"_class_name": "LuminaPipeline"})
    message = refusal(pipeline)
    assert (
        "'LuminaPipeline' is not supported; supported: WanPipeline, WanImageToVideoPipeline, WanVACEPipeline, Cog" in message
    )
    assert "round this one without training: `qvgen pack`" in message


def test_a_second_text_encoder_that_is_missing_is_named(pipeline: Path) -> None:
    write_json(pipeline / "model_index.json", INDEX | {"_class_name": "FluxPipeline"})
    assert "names no text_encoder_2 and no tokenizer_2: the pipeline is incomplete" in refusal(pipeline)


def test_a_folder_that_is_no_pipeline_is_refused(pipeline: Path) -> None:
    message = refusal(pipeline / "transformer")
    assert "model_index.json does not exist" in message
    assert "give the folder above transformer/" in message


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_damaged_index_is_refused(pipeline: Path, text: str) -> None:
    (pipeline / "model_index.json").write_text(text)
    assert "model_index.json" in refusal(pipeline)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt", ".pkl"])
def test_a_pickle_is_refused_by_name_even_beside_safetensors(pipeline: Path, suffix: str) -> None:
    (pipeline / "vae" / f"model{suffix}").write_bytes(b"cos\nsystem\n")
    message = refusal(pipeline)
    assert f"vae/model{suffix} is a pickle" in message
    assert "save_pretrained" in message


def test_code_that_comes_with_a_model_is_refused(pipeline: Path) -> None:
    write_json(pipeline / "model_index.json", INDEX | {"vae": ["my_vae", "MyVAE"]})
    assert "component vae is code of 'my_vae'" in refusal(pipeline)


def test_a_component_outside_the_folder_is_refused(pipeline: Path) -> None:
    write_json(pipeline / "model_index.json", INDEX | {"../other": ["diffusers", "AutoencoderKLWan"]})
    assert "'../other' is not a component name" in refusal(pipeline)


def test_missing_parts_are_named(pipeline: Path) -> None:
    (pipeline / "vae" / "model.safetensors").unlink()
    assert "the weights of vae are missing" in refusal(pipeline)
    (pipeline / "vae" / "config.json").unlink()
    assert "component vae is missing" in refusal(pipeline)


def test_a_missing_shard_is_named(pipeline: Path) -> None:
    shards = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    write_json(pipeline / "vae" / "diffusion_pytorch_model.safetensors.index.json", shards)
    assert "vae/model-2.safetensors is missing" in refusal(pipeline)


def test_a_truncated_file_is_refused_with_both_lengths(pipeline: Path) -> None:
    path = pipeline / "transformer" / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    message = refusal(pipeline)
    assert str(path) in message
    assert f"expected {len(whole)} bytes, found {len(whole) - 5}" in message


def test_every_cut_of_a_file_is_noticed(pipeline: Path) -> None:
    path = pipeline / "vae" / "model.safetensors"
    whole = path.read_bytes()
    check_safetensors(path)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(SourceError, match=r"model\.safetensors"):
            check_safetensors(path)


def test_a_file_with_extra_bytes_or_a_damaged_header_is_refused(pipeline: Path) -> None:
    path = pipeline / "vae" / "model.safetensors"
    whole = path.read_bytes()
    for damaged in (whole + b"x", whole[:8] + b"\0" + whole[9:], whole.replace(b"F32", b"F99"), b"\xff" * 200):
        path.write_bytes(damaged)
        with pytest.raises(SourceError, match=r"model\.safetensors"):
            check_safetensors(path)


def test_hashes_are_those_of_sha256sum(pipeline: Path) -> None:
    files = read_pipeline(pipeline).files
    read: list[int] = []
    found = hash_files(pipeline, files, read.append)
    listed = subprocess.run(["sha256sum", *files], cwd=pipeline, capture_output=True, text=True, check=True).stdout
    assert {name: record.sha256 for name, record in found.items()} == {
        name: sha for sha, name in (line.split() for line in listed.splitlines())
    }
    assert sum(read) == sum(record.bytes for record in found.values())


@pytest.mark.parametrize("form", ["sha256.json", "manifest.json"])
def test_a_tampered_model_is_refused_and_every_change_listed(pipeline: Path, form: str) -> None:
    hashes = {name: record.sha256 for name, record in hash_files(pipeline, read_pipeline(pipeline).files).items()}
    beside = {"train/vae.py": "not checked: it is not part of the pipeline"}
    record = hashes | beside if form == "sha256.json" else {"files": {n: {"sha256": s} for n, s in hashes.items()}}
    write_json(pipeline / form, record)
    recorded = recorded_hashes(pipeline)
    assert recorded is not None
    check_hashes(hash_files(pipeline, read_pipeline(pipeline).files), recorded, pipeline)

    weights = pipeline / "vae" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    write_json(pipeline / "vae" / "extra.json", {})
    (pipeline / "README.md").unlink()
    with pytest.raises(SourceError) as caught:
        check_hashes(hash_files(pipeline, read_pipeline(pipeline).files), recorded, pipeline)
    message = str(caught.value)
    assert f"vae/model.safetensors: expected sha256 {hashes['vae/model.safetensors']}, found" in message
    assert "vae/extra.json: was added" in message
    assert "README.md: is missing" in message
    assert "transformer" not in message


def test_a_folder_without_record_has_none(pipeline: Path) -> None:
    assert recorded_hashes(pipeline) is None


def test_a_folder_is_a_source(pipeline: Path) -> None:
    assert resolve_source("model", None, pipeline.parent) == pipeline
    assert resolve_source(str(pipeline), None) == pipeline
    with pytest.raises(SourceError, match="is a folder: set it to null"):
        resolve_source("model", COMMIT, pipeline.parent)


@pytest.mark.parametrize("revision", [None, "main", "v1.0", COMMIT[:8], COMMIT.upper()])
def test_a_hub_id_needs_a_commit(tmp_path: Path, revision: str | None) -> None:
    with pytest.raises(SourceError, match=r"needs fetch\.revision, the commit to use"):
        resolve_source("org/name", revision, tmp_path)


@pytest.mark.parametrize("source", ["nowhere", "a/b/c", "https://host/org/name", "org/na me"])
def test_what_is_neither_folder_nor_hub_id_is_refused(tmp_path: Path, source: str) -> None:
    with pytest.raises(SourceError, match="neither a folder nor a hub id"):
        resolve_source(source, COMMIT, tmp_path)


RESOLVE = "import sys; from qvgen.models.source import resolve_source; print(resolve_source(*sys.argv[1:]))"


def resolve_offline(cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, where the hub client is told before its import that there is no network."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache)}
    return subprocess.run(
        [sys.executable, "-c", RESOLVE, *arguments], cwd=cache, env=environment, capture_output=True, text=True
    )


def test_a_hub_commit_is_found_in_the_hub_cache(tmp_path: Path) -> None:
    snapshot = make_pipeline(tmp_path / "models--org--name" / "snapshots" / COMMIT)
    done = resolve_offline(tmp_path, "org/name", COMMIT)
    assert done.stdout.strip() == str(snapshot), done.stderr


def test_of_a_hub_repository_components_are_downloaded_and_no_weights_beside_them(pipeline: Path) -> None:
    files = [*read_pipeline(pipeline).files, "sha256.json", "tokenizer/spiece.model"]
    others = ["flux1-dev.safetensors", "dev_grid.jpg", "vae/model.bin"]
    assert [*filter_repo_objects(files + others, allow_patterns=DOWNLOADED)] == files


def test_a_hub_commit_that_cannot_be_had_is_an_error(tmp_path: Path) -> None:
    done = resolve_offline(tmp_path, "org/name", COMMIT)
    assert f"SourceError: org/name at {COMMIT[:8]} could not be downloaded" in done.stderr
