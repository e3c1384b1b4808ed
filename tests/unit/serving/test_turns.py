"""Limits of a served model, and turns of its requests."""

import threading

import pytest

from qvgen.serving.engine import BusyError, Turns
from qvgen.serving.limits import LimitError, Limits

OWN = {"inference_steps": 20, "frames": 9, "height": 32, "width": 32}


def test_limits_follow_the_models_own_settings() -> None:
    limits = Limits.of(OWN)
    assert (limits.steps, limits.pixels) == (100, 9 * 32 * 32)
    limits.check(steps=100, frames=9, height=32, width=32, prompts=("a", ""))
    assert Limits.of(OWN | {"inference_steps": 500}).steps == 1000
    for asked, named in (
        ({"steps": 101}, "limit steps = 100: 101"),
        ({"frames": 13}, "limit pixels = 9216: .* = 13312"),
        ({"prompts": ("a", "b" * 2001)}, "limit characters = 2000"),
    ):
        with pytest.raises(LimitError, match=named):
            limits.check(**{"steps": 20, "frames": 9, "height": 32, "width": 32, "prompts": ("a",), **asked})


def test_one_at_a_time_and_so_many_wait() -> None:
    turns, inside, order = Turns(waiting=1), threading.Event(), []
    go_on = threading.Event()

    def first() -> None:
        with turns.take():
            inside.set()
            assert go_on.wait(30)
            order.append("first")

    def second() -> None:
        with turns.take():
            order.append("second")

    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    threads[0].start()
    assert inside.wait(30)
    threads[1].start()
    while turns.queue < 2:
        pass
    with pytest.raises(BusyError, match="limit waiting = 1"), turns.take():
        pass
    go_on.set()
    for thread in threads:
        thread.join()
    assert order == ["first", "second"] and turns.queue == 0
    with turns.take():
        assert turns.queue == 1
