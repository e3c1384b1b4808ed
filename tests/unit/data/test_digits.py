import pytest
import torch

from qvgen.data.digits import (
    ALL_ATTRIBUTES,
    COLOURS,
    DIGITS,
    DIRECTIONS,
    FRAMES,
    SIZE,
    SPEED_RANGE,
    TRAIN_DIGITS,
    Attributes,
    glyphs,
    parse_caption,
    sample_clips,
)


def test_captions_and_attributes_match_one_to_one() -> None:
    assert len(ALL_ATTRIBUTES) == len(COLOURS) * len(DIRECTIONS) * len(DIGITS) == 400
    assert len({a.caption for a in ALL_ATTRIBUTES}) == 400
    assert all(parse_caption(a.caption) == a for a in ALL_ATTRIBUTES)
    assert Attributes(0, 4, 3).caption == "a red digit three moving up and left"
    assert parse_caption("  A Red digit three moving up and left ") == Attributes(0, 4, 3)


def test_an_unknown_caption_is_refused_with_an_example() -> None:
    with pytest.raises(ValueError, match=r"'a purple digit one'.*write it like"):
        parse_caption("a purple digit one")


def test_training_and_held_out_digits_are_disjoint_and_complete() -> None:
    train, held_out = glyphs(held_out=False), glyphs(held_out=True)
    assert len(train[0]) == len(train[1]) == TRAIN_DIGITS
    assert len(train[0]) + len(held_out[0]) == 1797
    seen = {image.numpy().tobytes() for image in train[0]}
    assert not any(image.numpy().tobytes() in seen for image in held_out[0])
    assert set(held_out[1].tolist()) == set(train[1].tolist()) == set(range(10))


def test_clips_are_seeded_and_in_range() -> None:
    attributes = list(ALL_ATTRIBUTES[::37])
    clips = sample_clips(attributes, torch.Generator().manual_seed(5))
    again = sample_clips(attributes, torch.Generator().manual_seed(5))
    other = sample_clips(attributes, torch.Generator().manual_seed(6))
    assert clips.shape == (len(attributes), 3, FRAMES, SIZE, SIZE) and clips.dtype == torch.float32
    assert clips.min() >= -1 and clips.max() <= 1
    assert torch.equal(clips, again) and not torch.equal(clips, other)


def test_the_whole_digit_stays_in_the_picture() -> None:
    """Its brightness is the same in every frame, up to what bilinear interpolation rounds."""
    clips = sample_clips(list(ALL_ATTRIBUTES), torch.Generator().manual_seed(0))
    mass = ((clips + 1) / 2).sum((1, 3, 4))
    assert ((mass.amax(1) - mass.amin(1)) / mass.mean(1)).max() < 0.02


@pytest.mark.parametrize("direction", range(len(DIRECTIONS)))
def test_it_moves_as_the_caption_says_at_the_stated_speed(direction: int) -> None:
    attributes = [Attributes(4, direction, digit) for digit in range(10)]
    brightness = (sample_clips(attributes, torch.Generator().manual_seed(1)) + 1).sum(1)
    pixel = torch.arange(SIZE, dtype=torch.float32)
    total = brightness.sum((-1, -2))
    centre = torch.stack([(brightness.sum(-1) * pixel).sum(-1), (brightness.sum(-2) * pixel).sum(-1)], -1) / total[..., None]
    velocity = (centre[:, -1] - centre[:, 0]) / (FRAMES - 1)
    heading = torch.tensor(list(DIRECTIONS.values())[direction])
    speed = velocity @ heading
    assert (velocity - speed[:, None] * heading).abs().max() < 0.05
    assert speed.min() > SPEED_RANGE[0] - 0.05 and speed.max() < SPEED_RANGE[1] + 0.05
