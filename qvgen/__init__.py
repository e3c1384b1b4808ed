"""4-bit video diffusion models: quantize a diffusers pipeline, train what that costs, pack it, sample it.

The way from a pipeline folder to a packed one, by plain rounding (a method trains between the second and the third line):

    from qvgen import QuantScheme, convert_, export_pipeline, load_family, load_transformer, prepare_

    transformer, scheme = load_transformer("model"), QuantScheme()       # 4-bit weights and activations
    prepare_(transformer, scheme, default_targets=load_family("model").default_targets)
    convert_(transformer)
    export_pipeline("model", transformer, scheme, "packed", torch.bfloat16)

and a video from it:

    from qvgen import load_pipeline, read_settings, sample, write_video

    settings = read_settings("packed")
    latents, clips = sample(load_pipeline("packed"), load_family("packed"), ["a red ball"], [0], settings.size, ...)
    write_video("ball.mp4", clips[0], settings.fps)

Names are imported when they are used: `import qvgen` loads neither torch nor diffusers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qvgen.lazy import lazy

if TYPE_CHECKING:
    from qvgen.checkpoint.packed import export_pipeline
    from qvgen.checkpoint.pipeline import load_pipeline, load_transformer
    from qvgen.models.registry import load_family
    from qvgen.nn.swap import convert_, prepare_
    from qvgen.quant.scheme import QuantArgs, QuantScheme
    from qvgen.sampling.sample import sample
    from qvgen.sampling.settings import read_settings
    from qvgen.sampling.video import write_video
    from qvgen.training.sampled import calibrate_while

__all__ = [
    "QuantArgs",
    "QuantScheme",
    "calibrate_while",
    "convert_",
    "export_pipeline",
    "load_family",
    "load_pipeline",
    "load_transformer",
    "prepare_",
    "read_settings",
    "sample",
    "write_video",
]


__getattr__ = lazy(
    {
        "QuantArgs": "qvgen.quant.scheme",
        "QuantScheme": "qvgen.quant.scheme",
        "calibrate_while": "qvgen.training.sampled",
        "convert_": "qvgen.nn.swap",
        "export_pipeline": "qvgen.checkpoint.packed",
        "load_family": "qvgen.models.registry",
        "load_pipeline": "qvgen.checkpoint.pipeline",
        "load_transformer": "qvgen.checkpoint.pipeline",
        "prepare_": "qvgen.nn.swap",
        "read_settings": "qvgen.sampling.settings",
        "sample": "qvgen.sampling.sample",
        "write_video": "qvgen.sampling.video",
    }
)
