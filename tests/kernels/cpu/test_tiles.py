"""Tiles against registers: bit for bit the same outputs in every order in which blocks, panels and chunks are taken."""

from collections.abc import Iterator

import pytest
import torch

from qvgen.kernels.cpu import library
from qvgen.kernels.registry import KernelPreference
from qvgen.nn.packed_linear import PackedLinear
from qvgen.nn.timestep import set_timestep
from qvgen.quant.scheme import QuantArgs
from tests.support.packed_reference import build, inputs, scheme_of

ALWAYS, NEVER, AS_AT_THE_START = 1, 2**40, 0  # tokens from which tiles are used: qvgen_use_tiles
LEAST_TOKENS = 16  # at the start
try:
    ISAS = library.supported_isas()
except library.LibraryMissing:
    ISAS = []


if "amx" not in ISAS:
    reason = "this machine does not have amx, nor is the library built with QVGEN_AMX_EMULATED (test_amx.py builds it)"
    pytest.skip(reason, allow_module_level=True)


@pytest.fixture(autouse=True)
def _amx(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(library.ISA_ENVIRONMENT, "amx")
    library.isa.cache_clear()
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    library.load().qvgen_use_tiles(AS_AT_THE_START)
    library.isa.cache_clear()


def cpu_layer(n: int, k: int, bits: tuple[int, int], weight: QuantArgs) -> PackedLinear:
    layer, _ = build(scheme_of(weight, *bits, symmetric=False), n, k)
    layer.prepare_backend(KernelPreference.CPU)
    set_timestep(torch.tensor([0.0, 900.0]))
    return layer


def output(layer: PackedLinear, x: torch.Tensor, tokens: int, out_dtype: torch.dtype, gelu: bool = False) -> torch.Tensor:
    library.load().qvgen_use_tiles(tokens)
    y = torch.full((*x.shape[:-1], layer.out_features), torch.nan, dtype=out_dtype)
    layer.forward_into(x, y, gelu)
    return y


def check(layer: PackedLinear, x: torch.Tensor, out_dtype: torch.dtype = torch.bfloat16, gelu: bool = False) -> None:
    assert torch.equal(output(layer, x, ALWAYS, out_dtype, gelu), output(layer, x, NEVER, out_dtype, gelu))


CHANNEL, SYMMETRIC = QuantArgs(zero_point_domain="float"), QuantArgs(symmetric=True)


# M per sample (of two), N, K.
@pytest.mark.parametrize(
    "shape",
    [
        (1, 32, 64),  # one tile, half a panel
        (16, 33, 63),  # exactly one block, two halves
        (200, 70, 900),  # several groups of blocks; k in two parts
        (300, 64, 2048),  # more than one block of 512 tokens, k in three parts
        (150, 330, 2113),  # chunks of k and of panels, all of them incomplete
        (40, 130, 2200),  # chunks of k, few blocks
        (600, 1024, 40),  # outputs past the caches
    ],
    ids=str,
)
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=["bf16", "fp32"])
def test_every_order_of_blocks_gives_the_same(shape: tuple[int, int, int], dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    m, n, k = shape
    check(cpu_layer(n, k, (4, 4), CHANNEL), inputs(2, m, k).to(dtypes[0]), dtypes[1])


@pytest.mark.parametrize("bits", [(2, 3), (3, 8), (4, 8), (5, 4), (8, 8)], ids=lambda bits: f"w{bits[0]}a{bits[1]}")
@pytest.mark.parametrize(
    "weight", [CHANNEL, SYMMETRIC, QuantArgs(strategy="group", group_size=40)], ids=["channel", "symmetric", "group"]
)
def test_every_width_and_kind_of_weight(bits: tuple[int, int], weight: QuantArgs) -> None:
    check(cpu_layer(100, 2160, bits, weight), inputs(2, 90, 2160), gelu=True)


@pytest.mark.parametrize("group_size", [8, 64, 120, 1000])
def test_groups(group_size: int) -> None:
    layer = cpu_layer(330, 3 * group_size, (4, 4), QuantArgs(strategy="group", group_size=group_size))
    check(layer, inputs(2, 290, layer.in_features), torch.float32)


@pytest.mark.parametrize("shape", [(20, 200, 2200), (700, 1024, 200), (1200, 100, 64)], ids=str)
def test_any_number_of_threads(shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    layer, x = cpu_layer(n, k, (4, 4), CHANNEL), inputs(2, m, k)
    expected = output(layer, x, NEVER, torch.bfloat16)
    for threads in (1, 2, 3, 16):
        torch.set_num_threads(threads)
        assert torch.equal(output(layer, x, ALWAYS, torch.bfloat16), expected), f"{threads} threads"


@pytest.mark.parametrize("tokens", [LEAST_TOKENS - 1, LEAST_TOKENS])
def test_few_tokens_by_default(tokens: int) -> None:
    layer, x = cpu_layer(70, 200, (4, 4), CHANNEL), inputs(1, tokens, 200)
    set_timestep(torch.tensor([0.0]))
    expected = output(layer, x, NEVER, torch.float32)
    assert torch.equal(output(layer, x, AS_AT_THE_START, torch.float32), expected)
