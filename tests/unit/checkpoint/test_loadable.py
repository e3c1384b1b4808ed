"""Fetch accepts what every later stage can load, and refuses the rest before it copies anything, saying which."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qvgen.checkpoint.loadable import check_loadable
from qvgen.checkpoint.pipeline import load_transformer
from qvgen.models.source import SourceError, check_expert, check_links, read_pipeline
from qvgen.models.tiny import tiny_pipeline

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module", params=["wan", "wan_image", "cogvideox"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline(request.param, tmp_path_factory.mktemp("source") / "model")


@pytest.fixture
def model(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "model"))


def edit(path: Path, **entries: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def refusal(folder: Path) -> str:
    with pytest.raises(SourceError) as caught:
        check_loadable(read_pipeline(folder))
    return str(caught.value)


def test_whole_pipelines_are_accepted(model: Path) -> None:
    check_loadable(read_pipeline(model))
    check_loadable(read_pipeline(ROOT / "assets/tiny-wan"))


def test_shards_are_accepted(model: Path) -> None:
    transformer = load_transformer(model)
    shutil.rmtree(model / "transformer")
    transformer.save_pretrained(model / "transformer", max_shard_size="20KB")
    assert len(list((model / "transformer").glob("*.safetensors"))) > 1
    check_loadable(read_pipeline(model))


@pytest.mark.parametrize("component", ["transformer", "vae", "text_encoder"])
def test_a_variant_alone_is_refused(model: Path, component: str) -> None:
    (path,) = (model / component).glob("*.safetensors")
    path.rename(path.with_suffix(".fp16.safetensors"))
    message = refusal(model)
    assert str(model / component) in message and "only the variant fp16" in message and "save_pretrained" in message


@pytest.mark.parametrize(("method", "says"), [("bitsandbytes", "by bitsandbytes"), ("qvgen", "by this project")])
def test_a_quantized_component_is_refused(model: Path, method: str, says: str) -> None:
    edit(model / "transformer" / "config.json", quantization_config={"quant_method": method})
    assert f"already quantized {says}" in refusal(model)


def test_a_git_lfs_pointer_is_refused(model: Path) -> None:
    (path,) = (model / "vae").glob("*.safetensors")
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    message = refusal(model)
    assert str(path) in message and "git-lfs pointer" in message and "git lfs pull" in message


@pytest.mark.parametrize(
    "name",
    [
        "WanVideoToVideoPipeline",
        "WanAnimatePipeline",
        "CogVideoXImageToVideoPipeline",
        "FluxFillPipeline",
        "FluxKontextPipeline",
        "HunyuanVideoImageToVideoPipeline",
    ],
)
def test_pipelines_that_need_more_than_text_are_refused(model: Path, name: str) -> None:
    edit(model / "model_index.json", _class_name=name)
    message = refusal(model)
    assert f"{name!r} is not supported" in message and "more than text" in message


def test_of_two_experts_one_is_named(tmp_path: Path) -> None:
    folder = tiny_pipeline("wan", tmp_path / "model", experts=True)
    pipeline = read_pipeline(folder)
    assert check_expert("transformer_2", pipeline) == "transformer_2"
    with pytest.raises(SourceError, match=r"two transformers.* set fetch.expert to transformer or transformer_2"):
        check_expert(None, pipeline)
    one = read_pipeline(tiny_pipeline("wan", tmp_path / "one"))
    with pytest.raises(SourceError, match=r"fetch.expert = 'transformer', but .* has one transformer: set it to null"):
        check_expert("transformer", one)
    assert check_expert(None, one) is None


def test_other_components_are_refused_and_missing_ones_named(model: Path) -> None:
    edit(model / "model_index.json", safety_checker=["transformers", "CLIPVisionModel"])
    assert "component safety_checker, which the stages would ignore" in refusal(model)
    edit(model / "model_index.json", safety_checker=[None, None], vae=[None, None])
    assert "names no vae" in refusal(model)


def test_a_text_family_has_no_image_encoder(tmp_path: Path) -> None:
    folder = tiny_pipeline("wan", tmp_path / "model")
    edit(folder / "model_index.json", image_encoder=["transformers", "CLIPVisionModel"])
    assert "component image_encoder, which the stages would ignore" in refusal(folder)


@pytest.mark.parametrize(
    ("family", "component", "prefix"), [("wan_image", "image_encoder", "vision_model"), ("flux", "text_encoder", "text_model")]
)
def test_an_encoder_as_older_releases_saved_it(tmp_path: Path, family: str, component: str, prefix: str) -> None:
    """The published ones of CLIP have a prefix before every name."""
    from safetensors.torch import load_file, save_file

    from qvgen.checkpoint.pipeline import load_component

    folder = tiny_pipeline(family, tmp_path / "model")
    path = folder / component / "model.safetensors"
    tensors = load_file(path)
    save_file({f"{prefix}.{name}": tensor for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    check_loadable(read_pipeline(folder))
    state = load_component(folder, component).state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in tensors.items())


def test_a_transformer_for_images_is_refused(model: Path) -> None:
    config = model / "transformer" / "config.json"
    edit(config, in_channels=8)
    said = refusal(model)
    assert "conditioned on images (8 input channels for 4)" in said or "8 input channels for 4; a first frame takes 12" in said


def cut_tensor(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    (path,) = (folder / "transformer").glob("*.safetensors")
    tensors = load_file(path)
    tensors.pop("proj_out.weight")
    save_file(tensors, path)


def other_shape(folder: Path) -> None:
    edit(folder / "transformer" / "config.json", num_attention_heads=3)


def no_vocabulary(folder: Path) -> None:
    (folder / "tokenizer" / "tokenizer.json").unlink()


def no_such_class(folder: Path) -> None:
    edit(folder / "model_index.json", vae=["diffusers", "AutoencoderKLNowhere"])


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (cut_tensor, "lacks 1 tensors of a"),
        (other_shape, "has shape"),
        (no_vocabulary, "tokenizer cannot be loaded ("),
        (no_such_class, "does not describe a AutoencoderKLNowhere"),
    ],
)
def test_a_component_that_cannot_be_loaded_is_refused(model: Path, damage: Callable[[Path], None], says: str) -> None:
    damage(model)
    assert says in refusal(model)


@pytest.mark.parametrize(
    "entries",
    [
        {"num_layers": 2**31},
        {"patch_size": [2**31, 2, 2]},
        {"num_attention_heads": 2**33},
        {"num_layers": ""},
        {"attention_head_dim": None},
        {"in_channels": [4]},
        {"num_layers": -1},
        {"num_layers": 1},
    ],
    ids=str,
)
def test_values_that_the_weights_cannot_have_are_refused_at_once(model: Path, entries: dict[str, Any]) -> None:
    edit(model / "transformer" / "config.json", **entries)
    message = refusal(model)
    assert "transformer" in message


def test_a_link_out_of_the_folder_is_refused(model: Path, tmp_path: Path) -> None:
    check_links(read_pipeline(model))
    secret = tmp_path / "secret.txt"
    secret.write_text("private")
    (model / "tokenizer" / "notes.txt").symlink_to(secret)
    with pytest.raises(SourceError, match=r"notes\.txt is a link to .*secret\.txt, outside the model"):
        check_links(read_pipeline(model))


def test_the_hub_cache_is_made_of_links_and_accepted(model: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    snapshot, blobs = repository / "snapshots" / ("0" * 40), repository / "blobs"
    shutil.copytree(model, snapshot)
    blobs.mkdir()
    files = [path for path in snapshot.rglob("*") if path.is_file()]
    for number, path in enumerate(files):
        path.rename(blobs / str(number))
        path.symlink_to(blobs / str(number))
    check_links(read_pipeline(snapshot))
    check_loadable(read_pipeline(snapshot))
    linked = snapshot / "README.md"
    linked.symlink_to(tmp_path / "models--org--other" / "blobs" / "0")
    linked.resolve().parent.mkdir(parents=True)
    linked.resolve().write_text("of another repository")
    with pytest.raises(SourceError, match=r"README\.md is a link"):
        check_links(read_pipeline(snapshot))


def test_nothing_is_allocated(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qvgen.checkpoint import loadable

    made: list[torch.nn.Module] = []
    empty = loadable.empty_model
    monkeypatch.setattr(loadable, "empty_model", lambda *arguments: made.append(empty(*arguments)) or made[-1])
    check_loadable(read_pipeline(source))
    assert len(made) in (3, 4) and all(tensor.is_meta for model in made for tensor in model.parameters())
