"""A candidate model against the full-precision one, from the same noise, over the same prompts and held-out latents.

`observe` each model once, then `compare` any number of candidates with the reference:

    trial = Trial.from_params(params, held_out)
    reference = observe(full_precision_pipeline, family, trial)
    for pipeline in candidates:
        scores = compare(reference, observe(pipeline, family, trial), trial)

`observe` is `answer`, which takes hours for a large model, and then `collect`. With a folder, `answer` goes on after what an
interrupted run left there, and several processes share it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qvgen.checkpoint.pipeline import holding
from qvgen.data.digits import ALL_ATTRIBUTES, FRAMES, parse_caption
from qvgen.data.latents import LatentDataset
from qvgen.data.stored import Latents, Text
from qvgen.evaluation.quality import motion, similarity
from qvgen.evaluation.quality.prompt_accuracy import judge
from qvgen.models.family import ClipSize, Family
from qvgen.params import Params
from qvgen.sampling.folder import read_prompts
from qvgen.sampling.pieces import Pieces
from qvgen.sampling.sample import OnBatch, decode_all, denoise_all, encode_all, lengths, silent
from qvgen.sampling.velocities import add_velocities, spread_timesteps, velocity_lengths
from qvgen.share import ALONE, Share

ACCURACIES = ("colour", "direction", "digit")  # what the judge of the embedded digits tells


@dataclass(frozen=True)
class HeldOut:
    """Clips of one size that velocities are predicted for."""

    latents: Latents  # (n, ...)
    text: Text  # (n, l, d)
    image: Latents | None  # (n, m, e), embeddings of the first frames


@dataclass(frozen=True)
class Trial:
    """The questions put to every model: videos for `prompts`, and velocities on `latents` (n, ...) with `text` (n, l, d) and
    on clips of `other_sizes`."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    size: ClipSize
    latents: Latents
    text: Text
    timesteps: tuple[float, ...]
    seed: int  # of the noise added to `latents`
    inference_steps: int
    guidance_scale: float
    batch_size: int
    image: Latents | None = None  # embeddings (n, m, e) of the first frames of the clips of `latents`
    first_frames: Latents | None = None  # (n, 3, h, w), of families that read one: prompt i has that of clip i mod n
    other_sizes: tuple[HeldOut, ...] = ()
    judged: bool = False  # whether the prompts are captions of the embedded digits, whose clips can be judged
    guidance_is_told: bool = False  # of the family

    @classmethod
    def from_params(cls, params: Params, held_out: LatentDataset, family: Family | None = None) -> Trial:
        """The trial of params.yaml's `evaluate`. Prompts are those of `prompts_file`, or else captions of the held-out clips,
        from the first on, and again from the first if there are too few; each has its own seed either way. Velocities are
        predicted for all of these clips, first those of the size that the videos have, at the noise that the `family`'s
        transformer is made for (without one: at all noise). Raises ValueError for a file that is missing, empty or not
        UTF-8, and for data without a clip of that size."""
        wanted, prepare = params.evaluate, params.prepare
        digits = prepare.source == "digits" and prepare.frames == FRAMES
        measured = held_out.of_size(prepare.height, prepare.width)
        others = held_out.other_sizes(prepare.height, prepare.width)
        if held_out.first_frames is not None:
            held_out = measured  # a caption goes with the first frame of its clip
        if wanted.prompts_file is None:
            prompts = [held_out.caption(i % len(held_out)) for i in range(wanted.prompts)]
        else:
            listed = read_prompts(wanted.prompts_file)
            prompts = [listed[i % len(listed)] for i in range(wanted.prompts)]
            digits = digits and set(prompts) <= {attributes.caption for attributes in ALL_ATTRIBUTES}
        return cls(
            prompts=tuple(prompts),
            seeds=tuple(params.seed + i for i in range(wanted.prompts)),
            size=ClipSize(prepare.frames, prepare.height, prepare.width, prepare.max_sequence_length),
            latents=measured.latents,
            text=measured.text_of_samples,
            timesteps=tuple(spread_timesteps(wanted.velocity_timesteps, family.noise_range if family else (0.0, 1.0))),
            seed=params.seed,
            inference_steps=wanted.inference_steps,
            guidance_scale=wanted.guidance_scale,
            batch_size=wanted.batch_size,
            image=measured.image,
            first_frames=measured.first_frames,
            other_sizes=tuple(HeldOut(data.latents, data.text_of_samples, data.image) for data in others),
            judged=digits,
            guidance_is_told=family is not None and family.guidance_is_told,
        )

    @property
    def held_out(self) -> tuple[HeldOut, ...]:
        """The clips of each size."""
        return HeldOut(self.latents, self.text, self.image), *self.other_sizes

    @property
    def images(self) -> torch.Tensor | None:
        """The first frame of each prompt's video (prompts, 3, h, w); None where the family takes none."""
        if self.first_frames is None:
            return None
        return self.first_frames[torch.arange(len(self.prompts)) % len(self.first_frames)]

    @property
    def predictions_per_video(self) -> int:
        """Velocities that the model predicts for one video: one a step, or two with guidance that is not told."""
        return self.inference_steps * (2 if self.guidance_scale > 1 and not self.guidance_is_told else 1)

    @property
    def predictions(self) -> int:
        """How many predictions `observe` reports to `on_batch` in total. A video counts as all of its own, so that the time
        left can be told from those done."""
        clips = sum(len(of_size.latents) for of_size in self.held_out)
        return len(self.prompts) * self.predictions_per_video + len(self.timesteps) * clips


