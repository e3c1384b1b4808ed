"""VBench over a folder of generated videos: the real package, in its own environment, one process per dimension.

It pins numpy < 2 and transformers 4.33, so it is never imported here. Before a dimension runs, its weight files and its
videos are checked; what lacks one is refused by name, and nothing downloads.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial as partial_call
from pathlib import Path
from typing import Any

from qvgen.evaluation.vbench.weights import VBENCH_VERSION, hub_cache, missing, vbench_cache
from qvgen.sampling.folder import SAMPLES, video_name

PYTHON_VARIABLE = "QVGEN_VBENCH_PYTHON"
_RUNNER = Path(__file__).with_name("runner.py")
_NAMED = 3  # missing videos that a message names


@dataclass(frozen=True)
class Outcome:
    """Of one dimension: exactly one of `score` (in [0, 1]), `refused` and `error`."""

    videos: int  # that are there
    expected: int
    score: float | None = None
    refused: str | None = None
    error: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class Package:
    """The package as another python has it."""

    python: Path
    prompts: dict[str, list[str]]  # per dimension

    def videos(self, dimension: str) -> list[str]:
        """File names that a dimension is evaluated over, five for each of its prompts."""
        return [video_name(prompt, sample) for prompt in self.prompts[dimension] for sample in range(SAMPLES)]


def find_package(python: str | Path | None) -> Package:
    """VBench in the environment of `python`, an executable or the folder of a virtual environment; None: as
    QVGEN_VBENCH_PYTHON says. Raises ValueError if there is none, or another version than the weight table's."""
    named = python or os.environ.get(PYTHON_VARIABLE)
    if not named:
        raise ValueError(
            f"VBench runs in an environment of its own: give its python with --python or {PYTHON_VARIABLE}; "
            "docs/evaluation.md shows how to make one"
        )
    path = Path(named).expanduser().absolute()  # not resolved: a link in a virtual environment is what makes it one
    path = path / "bin" / "python" if path.is_dir() else path
    try:
        done = subprocess.run([path, "-I", _RUNNER, "facts"], capture_output=True, text=True, env=_environment())
    except OSError as error:
        raise ValueError(f"{path} cannot be run ({error.strerror}): give the python of VBench's environment") from None
    if done.returncode:
        raise ValueError(f"{_last_line(done.stderr)}; make an environment for it as docs/evaluation.md shows")
    facts = json.loads(done.stdout)
    if facts["version"] != VBENCH_VERSION:
        raise ValueError(
            f"{path} has vbench {facts['version']}, {VBENCH_VERSION} is needed: pip install vbench=={VBENCH_VERSION}"
        )
    return Package(path, facts["prompts"])


def evaluate(
    package: Package,
    videos: Path,
    dimensions: Sequence[str],
    *,
    partial: bool = False,
    keep: Path | None = None,
    on_dimension: Callable[[str], object] = lambda dimension: None,
) -> dict[str, Outcome]:
    """One outcome per dimension, in the order asked for.

    `partial` evaluates over the videos that are there; without it a dimension that lacks one is refused, because VBench
    itself would only warn and print a score. `keep`: folder for VBench's own results, with a score per video, and its logs.
    `on_dimension` is told which one starts. Raises ValueError for a folder that is none.
    """
    if not videos.is_dir():
        raise ValueError(f"{videos} is not a folder; make it with `qvgen generate --prompts`")
    there = {path.name for path in videos.glob("[!.]*.mp4")}
    outcomes = {}
    for dimension in dimensions:
        names = package.videos(dimension)
        present = [name for name in names if name in there]
        outcome = partial_call(Outcome, len(present), len(names))
        refusal = missing(dimension) or _lacking(names, there, partial)
        if refusal:
            outcomes[dimension] = outcome(refused=refusal)
            continue
        on_dimension(dimension)
        with tempfile.TemporaryDirectory(prefix="qvgen-vbench-") as work:
            outcomes[dimension] = _run(package, dimension, videos, present, Path(work), keep, outcome)
    return outcomes


def average(outcomes: dict[str, Outcome]) -> float | None:
    """Mean of the scores there are, which may be fewer than the dimensions asked for; None if there are none."""
    scores = [outcome.score for outcome in outcomes.values() if outcome.score is not None]
    return sum(scores) / len(scores) if scores else None


def _lacking(names: list[str], there: set[str], partial: bool) -> str | None:
    lacking = [name for name in names if name not in there]
    if not lacking or (partial and len(lacking) < len(names)):
        return None
    more = f" and {len(lacking) - _NAMED} more" if len(lacking) > _NAMED else ""
    advice = "generate them" if partial or len(lacking) == len(names) else "generate them, or allow it with --partial"
    return f"{len(lacking)} of {len(names)} videos are missing: {', '.join(map(repr, lacking[:_NAMED]))}{more}; {advice}"


def _run(
    package: Package,
    dimension: str,
    videos: Path,
    names: list[str],
    work: Path,
    keep: Path | None,
    outcome: Callable[..., Outcome],
) -> Outcome:
    staged, results = work / "videos", keep.absolute() if keep else work / "results"
    results.mkdir(parents=True, exist_ok=True)
    staged.mkdir()
    for name in names:  # nothing else may lie there: VBench takes the suffix of the first file it sees
        (staged / name).symlink_to((videos / name).absolute())
    log, answer = results / f"{dimension}.log", results / f"{dimension}_eval_results.json"
    answer.unlink(missing_ok=True)
    command = [package.python, "-I", _RUNNER, "run", dimension, staged, results]
    environment = _environment(work)
    with (
        log.open("w") as file,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=work
        ) as process,
    ):
        code = process.wait()
    if code:
        kept = f"; whole log: {log}" if keep else "; --keep FOLDER keeps the whole log"
        return outcome(error=f"vbench ended with code {code}: {_last_line(log.read_text(errors='replace'))}{kept}")
    try:
        score = float(json.loads(answer.read_text())[dimension][0])
    except (OSError, ValueError, LookupError, TypeError) as error:
        return outcome(error=f"vbench wrote no score for {dimension} ({type(error).__name__}: {error})")
    if score != score:
        return outcome(error="vbench's score is not a number: no video could be read, or the weights are damaged")
    return outcome(score=score)


def _environment(work: Path | None = None) -> dict[str, str]:
    """Variables of the other process: caches as we checked them, and every library told that it is offline.

    DINO's own loader looks for its weights in torch's cache only, wherever VBench has them: `work` gets a link there.
    """
    cache, hub = vbench_cache(), str(hub_cache())
    changed = {
        "VBENCH_CACHE_DIR": str(cache),
        "TRANSFORMERS_CACHE": hub,
        "HUGGINGFACE_HUB_CACHE": hub,
        "HF_HUB_CACHE": hub,
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
    }
    if work is not None:
        checkpoints = work / "torch" / "hub" / "checkpoints"
        checkpoints.mkdir(parents=True)
        for weights in (cache / "dino_model").glob("*.pth"):
            (checkpoints / weights.name).symlink_to(weights)
        changed["TORCH_HOME"] = str(work / "torch")
    return os.environ | changed


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "it said nothing")
