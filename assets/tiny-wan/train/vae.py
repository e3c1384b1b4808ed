"""Train the embedded VAE: clips 9x32x32 <-> latents 8x5x8x8. Writes ../vae (a diffusers AutoencoderKLWan folder).

Run by `dvc repro` in assets/tiny-wan; takes about 10 minutes on 2 cores. Everything is seeded.
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from tqdm import tqdm

from qvgen.data.digits import ALL_ATTRIBUTES, sample_clips
from qvgen.evaluation.quality.prompt_accuracy import judge

HERE = Path(__file__).resolve().parents[1]
STEPS, BATCH, LEARNING_RATE, KL_WEIGHT, Z_DIM = 1600, 16, 2e-3, 1e-4, 8


def build() -> AutoencoderKLWan:
    vae = AutoencoderKLWan(
        base_dim=16,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[True],
        patch_size=2,
        in_channels=12,
        out_channels=12,
        z_dim=Z_DIM,
        scale_factor_temporal=2,
        scale_factor_spatial=4,
        latents_mean=[0.0] * Z_DIM,
        latents_std=[1.0] * Z_DIM,
    )
    # Start with a nearly deterministic posterior (log-variance -6): with the default of 0 the latents are mostly noise
    # and the decoder learns to ignore them.
    torch.nn.init.zeros_(vae.quant_conv.weight[Z_DIM:].data)
    torch.nn.init.constant_(vae.quant_conv.bias[Z_DIM:].data, -6.0)
    return vae


def decode_unclamped(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """Like vae.decode without its clamp to [-1, 1], whose gradient is zero exactly where a pixel is most wrong."""
    chunks: list[torch.Tensor] = []
    handle = vae.decoder.register_forward_hook(lambda _module, _args, output: chunks.append(output))
    try:
        vae.decode(latents)
    finally:
        handle.remove()
    return unpatchify(torch.cat(chunks, dim=2), patch_size=2)


def train(vae: AutoencoderKLWan, steps: int = STEPS) -> None:
    generator = torch.Generator().manual_seed(1)
    picker = random.Random(1)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.05)
    progress = tqdm(range(steps), desc="vae", mininterval=5)
    for step in progress:
        clips = sample_clips(picker.choices(ALL_ATTRIBUTES, k=BATCH), generator)
        posterior = vae.encode(clips).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator)
        reconstruction = decode_unclamped(vae, posterior.mean + posterior.std * noise)
        # The digit covers a tenth of the picture: weigh its pixels up, or the background decides.
        weight = 1 + 4 * (clips.amax(dim=1, keepdim=True) + 1) / 2
        error = reconstruction - clips
        loss = (weight * (error.abs() + error.square())).mean() + KL_WEIGHT * posterior.kl().mean() / posterior.mean[0].numel()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            progress.set_postfix(loss=f"{loss.item():.4f}", psnr=f"{psnr(reconstruction, clips):.1f} dB")


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(-10 * torch.log10(F.mse_loss(a.clamp(-1, 1), b) / 4))


@torch.no_grad()
def set_latent_statistics(vae: AutoencoderKLWan) -> None:
    """WanPipeline normalises latents per channel with these two config entries; nothing computes them for us."""
    generator = torch.Generator().manual_seed(2)
    latents = torch.cat([vae.encode(sample_clips(list(ALL_ATTRIBUTES[i::10]), generator)).latent_dist.mean for i in range(10)])
    vae.register_to_config(latents_mean=latents.mean((0, 2, 3, 4)).tolist(), latents_std=latents.std((0, 2, 3, 4)).tolist())


@torch.no_grad()
def report(vae: AutoencoderKLWan) -> None:
    attributes = list(ALL_ATTRIBUTES[::2])
    clips = sample_clips(attributes, torch.Generator().manual_seed(3), held_out=True)
    out = torch.cat([vae.decode(vae.encode(c).latent_dist.mean).sample for c in clips.split(20)])
    print(f"held-out reconstruction: {psnr(out, clips):.2f} dB, judge {judge(out, attributes).as_dict()}")


def main() -> None:
    torch.manual_seed(0)
    vae = build()
    train(vae)
    vae.eval()
    set_latent_statistics(vae)
    report(vae)
    vae.save_pretrained(HERE / "vae")


if __name__ == "__main__":
    main()
