"""Fused blocks against diffusers' own, both around the same packed layers."""

import copy
from typing import Any

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel, WanTransformer3DModel
from diffusers.models.attention_processor import CogVideoXAttnProcessor2_0
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import nn

from qvgen.integrations.fused import attention, fuse_, unfuse_
from qvgen.integrations.fused.cogvideox import PackedCogVideoXAttnProcessor
from qvgen.integrations.fused.wan import PackedWanAttnProcessor
from qvgen.models.family import Family
from qvgen.models.registry import families
from qvgen.nn.packed_linear import packed_layers
from qvgen.nn.swap import convert_, prepare_
from qvgen.nn.timestep import set_timestep
from qvgen.quant.scheme import QuantArgs, QuantScheme

# Relative to the output's norm: sums in another order ...
ROUNDING = 1e-6
# ... and where that moves an input's code by one, a step of a token's range, at 8 bits 1/255 of it.
CODE_FLIPS = 2e-3
# In bfloat16 every model is this far from itself in float32, and which way each value was rounded is chance.
NO_WORSE = 1.1

_SIZES = {"num_attention_heads": 2, "attention_head_dim": 48, "num_layers": 3, "in_channels": 4, "out_channels": 4}
WAN = {**_SIZES, "ffn_dim": 160, "text_dim": 24, "freq_dim": 16}
COGVIDEOX = {**_SIZES, "time_embed_dim": 16, "text_embed_dim": 24, "max_text_seq_length": 9}
COGVIDEOX |= {"sample_width": 10, "sample_height": 8, "sample_frames": 9}
CONFIGS: dict[str, dict[str, Any]] = {
    "wan": WAN,
    "cogvideox": COGVIDEOX,  # 2B
    "cogvideox rotary": COGVIDEOX | {"use_rotary_positional_embeddings": True, "patch_size_t": 2, "patch_bias": False},  # 1.5
}
KIND = pytest.mark.parametrize("kind", CONFIGS)
ATTENTIONS = {"wan": 6, "cogvideox": 3, "cogvideox rotary": 3}  # of three blocks


def family_of(model: nn.Module) -> Family:
    return families()["wan" if isinstance(model, WanTransformer3DModel) else "cogvideox"].from_scheduler({})


