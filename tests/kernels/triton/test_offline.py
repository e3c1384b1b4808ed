"""Every kernel, compiled for every architecture as it would be launched there: the right instruction, nothing spilled, no more
shared memory than a block can have. No GPU is needed; that the code runs there is for tests/kernels/triton/kernels on one."""

import re

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install -e .[triton]")

from qvgen.kernels.fused_ops import Gated, Norm
from qvgen.kernels.registry import Arguments, LayerTensors
from qvgen.kernels.triton import block_functions, launch
from qvgen.kernels.triton.architectures import ARCHITECTURES, Architecture
from qvgen.kernels.triton.attention.launch import attention_int8
from qvgen.kernels.triton.layout import PLANES, row_bytes
from qvgen.kernels.triton.training import launch as training
from qvgen.quant.scheme import QuantArgs
from tests.support.offline_triton import Compiled, compile_for, launches_of

K, N, LARGE, SMALL = 1536, 1536, 4096, 64
INSTRUCTIONS = {
    "mma.sync s8": "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32",
    "wgmma s8": "wgmma.mma_async.sync.aligned.m64n{}k32.s32.s8.s8",
    "tcgen05 kind::f8f6f4": "tcgen05.mma.cta_group::1.kind::f8f6f4",
}
GPUS = pytest.mark.parametrize("gpu", ARCHITECTURES, ids=lambda gpu: gpu.name)


def layer(bits: int, groups: int, symmetric: bool = False) -> LayerTensors:
    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    weight = empty(N, row_bytes(K, groups, bits), dtype=torch.uint8 if bits in PLANES else torch.int8)
    zero_point, clips = None if symmetric else empty(N, groups), (empty(50), empty(50))
    return LayerTensors(
        weight, empty(N, groups), zero_point, empty(N, groups, dtype=torch.int32), *clips, empty(N, dtype=torch.bfloat16)
    )


def compiled(
    gpu: Architecture,
    monkeypatch: pytest.MonkeyPatch,
    bits: int,
    tokens: int,
    groups: int = 1,
    only: str = "",
    residual: bool = False,
) -> dict[str, Compiled]:
    """The kernels of one layer's call, by name; with a GELU, and with `residual` a gate and a residual too."""
    monkeypatch.setattr(launch, "architecture_of", lambda _: gpu)
    tensors, arguments = (
        layer(bits, groups),
        Arguments(torch.empty(1, dtype=torch.int64, device="meta"), bits, bits, False, "triton"),
    )
    x, y = (torch.empty(1, tokens, width, dtype=torch.bfloat16, device="meta") for width in (K, N))

    def run() -> None:
        (codes,) = launch.quantize_tokens(x, [tensors], arguments, launch.uses_e4m3(gpu, bits, bits, groups))
        launch.integer_linear(codes, tensors, bits, K, True, y, Gated(y, y[:, :1].float()) if residual else None)

    launches = [one for one in launches_of(run) if only in one.kernel.__name__]
    return {one.kernel.__name__: compile_for(one, gpu.capability) for one in launches}


def check(gpu: Architecture, results: dict[str, Compiled]) -> None:
    for name, result in results.items():
        assert result.local_bytes == 0, f"{name} spills {result.local_bytes} bytes a thread on {gpu.name}"
        assert result.shared_bytes <= gpu.shared_bytes, f"{name} takes {result.shared_bytes} bytes of shared memory"


def check_product(gpu: Architecture, result: Compiled, instruction: str) -> None:
    (found,) = {re.sub(r"m64n\d+", "m64n{}", name) for name in result.products}
    assert found == INSTRUCTIONS[instruction]


@GPUS
def test_large_products(gpu: Architecture, monkeypatch: pytest.MonkeyPatch) -> None:
    results = compiled(gpu, monkeypatch, 4, LARGE)
    assert list(results) == ["quantize_tokens_kernel", "unpack_kernel", "integer_gemm_kernel"]
    check(gpu, results)
    check_product(gpu, results["integer_gemm_kernel"], gpu.instruction)
    division = results["quantize_tokens_kernel"].ptx
    assert "div.rn.f32" in division and "div.full" not in division and "fma" not in division


@GPUS
def test_a_norm_before_and_a_residual_after(gpu: Architecture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "architecture_of", lambda _: gpu)
    group = torch.empty(1, dtype=torch.int64, device="meta")
    x, y = (torch.empty(1, LARGE, width, dtype=torch.bfloat16, device="meta") for width in (K, N))
    norm, gated = Norm(None, None, x[:, :1].float(), x[:, :1].float(), 1e-6), Gated(y, y[:, :1].float())
    e4m3 = launch.uses_e4m3(gpu, 4, 4, 1)

    def run() -> None:
        codes = launch.quantize_tokens(x, [layer(4, 1)] * 3, Arguments(group, 4, 4, False, "triton"), e4m3, norm)
        launch.integer_linear(codes[0], layer(4, 1), 4, K, False, y, gated, torch.empty(N, K, dtype=torch.int8, device="meta"))

    results = {one.kernel.__name__: compile_for(one, gpu.capability) for one in launches_of(run)}
    check(gpu, results)
    check_product(gpu, results["integer_gemm_kernel"], gpu.instruction)
    ptx = results["quantize_tokens_kernel"].ptx
    assert "div.rn.f32" in ptx and "sqrt.rn.f32" in ptx and "div.full" not in ptx and "fma" not in ptx


