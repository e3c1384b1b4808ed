"""The recorder keeps timestep groups apart, and refuses bad data."""

import pytest
import torch
from torch import nn

from qvgen.training.recorder import InputRecorder


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def test_recorder_keeps_groups_apart_and_bounded() -> None:
    model, recorder = _Model(), InputRecorder(groups=3, rows=20)
    x = torch.stack([torch.full((50, 4), float(i)) for i in range(3)])
    with recorder.attached({"layer": model.layer}):
        for _ in range(4):
            recorder.group = torch.tensor([0, 1, 1])
            model(x)
    assert recorder.inputs("layer", 0).shape == (20, 4) and (recorder.inputs("layer", 0) == 0).all()
    assert set(recorder.inputs("layer", 1).unique().tolist()) <= {1.0, 2.0}
    with pytest.raises(ValueError, match="no calibration input of timestep group 2"):
        recorder.inputs("layer", 2)
    before = recorder.inputs("layer", 0)
    model(x)  # detached: nothing more is recorded
    assert torch.equal(recorder.inputs("layer", 0), before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_in_calibration_data_names_the_layer(bad: float) -> None:
    model, recorder = _Model(), InputRecorder(groups=1, rows=4)
    recorder.group = torch.tensor([0])
    x = torch.zeros(1, 2, 4)
    x[0, 1, 2] = bad
    with recorder.attached({"blocks.0.layer": model.layer}), pytest.raises(ValueError, match=r"blocks\.0\.layer"):
        model(x)


def test_fewer_clips_than_timestep_groups_are_taken_at_several_timesteps() -> None:
    from qvgen.training.calibration import record_inputs
    from tests.integration.test_training import settings, subject

    model, family, data = subject("wan")
    few = type(data)(data.latents[:2], data.caption_index[:2], data.captions, data.embeddings)
    params = settings()
    assert params.scheme.timestep_groups > len(few)
    clips: list[int] = []
    inputs = record_inputs(model, family, few, params, clips.append)
    assert sum(clips) == params.scheme.timestep_groups
    assert all(len(rows) > 0 for groups in inputs.values() for rows in groups)
    every = {tuple(groups[g][0, :3].tolist()) for groups in list(inputs.values())[:1] for g in range(len(groups))}
    assert len(every) == params.scheme.timestep_groups, "each group has rows of its own"
