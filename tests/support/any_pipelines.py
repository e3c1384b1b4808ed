"""Two-layer pipelines of diffusers that no family describes: image models, image conditioning, two experts.

Each has what denoising needs and no more: prompts come as embeddings, results stay latents, and a VAE is there only where the
pipeline encodes an image.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from PIL import Image

from qvgen.models.cogvideox import TINY as TINY_COGVIDEOX
from qvgen.models.tiny import seeded
from qvgen.models.wan import TINY as TINY_WAN
from qvgen.models.wan import WanFamily

_diffusers: Any = diffusers  # whose annotations know of no missing components
_transformers: Any = transformers
Call = dict[str, Any]  # arguments of a pipeline's call
_STEPS = {"num_inference_steps": 2, "output_type": "latent", "return_dict": False}
_HEADS = {"num_attention_heads": 2, "num_layers": 2}
_NO_TEXT = {"text_encoder": None, "tokenizer": None}


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _mask(length: int) -> torch.Tensor:
    return torch.ones(1, length, dtype=torch.int64)


def _flow(**options: Any) -> Any:
    return _diffusers.FlowMatchEulerDiscreteScheduler(**options)


def _wan(pipeline_class: Any, transformers: list[Any], **options: Any) -> Any:
    parts = {"vae": WanFamily.tiny_pipeline().vae, "scheduler": _flow(shift=3.0), "transformer": transformers[0]}
    if len(transformers) > 1:
        parts |= {"transformer_2": transformers[1], "boundary_ratio": 0.8}
    return pipeline_class(**_NO_TEXT, **parts, **options)


def _wan_call(**more: Any) -> Call:
    text = {"prompt_embeds": _random(1, 8, 16), "negative_prompt_embeds": torch.zeros(1, 8, 16)}
    return _STEPS | text | {"num_frames": 9, "height": 32, "width": 32} | more


def wan_experts() -> tuple[Any, Call]:
    """Wan 2.2 A14B: one transformer for the noisy steps, one for the others."""
    experts = [_diffusers.WanTransformer3DModel(**TINY_WAN) for _ in range(2)]
    return _wan(_diffusers.WanPipeline, experts), _wan_call(num_inference_steps=3)


def wan_i2v() -> tuple[Any, Call]:
    """Wan 2.1: embeddings of the first image go to every block, its latents beside the noisy ones."""
    image = {"image_dim": 8, "added_kv_proj_dim": 24, "in_channels": 12}
    model = _diffusers.WanTransformer3DModel(**{**TINY_WAN, **image})
    vision = _transformers.CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=16
    )
    parts = {
        "image_encoder": _transformers.CLIPVisionModel(vision),
        "image_processor": _transformers.CLIPImageProcessor(size=32, crop_size=32),
    }
    pipeline = _wan(_diffusers.WanImageToVideoPipeline, [model], **parts)
    return pipeline, _wan_call(image=Image.new("RGB", (32, 32), "red"))


def wan_vace() -> tuple[Any, Call]:
    model = _diffusers.WanVACETransformer3DModel(**TINY_WAN, vace_layers=[0, 1], vace_in_channels=72)
    return _wan(_diffusers.WanVACEPipeline, [model]), _wan_call(video=[Image.new("RGB", (32, 32), "red")] * 9)


def cogvideox_15() -> tuple[Any, Call]:
    """CogVideoX 1.5: patches in time too."""
    options = {"patch_size_t": 2, "use_rotary_positional_embeddings": True, "patch_bias": False}
    model = _diffusers.CogVideoXTransformer3DModel(**{**TINY_COGVIDEOX, **options})
    scheduler = _diffusers.CogVideoXDDIMScheduler(prediction_type="v_prediction")
    pipeline = _diffusers.CogVideoXPipeline(**_NO_TEXT, vae=None, transformer=model, scheduler=scheduler)
    text = {"prompt_embeds": _random(1, 8, 16), "negative_prompt_embeds": torch.zeros(1, 8, 16)}
    return pipeline, _STEPS | text | {"num_frames": 9, "height": 32, "width": 32, "max_sequence_length": 8}


def hunyuan_video() -> tuple[Any, Call]:
    sizes = {"in_channels": 4, "out_channels": 4, "attention_head_dim": 12, "num_single_layers": 1, "num_refiner_layers": 1}
    text = {"text_embed_dim": 16, "pooled_projection_dim": 8, "rope_axes_dim": (4, 4, 4)}
    model = _diffusers.HunyuanVideoTransformer3DModel(**_HEADS, **sizes, **text)
    encoders = {"text_encoder_2": None, "tokenizer_2": None}
    pipeline = _diffusers.HunyuanVideoPipeline(**_NO_TEXT, **encoders, vae=None, transformer=model, scheduler=_flow())
    prompt = {"prompt_embeds": _random(1, 8, 16), "pooled_prompt_embeds": _random(1, 8), "prompt_attention_mask": _mask(8)}
    return pipeline, _STEPS | prompt | {"num_frames": 9, "height": 32, "width": 32}


def ltx_video() -> tuple[Any, Call]:
    sizes = {"in_channels": 8, "out_channels": 8, "attention_head_dim": 16, "cross_attention_dim": 32, "caption_channels": 16}
    model = _diffusers.LTXVideoTransformer3DModel(**_HEADS, **sizes)
    scheduler = _flow(use_dynamic_shifting=True)
    pipeline = _diffusers.LTXPipeline(**_NO_TEXT, vae=None, transformer=model, scheduler=scheduler)
    prompt = {f"{sign}prompt_embeds": _random(1, 8, 16) for sign in ("", "negative_")}
    prompt |= {f"{sign}prompt_attention_mask": _mask(8) for sign in ("", "negative_")}
    return pipeline, _STEPS | prompt | {"num_frames": 9, "height": 64, "width": 64}


def flux() -> tuple[Any, Call]:
    sizes = {"in_channels": 16, "attention_head_dim": 16, "num_single_layers": 2, "axes_dims_rope": (4, 4, 8)}
    text = {"joint_attention_dim": 16, "pooled_projection_dim": 8, "guidance_embeds": True}
    model = _diffusers.FluxTransformer2DModel(**_HEADS, **sizes, **text)
    encoders = _NO_TEXT | {"text_encoder_2": None, "tokenizer_2": None}
    pipeline = _diffusers.FluxPipeline(**encoders, vae=None, transformer=model, scheduler=_flow())
    return pipeline, _STEPS | {"prompt_embeds": _random(1, 8, 16), "pooled_prompt_embeds": _random(1, 8)} | _image()


def stable_diffusion_35() -> tuple[Any, Call]:
    sizes = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "attention_head_dim": 16, "caption_projection_dim": 32}
    text = {"joint_attention_dim": 16, "pooled_projection_dim": 8, "qk_norm": "rms_norm", "dual_attention_layers": (0,)}
    model = _diffusers.SD3Transformer2DModel(**_HEADS, **sizes, **text, pos_embed_max_size=8)
    encoders = _NO_TEXT | {f"{part}_{i}": None for part in ("text_encoder", "tokenizer") for i in (2, 3)}
    pipeline = _diffusers.StableDiffusion3Pipeline(**encoders, vae=None, transformer=model, scheduler=_flow())
    prompt = {f"{sign}prompt_embeds": _random(1, 8, 16) for sign in ("", "negative_")}
    prompt |= {f"{sign}pooled_prompt_embeds": _random(1, 8) for sign in ("", "negative_")}
    return pipeline, _STEPS | prompt | _image()


def pixart() -> tuple[Any, Call]:
    sizes = {"sample_size": 8, "in_channels": 4, "out_channels": 8, "attention_head_dim": 16, "cross_attention_dim": 32}
    model = _diffusers.PixArtTransformer2DModel(**_HEADS, **sizes, caption_channels=16)
    pipeline = _diffusers.PixArtSigmaPipeline(
        **_NO_TEXT, vae=None, transformer=model, scheduler=_diffusers.DPMSolverMultistepScheduler()
    )
    return pipeline, _STEPS | _masked_prompt() | _image() | {"use_resolution_binning": False}


def sana() -> tuple[Any, Call]:
    sizes = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "attention_head_dim": 16, "caption_channels": 16}
    cross = {"num_cross_attention_heads": 2, "cross_attention_head_dim": 16, "cross_attention_dim": 32}
    model = _diffusers.SanaTransformer2DModel(**_HEADS, **sizes, **cross)
    pipeline = _diffusers.SanaPipeline(**_NO_TEXT, vae=None, transformer=model, scheduler=_flow())
    return pipeline, _STEPS | _masked_prompt() | _image() | {"use_resolution_binning": False}


def qwen_image() -> tuple[Any, Call]:
    sizes = {"in_channels": 16, "out_channels": 4, "attention_head_dim": 16, "joint_attention_dim": 16}
    model = _diffusers.QwenImageTransformer2DModel(**_HEADS, **sizes, axes_dims_rope=(4, 4, 8))
    pipeline = _diffusers.QwenImagePipeline(**_NO_TEXT, vae=None, transformer=model, scheduler=_flow())
    prompt = {"prompt_embeds": _random(1, 8, 16), "prompt_embeds_mask": _mask(8), "true_cfg_scale": 1.0}
    return pipeline, _STEPS | prompt | _image()


def _image() -> Call:
    return {"height": 64, "width": 64}


def _masked_prompt() -> Call:
    prompt = {f"{sign}prompt_embeds": _random(1, 8, 16) for sign in ("", "negative_")}
    return (
        prompt
        | {f"{sign}prompt_attention_mask": _mask(8) for sign in ("", "negative_")}
        | {"clean_caption": False, "negative_prompt": None}
    )


_KINDS = (
    wan_experts,
    wan_i2v,
    wan_vace,
    cogvideox_15,
    hunyuan_video,
    ltx_video,
    flux,
    stable_diffusion_35,
    pixart,
    sana,
    qwen_image,
)
KINDS: dict[str, Callable[[], tuple[Any, Call]]] = {kind.__name__: kind for kind in _KINDS}


def make(kind: str) -> tuple[Any, Call]:
    """A pipeline with random weights, and the arguments of a short call. The same seed, the same weights."""
    with seeded(0):
        pipeline, call = KINDS[kind]()
    for model in pipeline.components.values():
        if isinstance(model, torch.nn.Module):
            model.eval()
    return pipeline, call


def load(folder: Path) -> Any:
    """A saved pipeline, the components that it does not have given as None, as diffusers wants to be told."""
    index = json.loads((folder / "model_index.json").read_text())
    absent = {name: None for name, value in index.items() if value == [None, None]}
    return getattr(_diffusers, index["_class_name"]).from_pretrained(folder, **absent)


def latents(pipeline: Any, call: Call) -> torch.Tensor:
    """What denoising gives, from the same noise each time."""
    pipeline.set_progress_bar_config(disable=True)
    result = pipeline(**call, generator=torch.Generator().manual_seed(0))[0]
    assert isinstance(result, torch.Tensor) and result.isfinite().all()
    return result.float()
