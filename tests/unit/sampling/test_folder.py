"""Names and seeds of the videos of a list of prompts, and lists that cannot be used."""

import hashlib

import pytest

from qvgen.sampling.folder import read_prompts, short_names, video_name, video_seed


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


def test_lists_of_json(tmp_path) -> None:
    """captions.jsonl of a folder of videos does as it is."""
    path = tmp_path / "prompts.jsonl"
    rows = '{"file": "a.mp4", "caption": " a \\"red\\" dog,\\nrunning "}', '{"caption": "café"}'
    path.write_bytes("\r\n\r\n".join(["\ufeff" + rows[0], rows[1]]).encode())
    assert read_prompts(path) == ['a "red" dog,\nrunning', "café"]
    for bad, says in (
        ('{"prompt": "a"}', 'line 2 must be an object with the text "caption", found {"prompt"'),
        ("a dog", "line 2 is not JSON"),
        ('{"caption": "café"}', "line 2 repeats the prompt of line 1"),
    ):
        path.write_text(f'{{"caption": "café"}}\n{bad}\n', encoding="utf-8")
        with pytest.raises(ValueError, match=r"prompts\.jsonl") as error:
            read_prompts(path)
        assert says in str(error.value)
    path.write_text("\n")
    with pytest.raises(ValueError, match=r"prompts\.jsonl has no prompts"):
        read_prompts(path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("a\nb\n\na \n", "line 4 repeats the prompt of line 1, 'a': remove one"),
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


LONG = "A cat walks, " * 30
SHORT = "A cat walks A cat walks A cat walks A cat walks A cat walks"


@pytest.mark.parametrize(
    ("prompt", "prefix"),
    [(LONG, SHORT), ("b/c", "b c"), ("a\tb", "a b"), (".a", "a"), ("é" * 118, ""), ("a" * 232, "a" * 60), ("../x", "x")],
)
def test_a_prompt_that_cannot_name_a_file_gets_a_short_stable_name(tmp_path, prompt: str, prefix: str) -> None:
    stem = f"{prefix}-{hashlib.sha256(prompt.encode()).hexdigest()[:12]}"
    assert video_name(prompt, 3) == f"{stem}-3.mp4"
    assert short_names(["a dog", prompt]) == {stem: prompt}
    (tmp_path / video_name(prompt, 3)).write_bytes(b"x")  # the file system takes it, in this folder
    assert [path.name for path in tmp_path.iterdir()] == [f"{stem}-3.mp4"]


def test_a_prompt_that_can_name_a_file_does() -> None:
    longest = "a" * 231
    assert video_name(longest, 0) == f"{longest}-0.mp4" and len(video_name(longest, 9999)) == 240
    assert short_names([longest, "a dog."]) == {}


def test_no_list(tmp_path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        read_prompts(tmp_path / "prompts.txt")
