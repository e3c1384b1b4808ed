"""A checkpoint that finds no room costs nothing but itself."""

import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from safetensors import SafetensorError

from stages.runtime.run import Stage, is_disk_full


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    facts: Any = SimpleNamespace(key="qat-0")
    return Stage("qat", cast(Any, None), tmp_path, tmp_path, facts, cast(Any, None))


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: No space left on device (os error 28)")],
)
def test_it_is_said_and_the_next_one_is_tried(stage: Stage, error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    done = []
    for full in (True, False):
        with stage.resumable():
            if full:
                raise error
            done.append(True)
    assert done == [True]
    assert capsys.readouterr().err.count("no room for a checkpoint") == 1


def test_any_other_error_stops_the_stage(stage: Stage) -> None:
    with pytest.raises(PermissionError), stage.resumable():
        raise PermissionError("not yours")


def test_a_lack_of_space_is_seen_through_what_a_library_makes_of_it() -> None:
    try:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as cause:
            raise RuntimeError("no possible cache link types") from cause
    except RuntimeError as error:
        assert is_disk_full(error)
    assert not is_disk_full(ValueError("anything else"))
