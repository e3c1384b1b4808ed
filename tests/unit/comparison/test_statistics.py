import math

import pytest

from comparison.report.statistics import PairedDifference, Summary, paired_difference, summarize


def test_mean_and_sample_standard_deviation() -> None:
    summary = summarize([2.0, 4.0, 9.0])
    assert summary.mean == 5.0 and summary.count == 3
    assert summary.sd == pytest.approx(math.sqrt(13))  # (9 + 1 + 16) / 2


def test_one_seed_has_no_standard_deviation() -> None:
    assert summarize([3.5]) == Summary(3.5, None, 1)


def test_a_diverged_run_is_not_averaged_away() -> None:
    summary = summarize([1.0, math.inf, 2.0])
    assert math.isnan(summary.mean) and summary.sd is not None and math.isnan(summary.sd) and summary.count == 3
    assert summarize([math.nan]).sd is None


def test_nothing_to_summarize_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        summarize([])


def test_differences_are_paired_by_seed() -> None:
    """Seeds in another order, and one that only one side has: differences are 0.1, -0.3, -0.1."""
    candidate, baseline = {2: 0.9, 0: 1.1, 1: 1.7}, {0: 1.0, 1: 2.0, 2: 1.0, 7: 5.0}
    difference = paired_difference(candidate, baseline, lower_is_better=True)
    assert difference is not None
    assert difference.mean == pytest.approx(-0.1)
    assert difference.sd == pytest.approx(0.2)  # deviations 0.2, -0.2, 0: sqrt(0.08 / 2)
    assert difference.ratio == pytest.approx(0.5)
    assert (difference.won, difference.count) == (2, 3)
    higher = paired_difference(candidate, baseline, lower_is_better=False)
    assert higher is not None and higher.won == 1


def test_equal_values_win_nothing() -> None:
    assert paired_difference({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0}, lower_is_better=True) == PairedDifference(0, 0, None, 0, 2)


def test_a_constant_difference_is_infinitely_sure() -> None:
    difference = paired_difference({0: 1.5, 1: 2.5}, {0: 1.0, 1: 2.0}, lower_is_better=True)
    assert difference == PairedDifference(0.5, 0, math.inf, 0, 2)


def test_one_shared_seed_is_shown_as_one() -> None:
    assert paired_difference({3: 1.0}, {3: 2.0}, lower_is_better=True) == PairedDifference(-1.0, None, None, 1, 1)


def test_no_shared_seed_no_difference() -> None:
    assert paired_difference({0: 1.0}, {1: 1.0}, lower_is_better=True) is None
