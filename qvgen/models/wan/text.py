"""Wan 2.1 / 2.2 text-to-video: flow matching on latents (n, c, t, h, w), by one transformer or two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, ClassVar, Self

import torch
from torch import nn

from qvgen.models.family import ClipStep, SamplingSettings
from qvgen.models.files import EXPERT
from qvgen.models.folding import Fold, FoldableInput, affine_fold, linear_fold, shared_modulation_fold, shift_fold
from qvgen.models.noise import FlowMatching, sampler_shift
from qvgen.models.tiny import LATENT_CHANNELS, TEXT_DIM, seeded, t5_sizes, word_tokenizer

# transformer/config.json of Wan 2.1 T2V 1.3B in diffusers format.
WAN_2_1_1_3B: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 12,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 8960,
    "num_layers": 30,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 1024,
}
TINY: Mapping[str, Any] = {
    **WAN_2_1_1_3B,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "text_dim": TEXT_DIM,
    "freq_dim": 16,
    "ffn_dim": 40,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}


class WanFamily(FlowMatching):
    name: ClassVar[str] = "wan"
    pipelines: ClassVar[tuple[str, ...]] = ("WanPipeline",)
    default_targets: ClassVar[tuple[str, ...]] = (r"re:blocks\..*",)
    sampling: ClassVar[SamplingSettings] = SamplingSettings(81, 480, 832, 512, 50, 5.0, fps=16)
    guidance_can_stop: ClassVar[bool] = True
    published: ClassVar[tuple[str, Mapping[str, Any]]] = ("wan2.1_1.3b", WAN_2_1_1_3B)
    optional: ClassVar[tuple[str, ...]] = ("transformer_2",)

    def __init__(self, shift: float = 1.0, boundary: float | None = None, component: str = "transformer") -> None:
        """`boundary`: of Wan 2.2 A14B, the noise level from which on `transformer` denoises, and `transformer_2` below it."""
        self.shift, self.component = shift, component
        if boundary is not None:
            self.noise_range = (boundary, 1.0) if component == "transformer" else (0.0, boundary)

    @classmethod
    def from_scheduler(cls, config: Mapping[str, Any], index: Mapping[str, Any] = MappingProxyType({})) -> Self:
        return cls(sampler_shift(config), index.get("boundary_ratio"), index.get(EXPERT) or "transformer")

    @staticmethod
    def refusal(index: Mapping[str, Any], transformer_config: Mapping[str, Any]) -> str | None:
        if fault := experts_fault(index):
            return fault
        options = ("image_dim", "added_kv_proj_dim", "vace_layers")
        image = [name for name in options if transformer_config.get(name) is not None]
        channels = [transformer_config.get(name, 16) for name in ("in_channels", "out_channels")]
        if image or channels[0] != (channels[1] or channels[0]):
            found = f"{image[0]} = {transformer_config[image[0]]}" if image else "{} input channels for {}".format(*channels)
            return f"the transformer is conditioned on images ({found}), which WanPipeline lacks; give a text-to-video model"
        return None

    @staticmethod
    def clip_step(transformer_config: Mapping[str, Any], vae_config: Mapping[str, Any]) -> ClipStep:
        patch = transformer_config.get("patch_size", (1, 2, 2))
        time, space = vae_config.get("scale_factor_temporal", 4), vae_config.get("scale_factor_spatial", 8)
        return ClipStep(time * patch[0], space * patch[1], space * patch[2])

    @classmethod
    def sampling_of(cls, transformer_config: Mapping[str, Any]) -> SamplingSettings:
        fps = 24 if transformer_config.get("in_channels") == 48 else cls.sampling.fps  # 48: TI2V 5B of Wan 2.2
        return replace(cls.sampling, fps=fps)

    @staticmethod
    def transformer(config: Mapping[str, Any]) -> nn.Module:
        from diffusers import WanTransformer3DModel

        return WanTransformer3DModel(**config)

    @staticmethod
    def tiny_pipeline(seed: int = 0, experts: bool = False) -> Any:
        """`experts`: two transformers as in Wan 2.2 A14B."""
        from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline
        from transformers import UMT5Config, UMT5EncoderModel

        both: dict[str, Any] = {"transformer_2": tiny_transformer(seed + 1), "boundary_ratio": 0.5} if experts else {}
        tokenizer = word_tokenizer()
        with seeded(seed):
            vae = AutoencoderKLWan(
                base_dim=4,
                z_dim=LATENT_CHANNELS,
                dim_mult=[1, 1, 1, 1],
                num_res_blocks=1,
                temperal_downsample=[False, True, True],
                latents_mean=[0.0] * LATENT_CHANNELS,
                latents_std=[1.0] * LATENT_CHANNELS,
            )
            text_encoder = UMT5EncoderModel(UMT5Config(**t5_sizes(tokenizer))).eval()
        return WanPipeline(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            vae=vae.eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            transformer=tiny_transformer(seed),
            **both,
        )

    def predict(
        self,
        model: nn.Module,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        text: torch.Tensor,
        image: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return model(hidden_states=latents, timestep=timestep, encoder_hidden_states=text, return_dict=False)[0]

    def foldable_inputs(self, model: nn.Module) -> list[FoldableInput]:
        """Scaled for all blocks together: the input of self-attention's q, k and v, and that of the feed-forward, because one
        projection of the timestep modulates both in every block; and the text. Per block: a shift of these two, which goes
        into the block's table; the inputs of the output projections; the input of the cross-attention's query, whose norm is
        affine."""
        lists = [name for name in ("blocks", "vace_blocks") if hasattr(model, name)]
        named = {f"{name}.{i}": block for name in lists for i, block in model.get_submodule(name).named_children()}
        names, blocks = list(named), list[Any](named.values())
        embedder: Any = model.get_submodule("condition_embedder")
        attention = [tuple(f"{name}.attn1.to_{x}" for x in "qkv") for name in names]
        feed_forward = tuple(f"{name}.ffn.net.0.proj" for name in names)
        text = tuple(f"{name}.attn2.to_{x}" for name in names for x in "kv")
        found = [
            FoldableInput(sum(attention, ()), _modulated(embedder.time_proj, blocks, 0), shifts=False),
            FoldableInput(feed_forward, _modulated(embedder.time_proj, blocks, 3), shifts=False),
            FoldableInput(text, linear_fold(embedder.text_embedder.linear_2)),
        ]
        for name, block, read in zip(names, blocks, attention, strict=True):
            table = block.scale_shift_table[0]  # rows: shift, scale, gate of self-attention, then of the feed-forward
            found.append(FoldableInput(read, shift_fold(table[0]), scales=False))
            found.append(FoldableInput((f"{name}.ffn.net.0.proj",), shift_fold(table[3]), scales=False))
            for part in ("attn1", "attn2"):
                if block.get_submodule(part).add_k_proj is not None:
                    continue  # values of the image are added to those of the text
                value = block.get_submodule(part).to_v
                found.append(FoldableInput((f"{name}.{part}.to_out.0",), linear_fold(value)))
            if getattr(block.norm2, "weight", None) is not None:
                found.append(FoldableInput((f"{name}.attn2.to_q",), affine_fold(block.norm2.weight, block.norm2.bias)))
        return found

    def encode_clips(self, pipeline: Any, clips: torch.Tensor) -> torch.Tensor:
        mean, std = latent_statistics(pipeline.vae)
        clips = clips.to(pipeline.vae.device, pipeline.vae.dtype)
        return (pipeline.vae.encode(clips).latent_dist.mean - mean) / std

    def decode_latents(self, pipeline: Any, latents: torch.Tensor, frames: int) -> torch.Tensor:
        mean, std = latent_statistics(pipeline.vae)
        latents = latents.to(pipeline.vae.device).float() * std + mean
        return pipeline.vae.decode(latents.to(pipeline.vae.dtype)).sample.float()


def tiny_transformer(seed: int = 0) -> Any:
    """2 layers, 2 heads of 12, in evaluation mode. Latents (n, 4, t, h, w), text (n, l, 16)."""
    with seeded(seed):
        return WanFamily.transformer(TINY).eval()


def experts_fault(index: Mapping[str, Any]) -> str | None:
    """What is wrong with the two transformers of a pipeline, in words; None if they belong together, or there is one."""
    boundary, second = index.get("boundary_ratio"), index.get("transformer_2")
    there = isinstance(second, list) and second[1] is not None
    if boundary is None and not there:
        return None
    if not there:
        return f"boundary_ratio = {boundary!r:.100}, and no transformer_2 for the levels below: get the whole pipeline"
    if isinstance(boundary, bool) or not isinstance(boundary, int | float) or not 0 < boundary < 1:
        return f"boundary_ratio = {boundary!r:.100} must be a number between 0 and 1: which levels transformer_2 denoises"
    return None


def _modulated(time_proj: nn.Linear, blocks: Sequence[Any], first: int) -> Fold:
    """Of the inputs that rows `first` (shift) and `first` + 1 (scale) of the tables modulate."""
    width = time_proj.out_features // 6
    offset, factor = (slice(row * width, (row + 1) * width) for row in (first, first + 1))
    return shared_modulation_fold(time_proj, (offset, factor), [b.scale_shift_table[0, first : first + 2] for b in blocks])


def latent_statistics(vae: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation (1, c, 1, 1, 1) of its latents, of a VAE whose config has both."""
    both = torch.tensor([vae.config.latents_mean, vae.config.latents_std], device=vae.device)
    mean, std = both.view(2, 1, -1, 1, 1, 1).unbind()
    return mean, std
