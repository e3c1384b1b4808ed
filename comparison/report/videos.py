"""The videos of the comparison report: per prompt full precision and every method, as data URIs."""

from __future__ import annotations

import base64
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from comparison.report.results import Results, Run
from comparison.report.words import method_order
from qvgen.sampling.video import write_video

VIDEO_BITS = ("W4A4", "W3A3")
MAX_TEXT = 9_000_000  # characters that all videos may take in the page


@dataclass(frozen=True)
class Video:
    label: str
    uri: str
    reference: bool = False


@dataclass(frozen=True)
class Scene:
    """One prompt: per bits the reference, if there is one, and a video per method."""

    prompt: str
    rows: tuple[tuple[str, tuple[Video, ...]], ...]  # (bits, videos)

    @property
    def text(self) -> int:
        return sum(len(video.uri) for _, row in self.rows for video in row)


def scenes(results: Results) -> tuple[list[Scene], int]:
    """(scenes, prompts left out): as many prompts as fit into MAX_TEXT, at least one.

    Every clip is the run's of the lowest seed. Raises ValueError if two runs were given different prompts.
    """
    shown = {bits: _first_runs(results, bits) for bits in VIDEO_BITS if bits in results.bits}
    clips = {bits: _with_clips(runs) for bits, runs in shown.items()}
    reference = _with_clips([results.full_precision] if results.full_precision else [])
    kept = reference + [pair for row in clips.values() for pair in row]
    if not any(clips.values()):
        return [], 0
    prompts = kept[0][1][0]
    for run, (words, _) in kept:
        if words != prompts:
            raise ValueError(f"{run.case} shows other prompts than {kept[0][0].case}; repeat one of the two runs")
    done: list[Scene] = []
    for i, prompt in enumerate(prompts):
        first = tuple(Video("full precision", _uri(found[1][i]), reference=True) for _, found in reference)
        rows = {bits: tuple(Video(_label(run), _uri(found[1][i])) for run, found in row) for bits, row in clips.items()}
        scene = Scene(prompt, tuple((bits, first + row) for bits, row in rows.items() if row))
        if done and sum(s.text for s in done) + scene.text > MAX_TEXT:
            break
        done.append(scene)
    return done, len(prompts) - len(done)


def _first_runs(results: Results, bits: str) -> list[Run]:
    methods = results.compared(bits)
    return [min(methods[name], key=lambda run: run.seed) for name in sorted(methods, key=method_order)]


def _with_clips(runs: list[Run]) -> list[tuple[Run, tuple[list[str], torch.Tensor]]]:
    return [(run, clips) for run in runs if (clips := run.clips())]


def _label(run: Run) -> str:
    return run.method if run.seed == 0 else f"{run.method}, seed {run.seed}"


def _uri(clip: torch.Tensor) -> str:
    """H.264 in mp4, which Chromium, Firefox and Safari play."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        write_video(path, clip)
        return f"data:video/mp4;base64,{base64.b64encode(path.read_bytes()).decode()}"
