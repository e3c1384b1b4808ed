"""Results of the cpu backend do not depend on who computes them: threads, callers, forked processes."""

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from qvgen.kernels.cpu import library
from qvgen.kernels.registry import KernelPreference
from qvgen.nn.layers_together import feed_forward, linears
from qvgen.nn.packed_linear import PackedLinear
from qvgen.nn.timestep import carry_timestep, set_timestep
from qvgen.quant.scheme import QuantArgs
from tests.support.packed_reference import build, inputs, scheme_of

FORK_SECONDS = 60  # some milliseconds, unless it hangs


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def own_threads() -> Iterator[None]:
    """Threads started for each call, as where torch has no OpenMP runtime of GCC's kind."""
    library.load().qvgen_use_openmp(None)
    yield
    library.load().qvgen_use_openmp(library._openmp())


def cpu_layer(n: int, k: int, bits: int = 4, seed: int = 0, weight: QuantArgs | None = None) -> PackedLinear:
    scheme = scheme_of(weight or QuantArgs(zero_point_domain="float"), bits, bits, symmetric=False)
    layer, _ = build(scheme, n, k, seed)
    layer.prepare_backend(KernelPreference.CPU)
    set_timestep(torch.tensor([0.0, 900.0]))
    return layer


def with_threads(threads: int, call: Callable[[], torch.Tensor]) -> torch.Tensor:
    torch.set_num_threads(threads)
    return call()


def check_threads(call: Callable[[], torch.Tensor]) -> None:
    expected = with_threads(1, call)
    for threads in (2, 3, 8):
        for _ in range(3):
            assert torch.equal(with_threads(threads, call), expected), f"{threads} threads"


# M per sample (of two), N, K: panels shared by threads; tokens quantized by one and by several; whole blocks of tokens.
@pytest.mark.parametrize("shape", [(1, 1000, 2000), (3, 700, 1100), (60, 300, 300), (350, 200, 512), (1200, 64, 800)], ids=str)
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_any_number_of_threads(isa: str, shape: tuple[int, int, int], bits: int) -> None:
    m, n, k = shape
    layer, x = cpu_layer(n, k, bits), inputs(2, m, k)
    check_threads(lambda: layer(x))


def test_any_number_of_threads_with_groups(isa: str) -> None:
    layer, x = cpu_layer(500, 1024, weight=QuantArgs(strategy="group", group_size=64)), inputs(2, 100, 1024)
    check_threads(lambda: layer(x))
    check_threads(lambda: layer(x[:, :1]))


def test_any_number_of_threads_with_shared_inputs(isa: str) -> None:
    layers, x = [cpu_layer(n, 300, seed=n) for n in (300, 100, 200)], inputs(2, 200, 300)
    check_threads(lambda: torch.cat(linears(x, layers), -1))


@pytest.mark.parametrize("m", [1, 5, 350])
def test_any_number_of_threads_in_a_feed_forward(isa: str, m: int) -> None:
    up, down, x = cpu_layer(2000, 512), cpu_layer(300, 2000, seed=1), inputs(2, m, 512).bfloat16()
    check_threads(lambda: feed_forward(x, up, down))


def test_any_number_of_threads_with_strassen(isa: str, strassen: Callable[[int], None]) -> None:
    strassen(2)
    layer, x = cpu_layer(512, 208), inputs(2, 500, 208)
    check_threads(lambda: layer(x))


def test_any_number_of_threads_of_its_own(isa: str, own_threads: None) -> None:
    layer, x = cpu_layer(1000, 300), inputs(2, 200, 300)
    check_threads(lambda: layer(x))
    check_threads(lambda: layer(x[:, :1]))


def test_weights_packed_by_any_number_of_threads() -> None:
    def packed() -> torch.Tensor:
        layer, _ = build(scheme_of(QuantArgs(), 4, 4, symmetric=False), 1000, 300)
        return torch.cat([layer.prepare_backend(KernelPreference.CPU).weight, layer.weight_packed.view(torch.uint8).flatten()])

    check_threads(packed)


@pytest.mark.parametrize("threads", [1, 2])
def test_many_callers_at_once(isa: str, threads: int) -> None:
    check_callers(threads)


def test_many_callers_with_threads_of_their_own(isa: str, own_threads: None) -> None:
    check_callers(2)


def check_callers(threads: int) -> None:
    torch.set_num_threads(threads)
    # ctypes lets go of the interpreter's lock, so that the calls do run at the same time.
    calls: list[Callable[[], torch.Tensor]] = []
    for seed, (m, n, k) in enumerate([(1, 500, 900), (9, 70, 2000), (400, 130, 64), (50, 300, 300)]):
        layer, x = cpu_layer(n, k, bits=(2, 3, 4, 8)[seed], seed=seed), inputs(2, m, k, seed)
        calls.append(carry_timestep(lambda layer=layer, x=x: layer(x)))
        up, down = cpu_layer(n, k, seed=seed), cpu_layer(k, n, seed=seed + 10)
        calls.append(carry_timestep(lambda up=up, down=down, x=x: feed_forward(x, up, down)))
    expected = [call() for call in calls]

    def repeat(call: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
        torch.set_num_threads(threads)  # each thread has a number of its own
        return [call() for _ in range(10)]

    with ThreadPoolExecutor(len(calls)) as pool:
        for results, right in zip(pool.map(repeat, calls), expected, strict=True):
            assert all(torch.equal(result, right) for result in results)


def test_a_forked_child_computes_the_same(isa: str) -> None:
    torch.set_num_threads(2)
    layer, x = cpu_layer(1000, 512), inputs(2, 200, 512)
    expected = layer(x)  # from here on there are threads, of which the child has none
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def child() -> None:
        y = torch.empty_like(expected)
        layer.forward_into(x, y)
        sender.send((torch.get_num_threads(), y.numpy().tobytes()))

    process = context.Process(target=child, daemon=True)
    process.start()
    try:
        assert receiver.poll(FORK_SECONDS), "the forked child hangs"
        threads, result = receiver.recv()
    finally:
        process.kill()
        process.join()
    assert threads == 2
    assert result == expected.numpy().tobytes()
    assert torch.equal(layer(x), expected)  # and the parent goes on
