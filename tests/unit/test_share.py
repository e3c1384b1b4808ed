"""Which pieces of work are this process's: from the variables of torchrun."""

import pytest

from qvgen import share
from qvgen.share import ALONE, Share


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, ALONE),
        ({"RANK": "", "WORLD_SIZE": ""}, ALONE),
        ({"WORLD_SIZE": "3"}, Share(0, 3)),
        ({"RANK": "2", "WORLD_SIZE": "3"}, Share(2, 3)),
        ({"RANK": "1"}, r"RANK=1 must be below WORLD_SIZE=1, the number of processes"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, r"RANK=0 must be below WORLD_SIZE=0"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, r"RANK=-1 is no number"),
        ({"WORLD_SIZE": "two"}, r"WORLD_SIZE=two is no number: it counts processes"),
    ],
)
def test_the_environment_says_which(variables: dict[str, str], expected: Share | str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if isinstance(expected, Share):
        assert Share.from_environment() == expected
        return
    with pytest.raises(ValueError, match=expected):
        Share.from_environment()


def test_every_piece_has_one_owner_and_who_is_late_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shares = [Share(rank, 3) for rank in range(3)]
    assert all(sum(one.has(piece) for one in shares) == 1 for piece in range(20)) and ALONE.has(7)
    monkeypatch.setattr(share, "POLL_SECONDS", 0.0)
    monkeypatch.setattr(share, "PATIENCE_SECONDS", 0.0)
    left = iter([[1, 4, 5], [4], []])
    shares[0].wait("model/latents", lambda: next(left))
    first, second = capsys.readouterr().err.splitlines()
    assert "3 pieces of model/latents, which processes with RANK=1, RANK=2 and WORLD_SIZE=3 make" in first
    assert "1 pieces of model/latents, which processes with RANK=1 and" in second
