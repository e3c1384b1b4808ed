"""Train the embedded Wan transformer on the moving digits and assemble the pipeline folder.

Flow matching: x_t = (1 - sigma) x_0 + sigma noise, the model predicts noise - x_0 at timestep 1000 sigma. Latents of
16,000 clips are encoded once. Matrices inside the blocks are trained with Muon, the rest with AdamW, which is faster here
than AdamW alone (LOG.md). Everything is seeded. Run by `dvc repro` in assets/tiny-wan.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from tqdm import tqdm
from transformers import AutoTokenizer, UMT5EncoderModel

from qvgen.data.digits import ALL_ATTRIBUTES, sample_clips
from qvgen.evaluation.quality.prompt_accuracy import judge

HERE = Path(__file__).resolve().parents[1]
STEPS, BATCH, WARMUP = 6000, 32, 200
MUON_LEARNING_RATE, ADAMW_LEARNING_RATE = 6e-3, 2e-3
CLIPS_PER_CAPTION = 40
CAPTION_DROPOUT = 0.1  # "" must be known for classifier-free guidance
SHIFT = 3.0
EMA_DECAY = 0.999
MAX_LENGTH = 12


def build() -> WanTransformer3DModel:
    # ffn_dim / width = 6, as in Wan 2.1 1.3B (8960 / 1536 = 5.8).
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=8,
        out_channels=8,
        text_dim=64,
        freq_dim=64,
        ffn_dim=768,
        num_layers=4,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )


def load_pipeline(transformer: WanTransformer3DModel) -> WanPipeline:
    pipeline = WanPipeline(
        tokenizer=AutoTokenizer.from_pretrained(HERE / "tokenizer"),
        text_encoder=UMT5EncoderModel.from_pretrained(HERE / "text_encoder"),
        vae=AutoencoderKLWan.from_pretrained(HERE / "vae"),
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(HERE / "scheduler"),
        transformer=transformer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def precompute(pipeline: WanPipeline) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normalised latents (n, 8, 5, 8, 8), their caption index (n,), and embeddings (401, 12, 64), the last being ""."""
    generator = torch.Generator().manual_seed(1)
    mean = torch.tensor(pipeline.vae.config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(pipeline.vae.config.latents_std).view(1, -1, 1, 1, 1)
    latents, captions = [], []
    for _ in tqdm(range(CLIPS_PER_CAPTION), desc="encode", mininterval=5):
        for part in torch.arange(len(ALL_ATTRIBUTES)).split(50):
            clips = sample_clips([ALL_ATTRIBUTES[i] for i in part], generator)
            latents.append((pipeline.vae.encode(clips).latent_dist.mean - mean) / std)
            captions.append(part)
    texts = [a.caption for a in ALL_ATTRIBUTES] + [""]
    embeddings, _ = pipeline.encode_prompt(texts, do_classifier_free_guidance=False, max_sequence_length=MAX_LENGTH)
    return torch.cat(latents), torch.cat(captions), embeddings


def optimizers(model: WanTransformer3DModel) -> list[torch.optim.Optimizer]:
    matrices = [p for n, p in model.named_parameters() if n.startswith("blocks.") and p.ndim == 2]
    chosen = set(map(id, matrices))
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=MUON_LEARNING_RATE, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=ADAMW_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def learning_rate_factor(step: int, steps: int) -> float:
    """Warm up, hold, then fall linearly to zero over the last 40 %."""
    return min(1.0, (step + 1) / WARMUP, (steps - step) / (0.4 * steps))


def train(pipeline: WanPipeline, steps: int, report_every: int, snapshot: Path | None) -> None:
    model = pipeline.transformer
    latents, captions, embeddings = precompute(pipeline)
    generator = torch.Generator().manual_seed(2)
    opts = optimizers(model)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(EMA_DECAY))
    base = [[g["lr"] for g in o.param_groups] for o in opts]
    progress = tqdm(range(steps), desc="transformer", mininterval=10)
    mean_loss = 1.0
    started = time.time()
    for step in progress:
        index = torch.randint(len(latents), (BATCH,), generator=generator)
        x_0, caption = latents[index], captions[index]
        dropped = torch.rand(BATCH, generator=generator) < CAPTION_DROPOUT
        text = embeddings[torch.where(dropped, len(embeddings) - 1, caption)]
        u = torch.rand(BATCH, generator=generator)
        sigma = SHIFT * u / (1 + (SHIFT - 1) * u)
        noise = torch.randn(x_0.shape, generator=generator)
        s = sigma.view(-1, 1, 1, 1, 1)
        velocity = model((1 - s) * x_0 + s * noise, 1000 * sigma, text, return_dict=False)[0]
        loss = (velocity - (noise - x_0)).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        factor = learning_rate_factor(step, steps)
        for opt, rates in zip(opts, base, strict=True):
            for group, rate in zip(opt.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            opt.step()
            opt.zero_grad(set_to_none=True)
        average.update_parameters(model)
        mean_loss += 0.01 * (loss.item() - mean_loss)
        if step % 50 == 0:
            progress.set_postfix(loss=f"{mean_loss:.4f}")
        if (step + 1) % report_every == 0:
            pipeline.transformer = average.module
            verdicts = {g: evaluate(pipeline, prompts=40, guidance_scale=g).as_dict() for g in (1.0, 4.0)}
            pipeline.transformer = model
            print(f"\n{time.time() - started:.0f} s, step {step + 1}, loss {mean_loss:.4f}, {verdicts}", flush=True)
            if snapshot is not None:
                average.module.save_pretrained(snapshot)
    pipeline.transformer = average.module


def evaluate(pipeline: WanPipeline, prompts: int, guidance_scale: float, steps: int = 20):
    """Judge samples of evenly spread captions."""
    attributes = [ALL_ATTRIBUTES[(i * 7) % len(ALL_ATTRIBUTES)] for i in range(prompts)]
    clips = []
    for part in range(0, prompts, 20):
        frames = pipeline(
            prompt=[a.caption for a in attributes[part : part + 20]],
            negative_prompt=[""] * len(attributes[part : part + 20]),
            height=32,
            width=32,
            num_frames=9,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            max_sequence_length=MAX_LENGTH,
            generator=torch.Generator().manual_seed(part),
            output_type="pt",
        ).frames
        clips.append(frames.permute(0, 2, 1, 3, 4) * 2 - 1)
    return judge(torch.cat(clips), attributes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--report-every", type=int, default=1000)
    parser.add_argument("--snapshot", type=Path, help="folder for the averaged transformer at every report")
    args = parser.parse_args()
    torch.manual_seed(0)
    pipeline = load_pipeline(build())
    train(pipeline, args.steps, args.report_every, args.snapshot)
    for guidance_scale in (1.0, 2.0, 3.0, 4.0, 5.0, 6.0):
        verdict = evaluate(pipeline, prompts=200, guidance_scale=guidance_scale)
        print(f"200 prompts, guidance {guidance_scale}: {verdict.as_dict()}")
    pipeline.vae.register_to_config(_name_or_path="vae")  # else the path of this machine
    pipeline.save_pretrained(HERE)


if __name__ == "__main__":
    main()
