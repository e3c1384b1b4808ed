"""Both evaluations of a guided step in one batch: what two calls give up to rounding, and never an answer to another call."""

import copy
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from diffusers import FirstBlockCacheConfig

from qvgen.integrations.fused import fuse_
from qvgen.models.registry import families
from qvgen.models.tiny import TINY_CLIP
from qvgen.nn.swap import convert_, prepare_
from qvgen.quant.scheme import QuantArgs, QuantScheme
from qvgen.sampling import one_batch
from qvgen.sampling.clip import own_scheduler
from qvgen.sampling.one_batch import both_at_once
from qvgen.sampling.sample import denoise

WAN = families()["wan"]()
STEPS, SCALE = 5, 3.0
# Relative to the norm of the latents. float32: products of embedders in batches of other sizes, over 5 steps. Packed at 8
# bits: where such a rounding moves a code, 1/255 of a token's range.
ROUNDING, CODE_FLIPS = 1e-5, 2e-2
PACKED = QuantScheme(
    weights=QuantArgs(num_bits=8), input_activations=QuantArgs(num_bits=8, strategy="token"), timestep_groups=4
)


def pipeline_of(family: str) -> Any:
    pipeline = families()[family].tiny_pipeline(0)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def fp32() -> Any:
    return pipeline_of("wan")


@pytest.fixture(scope="module")
def packed() -> Any:
    pipeline = pipeline_of("wan")
    prepare_(pipeline.transformer, PACKED, default_targets=WAN.default_targets)
    convert_(pipeline.transformer)
    fuse_(pipeline.transformer)
    return pipeline


def texts(n: int, seed: int = 0, tokens: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, tokens, 16, generator=generator), torch.randn(n, tokens, 16, generator=generator)


def latents(pipeline: Any, n: int = 1, seed: int = 0, scale: float = SCALE, family: Any = WAN, **options: Any) -> torch.Tensor:
    how = {"inference_steps": STEPS, "guidance_scale": scale} | options
    text, negative = texts(n, seed)
    return denoise(pipeline, family, (text, negative if scale > 1 else None), list(range(n)), TINY_CLIP, **how)


