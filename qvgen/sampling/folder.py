"""Videos of many prompts in one folder, named as VBench expects: `{prompt}-{0..4}.mp4`.

The folder holds nothing but videos: VBench takes the suffix of whatever file the system lists first for that of all.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

SAMPLES = 5  # videos per prompt that VBench looks for
_LONGEST_NAME = 240  # bytes: file systems allow 255, and a file that is being written has a longer name


def video_name(prompt: str, sample: int) -> str:
    """File name of a prompt's video number `sample`, from 0 on."""
    return f"{prompt}-{sample}.mp4"


def video_seed(seed: int, prompt: str, sample: int) -> int:
    """Seed of one video in [0, 2**63): the first 63 bits of sha256 over "{seed}\\n{sample}\\n{prompt}" in UTF-8.

    It depends on nothing else, so neither the order of the prompts nor the number of processes changes a video.
    """
    digest = hashlib.sha256(f"{seed}\n{sample}\n{prompt}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def read_prompts(path: str | Path, samples: int = SAMPLES) -> list[str]:
    """Prompts of a text file, one per line, in its order; blank lines and spaces around a prompt do not count.

    Raises ValueError that names the line for a prompt that comes twice or cannot be a file name, and for a file that is
    missing, empty or not UTF-8.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist: write a text file with one prompt per line")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from None
    found: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not (prompt := line.strip()):
            continue
        if prompt in found:
            raise ValueError(f"{path} line {number} repeats the prompt of line {found[prompt]}, {prompt!r}: remove one")
        if fault := _fault(prompt, samples):
            raise ValueError(f"{path} line {number}: {fault}")
        found[prompt] = number
    if not found:
        raise ValueError(f"{path} has no prompts: write one per line")
    return list(found)


def _fault(prompt: str, samples: int) -> str | None:
    """Why a prompt cannot name a file, and what to do; None if it can."""
    length = len(video_name(prompt, samples - 1).encode())
    if length > _LONGEST_NAME:
        return (
            f"the file of prompt {prompt[:40]!r}... would have a name of {length} bytes, {_LONGEST_NAME} is the limit: "
            f"shorten it by {length - _LONGEST_NAME}"
        )
    if prompt.startswith("."):
        return f"prompt {prompt!r} begins with a dot, so its files would be hidden: begin it with a word"
    if bad := sorted({c for c in prompt if c == "/" or not c.isprintable()}):
        return f"prompt {prompt!r} has {bad}, which a file name cannot have: replace it"
    return None
