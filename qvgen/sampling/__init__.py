"""How a video is made: settings of a model, latents from noise, pixels, a file.

    from qvgen.sampling.sample import sample                 # the module has the function's name: `qvgen.sample` is it, too

    settings = read_settings("artifacts/packed")             # generation.json, else the family's defaults
    latents, clips = sample(
        pipeline, family, ["a red ball"], [0], settings.size, inference_steps=settings.inference_steps,
        guidance_scale=settings.guidance_scale, guidance_stop=settings.guidance_stop, batch_size=1,
    )
    write_video("ball.mp4", clips[0], settings.fps)

`stop_guidance` is the callback that plain diffusers needs to sample a model as it was scored if its generation.json names a
`guidance_stop`. Names and seeds of many videos in one folder are in folder.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qvgen.lazy import lazy

if TYPE_CHECKING:
    from qvgen.sampling.folder import read_prompts, video_name, video_seed
    from qvgen.sampling.sample import generate, stop_guidance
    from qvgen.sampling.settings import read_guidance_stop, read_settings
    from qvgen.sampling.video import write_video

__all__ = [
    "generate",
    "read_guidance_stop",
    "read_prompts",
    "read_settings",
    "stop_guidance",
    "video_name",
    "video_seed",
    "write_video",
]

__getattr__ = lazy(
    {
        **dict.fromkeys(("read_prompts", "video_name", "video_seed"), "qvgen.sampling.folder"),
        **dict.fromkeys(("generate", "stop_guidance"), "qvgen.sampling.sample"),
        **dict.fromkeys(("read_guidance_stop", "read_settings"), "qvgen.sampling.settings"),
        "write_video": "qvgen.sampling.video",
    }
)
