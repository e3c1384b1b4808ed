"""Weight-free stand-ins for three dimensions of VBench: optical flow by OpenCV's DIS instead of trained networks.

They are no VBench scores and never stand in one table with them; each name says proxy. A frozen video has the best
smoothness and consistency there are, so `scores` always has motion beside them.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qvgen.evaluation.quality import motion

_FLOW_FPS = 8  # VBench looks at about this many frames per second
_FAST_PIXELS = 6.0  # a pair of frames moves if its fastest pixels move more, at 256 pixels of the shorter side
_FASTEST = 0.05  # fraction of the pixels that counts as the fastest
_MOVING = 4 / 16  # fraction of the frames that must move
_THUMBNAIL = 32  # pixels
_BLANK = 1e-6  # deviation, as a fraction of the pixel range, below which a frame is one flat colour

Frames = np.ndarray[Any, Any]  # (t, h, w, 3) uint8, RGB


def read_frames(path: str | Path) -> tuple[Frames, float]:
    """Frames (t, h, w, 3) uint8 and frames per second. Raises ValueError for a file without a video."""
    import av

    try:
        with av.open(str(path)) as container:
            rate = container.streams.video[0].average_rate
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    except (av.FFmpegError, IndexError) as error:
        raise ValueError(f"{path} cannot be read as a video ({error}): remove it or generate it again") from None
    if not frames:
        raise ValueError(f"{path} has no frames: remove it or generate it again")
    return np.stack(frames), float(rate or _FLOW_FPS)


def scores(frames: Frames, fps: float) -> dict[str, float]:
    """Of one video: motion and flicker (qvgen/evaluation/quality/motion.py), then the three proxies."""
    clip = torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    return {
        "motion": float(motion.motion(clip)),
        "flicker": float(motion.flicker(clip)),
        "proxy_flow_dynamic_degree": proxy_flow_dynamic_degree(frames, fps),
        "proxy_warp_smoothness": proxy_warp_smoothness(frames),
        "proxy_frame_consistency": proxy_frame_consistency(frames),
    }


def proxy_flow_dynamic_degree(frames: Frames, fps: float) -> float:
    """1.0 if the video moves, else 0.0, by VBench's rule for dynamic_degree with DIS instead of RAFT.

    At about 8 frames per second, a pair of frames moves if the mean flow of its fastest 5 % of pixels exceeds 6 pixels per
    256 of the shorter side; the video moves if at least a quarter as many pairs do as there are frames. VBench rounds that
    quarter to 0 for one or two frames, and calls any pair moving then; here it is at least 1.
    """
    frames = frames[:: max(1, round(fps / _FLOW_FPS))]
    fast = _FAST_PIXELS * min(frames.shape[1:3]) / 256
    needed = max(1, round(_MOVING * len(frames)))
    moving = 0
    for before, after in itertools.pairwise(frames):
        speed = np.sort(np.linalg.norm(_flow(before, after), axis=-1), axis=None)
        moving += bool(speed[-max(1, int(speed.size * _FASTEST)) :].mean() > fast)
        if moving >= needed:
            return 1.0
    return 0.0


def proxy_warp_smoothness(frames: Frames) -> float:
    """How well every second frame follows from its neighbours, in [0, 1]: VBench's measure of motion_smoothness with a
    warp by DIS instead of AMT.

    Odd frames are dropped and made again half-way between the two around them, each warped along the flow in both
    directions; 1 minus the mean absolute difference, as a fraction of the pixel range. 1.0 for fewer than three frames.
    """
    differences = [
        np.abs(_between(frames[i - 1], frames[i + 1]) - frames[i].astype(np.float32)).mean() / 255
        for i in range(1, len(frames) - 1, 2)
    ]
    return 1.0 - float(np.mean(differences)) if differences else 1.0


def proxy_frame_consistency(frames: Frames) -> float:
    """How alike the frames are, in [0, 1]: VBench's rule for subject and background consistency, over 32 x 32 pictures with
    their mean taken out instead of DINO's or CLIP's features.

    Mean over the frames but the first of the average similarity (cosine, at least 0) with the frame before and with the
    first. 1.0 for one frame.
    """
    features = [_thumbnail(frame) for frame in frames]
    similarities = [
        (_cosine(features[i - 1], features[i]) + _cosine(features[0], features[i])) / 2 for i in range(1, len(features))
    ]
    return float(np.mean(similarities)) if similarities else 1.0


def _flow(before: Frames, after: Frames) -> np.ndarray:
    """Displacement (h, w, 2) as (x, y) in pixels of each pixel of `before`."""
    import cv2

    estimator = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in (before, after)]
    return estimator.calc(grey[0], grey[1], None)  # type: ignore[call-overload]  (None: no first guess)


def _between(before: Frames, after: Frames) -> np.ndarray:
    """The picture half-way between two, float32. From the middle, a pixel came half of the flow ahead less the flow back,
    halved again: what Super SloMo (arXiv 1712.00080, section 3.2) takes for the flow of a frame that is not there."""
    import cv2

    ahead, back = _flow(before, after), _flow(after, before)
    rows, columns = np.indices(before.shape[:2], dtype=np.float32)
    x, y = np.moveaxis(ahead - back, -1, 0) / 4  # from the middle to `after`
    from_before = cv2.remap(before, columns - x, rows - y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    from_after = cv2.remap(after, columns + x, rows + y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return (from_before.astype(np.float32) + from_after) / 2


def _thumbnail(frame: Frames) -> np.ndarray:
    """(32 * 32 * 3,) float64 with zero mean per colour, in fractions of the pixel range."""
    import cv2

    small = cv2.resize(frame, (_THUMBNAIL, _THUMBNAIL), interpolation=cv2.INTER_AREA).astype(np.float64) / 255
    return (small - small.mean(axis=(0, 1))).ravel()


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    """At least 0. Flat frames have no direction: two of them are alike, one and another are not."""
    blank = [float(np.sqrt(np.square(x).mean())) < _BLANK for x in (a, b)]
    if any(blank):
        return float(all(blank))
    return max(0.0, float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b))))
