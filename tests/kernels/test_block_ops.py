"""The ops between linear layers: compiled kernels against the PyTorch expressions that define them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qvgen.kernels import block_ops
from qvgen.kernels.cpu import block_functions, library

# Sums in another order, and up to six operations on values of about 1.
FLOAT32 = 2e-5
# One rounding to bfloat16 each, which may fall to either side: a spacing of 2^-7 for values up to 2, 2^-6 up to 4, ...
BFLOAT16_SPACING = 2**-7

pytestmark = pytest.mark.skipif(bool(library.refusal()), reason="the compiled kernels are not installed")


def rand(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(compiled: torch.Tensor, expected: torch.Tensor) -> bool:
    assert compiled.dtype == expected.dtype and compiled.shape == expected.shape
    difference = (compiled.double() - expected.double()).abs()
    scale = expected.double().abs().clamp(min=1)
    return bool((difference <= (FLOAT32 if compiled.dtype == torch.float32 else BFLOAT16_SPACING) * scale).all())


def both(op: object, *arguments: object) -> tuple[torch.Tensor, torch.Tensor]:
    """Result of the compiled kernels and of PyTorch."""
    compiled = op(*arguments)  # type: ignore[operator]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QVGEN_KERNELS", "reference")
        return compiled, op(*arguments)  # type: ignore[operator]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("features", [1, 15, 16, 33, 1536])
@pytest.mark.parametrize("per_token", [False, True])
def test_layer_norm_modulate(isa: str, features: int, per_token: bool, dtype: torch.dtype) -> None:
    x = 3 * rand(2, 37, features, dtype=dtype) + 1
    scale, shift = (rand(2, 37 if per_token else 1, features, seed=s) for s in (1, 2))
    weight, bias = rand(features, seed=3), rand(features, seed=4, dtype=dtype)
    for parameters in [(None, None, scale, shift), (weight, bias, None, None), (weight, bias, scale, shift), (None,) * 4]:
        assert close(*both(block_ops.layer_norm_modulate, x, *parameters, 1e-6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "size"), [(1, 16), (3, 32), (12, 128), (2, 10)])
def test_rms_norm_rotary(isa: str, heads: int, size: int, dtype: torch.dtype) -> None:
    x, weight = rand(2, 41, heads * size, dtype=dtype), rand(heads * size, seed=1, dtype=dtype)
    angle = rand(1, 41, 1, size // 2, seed=2).repeat_interleave(2, -1)
    for parameters in [(weight, angle.cos(), angle.sin()), (None, angle.cos(), angle.sin()), (weight, None, None)]:
        assert close(*both(block_ops.rms_norm_rotary, x, *parameters, heads, 1e-6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("features", [1, 31, 64])
def test_add_gated(isa: str, features: int, dtype: torch.dtype) -> None:
    x, y = (rand(2, 19, features, seed=s, dtype=dtype) for s in (0, 1))
    for gate in (None, rand(2, 1, features, seed=2), rand(2, 19, features, seed=2)):
        assert close(*both(block_ops.add_gated, x, y, gate))


@settings(deadline=None, max_examples=40)
@given(
    samples=st.integers(1, 3),
    queries=st.integers(1, 200),
    keys=st.integers(1, 1400),
    heads=st.integers(1, 4),
    size=st.sampled_from([16, 48, 64, 80, 128, 256]),
    spread=st.sampled_from([0.1, 1.0, 6.0]),
)
def test_attention(samples: int, queries: int, keys: int, heads: int, size: int, spread: float) -> None:
    q, k, v = (
        (spread * rand(samples, tokens, heads, size, seed=seed)).bfloat16()
        for seed, tokens in enumerate((queries, keys, keys))
    )
    result = block_ops.attention(q, k, v).double()
    exact = torch.nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2).double() for t in (q, k, v))).transpose(1, 2)
    # Probabilities and result are each rounded to 8 bits of mantissa.
    assert (result - exact).abs().max() <= 2 * 2**-8 * v.double().abs().max()


def test_attention_is_compiled_where_that_is_faster() -> None:
    if not block_functions.attention_kernel():
        pytest.skip("PyTorch's attention runs here: " + block_functions.attention_refusal())
    q = rand(1, 600, 2, 128, dtype=torch.bfloat16)
    assert block_functions.attention_supported(q, q, q)
    assert not block_functions.attention_supported(q.float(), q.float(), q.float())
    assert not block_functions.attention_supported(*[rand(1, 600, 2, 72, dtype=torch.bfloat16)] * 3)


def test_results_do_not_depend_on_threads() -> None:
    x, q = rand(2, 700, 96), rand(2, 300, 3, 64, dtype=torch.bfloat16)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append((block_ops.layer_norm_modulate(x, None, None, x, x, 1e-6), block_ops.attention(q, q, q)))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    finally:
        torch.set_num_threads(before)


def test_opcheck() -> None:
    x, y = rand(2, 5, 32), rand(2, 5, 32, seed=1)
    gate, angle, weight = rand(2, 1, 32, seed=2), rand(1, 5, 1, 16, seed=3), rand(32, seed=4)
    heads = x.unflatten(-1, (2, 16))
    for op, arguments in [
        (block_ops.layer_norm_modulate, (x, weight, weight, gate, gate, 1e-6)),
        (block_ops.rms_norm_rotary, (x, weight, angle, angle, 2, 1e-6)),
        (block_ops.add_gated, (x, y, gate)),
        (block_ops.attention, (heads, heads, heads)),
        (block_ops.attention, (heads.bfloat16(),) * 3),
        (block_ops.attention_int8, (heads.bfloat16(),) * 3),
    ]:
        torch.library.opcheck(getattr(torch.ops.qvgen, op.__name__).default, arguments)


def test_compiled_kernels_that_were_asked_for_and_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> bytes:
        raise library.LibraryMissing("no compiler")

    monkeypatch.setattr(library, "isa", missing)
    x = rand(1, 2, 16)
    assert torch.equal(block_ops.add_gated(x, x, None), 2 * x)  # in PyTorch
    monkeypatch.setenv("QVGEN_KERNELS", "cpu")
    with pytest.raises(RuntimeError, match="asks for kernels that cannot run: no compiler"):
        block_ops.add_gated(x, x, None)
