from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qvgen.phi.rank_decay import ANNEALINGS, RankDecaySchedule, RankState

ROUNDING = 1e-12


@given(
    initial_rank=st.integers(0, 64),
    decay_ratio=st.floats(0.05, 1),
    annealing=st.sampled_from(sorted(ANNEALINGS)),
    hold_steps=st.integers(0, 5),
    phase_steps=st.integers(1, 5),
    final_steps=st.integers(0, 5),
)
def test_every_run_decays_to_nothing(**settings: Any) -> None:
    schedule = RankDecaySchedule(**settings)
    states = [schedule.at(step) for step in range(schedule.total_steps)]
    ranks = [state.rank for state in states]
    assert ranks == sorted(ranks, reverse=True)
    assert all(len(state.gamma) == state.rank and state.decaying <= state.rank for state in states)
    assert all(0 <= g <= 1 for state in states for g in state.gamma)
    assert all(state == RankState(0, 0, 0.0) for state in states[schedule.decay_end :])
    assert states == [RankDecaySchedule(**settings).at(step) for step in range(len(states))]  # no hidden state
    if settings["initial_rank"]:
        assert ranks[: schedule.hold_steps] == [settings["initial_rank"]] * schedule.hold_steps
        assert len(states) == schedule.decay_end + schedule.final_steps


def test_the_paper_schedule_halves() -> None:
    schedule = RankDecaySchedule(initial_rank=32, hold_steps=10, phase_steps=4, final_steps=3)
    assert schedule.phase_ranks == (32, 16, 8, 4, 2, 1)
    assert (schedule.decay_end, schedule.total_steps) == (10 + 6 * 4, 10 + 6 * 4 + 3)
    assert [schedule.at(10 + 4 * phase).rank for phase in range(7)] == [32, 16, 8, 4, 2, 1, 0]
    assert schedule.at(9) == RankState(32, 0, 1.0)
    assert (schedule.at(10).decaying, schedule.at(14).decaying) == (16, 8)
    assert 0.5 < schedule.at(10).u < 1
    assert schedule.at(13) == RankState(32, 16, pytest.approx(0, abs=ROUNDING))  # all gone before it is cut


def test_gamma_scales_the_last_directions() -> None:
    state = RankDecaySchedule(initial_rank=4, annealing="linear", phase_steps=4).at(0)
    assert state.gamma == [1.0, 1.0, 0.75, 0.75]


def test_the_last_phase_decays_all_of_phi() -> None:
    schedule = RankDecaySchedule(initial_rank=2, annealing="linear", phase_steps=2)
    assert schedule.at(2) == RankState(1, 1, 0.5)
    assert schedule.at(3) == RankState(1, 1, 0.0)
    assert schedule.at(4) == RankState(0, 0, 0.0)


def test_ratio_one_removes_everything_in_one_phase() -> None:
    schedule = RankDecaySchedule(initial_rank=5, decay_ratio=1.0, phase_steps=2)
    assert schedule.phase_ranks == (5,)
    assert schedule.at(1).decaying == 5


@pytest.mark.parametrize("name", ["cosine", "linear", "exponential", "logarithmic", "square"])
def test_annealings_fall_from_one_to_zero(name: str) -> None:
    u = [ANNEALINGS[name](step / 100) for step in range(101)]
    assert u[0] == pytest.approx(1, abs=ROUNDING)
    assert u[-1] == pytest.approx(0, abs=ROUNDING)
    assert all(later < earlier for earlier, later in pairwise(u))


def test_annealings_have_the_shape_of_their_name() -> None:
    middle = {name: u(0.5) for name, u in ANNEALINGS.items()}
    assert middle["linear"] == middle["cosine"] == pytest.approx(0.5)
    assert middle["exponential"] < 0.1 < middle["logarithmic"] < 0.5 < middle["square"] == pytest.approx(0.75)


def test_without_phi_only_the_steps_remain() -> None:
    schedule = RankDecaySchedule(initial_rank=0, hold_steps=3, final_steps=2)
    assert (schedule.phase_ranks, schedule.decay_end, schedule.total_steps) == ((), 3, 5)
    assert schedule.at(0) == RankState(0, 0, 0.0)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"initial_rank": -1}, "must be >= 0"),
        ({"initial_rank": 4, "hold_steps": -1}, "must be >= 0"),
        ({"initial_rank": 4, "final_steps": -1}, "must be >= 0"),
        ({"initial_rank": 4, "phase_steps": 0}, "phase_steps >= 1"),
        ({"initial_rank": 4, "decay_ratio": 0.0}, r"decay_ratio must be in \(0, 1\], got 0.0"),
        ({"initial_rank": 4, "decay_ratio": 1.5}, "got 1.5"),
        ({"initial_rank": 4, "decay_ratio": float("nan")}, "got nan"),
        ({"initial_rank": 4, "annealing": "sudden"}, "'sudden' is unknown; choose one of cosine, linear"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        RankDecaySchedule(**settings)


def test_a_negative_step_is_refused() -> None:
    with pytest.raises(ValueError, match="step must be >= 0, got -1"):
        RankDecaySchedule(initial_rank=4).at(-1)