@dataclass(frozen=True)
class Observation:
    """The answers of one model."""

    latents: torch.Tensor  # sampled, (n, ...)
    clips: torch.Tensor  # (n, 3, t, h, w) in [-1, 1]
    velocities: torch.Tensor  # (timesteps, held-out clips, ...)
    other_velocities: tuple[torch.Tensor, ...] = ()  # those of clips of other sizes


def load_observation(path: str | Path) -> Observation:
    """One saved as safetensors with the tensors `latents`, `clips` and `velocities`."""
    from safetensors.torch import load_file

    tensors = load_file(path)
    return Observation(tensors["latents"], tensors["clips"], tensors["velocities"])


@dataclass(frozen=True)
class Answers:
    """What one model makes in the trial, piece by piece."""

    latents: Pieces  # sampled
    velocities: tuple[Pieces, ...]  # of each size of clips

    def found(self, trial: Trial) -> int:
        """Predictions that this process need not make: they are there, or others make them."""
        return self.latents.found * trial.predictions_per_video + sum(pieces.found for pieces in self.velocities)


def observe(
    model: Any, family: Family, trial: Trial, guidance_stop: float = 1.0, on_batch: OnBatch = silent, store: Path | None = None
) -> Observation:
    """Run one model, a pipeline or a PipelineFolder, through the trial; see `answer` and `collect`."""
    return collect(answer(model, family, trial, guidance_stop, on_batch, store), model, family, trial, store)


