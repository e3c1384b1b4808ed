"""Clips of several sizes through every stage that reads them, on all families."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from qvgen.checkpoint.pipeline import load_pipeline
from qvgen.data.latents import LatentDataset
from qvgen.evaluation.quality.trial import Trial
from qvgen.models.registry import load_family
from qvgen.models.tiny import TINY_CLIP, tiny_pipeline
from qvgen.params import load_params
from qvgen.sampling.velocities import velocities
from qvgen.sampling.video import write_video
from tests.support.stages_in_process import TO_PACK, run_stages

ROOT = Path(__file__).parents[2]
SHAPES = ((32, 32), (32, 48), (48, 32))

pytestmark = [pytest.mark.slow, pytest.mark.integration]


@pytest.mark.parametrize(
    ("family", "options"), [("wan", {}), ("wan_image", {}), ("cogvideox", {}), ("cogvideox", {"rotary": True})]
)
def test_clips_of_several_sizes_are_trained_on_and_measured(
    family: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_pipeline(family, tmp_path / "model", **options)
    videos, generator = tmp_path / "videos", torch.Generator().manual_seed(0)
    videos.mkdir()
    for i in range(12):
        height, width = SHAPES[i % 3]
        noise = torch.rand(3, TINY_CLIP.frames, height // 8, width // 8, generator=generator) * 2 - 1
        write_video(videos / f"{i}.mp4", noise.repeat_interleave(8, -1).repeat_interleave(8, -2))
        (videos / f"{i}.txt").write_text(f"a red digit three moving up {i}")
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    clip = {k: getattr(TINY_CLIP, k) for k in ("frames", "height", "width", "max_sequence_length")}
    parts = {"train_clips": 5, "calibration_clips": 3, "held_out_clips": 4, "buckets": [list(shape) for shape in SHAPES]}
    params["fetch"]["source"] = "model"
    params["prepare"] |= {"source": "videos", "folder": "videos", "fps": 8, **clip, **parts}
    params["scheme"]["timestep_groups"] = 4  # one clip more than once, and not the same number of each size
    params["qat"] |= {"steps": 6, "batch_size": 2}
    params["decay"] |= {"initial_rank": 2, "phase_steps": 2, "final_steps": 2}
    params["evaluate"] |= {"prompts": 2, "inference_steps": 2, "velocity_timesteps": 2, "videos": 1}
    params["compute"]["processes"] = 1
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))

    run_stages(tmp_path, *TO_PACK, "baselines", "evaluate")
    held_out = LatentDataset.open(tmp_path / "artifacts/data/held_out")
    square = held_out.of_size(32, 32)
    assert 0 < len(square) < len(held_out)
    for part in ("train", "calibration"):
        assert len(LatentDataset.open(tmp_path / "artifacts/data" / part).size_index.unique()) > 1
    # Velocities are measured on the clips of all sizes, each of which counts alike.
    found = []
    for folder in (tmp_path / "artifacts/model", tmp_path / "artifacts/packed"):
        pipeline, adapter = load_pipeline(folder), load_family(folder)
        trial = Trial.from_params(load_params(tmp_path / "params.yaml"), held_out)
        options: dict[str, Any] = {"seed": trial.seed, "batch_size": trial.batch_size}
        of_sizes = [
            velocities(pipeline.transformer, adapter, c.latents, c.text, trial.timesteps, image=c.image, **options)
            for c in trial.held_out
        ]
        found.append([clip.flatten(1) for part in of_sizes for clip in part.unbind(1)])
    assert len(found[0]) == len(held_out) and len(trial.held_out) == len(held_out.size_index.unique()) > 1
    expected = sum(float((a - b).square().mean()) for a, b in zip(*found, strict=True)) / len(held_out)
    scored = json.loads((tmp_path / "metrics/evaluate.json").read_text())["packed"]
    assert scored["velocity_mse"] == pytest.approx(expected, rel=1e-5)
    steps = (tmp_path / "metrics/qat.csv").read_text().splitlines()
    assert len(steps) == 1 + 6
    for path in ("metrics/evaluate.json", "metrics/baselines.json"):
        scores = json.loads((tmp_path / path).read_text())
        for scored in (scores["packed"],) if "packed" in scores else scores.values():
            assert 0 < scored["velocity_mse"] < 1 and scored["psnr_db"] > 5, (path, scored)
