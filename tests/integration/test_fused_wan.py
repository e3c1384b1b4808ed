"""Fused Wan blocks against diffusers' own, both around the same packed layers."""

import copy

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

from qvgen.integrations.fused import attention
from qvgen.integrations.fused.wan import PackedWanAttnProcessor, fuse_wan_
from qvgen.models.wan import WanFamily
from qvgen.nn.packed_linear import packed_layers
from qvgen.nn.swap import convert_, prepare_
from qvgen.quant.scheme import QuantArgs, QuantScheme

# Relative to the output's norm: sums in another order ...
ROUNDING = 1e-6
# ... and where that moves an input's code by one, a step of a token's range, at 8 bits 1/255 of it.
CODE_FLIPS = 2e-3
# In bfloat16 every model is this far from itself in float32, and which way each value was rounded is chance.
NO_WORSE = 1.1

CONFIG = {
    "num_attention_heads": 2,
    "attention_head_dim": 48,
    "ffn_dim": 160,
    "num_layers": 3,
    "text_dim": 24,
    "freq_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
}


def packed(bits: int, **config: object) -> WanTransformer3DModel:
    torch.manual_seed(0)
    model = WanTransformer3DModel(**(CONFIG | config)).eval()
    for block in model.blocks:  # random tables would leave the gates at nearly nothing
        block.scale_shift_table.data.mul_(20)
    scheme = QuantScheme(
        weights=QuantArgs(num_bits=bits), input_activations=QuantArgs(num_bits=bits, strategy="token"), timestep_groups=4
    )
    prepare_(model, scheme, default_targets=WanFamily.default_targets)
    convert_(model)
    return model


def run(model: WanTransformer3DModel, timestep: torch.Tensor | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, 3, 8, 10, generator=generator).to(model.dtype)
    text = torch.randn(2, 9, 24, generator=generator).to(model.dtype)
    timestep = torch.tensor([100.0, 800.0]) if timestep is None else timestep
    with torch.no_grad():
        return model(hidden_states=latents, timestep=timestep, encoder_hidden_states=text, return_dict=False)[0].float()


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_equals_diffusers_in_float32(kernels: str, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QVGEN_KERNELS", kernels)
    model = packed(bits)
    fused = copy.deepcopy(model)
    assert fuse_wan_(fused) == 3
    assert relative(run(fused), run(model)) < CODE_FLIPS


@pytest.mark.parametrize("bits", [4, 8])
def test_is_as_near_to_float32_in_bfloat16_as_diffusers(bits: int) -> None:
    exact = run(packed(bits))
    model = packed(bits).bfloat16()
    fused = copy.deepcopy(model)
    fuse_wan_(fused)
    assert 0 < relative(run(fused), exact) < NO_WORSE * relative(run(model), exact)


@pytest.mark.parametrize("cross_attn_norm", [True, False])
def test_a_timestep_per_token_and_no_cross_attention_norm(cross_attn_norm: bool) -> None:
    model = packed(8, cross_attn_norm=cross_attn_norm)
    fused = copy.deepcopy(model)
    fuse_wan_(fused)
    per_token = torch.full((2, 3 * 4 * 5), 500.0)
    assert relative(run(fused, per_token), run(model, per_token)) < CODE_FLIPS


def test_layers_left_in_full_precision_are_called_as_they_are() -> None:
    torch.manual_seed(0)
    model = WanTransformer3DModel(**CONFIG).eval()
    prepare_(model, QuantScheme(timestep_groups=1), default_targets=(r"re:blocks\.\d\.(attn1\.to_q|ffn\.net\.2)",))
    convert_(model)
    fused = copy.deepcopy(model)
    assert fuse_wan_(fused) == 3
    assert relative(run(fused), run(model)) < ROUNDING


def test_a_processor_set_by_the_user_wins() -> None:
    model = packed(8)
    fuse_wan_(model)
    assert all(isinstance(block.attn1.processor, PackedWanAttnProcessor) for block in model.blocks)
    calls = []

    class Counting(WanAttnProcessor):
        def __call__(self, *args: object, **kwargs: object) -> torch.Tensor:
            calls.append(1)
            return super().__call__(*args, **kwargs)

    model.set_attn_processor(Counting())
    run(model)
    assert len(calls) == 6


def test_full_precision_blocks_stay_as_they_are() -> None:
    model = WanTransformer3DModel(**CONFIG)
    assert fuse_wan_(model) == 0
    assert not list(packed_layers(model))


def test_the_whole_model_compiles_without_a_graph_break() -> None:
    model = packed(4)
    fuse_wan_(model)
    expected = run(model)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")  # what Inductor does with the ops: test_ops.py
    assert torch.equal(run(compiled), expected)


def test_attention_asked_for_by_name(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """diffusers' own math attention stands for a library: it is here, and rounds otherwise than SDPA."""
    model = packed(8)
    fuse_wan_(model)
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
    assert len(caplog.messages) == 6, "each of three blocks' two attentions is compared, once"
    assert torch.equal(*results) and relative(results[0], expected) < CODE_FLIPS
    another = packed(8)
    fuse_wan_(another)
    monkeypatch.setitem(attention.LIBRARIES, "sage", here._replace(bound=1e-12))
    with pytest.raises(RuntimeError, match=r"=sage: its result is [\d.]+e-\d+ of SDPA's norm .* at most 1e-12"):
        run(another)
    with pytest.raises(Exception, match="call the model once before it is compiled"):
        run(torch.compile(another, fullgraph=True, backend="eager"))


@pytest.mark.parametrize(
    ("wanted", "here", "said"),
    [
        ("fast", {}, "QVGEN_ATTENTION='fast' is not one of auto, sdpa, flash, sage"),
        ("flash", {}, "takes bfloat16 or float16 on cuda, not torch.float32 on cpu"),
        ("flash", {"devices": ("cpu",), "dtypes": (torch.float32,)}, r"cannot run: .*\(`pip install flash-attn`, or unset"),
        ("sage", {"devices": ("cpu",), "dtypes": (torch.float32,)}, r"cannot run: .*\(`pip install sageattention`, or unset"),
    ],
)
def test_attention_that_cannot_run_says_why(
    wanted: str, here: dict[str, object], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = packed(8)
    fuse_wan_(model)
    monkeypatch.setenv(attention.ENVIRONMENT, wanted)
    if here:
        monkeypatch.setitem(attention.LIBRARIES, wanted, attention.LIBRARIES[wanted]._replace(**here))
    with pytest.raises((ValueError, RuntimeError), match=said):
        run(model)