def answer(
    model: Any,
    family: Family,
    trial: Trial,
    guidance_stop: float = 1.0,
    on_batch: OnBatch = silent,
    store: Path | None = None,
    share: Share = ALONE,
    on_found: OnBatch = silent,
) -> Answers:
    """Sample the videos' latents and predict the velocities. `guidance_stop` is the model's own, see models/family.py.

    With a folder `store`, which belongs to this model and trial alone, each batch is kept there as it is done: what is there
    is not made again, and this process makes its `share` of the rest. `on_batch(predictions)` is called as work is done,
    `on_found(predictions)` for what others make or made; together `Trial.predictions`.
    """
    size, batch_size = trial.size, trial.batch_size
    of_sizes = [
        Pieces(velocity_lengths(len(clips.latents), trial.timesteps, batch_size), store, f"velocities-{number}", share)
        for number, clips in enumerate(trial.held_out)
    ]
    answers = Answers(Pieces(lengths(len(trial.prompts), batch_size), store, "latents", share), tuple(of_sizes))
    on_found(answers.found(trial))
    videos = answers.latents.todo
    texts = encode_all(model, family, trial.prompts, trial.seeds, size, trial.guidance_scale, batch_size, wanted=videos)
    if not videos and not any(pieces.todo for pieces in of_sizes):
        return answers
    with holding(model, "transformer") as pipeline:
        denoise_all(
            pipeline,
            family,
            texts,
            trial.seeds,
            size,
            inference_steps=trial.inference_steps,
            guidance_scale=trial.guidance_scale,
            batch_size=batch_size,
            guidance_stop=guidance_stop,
            on_batch=lambda clips: on_batch(clips * trial.predictions_per_video),
            latents=answers.latents,
            images=trial.images,
        )
        for pieces, clips in zip(of_sizes, trial.held_out, strict=True):
            add_velocities(
                pieces,
                getattr(pipeline, family.component),
                family,
                clips.latents,
                clips.text,
                trial.timesteps,
                seed=trial.seed,
                batch_size=batch_size,
                on_batch=on_batch,
                image=clips.image,
            )
    return answers


def collect(answers: Answers, model: Any, family: Family, trial: Trial, store: Path | None = None) -> Observation:
    """The answers of all processes, and the clips that the latents decode to. With `store` they lie in files there, so that
    they need no memory."""
    latents = answers.latents.tensor()
    first, *others = (pieces.tensor().unflatten(0, (len(trial.timesteps), -1)) for pieces in answers.velocities)
    clips = decode_all(model, family, latents, trial.size, trial.batch_size, store)
    return Observation(latents, clips, first, tuple(others))


def compare(reference: Observation, candidate: Observation, trial: Trial) -> dict[str, float]:
    """Scores of the candidate, each a mean over the trial.

    colour, direction, digit: fractions (absent for other data than the embedded digits); psnr_db; ssim;
    velocity_mse: on held-out latents, mean over timesteps; latent_mse: of the sampled latents; motion, flicker
    (absent for images): the candidate's own, see qvgen/evaluation/quality/motion.py.
    """
    return {
        **prompt_accuracy(candidate, trial),
        "psnr_db": float(similarity.psnr_db(reference.clips, candidate.clips).mean()),
        "ssim": float(similarity.ssim(reference.clips, candidate.clips).mean()),
        "velocity_mse": sum(velocity_mse(reference, candidate)) / len(trial.timesteps),
        "latent_mse": float(similarity.mse(reference.latents, candidate.latents).mean()),
        **movement(candidate),
    }


def prompt_accuracy(observation: Observation, trial: Trial) -> dict[str, float]:
    """{"colour", "direction", "digit"} as fractions; {} for data other than the embedded digits, which nothing here can
    judge. Raises ValueError for a prompt that is no caption of the digits."""
    if not trial.judged:
        return {}
    return judge(observation.clips, [parse_caption(prompt) for prompt in trial.prompts]).as_dict()


def velocity_mse(reference: Observation, candidate: Observation) -> list[float]:
    """Mean squared difference of the predicted velocities, one value per timestep of the trial. Of clips of several sizes the
    mean over clips: each counts alike, whatever its size."""
    pairs = zip(
        (reference.velocities, *reference.other_velocities), (candidate.velocities, *candidate.other_velocities), strict=True
    )
    of_sizes = [(a.shape[1], similarity.mse(a, b).tolist()) for a, b in pairs]
    clips = sum(count for count, _ in of_sizes)
    return [sum(count * errors[t] for count, errors in of_sizes) / clips for t in range(len(reference.velocities))]


def movement(observation: Observation) -> dict[str, float]:
    """{"motion", "flicker"}, means over the clips; {} for images."""
    if observation.clips.shape[2] == 1:
        return {}
    return {
        "motion": float(motion.motion(observation.clips).mean()),
        "flicker": float(motion.flicker(observation.clips).mean()),
    }
