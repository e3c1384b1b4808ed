"""Videos of many prompts in one folder, named as VBench expects, `{prompt}-{0..4}.mp4`, wherever a file can have the name.

The folder holds nothing but videos: VBench takes the suffix of whatever file the system lists first for that of all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from qvgen.data.captions import read_lines, read_text

SAMPLES = 5  # videos per prompt that VBench looks for
_LONGEST_NAME = 240  # bytes: file systems allow 255, and a file that is being written has a longer name
_LARGEST_SAMPLE = 9999  # that a name has room for: the name of a video does not depend on how many there are
_PREFIX = 60  # characters of a long prompt that its file is called by


def video_name(prompt: str, sample: int) -> str:
    """File name of a prompt's video number `sample`, from 0 on.

    VBench's own, `{prompt}-{sample}.mp4`, where a file can have it. A prompt that is too long, begins with a dot, or holds a
    slash or a control character gets `{its first words}-{12 digits of sha256}-{sample}.mp4`: short, and the same everywhere.
    """
    return f"{_stem(prompt)}-{sample}.mp4"


def short_names(prompts: Iterable[str]) -> dict[str, str]:
    """File name without number and suffix -> prompt, of those prompts that cannot name a file themselves."""
    return {stem: prompt for prompt in prompts if (stem := _stem(prompt)) != prompt}


def _stem(prompt: str) -> str:
    length = len(f"{prompt}-{_LARGEST_SAMPLE}.mp4".encode())
    if length <= _LONGEST_NAME and not prompt.startswith(".") and "/" not in prompt and prompt.isprintable():
        return prompt
    words = "".join(c if c.isascii() and c.isalnum() else " " for c in prompt).split()
    return f"{' '.join(words)[:_PREFIX].strip()}-{hashlib.sha256(prompt.encode()).hexdigest()[:12]}"


def video_seed(seed: int, prompt: str, sample: int) -> int:
    """Seed of one video in [0, 2**63): the first 63 bits of sha256 over "{seed}\\n{sample}\\n{prompt}" in UTF-8.

    It depends on nothing else, so neither the order of the prompts nor the number of processes changes a video.
    """
    digest = hashlib.sha256(f"{seed}\n{sample}\n{prompt}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def read_prompts(path: str | Path) -> list[str]:
    """Prompts of a text file, one per line, or of a .jsonl file, an object {"caption": ...} on each line, in its order; blank
    lines and spaces around a prompt do not count.

    Raises ValueError that names the line for a prompt that comes twice, and for a file that is missing, empty or not UTF-8.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist: write a text file with one prompt per line")
    if path.suffix == ".jsonl":
        listed = [(number, caption) for number, (caption,) in read_lines(path, ("caption",))]
    else:
        listed = list(enumerate(read_text(path).split("\n"), start=1))
    found: dict[str, int] = {}
    for number, line in listed:
        if not (prompt := line.strip()):
            continue
        if prompt in found:
            raise ValueError(f"{path} line {number} repeats the prompt of line {found[prompt]}, {prompt!r}: remove one")
        found[prompt] = number
    if not found:
        raise ValueError(f"{path} has no prompts: write one per line")
    return list(found)
