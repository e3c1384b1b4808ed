"""Which frames of a video make a clip, and which way up they are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

MOST_REPEATED = 10  # one frame in so many may stand twice: 15 frames a second serve for 16


class TooFewFramesError(ValueError):
    """The video cannot give the clip; the message says what it has and needs."""


def take(decoded: Iterator[Any], count: int, fps: float | None) -> Iterator[Any]:
    """`count` frames of a decoded video: the first ones, or with `fps` those shown nearest to 0, 1/fps, 2/fps, ... seconds
    after its first, by their timestamps, so that variable frame rates come out even. Reads no further than needed.

    Raises TooFewFramesError if the video ends before the clip does, if it has no timestamps, and if it is so much slower than
    `fps` that frames would be repeated (more than one, and more than one in ten).
    """
    if fps is None:
        yield from _first(decoded, count)
        return
    previous, seen, given, repeats = None, 0, 0, 0
    start, shown, gap = 0.0, 0.0, 1 / fps  # the gap of a lone frame, which has no neighbour
    last_given = None
    for frame in _until_over(decoded):
        if frame is None:  # the last frame stays on the screen as long as the one before it
            frame, time = previous, shown + gap
        elif frame.time is None:
            raise TooFewFramesError("has no timestamps; set prepare.fps: native")
        else:
            start = frame.time if previous is None else start
            time, seen = frame.time - start, seen + 1
        if previous is None:
            previous = frame
            continue
        if time <= shown:
            continue
        while given < count and given / fps < time:
            before = given / fps - shown <= time - given / fps + 1e-6  # microseconds: timestamps are rounded
            if frame is previous and not before:
                break
            chosen = previous if before else frame
            repeats += chosen is last_given
            if repeats > max(1, count // MOST_REPEATED):
                raise TooFewFramesError(
                    f"has {seen} frames in its first {max(time, shown):.3g} s: too slow for {fps:g} a second, where frames "
                    "would be repeated; replace it, or set prepare.fps to what the videos have, or to native"
                )
            last_given, given = chosen, given + 1
            yield chosen
        if given == count:
            return
        previous, gap, shown = frame, time - shown, time
    if given < count:
        raise TooFewFramesError(
            f"lasts {shown:.3g} s ({seen} frames), {count} frames at {fps:g} a second take {count / fps:.3g} s; remove it or "
            "lower prepare.frames"
        )


def _first(decoded: Iterator[Any], count: int) -> Iterator[Any]:
    given = 0
    for frame in decoded:
        given += 1
        yield frame
        if given == count:
            return
    raise TooFewFramesError(f"has {given} frames, {count} are needed; remove it or lower prepare.frames")


def _until_over(decoded: Iterator[Any]) -> Iterator[Any]:
    yield from decoded
    yield None


def upright(frame: Any) -> np.ndarray:
    """A decoded frame as its display matrix says it is to be seen: (h, w, 3) uint8. Raises ValueError for a matrix that is
    neither a quarter turn nor a mirror image.

    Source of the matrix's meaning: ISO/IEC 14496-12, track header; a pixel (x, y) goes to (a x + c y, b x + d y).
    """
    image = frame.to_ndarray(format="rgb24")
    if (matrix := frame.side_data.get("DISPLAYMATRIX")) is None:
        return image
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
    if a and d and not b and not c:
        rows, columns = d < 0, a < 0
    elif b and c and not a and not d:
        image, rows, columns = image.transpose(1, 0, 2), b < 0, c < 0
    else:
        raise ValueError(f"its display matrix ({a}, {b}, {c}, {d}) is no quarter turn: write the video upright")
    image = image[::-1] if rows else image
    return np.ascontiguousarray(image[:, ::-1] if columns else image)
