"""params.yaml as a frozen, typed tree. Every knob of the pipeline is declared here, once, with its limits.

`load_params` refuses unknown keys, wrong types and impossible combinations, all at once, each with its path, the value
found and what is allowed.
"""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from qvgen.device import PATTERN as DEVICE
from qvgen.faults import explain
from qvgen.gate import Gate
from qvgen.methods.method import Method
from qvgen.methods.registry import METHODS
from qvgen.phi.rank_decay import Annealing, RankDecaySchedule
from qvgen.quant.scheme import QuantScheme
from qvgen.quant.search.settings import SearchSettings
from qvgen.safe_yaml import read_yaml

LARGEST = 10**9  # of steps, clips, pixels and other counts: what is larger is a slip, and would run for years
Share = Annotated[float, Field(ge=0, lt=1)]
Side = Annotated[int, Field(ge=16, le=LARGEST, multiple_of=16)]  # of a frame, pixels


def _known_method(name: str) -> str:
    if name not in METHODS:
        raise ValueError(f"unknown method; choose one of {', '.join(METHODS)}")
    return name


class ParamsError(ValueError):
    """params.yaml is not usable; the message lists every fault."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Fetch(_Section):
    source: str = Field(min_length=1, description="folder of a diffusers pipeline, or a hub id such as org/name")
    revision: str | None = Field(default=None, pattern=r"^[0-9a-f]{40}$", description="commit of the hub repository")
    expert: Literal["transformer", "transformer_2"] | None = Field(default=None, description="of two, the one that is trained")

    @model_validator(mode="after")
    def _full_precision(self) -> Self:
        if self.source.startswith("models:/"):
            raise ValueError(
                f"source {self.source!r:.200} is a model of the registry, which is packed, and the stages train and judge by "
                "full precision: give the folder or hub id that it was made of (its run in MLflow names it)"
            )
        if re.fullmatch(r"[\w.-]+/[\w.-]+@.*", self.source):
            raise ValueError(f"source {self.source!r:.200}: here the commit after @ belongs into fetch.revision")
        return self


class Prepare(_Section):
    source: Literal["digits", "videos"]
    folder: str | None = Field(default=None, description="of source 'videos', with captions.csv, captions.jsonl or .txt")
    frames: int = Field(ge=1, le=LARGEST)
    height: Side = Field(description="of the videos that are made, and of clips where there are no buckets")
    width: Side
    buckets: list[Annotated[tuple[Side, Side], Field(strict=False)]] = Field(
        default_factory=list, description="height and width of clips: each video takes the nearest aspect ratio"
    )
    fps: Annotated[float, Field(gt=0, le=1000)] | Literal["native"] | None = Field(
        default=None, description="of clips from videos; null: what the model was trained with; native: every frame"
    )
    max_sequence_length: int = Field(ge=1, le=512, description="text tokens the model was trained with")
    clips_per_video: int = Field(default=1, ge=1, le=LARGEST, description="spread over what a clip leaves of the video")
    start: Literal["first", "centre", "random"] = Field(default="first", description="where in its share of the video")
    max_skipped: Share = Field(default=0.0, description="share of clips that may be unreadable; they are listed")
    dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="how latents and text are stored")
    vae_tiling: bool = Field(default=False, description="the VAE works in tiles with blended seams, evaluation's too")
    train_clips: int = Field(ge=1, le=LARGEST)
    calibration_clips: int = Field(ge=1, le=LARGEST)
    held_out_clips: int = Field(ge=1, le=LARGEST)
    batch_size: int = Field(ge=1, le=LARGEST)
    shard_size: int = Field(ge=1, le=LARGEST, description="clips per safetensors shard")
    store: Annotated[str, Field(pattern=r"^[a-z][a-z0-9+.-]*://[^@\s]+$")] | None = Field(
        default=None, description="address of an object store for the shards, without keys; null: they lie in artifacts/data"
    )

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if (self.source == "videos") != (self.folder is not None):
            raise ValueError("folder belongs to source 'videos', and source 'videos' needs it")
        if self.buckets and self.source != "videos":
            raise ValueError("buckets belong to source 'videos'")
        if self.buckets and (self.height, self.width) not in self.buckets:
            raise ValueError(f"buckets must hold [height, width] = [{self.height}, {self.width}], which evaluation measures")
        if len({Fraction(*bucket) for bucket in self.buckets}) < len(self.buckets):
            raise ValueError("two buckets have the same aspect ratio: no video could tell them apart, remove one")
        return self


class Calibrate(SearchSettings):
    batch_size: int = Field(ge=1, le=LARGEST)
    tokens_per_group: int = Field(ge=16, le=LARGEST, description="activation rows kept per layer and timestep group")


class Qat(_Section):
    """Training with Φ at full rank, and the optimizer settings that the decay stage continues with."""

    steps: int = Field(ge=0, le=LARGEST, description="optimizer steps before rank decay starts")
    batch_size: int = Field(ge=1, le=LARGEST)
    learning_rate: float = Field(gt=0, lt=1, description="weights and Φ")
    quantizer_learning_rate: float = Field(gt=0, lt=1, description="scales and zero points")
    clip_learning_rate: float = Field(gt=0, lt=1, description="logits of the activation clips")
    optimizer: Literal["adamw", "adamw8bit"] = Field(
        default="adamw", description="adamw8bit: moments in blocks of 256 codes of 8 bits; needs torchao"
    )
    betas: tuple[Share, Share] = Field(strict=False, description="AdamW's moment decay rates")
    weight_decay: float = Field(ge=0, lt=1, description="weights and Φ only; never scales, zero points, clips")
    warmup_fraction: float = Field(ge=0, lt=1)
    final_learning_rate: float = Field(ge=0, le=1, description="last learning rate over the first, cosine in between")
    max_grad_norm: float = Field(gt=0)
    caption_dropout: float = Field(ge=0, lt=1)
    ema_decay: float | None = Field(default=None, gt=0, lt=1, description="null: no average of the weights")
    checkpoint_every: int = Field(ge=1, le=LARGEST, description="steps between resume checkpoints")
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32", description="bfloat16: autocast, and a teacher in bfloat16; weights and quantizers stay float32"
    )


class Decay(_Section):
    """Rank decay of Φ, paper section 3.3."""

    initial_rank: int = Field(ge=0, le=LARGEST, description="0: no Φ")
    decay_ratio: float = Field(gt=0, le=1, description="λ, the share of the rank that one phase removes")
    annealing: Annealing
    initialization: Literal["weight_error", "zero"] = Field(default="weight_error", description="what Φ starts as")
    redecompose: bool = Field(default=True, description="decompose Φ anew after each phase; false is the public code's fault")
    phase_steps: int = Field(ge=1, le=LARGEST)
    final_steps: int = Field(ge=0, le=LARGEST, description="steps after Φ is gone")


class Pack(_Section):
    dtype: Literal["float32", "bfloat16", "float16"] = Field(description="how tensors outside the packed layers are stored")


class Evaluate(_Section):
    prompts: int = Field(ge=1, le=LARGEST, description="videos of each model, each with its own seed")
    prompts_file: str | None = Field(default=None, min_length=1, description=".txt: a prompt a line; .jsonl; null: captions")
    inference_steps: int = Field(ge=1, le=1000)
    guidance_scale: float = Field(ge=1)
    batch_size: int = Field(ge=1, le=LARGEST)
    velocity_timesteps: int = Field(ge=1, le=1000, description="evenly spread timesteps at which velocities are compared")
    videos: int = Field(ge=0, le=LARGEST, description="side-by-side videos written")


class Benchmark(_Section):
    repetitions: int = Field(ge=3, le=LARGEST, description="interleaved measurements; the median is reported")
    batch_size: int = Field(ge=1, le=LARGEST)
    threads: int | None = Field(default=None, ge=1, description="null: all cores")


class Register(_Section):
    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$", description="registered model in MLflow")
    upload: Literal["auto", "copy", "link"] = Field(
        default="auto", description="copy: the packed files go to MLflow; link: they stay in DVC; auto: copy up to 2 GB"
    )


class FlowSettings(_Section):
    runner: Literal["threads", "dask", "ray"]
    workers: int = Field(ge=1, le=256, description="stages that run at a time, where the graph allows it")
    alone: list[str] = Field(default_factory=list, description="stages beside which no other runs: they measure time")
    schedule: str = Field(min_length=9, description="of retraining, as in cron: minute hour day month weekday")
    timezone: str = Field(min_length=1, description="of the schedule, such as Europe/Vienna")
    deadline: float | None = Field(default=None, gt=0, description="seconds after which a stage is stopped; null: never")
    deadlines: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict, description="of single stages")
    retries: dict[str, Annotated[int, Field(ge=0)]] = Field(default_factory=dict, description="of stages that fail: how often")


class Compute(_Section):
    """Where and in which portions stages compute. No stage depends on it: results are the same up to rounding."""

    device: str = Field(default="auto", pattern=DEVICE, description="auto, cpu, cuda, cuda:N or mps")
    processes: int = Field(default=1, ge=1, le=256, description="that share a batch in training, each on a GPU of its own")
    shard: bool = Field(default=False, description="processes share student, teacher and moments too, by FSDP2")
    micro_batch: int | None = Field(default=None, ge=1, le=LARGEST, description="clips trained at once; gradients add up")
    checkpointing: bool = Field(default=False, description="blocks run again in the backward pass instead of being kept")
    workers: int = Field(default=0, ge=0, le=256, description="that read ahead: processes in training, threads in prepare")
    checkpoint_seconds: float = Field(default=0.0, ge=0, description="least time between two resume checkpoints")


class Params(_Section):
    seed: int = Field(ge=0, lt=2**63)
    method: Annotated[str, AfterValidator(_known_method)]
    fetch: Fetch
    prepare: Prepare
    scheme: QuantScheme
    calibrate: Calibrate
    qat: Qat
    decay: Decay
    pack: Pack
    evaluate: Evaluate
    benchmark: Benchmark
    register_: Register = Field(alias="register")
    flow: FlowSettings
    gate: Gate
    compute: Compute = Compute()

    @model_validator(mode="after")
    def _possible(self) -> Self:
        faults = []
        try:
            _ = self.schedule
        except ValueError as error:
            faults.append(str(error))
        if self.evaluate.prompts < self.evaluate.videos:
            faults.append(
                f"evaluate.videos = {self.evaluate.videos} but only evaluate.prompts = {self.evaluate.prompts} are generated"
            )
        share, rest = divmod(self.qat.batch_size, self.compute.processes)
        if rest:
            faults.append(
                f"qat.batch_size = {self.qat.batch_size} clips cannot be shared equally by compute.processes = "
                f"{self.compute.processes}: choose a multiple of {self.compute.processes}"
            )
        elif self.compute.micro_batch is not None and share % self.compute.micro_batch:
            each = f" / compute.processes = {share}" if self.compute.processes > 1 else ""
            faults.append(
                f"compute.micro_batch = {self.compute.micro_batch} does not divide qat.batch_size = "
                f"{self.qat.batch_size}{each}: choose a divisor, or null"
            )
        if self.compute.shard and self.chosen.finishes_whole:
            faults.append(
                f"compute.shard = true: method {self.method} needs the whole trained student, which no process has then"
            )
        if self.compute.shard and self.qat.optimizer != "adamw":
            faults.append(f"compute.shard = true shares moments of qat.optimizer: adamw, not of {self.qat.optimizer}")
        for name, value in self.scheme.extras.items():
            if name not in self.chosen.extras:
                users = [method for method, card in METHODS.items() if name in card.extras]
                faults.append(f"scheme.{name} = {value} is of no use to method {self.method}; it is for {', '.join(users)}")
        if faults:
            raise ValueError("; ".join(faults))
        return self

    @property
    def effective_scheme(self) -> QuantScheme:
        """`scheme` as the chosen method uses it: what every stage quantizes with."""
        return self.scheme_of(self.method)

    def scheme_of(self, method: str) -> QuantScheme:
        """`scheme` with what `method` adds to each layer, as given in params.yaml or else the method's default, and without
        what only others add."""
        extras = METHODS[method].extras
        given = {name: value for name, value in self.scheme.extras.items() if name in extras}
        return QuantScheme.model_validate({**dict(self.scheme.without_extras()), **extras, **given})

    @property
    def chosen(self) -> Method:
        """The card that `method` names."""
        return METHODS[self.method]

    @property
    def schedule(self) -> RankDecaySchedule:
        """Steps, rank and γ of this run, as its method has them. Raises ValueError for a rank that the method cannot take."""
        qat, decay = self.qat, self.decay
        return self.chosen.schedule(
            RankDecaySchedule(
                initial_rank=decay.initial_rank,
                decay_ratio=decay.decay_ratio,
                annealing=decay.annealing,
                hold_steps=qat.steps,
                phase_steps=decay.phase_steps,
                final_steps=decay.final_steps,
            )
        )


def load_params(path: str | Path = "params.yaml") -> Params:
    """Read and check params.yaml. Raises ParamsError that lists every fault."""
    path = Path(path)
    if not path.is_file():
        raise ParamsError(f"{path} is not a file; run from the project folder")
    try:
        tree = read_yaml(path)
    except ValueError as error:
        raise ParamsError(str(error)) from None
    if not isinstance(tree, dict):
        raise ParamsError(f"{path} must hold sections, found {type(tree).__name__}")
    return validate_params(tree, path)


def validate_params(tree: dict[str, Any], source: str | Path) -> Params:
    """Check a tree of parameters; `source` names it in messages. Raises ParamsError that lists every fault."""
    try:
        return Params.model_validate(tree)
    except ValidationError as error:
        raise ParamsError(explain(source, error, Params)) from None
