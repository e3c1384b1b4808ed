"""The parts of bench.gpu, each a command, and how they are run: one after the other, within a time that they share."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
TESTS = (
    "tests/kernels/triton",
    "tests/integration/test_diffusers_features.py",
    "tests/integration/test_loading_memory.py",
)
_LEAST_S = 1.0
_LINES = 60  # of a failed part's output
_MEMORY = "OutOfMemoryError"


class Part(NamedTuple):
    """`command` are arguments of Python; with `json` it is given a file to write. `share` is of the time, relative."""

    name: str
    share: float
    command: tuple[str, ...]
    json: bool = True


class Result(NamedTuple):
    part: str
    status: str  # "ok", or why not
    seconds: float
    content: dict[str, Any] | None


def _step(model: str, frames: int) -> Part:
    """Those with 81 frames, of which targets are stated, have the larger share."""
    share = 65 if frames == 81 else 38
    some = ("--layers", "12") if model == "wan2.1-14b" else ()  # all 40 take most of the time to make and to pack
    options = ("--device", "cuda", "--model", model, "--frames", str(frames), "--seconds", str(share / 4), *some)
    return Part(f"step-{model}-{frames}", share, ("-m", "bench.dit_step", *options))


_LAYERS = "1536x1536,1536x8960,8960x1536,5120x5120,5120x13824,13824x5120"
_LINEAR = ("-m", "bench.linear", "--device", "cuda", "--m", "1,64,32760", "--shapes", _LAYERS, "--repetitions", "5")
PARTS = (
    Part("tests", 70, ("-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS), json=False),
    Part("linear", 90, _LINEAR),
    Part("embedded", 20, ("-m", "bench.gpu.embedded", "--device", "cuda")),
    *[_step(model, frames) for frames in (81, 49) for model in ("wan2.1-1.3b", "wan2.1-14b", "cogvideox-2b")],
    Part("qat-step", 40, ("-m", "bench.gpu.qat_step", "--device", "cuda", "--seconds", "15")),
)
_TINY = ("--device", "cpu", "--frames", "1", "--layers", "1", "--seconds", "0.1", "--model")
SMALLEST = (
    Part("linear", 1, ("-m", "bench.linear", "--threads", "1", "--m", "8", "--shapes", "64x64", "--repetitions", "2")),
    Part("embedded", 1, ("-m", "bench.gpu.embedded", "--device", "cpu")),
    Part("step-tiny-1", 1, ("-m", "bench.dit_step", "--eager", *_TINY, "tiny")),
    Part("qat-step", 1, ("-m", "bench.gpu.qat_step", *_TINY, "tiny")),
)


def run_all(parts: Sequence[Part], seconds: float, folder: Path, say: Callable[[str], object]) -> list[Result]:
    """Run parts in turn. Time that one leaves is there for those after it. `folder` is for files between processes."""
    end, results = time.monotonic() + seconds, []
    for i, part in enumerate(parts):
        left = end - time.monotonic()
        limit = left * part.share / sum(later.share for later in parts[i:])
        result = run(part, limit, folder)
        say(f"{part.name}: {result.status}, {result.seconds:.0f} s")
        results.append(result)
    return results


def run(part: Part, limit: float, folder: Path) -> Result:
    """Run a part for at most `limit` seconds; whatever happens in it is a result."""
    if limit < _LEAST_S:
        return Result(part.name, "not started: no time was left", 0.0, None)
    path = folder / f"{part.name}.json"
    command = [sys.executable, *part.command, *(("--json", str(path)) if part.json else ())]
    started = time.monotonic()
    log = folder / f"{part.name}.log"
    with log.open("wb") as output:
        # A group of its own: what the part started, such as compilers, ends with it.
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end_group(process)
    seconds = time.monotonic() - started
    text = log.read_text(errors="replace")
    if code is None:
        return Result(part.name, f"took more than its {limit:.0f} s and was ended", seconds, None)
    content = json.loads(path.read_text()) if path.is_file() else None
    if not part.json:
        content = {"summary": _last_line(text)}
    if code:  # the whole of what went wrong goes to the terminal, its last line to the table
        print("\n".join(text.splitlines()[-_LINES:]), file=sys.stderr, flush=True)
    return Result(part.name, "ok" if code == 0 else _failure(code, text), seconds, content)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _failure(code: int, text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if memory := [line for line in lines if _MEMORY in line]:
        return (
            f"out of memory: {memory[-1].partition(': ')[2]} Close what else uses the card, or run the part with fewer layers"
        )
    return f"failed with status {code}: {lines[-1] if lines else 'it said nothing'}"


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1].strip("= ") if lines else ""
