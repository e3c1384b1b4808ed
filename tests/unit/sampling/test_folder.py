"""Names and seeds of the videos of a list of prompts, and lists that cannot be used."""

import hashlib

import pytest

from qvgen.sampling.folder import read_prompts, video_name, video_seed


def test_names_are_those_of_vbench() -> None:
    assert video_name("A 3D model of a 1800s victorian house.", 0) == "A 3D model of a 1800s victorian house.-0.mp4"


def test_the_seed_is_the_documented_function() -> None:
    digest = hashlib.sha256("7\n3\na café".encode()).hexdigest()
    assert video_seed(7, "a café", 3) == int(digest[:16], 16) // 2
    seeds = {video_seed(seed, prompt, sample) for seed in (0, 1, 11) for prompt in ("a", "b", "1") for sample in range(20)}
    assert len(seeds) == 3 * 3 * 20
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_lists(tmp_path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa dog\r\n\n   \n  two cats, running  \na dog.".encode())
    assert read_prompts(path) == ["a dog", "two cats, running", "a dog."]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("a\nb\n\na \n", "line 4 repeats the prompt of line 1, 'a': remove one"),
        ("a\nb/c\n", "line 2: prompt 'b/c' has ['/']"),
        ("a\tb\n", "has ['\\t']"),
        (".a\n", "begins with a dot"),
        ("a" * 234 + "\n" + "é" * 118 + "\n", "line 2: the file of prompt"),
        ("a" * 235 + "\n", "241 bytes, 240 is the limit: shorten it by 1"),
        (" \n\n", "has no prompts"),
        (b"caf\xe9\n", "is not UTF-8"),
    ],
)
def test_bad_lists(tmp_path, content: str | bytes, says: str) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=r"prompts\.txt") as error:
        read_prompts(path)
    assert says in str(error.value)


def test_more_samples_leave_less_room(tmp_path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a" * 234)
    assert read_prompts(path, samples=10)
    with pytest.raises(ValueError, match="241 bytes"):
        read_prompts(path, samples=11)


def test_no_list(tmp_path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        read_prompts(tmp_path / "prompts.txt")
