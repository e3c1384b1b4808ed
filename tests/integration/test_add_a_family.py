"""docs/add-a-family.md, followed: a third family goes from its two-layer model to a packed one that samples."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import diffusers
import pytest
import torch

from qvgen.checkpoint.packed import export_pipeline, verify_folder
from qvgen.checkpoint.pipeline import load_pipeline, load_transformer
from qvgen.models import registry
from qvgen.models.family import SamplingSettings
from qvgen.models.source import read_pipeline
from qvgen.models.tiny import TINY_CLIP, TINY_PROMPT, tiny_pipeline
from qvgen.models.wan import WanFamily
from qvgen.nn.swap import convert_, prepare_
from qvgen.quant.scheme import QuantScheme
from qvgen.sampling.sample import sample
from qvgen.sampling.settings import read_settings

LOADED_TOLERANCE = 1e-5  # a loaded model differs by a few roundings


class ToyPipeline(diffusers.WanPipeline):
    """A pipeline class of its own, as a new family brings one."""


class ToyFamily(WanFamily):
    """Another pipeline and other targets; equations and layout as Wan's."""

    name: ClassVar[str] = "toy"
    pipelines: ClassVar[tuple[str, ...]] = ("ToyPipeline",)
    default_targets: ClassVar[tuple[str, ...]] = (r"re:blocks\..*\.ffn\..*",)
    sampling: ClassVar[SamplingSettings] = SamplingSettings(9, 32, 32, 8, 2, 3.0, fps=8)

    @staticmethod
    def tiny_pipeline(seed: int = 0, **options: bool) -> ToyPipeline:
        return ToyPipeline(**WanFamily.tiny_pipeline(seed, **options).components)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    monkeypatch.setattr(registry, "_FAMILIES", dict(registry._FAMILIES))
    monkeypatch.setattr(diffusers, "ToyPipeline", ToyPipeline, raising=False)
    registry.register(ToyFamily)
    yield tiny_pipeline("toy", tmp_path / "model")


def test_a_third_family_goes_through(toy: Path, tmp_path: Path) -> None:
    assert read_pipeline(toy).pipeline_class == "ToyPipeline"
    family, student = registry.load_family(toy), load_transformer(toy)
    assert isinstance(family, ToyFamily)
    scheme = QuantScheme()
    names = prepare_(student, scheme, default_targets=family.default_targets)
    assert names and all(".ffn." in name for name in names)

    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(1, 4, 3, 4, 4, generator=generator) for _ in range(2))
    text, timestep = torch.randn(1, 8, 16, generator=generator), family.sample_timesteps(1, generator)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        predicted = family.predict(student, family.add_noise(clean, noise, timestep), timestep, text)
        loss = (predicted - family.target(clean, noise, timestep)).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]

    convert_(student)
    with torch.no_grad():
        before = family.predict(student, noise, timestep, text)
    packed = tmp_path / "packed"
    export_pipeline(toy, student, scheme, packed, torch.float32)
    assert verify_folder(packed) == len(names)
    loaded, pipeline = registry.load_family(packed), load_pipeline(packed)
    assert type(pipeline) is ToyPipeline and loaded.name == "toy"
    with torch.no_grad():
        after = loaded.predict(pipeline.transformer, noise, timestep, text)
    assert torch.allclose(before, after, atol=LOADED_TOLERANCE)

    settings = read_settings(packed)
    assert settings.size == TINY_CLIP
    arguments = {"inference_steps": settings.inference_steps, "guidance_scale": settings.guidance_scale, "batch_size": 1}
    _latents, clips = sample(pipeline, loaded, [TINY_PROMPT], [0], settings.size, **arguments)
    assert clips.shape == (1, 3, 9, 32, 32) and clips.isfinite().all()


def test_a_pipeline_class_has_one_family(toy: Path) -> None:
    class Rival(WanFamily):
        name: ClassVar[str] = "rival"

    registry.register(ToyFamily)  # again: no change
    with pytest.raises(ValueError, match="WanPipeline already belongs to family 'wan', not to 'rival'"):
        registry.register(Rival)


def test_without_it_the_pipeline_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "ToyPipeline"}))
    with pytest.raises(ValueError, match="'ToyPipeline' is not supported; supported: WanPipeline, WanImageToVideoPipeline"):
        read_pipeline(tmp_path)