def full(kind: str, **config: object) -> Any:
    torch.manual_seed(0)
    model = (WanTransformer3DModel if kind == "wan" else CogVideoXTransformer3DModel)(**(CONFIGS[kind] | config)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("scale_shift_table") or ".norm1.linear" in name or ".norm2.linear" in name:
            parameter.data.mul_(20 if kind == "wan" else 3)  # random ones would leave the gates at nearly nothing
        elif "norm" in name:
            parameter.data.add_(torch.randn_like(parameter) / 4)
    return model


def packed(kind: str, bits: int, **config: object) -> Any:
    model = full(kind, **config)
    scheme = QuantScheme(
        weights=QuantArgs(num_bits=bits), input_activations=QuantArgs(num_bits=bits, strategy="token"), timestep_groups=4
    )
    prepare_(model, scheme, default_targets=family_of(model).default_targets)
    convert_(model)
    return model


def inputs(model: Any) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (2, 4, 3, 8, 10) if isinstance(model, WanTransformer3DModel) else (2, 4, 4, 8, 10)
    return [torch.randn(size, generator=generator).to(model.dtype) for size in (shape, (2, 9, 24))]


def run(model: Any, timestep: torch.Tensor | None = None) -> torch.Tensor:
    of = getattr(model, "_orig_mod", model)
    latents, text = inputs(of)
    timestep = torch.tensor([100.0, 800.0]) if timestep is None else timestep
    with torch.no_grad():
        return family_of(of).predict(model, latents, timestep, text).float()


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@KIND
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_equals_diffusers_in_float32(kernels: str, bits: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QVGEN_KERNELS", kernels)
    model = packed(kind, bits)
    fused = copy.deepcopy(model)
    assert fuse_(fused) == 3
    assert relative(run(fused), run(model)) < CODE_FLIPS
    unfuse_(fused)
    assert torch.equal(run(fused), run(model))
    assert {*map(type, fused.attn_processors.values())} == {*map(type, model.attn_processors.values())}


@KIND
@pytest.mark.parametrize("bits", [4, 8])
def test_is_as_near_to_float32_in_bfloat16_as_diffusers(bits: int, kind: str) -> None:
    exact = run(packed(kind, bits))
    model = packed(kind, bits).bfloat16()
    fused = copy.deepcopy(model)
    fuse_(fused)
    assert 0 < relative(run(fused), exact) < NO_WORSE * relative(run(model), exact)


@pytest.mark.parametrize("cross_attn_norm", [True, False])
def test_a_timestep_per_token_and_no_cross_attention_norm(cross_attn_norm: bool) -> None:
    model = packed("wan", 8, cross_attn_norm=cross_attn_norm)
    fused = copy.deepcopy(model)
    fuse_(fused)
    per_token = torch.full((2, 3 * 4 * 5), 500.0)
    assert relative(run(fused, per_token), run(model, per_token)) < CODE_FLIPS


@KIND
@pytest.mark.parametrize("targets", [r"(attn1\.to_q|ffn?\.net\.2)", r"(attn1\.to_[kv]|attn1\.to_out\.0|ffn?\.net\.0\.proj)"])
def test_layers_left_in_full_precision_are_called_as_they_are(targets: str, kind: str) -> None:
    model = full(kind)
    prepare_(model, QuantScheme(timestep_groups=1), default_targets=(rf"re:.*blocks\.\d\.{targets}",))
    convert_(model)
    fused = copy.deepcopy(model)
    assert fuse_(fused) == 3
    assert relative(run(fused), run(model)) < ROUNDING


@KIND
def test_layers_with_hooks_are_called_once_with_all_tokens(kind: str) -> None:
    model = packed(kind, 8)
    fused = copy.deepcopy(model)
    fuse_(fused)
    calls: dict[str, list[Any]] = {}

    def note(name: str, output: Any) -> None:
        calls.setdefault(name, []).append(output.shape)

    for name, layer in packed_layers(fused):
        layer.register_forward_hook(lambda *args, name=name: note(name, args[-1]))
    assert relative(run(fused), run(model)) < CODE_FLIPS
    assert calls.keys() == dict(packed_layers(fused)).keys() and all(len(shapes) == 1 for shapes in calls.values())


@KIND
def test_gradients_are_those_through_diffusers_blocks(kind: str) -> None:
    model = packed(kind, 8)
    fused = copy.deepcopy(model)
    fuse_(fused)
    gradients = []
    for one in (fused, model):
        latents, text = inputs(one)
        family_of(one).predict(one, latents.requires_grad_(), torch.tensor([100.0, 800.0]), text).square().sum().backward()
        gradients.append(latents.grad)
    assert relative(*gradients) < CODE_FLIPS


@KIND
def test_a_processor_set_by_the_user_wins(kind: str) -> None:
    model = packed(kind, 8)
    fuse_(model)
    own = (PackedWanAttnProcessor, PackedCogVideoXAttnProcessor)
    assert all(isinstance(processor, own) for processor in model.attn_processors.values())
    calls = []
    theirs: Any = WanAttnProcessor if kind == "wan" else CogVideoXAttnProcessor2_0

    class Counting(theirs):
        def __call__(self, *args: object, **kwargs: object) -> Any:
            calls.append(1)
            return super().__call__(*args, **kwargs)

    model.set_attn_processor(Counting())
    run(model)
    unfuse_(model)
    assert all(isinstance(processor, Counting) for processor in model.attn_processors.values())
    assert len(calls) == ATTENTIONS[kind]


@KIND
def test_an_attention_backend_set_by_the_user_wins(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = packed(kind, 8)
    fuse_(model)
    expected = run(model)
    monkeypatch.setenv(attention.ENVIRONMENT, "no such")
    with pytest.raises(ValueError, match="is not one of"):
        run(model)
    model.set_attention_backend("native")
    assert relative(run(model), expected) < CODE_FLIPS


@pytest.mark.parametrize("why", ["dropout", "kwargs"])
def test_what_stands_between_a_cogvideox_block_and_its_attention(why: str) -> None:
    """Dropout in training, which drops all here, and arguments of the attention's own: of neither fused blocks know."""
    model = packed("cogvideox", 8)
    fused = copy.deepcopy(model)
    fuse_(fused)
    block, plain = fused.transformer_blocks[0], model.transformer_blocks[0]
    generator = torch.Generator().manual_seed(2)
    video, text, temb = (torch.randn(size, generator=generator) for size in ((1, 7, 96), (1, 9, 96), (1, 16)))
    kwargs = {"attention_mask": torch.zeros(1, 16, 16).index_fill(2, torch.arange(5), -1e4)} if why == "kwargs" else None
    for one in (block, plain):
        for dropout in (one.attn1.to_out[1], one.ff.net[1], one.ff.net[3]) if why == "dropout" else ():
            dropout.train().p = 1.0
    set_timestep(torch.tensor([500.0]))
    with torch.no_grad():
        found, expected = (one(video, text, temb, None, kwargs) for one in (block, plain))
    for a, b in zip(found, expected, strict=True):
        assert relative(a, b) < CODE_FLIPS


@KIND
def test_full_precision_blocks_stay_as_they_are(kind: str) -> None:
    model = full(kind)
    assert fuse_(model) == 0
    assert not list(packed_layers(model))


@KIND
def test_the_whole_model_compiles_without_a_graph_break(kind: str) -> None:
    model = packed(kind, 4)
    fuse_(model)
    expected = run(model)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")  # what Inductor does with the ops: test_ops.py
    if kind == "cogvideox rotary":  # turned in complex numbers, compiled in real ones
        assert relative(run(compiled), expected) < CODE_FLIPS
    else:
        assert torch.equal(run(compiled), expected)


@KIND
def test_attention_asked_for_by_name(kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """diffusers' own math attention stands for a library: it is here, and rounds otherwise than SDPA."""
    model = packed(kind, 8)
    fuse_(model)
    expected = run(model)
    monkeypatch.setenv("QVGEN_KERNELS", "reference")  # PyTorch's norms and rotary embedding, for all below
    by_reference = run(model)
    monkeypatch.setenv(attention.ENVIRONMENT, "sdpa")
    assert torch.equal(run(model), by_reference)
    here = attention.Library(("_native_math",), 1e-5, "pip install torch", ("cpu",), (torch.float32,))
    monkeypatch.setenv(attention.ENVIRONMENT, "sage")
    monkeypatch.setitem(attention.LIBRARIES, "sage", here)
    with caplog.at_level("INFO", attention.__name__):
        results = [run(model) for _ in range(2)]
    assert len(caplog.messages) == ATTENTIONS[kind], "each attention of three blocks is compared, once"
    assert torch.equal(*results) and relative(results[0], expected) < CODE_FLIPS
    another = packed(kind, 8)
    fuse_(another)
    monkeypatch.setitem(attention.LIBRARIES, "sage", here._replace(bound=1e-12))
    with pytest.raises(RuntimeError, match=r"=sage: its result is [\d.]+e-\d+ of SDPA's norm .* at most 1e-12"):
        run(another)
    with pytest.raises(Exception, match="call the model once before it is compiled"):
        run(torch.compile(another, fullgraph=True, backend="eager"))


@KIND
def test_our_own_attention_in_8_bits(kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """On a CPU by the expression that defines it."""
    model = packed(kind, 8)
    fuse_(model)
    expected = run(model)
    monkeypatch.setenv(attention.ENVIRONMENT, "int8")
    with caplog.at_level("INFO", attention.__name__):
        result = run(model)
    assert len(caplog.messages) == ATTENTIONS[kind] and all("=int8: 0.00" in message for message in caplog.messages)
    assert 0 < relative(result, expected) < attention.LIBRARIES["int8"].bound
    torch.compiler.reset()
    compiled = run(torch.compile(model, fullgraph=True, backend="eager"))
    assert relative(compiled, result) < CODE_FLIPS


@pytest.mark.parametrize(
    ("wanted", "here", "said"),
    [
        ("fast", {}, "QVGEN_ATTENTION='fast' is not one of auto, sdpa, flash, sage, int8"),
        ("flash", {}, "takes bfloat16 or float16 on cuda, not torch.float32 on cpu"),
        ("flash", {"devices": ("cpu",), "dtypes": (torch.float32,)}, r"cannot run: .*\(`pip install flash-attn`, or unset"),
        ("sage", {"devices": ("cpu",), "dtypes": (torch.float32,)}, r"cannot run: .*\(`pip install sageattention`, or unset"),
    ],
)
def test_attention_that_cannot_run_says_why(
    wanted: str, here: dict[str, object], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = packed("wan", 8)
    fuse_(model)
    monkeypatch.setenv(attention.ENVIRONMENT, wanted)
    if here:
        monkeypatch.setitem(attention.LIBRARIES, wanted, attention.LIBRARIES[wanted]._replace(**here))
    with pytest.raises((ValueError, RuntimeError), match=said):
        run(model)
