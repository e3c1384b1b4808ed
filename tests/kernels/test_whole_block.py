"""A transformer block in one call against its ops one by one, which have the same bits."""

from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel

from qvgen.integrations.fused import fuse_
from qvgen.kernels import whole_block
from qvgen.kernels.cpu import library, transformer_block
from qvgen.models.wan import WanFamily
from qvgen.nn.packed_linear import packed_layers
from qvgen.nn.swap import convert_, prepare_
from qvgen.nn.timestep import set_timestep
from qvgen.quant.scheme import QuantArgs, QuantScheme

pytestmark = pytest.mark.skipif(bool(library.refusal()), reason="the compiled kernels are not installed")

SIZES: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 48,
    "num_layers": 2,
    "in_channels": 4,
    "out_channels": 4,
}
SIZES |= {"ffn_dim": 160, "text_dim": 24, "freq_dim": 16}
TOKENS = 3 * 4 * 4


def packed(bits: int = 4, activations: QuantArgs | None = None, **options: Any) -> Any:
    torch.manual_seed(0)
    weights = options.pop("weights", QuantArgs(num_bits=bits))
    model = WanTransformer3DModel(**SIZES, **options).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("scale_shift_table"):
            parameter.data.mul_(20)  # random ones would leave the gates at nearly nothing
        elif "norm" in name:
            parameter.data.add_(torch.randn_like(parameter) / 4)
    scheme = QuantScheme(weights=weights, input_activations=activations, timestep_groups=4)
    prepare_(model, scheme, default_targets=WanFamily.default_targets)
    convert_(model)
    fuse_(model)
    return model


A4 = QuantArgs(num_bits=4, strategy="token")


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each block since the start was one call."""
    calls, real = [], whole_block.transformer_block

    def note(*arguments: Any) -> Any:
        y = real(*arguments)
        calls.append(y is not None)
        return y

    monkeypatch.setattr(whole_block, "transformer_block", note)
    return calls


def run(model: Any, timestep: torch.Tensor | None = None, samples: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    latents, text = (torch.randn(samples, *size, generator=generator) for size in ((4, 3, 8, 8), (9, 24)))
    timestep = torch.tensor([100.0, 800.0])[:samples] if timestep is None else timestep
    with torch.no_grad():
        return WanFamily().predict(model, latents.to(model.dtype), timestep, text.to(model.dtype))


def one_by_one(model: Any, *arguments: Any) -> torch.Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(whole_block, "may_run", lambda _: False)
        return run(model, *arguments)


MODELS: dict[str, dict[str, Any]] = {
    "W4A4": {"activations": A4},
    "W3A8": {"bits": 3, "activations": QuantArgs(num_bits=8, strategy="token", symmetric=True)},
    "groups, no cross-attention norm": {
        "weights": QuantArgs(strategy="group", group_size=16),
        "activations": A4,
        "cross_attn_norm": False,
    },
    "weight-only": {},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_no_bit_differs(isa: str, name: str, dtype: torch.dtype, taken: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QVGEN_KERNELS", "cpu")  # else weight-only layers may go to PyTorch, where that is faster
    model = packed(**MODELS[name]).to(dtype)
    per_token = torch.full((2, TOKENS), 500.0)
    for arguments in ((), (torch.tensor([300.0]), 1), (per_token,)):
        expected = one_by_one(model, *arguments)
        before = torch.get_num_threads()
        for threads in (1, 3):
            torch.set_num_threads(threads)
            try:
                taken.clear()
                assert torch.equal(run(model, *arguments), expected)
                assert taken == [True, True]
            finally:
                torch.set_num_threads(before)


def test_a_token_of_nan_stays_alone(isa: str, taken: list[bool]) -> None:
    model = packed(activations=A4)
    latents = torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    latents[0, :, 0, 0, 0] = torch.nan
    with torch.no_grad():
        y = WanFamily().predict(model, latents, torch.tensor([100.0, 800.0]), torch.ones(2, 9, 24))
    assert taken == [True, True] and y[0].isnan().all() and y[1].isfinite().all()  # a key is seen by its sample alone


WHO = {
    "QVGEN_KERNELS": lambda patch, model: patch.setenv("QVGEN_KERNELS", "reference"),
    "QVGEN_ATTENTION": lambda patch, model: patch.setenv("QVGEN_ATTENTION", "sdpa"),
    "hooks": lambda patch, model: [layer.register_forward_hook(lambda *_: None) for _, layer in packed_layers(model)],
    "an attention backend": lambda patch, model: model.set_attention_backend("native"),
    "size": lambda patch, model: patch.setattr(transformer_block, "MOST_WORK", 1),
}


@pytest.mark.parametrize("who", WHO)
def test_who_has_a_block_run_one_by_one(who: str, taken: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    model = packed(activations=A4)
    expected = run(model)
    assert taken == [True, True]
    taken.clear()
    WHO[who](monkeypatch, model)
    y = run(model)
    assert not any(taken)
    assert (y - expected).norm() < 2e-2 * expected.norm()


def test_the_profiler_sees_the_ops(taken: list[bool]) -> None:
    model = packed(activations=A4)
    with torch.profiler.profile() as profile:
        y = run(model)
    assert {"qvgen::attention", "qvgen::layer_norm_linears"} <= {event.name for event in profile.events()}
    assert not taken and torch.equal(y, run(model))


def test_biases_that_are_converted_live_until_the_call(isa: str, taken: list[bool]) -> None:
    """In float16, which compiled code does not read, and so different that memory of another is noticed."""
    model = packed(activations=A4)
    for number, (_, layer) in enumerate(packed_layers(model)):
        layer.bias.data = torch.full_like(layer.bias, number - 9.0, dtype=torch.float16)
    expected = one_by_one(model)
    taken.clear()
    assert torch.equal(run(model), expected)
    assert taken == [True, True]


@pytest.mark.parametrize(
    ("unusual", "in_one"),
    [("nothing", True), ("angles in float64", True), ("x in columns", False), ("text in columns", False)],
)
def test_what_is_unusual(unusual: str, in_one: bool, taken: list[bool]) -> None:
    block, generator = packed(activations=A4).blocks[0], torch.Generator().manual_seed(3)
    x, text, temb = (torch.randn(2, *size, generator=generator) for size in ((TOKENS, 96), (9, 96), (6, 96)))
    angles = torch.randn(1, TOKENS, 1, 48, generator=generator)
    set_timestep(torch.tensor([100.0, 800.0]))
    with torch.no_grad():
        expected = block(x, text, temb, (angles.cos(), angles.sin()))
        taken.clear()
        if unusual == "angles in float64":
            cosine, sine = angles.cos().double(), angles.sin().double()
        else:
            cosine, sine = angles.cos(), angles.sin()
        x, text = (t.mT.contiguous().mT if unusual == f"{name} in columns" else t for name, t in (("x", x), ("text", text)))
        assert torch.equal(block(x, text, temb, (cosine, sine)), expected)
    assert taken == [in_one]


def test_a_text_of_other_features_is_refused(taken: list[bool]) -> None:
    block = packed(activations=A4).blocks[0]
    set_timestep(torch.tensor([100.0]))
    x, text, temb = torch.ones(1, TOKENS, 96), torch.ones(1, 9, 95), torch.ones(1, 6, 96)
    with torch.no_grad(), pytest.raises(ValueError, match="95 features, this layer takes 96"):
        block(x, text, temb, (torch.ones(1, TOKENS, 1, 48), torch.zeros(1, TOKENS, 1, 48)))