def test_a_float32_gate_of_each_token_does_not_spill(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the architecture where it did, in the tile of all others."""
    (gpu,) = (gpu for gpu in ARCHITECTURES if gpu.name == "sm_100")
    monkeypatch.setattr(launch, "architecture_of", lambda _: gpu)
    y, codes = torch.empty(1, LARGE, N, device="meta"), launch.empty_codes(LARGE, K, 1, False, torch.device("meta"))
    launches = launches_of(lambda: launch.integer_linear(codes, layer(4, 1), 4, K, False, y, Gated(y, y)))
    check(gpu, {"integer_gemm_kernel": compile_for(launches[-1], gpu.capability)})


@GPUS
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_small_products(gpu: Architecture, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    results = compiled(gpu, monkeypatch, bits, SMALL, only="integer_gemm_kernel", residual=True)
    check(gpu, results)


@GPUS
def test_groups(gpu: Architecture, monkeypatch: pytest.MonkeyPatch) -> None:
    results = compiled(gpu, monkeypatch, 3, LARGE, K // 128, residual=True)
    check(gpu, results)
    check_product(gpu, results["integer_gemm_kernel"], "mma.sync s8" if gpu.e4m3 else gpu.instruction)


def test_eight_bits_run_in_int8_where_four_run_in_e4m3(monkeypatch: pytest.MonkeyPatch) -> None:
    (gpu,) = (gpu for gpu in ARCHITECTURES if gpu.e4m3)
    results = compiled(gpu, monkeypatch, 8, LARGE)
    assert list(results) == ["quantize_tokens_kernel", "integer_gemm_kernel"]
    check(gpu, results)
    check_product(gpu, results["integer_gemm_kernel"], "mma.sync s8")


@GPUS
def test_what_lies_between_products(gpu: Architecture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "architecture_of", lambda _: gpu)
    x = torch.empty(1, 64, K, dtype=torch.bfloat16, device="meta")
    parameter, row, angle = x[0, 0], x[:, :1].float(), torch.empty(1, 64, 1, 128, device="meta")

    def run() -> None:
        block_functions.layer_norm_modulate(x, parameter, parameter, row, row, 1e-6)
        block_functions.rms_norm_rotary(x, parameter, angle, angle, K // 128, 1e-6)
        block_functions.add_gated(x, x, row)
        launch.unpack(layer(3, 1), K, 3, torch.bfloat16, True)  # W3A16

    results = {one.kernel.__name__: compile_for(one, gpu.capability) for one in launches_of(run)}
    assert len(results) == 4
    check(gpu, results)


@GPUS
@pytest.mark.parametrize("features", [8960, 13824])
def test_fake_quantization(gpu: Architecture, features: int) -> None:
    x = torch.empty(1, 64, features, dtype=torch.bfloat16, device="meta")
    grid, args = torch.empty(1, 64, 1, device="meta"), QuantArgs(strategy="token")

    def run() -> None:
        training.backward(training.forward(x, grid, grid, args, torch.bfloat16), x, grid, grid, args)

    results = {one.kernel.__name__: compile_for(one, gpu.capability) for one in launches_of(run)}
    assert len(results) == 2
    check(gpu, results)
    assert all("div.rn.f32" in one.ptx and "div.full" not in one.ptx and "fma" not in one.ptx for one in results.values())


@GPUS
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_weight_only_in_the_loop(gpu: Architecture, bits: int) -> None:
    x, y = (torch.empty(1, SMALL, width, dtype=torch.bfloat16, device="meta") for width in (K, N))
    (found,) = launches_of(lambda: launch.weight_only_in_loop(x, layer(bits, 1), bits, True, y))
    result = compile_for(found, gpu.capability)
    check(gpu, {"weight_only_kernel": result})
    assert any("bf16" in name or "kind::f16" in name for name in result.products), result.products


# Heads of 64 where they spilled in four warps.
SIZES = [*((gpu, 128) for gpu in ARCHITECTURES), (ARCHITECTURES[-1], 64)]


@pytest.mark.parametrize(("gpu", "size"), SIZES, ids=[f"{gpu.name}-{size}" for gpu, size in SIZES])
def test_attention(gpu: Architecture, size: int) -> None:
    q = torch.empty(1, LARGE - 7, 12, size, dtype=torch.bfloat16, device="meta")
    results = {one.kernel.__name__: compile_for(one, gpu.capability) for one in launches_of(lambda: attention_int8(q, q, q))}
    check(gpu, results)
    codes, values = sorted(results["attention_int8_kernel"].products, key=lambda name: ".s8" not in name)
    assert re.sub(r"m64n\d+", "m64n{}", codes) == INSTRUCTIONS["wgmma s8" if gpu.name == "sm_90" else "mma.sync s8"]
    assert "bf16" in values or "kind::f16" in values