@contextmanager
def batches(pipeline: Any) -> Iterator[list[int]]:
    """Samples of each call of the transformer."""
    sizes: list[int] = []
    note = lambda _model, _args, kwargs: sizes.append(len(kwargs["hidden_states"]))  # noqa: E731
    handle = pipeline.transformer.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield sizes
    finally:
        handle.remove()


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize(("name", "bound"), [("fp32", ROUNDING), ("packed", CODE_FLIPS)])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("stop", [1.0, 0.3])
def test_the_latents_of_two_calls_a_step(
    name: str, bound: float, n: int, stop: float, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = request.getfixturevalue(name)
    with batches(pipeline) as ours:
        made = latents(pipeline, n, guidance_stop=stop)
    monkeypatch.setattr(one_batch, "MOST_TOKENS", 0)
    with batches(pipeline) as theirs:
        expected = latents(pipeline, n, guidance_stop=stop)
    guided = len(theirs) - STEPS
    assert (guided == STEPS) == (stop == 1) and theirs == [n] * len(theirs)
    assert ours == [2 * n] * guided + [n] * (STEPS - guided)
    assert relative(made, expected) < bound
    assert relative(latents(pipeline, n, seed=1), expected) > 0.05  # the bound tells texts apart


def test_the_next_call_with_other_prompts(fp32: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    transformer, made = fp32.transformer, [latents(fp32, seed=seed) for seed in (0, 1, 0)]
    assert fp32.transformer is transformer and torch.equal(made[0], made[2])
    monkeypatch.setattr(one_batch, "MOST_TOKENS", 0)
    assert relative(made[1], latents(fp32, seed=1)) < ROUNDING


def test_without_guidance_there_is_one_call(fp32: Any) -> None:
    with batches(fp32) as sizes:
        latents(fp32, 2, scale=1.0)
    assert sizes == [2] * STEPS and both_at_once(fp32, *texts(2)[:1], None) is fp32


def test_more_tokens_than_the_bound_are_called_twice(fp32: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = 2 * (3 * 2 * 2)  # of two clips
    for bound, expected in ((tokens, [4] * STEPS), (tokens - 1, [2] * (2 * STEPS))):
        monkeypatch.setattr(one_batch, "MOST_TOKENS", bound)
        with batches(fp32) as sizes:
            latents(fp32, 2)
        assert sizes == expected


def test_a_pipeline_that_batches_itself() -> None:
    pipeline = pipeline_of("cogvideox")
    with batches(pipeline) as sizes:
        latents(pipeline, 2, family=families()["cogvideox"].from_scheduler(pipeline.scheduler.config))
    assert sizes == [4] * STEPS


def test_what_is_not_batched(fp32: Any) -> None:
    text, negative = texts(1)
    assert both_at_once(fp32, text, negative) is not fp32
    assert both_at_once(fp32, text, texts(1, tokens=9)[1]) is fp32
    offloaded = copy.deepcopy(fp32)
    cpu_offload(offloaded.transformer, torch.device("cpu"))
    assert both_at_once(offloaded, text, negative) is offloaded
    cached = copy.deepcopy(fp32)
    cached.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    assert both_at_once(cached, text, negative) is cached


_called: list[Any] = []


def wrapper_of(pipeline: Any, text: torch.Tensor, negative: torch.Tensor) -> Any:
    """What a pipeline that was called with guidance calls as its transformer."""
    guided = copy.copy(pipeline)
    guided._guidance_scale = SCALE
    called = both_at_once(guided, text, negative)
    _called.append(called)  # the wrapper does not hold it
    return called.transformer


def arguments(text: torch.Tensor) -> dict[str, Any]:
    x = torch.randn(1, 4, 3, 4, 4, generator=torch.Generator().manual_seed(5))
    timestep = torch.tensor([500.0])
    return {"hidden_states": x, "timestep": timestep, "encoder_hidden_states": text, "return_dict": False}


def other_latents(call: dict[str, Any]) -> None:
    call["hidden_states"].add_(1)  # the very tensor of the first call


def other_timestep(call: dict[str, Any]) -> None:
    call["timestep"].sub_(100)


def other_text(call: dict[str, Any]) -> None:
    call["encoder_hidden_states"].mul_(2)


def text_of_the_first_call(call: dict[str, Any]) -> None:
    call["encoder_hidden_states"] = texts(1)[0]


def text_of_another_shape(call: dict[str, Any]) -> None:
    call["encoder_hidden_states"] = call["encoder_hidden_states"][:, :5]


def text_of_another_dtype(call: dict[str, Any]) -> None:
    call["encoder_hidden_states"] = call["encoder_hidden_states"].double()


def more_arguments(call: dict[str, Any]) -> None:
    call["attention_kwargs"] = {"scale": 1.0}


CHANGES = [
    other_latents,
    other_timestep,
    other_text,
    text_of_the_first_call,
    text_of_another_shape,
    text_of_another_dtype,
    more_arguments,
]


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_another_second_call_is_computed_as_asked(fp32: Any, change: Callable[[dict[str, Any]], None]) -> None:
    text, negative = texts(1)
    wrapper = wrapper_of(fp32, text, negative)
    first = arguments(text)
    second = first | {"encoder_hidden_states": negative}
    with batches(fp32) as sizes:
        wrapper(**first)
        change(second)
        if change is text_of_another_dtype:
            with pytest.raises(RuntimeError, match="same dtype"):
                wrapper(**second)
        else:
            assert torch.equal(wrapper(**second)[0], fp32.transformer(**second)[0])
    assert sizes[:2] == [2, 1]


@torch.no_grad()
def test_an_answer_is_given_once_and_embeddings_may_change_on_the_way(fp32: Any) -> None:
    text, negative = texts(1)
    wrapper = wrapper_of(fp32, text, negative)
    first = arguments(text)
    second = first | {"encoder_hidden_states": negative}
    with batches(fp32) as sizes:
        made = [wrapper(**call)[0] for call in (first, second, second)]
        text.mul_(2)  # that of the callers, as a callback of a pipeline may
        changed = wrapper(**first)[0]
    assert sizes == [2, 1, 1]
    assert torch.allclose(made[1], made[2], atol=1e-5) and not torch.allclose(made[0], made[1], atol=1e-2)
    assert torch.equal(changed, fp32.transformer(**first)[0])


@torch.no_grad()
def test_a_second_call_that_never_comes_ends_it(fp32: Any) -> None:
    text, negative = texts(1)
    wrapper = wrapper_of(fp32, text, negative)
    with batches(fp32) as sizes:
        for _ in range(3):
            wrapper(**arguments(text))
        wrapper(**arguments(negative))
    assert sizes == [2, 1, 1, 1]


def test_an_error_on_the_way_leaves_the_pipeline_as_it_was(fp32: Any) -> None:
    expected, transformer, before = latents(fp32), fp32.transformer, set(vars(fp32))
    calls: list[int] = []

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of memory")

    handle = transformer.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        latents(fp32)
    handle.remove()
    assert fp32.transformer is transformer and set(vars(fp32)) == before
    assert torch.equal(latents(fp32), expected)


def test_nothing_of_it_outlives_the_call(fp32: Any) -> None:
    """A cycle would keep the transformer's memory."""
    called = both_at_once(fp32, *texts(1))
    kept = weakref.ref(called.transformer)
    gc.disable()
    try:
        del called
        assert kept() is None
    finally:
        gc.enable()


def test_threads_that_share_a_transformer(packed: Any) -> None:
    alone = [latents(packed, seed=seed) for seed in range(6)]
    together = threading.Barrier(3)

    def made(number: int) -> list[torch.Tensor]:
        torch.set_num_threads(1)  # a number of each thread's own
        pipeline = own_scheduler(packed)
        together.wait()
        return [latents(pipeline, seed=(seed + number) % 6) for seed in range(6)]

    with ThreadPoolExecutor(3) as pool:
        for number, found in enumerate(pool.map(made, range(3))):
            assert all(torch.equal(x, alone[(seed + number) % 6]) for seed, x in enumerate(found))
