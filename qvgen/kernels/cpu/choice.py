"""Which of the kernels that can run here are fastest: measured once per processor and build, never guessed from names.

The same instruction is fast on one processor and slow on another (vdpbf16ps: 64 multiply-adds per cycle on Zen 5, 15 on
Sapphire Rapids), so instruction sets in order of age are a wrong list. Three short measurements at first use, together below
half a second, decide: one linear layer in every instruction set, then attention and a weight-only layer here and in PyTorch.
The integers of linear layers are the same whichever is chosen; the others differ by rounding.

The result is kept in a file of the user's cache, one per processor, build of the kernels and version of PyTorch. The first of
several processes that measure at once decides for all. `qvgen kernels --measure` measures again.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import platform
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
import torch.nn.functional as F

from qvgen.kernels.cpu import library
from qvgen.kernels.reference import ReferenceBackend
from qvgen.kernels.registry import Arguments, LayerTensors

M, K, N, BITS = 256, 1024, 1024, 4  # of the linear layer, inputs in bfloat16, one thread
QUERIES, HEADS, FEATURES = 512, 4, 128  # of attention, in bfloat16, one thread
PYTORCH = "pytorch"
NOISE = 1.05  # times as slow counts as equal: the order of names decides
ROUNDS, ATTENTION_ROUNDS, WEIGHT_ONLY_ROUNDS = 10, 6, 4
HOPELESS = 4.0  # times the fastest, after one call: not measured further
UNSTEADY = 1.15  # between the halves of a measurement: something else slowed the processor, so measure again


class Choice(NamedTuple):
    isa: str
    attention: str  # the instruction set of the compiled kernel, or PYTORCH
    linear_ms: Mapping[str, float]  # by instruction set
    attention_ms: Mapping[str, float]  # by instruction set, and PYTORCH; empty: no compiled attention here
    weight_only_ms: Mapping[str, float]  # "cpu", in `isa`, and PYTORCH
    path: str  # of the file that holds it; empty: none could be written

    @property
    def compiled_weight_only(self) -> bool:
        return self.weight_only_ms["cpu"] <= NOISE * self.weight_only_ms[PYTORCH]

    @property
    def compiled_attention(self) -> str:
        """The fastest of the compiled kernels, whether PyTorch's is faster or not; empty: there are none."""
        compiled = {name: ms for name, ms in self.attention_ms.items() if name != PYTORCH}
        return min(compiled, key=compiled.__getitem__, default="")


_lock = threading.Lock()
_known: list[Choice] = []  # at most one: asked for with each attention


def choice(again: bool = False) -> Choice:
    """The measurement on this machine, from the cache if there is one; `again` takes it anew."""
    with _lock:
        if again or not _known:
            names = [name for name in library.supported_isas() if not library.load().qvgen_isa_emulated(name.encode())]
            path = _path(names)
            found = None if again else _read(path, names)
            _known[:] = [found or _keep(_measure(names), path, names, again)]
        return _known[0]


def _measure(names: Sequence[str]) -> Choice:
    linear = measure_linear(names)
    kernels = [name for name in library.attention_kernels(FEATURES) if name in names]
    attention = measure_attention(kernels) if kernels else {}
    isa = _first_of_the_fastest(linear)
    fastest_attention = _first_of_the_fastest(attention or {PYTORCH: 0.0})
    return Choice(isa, fastest_attention, linear, attention, measure_weight_only(isa), "")


def _first_of_the_fastest(ms: Mapping[str, float]) -> str:
    return next(name for name in ms if ms[name] <= NOISE * min(ms.values()))


def measure_linear(names: Sequence[str], m: int = M, k: int = K, n: int = N) -> dict[str, float]:
    """Milliseconds of CPU time of one linear layer (m, k) -> (m, n) in each instruction set."""
    call = _linear_call(m, k, n, BITS)
    return _fastest({name: partial(call, name) for name in names}, ROUNDS, time.thread_time)


def measure_weight_only(isa: str, m: int = M, k: int = K, n: int = N) -> dict[str, float]:
    """Milliseconds of one layer (m, k) -> (m, n) with packed weights and inputs in bfloat16, here and in the reference
    backend, which unpacks the weight and leaves the rest to PyTorch."""
    call = _linear_call(m, k, n, 0)
    codes = torch.zeros(n, k, dtype=torch.int8)
    layer = LayerTensors(codes, torch.full((n, 1), 0.01), None, torch.zeros(n, 1, dtype=torch.int32), None, None, None)
    x, y = torch.zeros(m, k, dtype=torch.bfloat16), torch.empty(m, n, dtype=torch.bfloat16)
    reference, arguments = ReferenceBackend(), Arguments(None, BITS, None, False, "reference")

    def pytorch() -> None:
        reference.linear(x, [layer], arguments, [y], False)

    with torch.no_grad(), _one_thread():
        return _fastest({"cpu": partial(call, isa), PYTORCH: pytorch}, WEIGHT_ONLY_ROUNDS, time.thread_time)


def _linear_call(m: int, k: int, n: int, activation_bits: int) -> Callable[[str], None]:
    """A function that runs a layer of random weights in an instruction set, in this thread."""
    functions = library.load()
    generator = torch.Generator().manual_seed(0)  # of its own: the caller's random numbers stay as they are
    words = torch.randint(-(2**31), 2**31, (n, k * BITS // 32), dtype=torch.int32, generator=generator)
    scale, row_sum = torch.full((n,), 0.01), torch.zeros(n, dtype=torch.int32)
    size, alignment = functions.qvgen_panel_bytes(n, k, 1, BITS), 64
    memory = torch.empty(size + alignment, dtype=torch.uint8)
    weight = memory[-memory.data_ptr() % alignment :][:size]
    pointers = words.data_ptr(), words.shape[1] * 4, scale.data_ptr(), None, row_sum.data_ptr()
    library.check(functions.qvgen_pack_panels(*pointers, n, k, 1, BITS, weight.data_ptr(), 1))
    x, y = torch.randn(m, k, generator=generator).bfloat16(), torch.empty(m, n, dtype=torch.bfloat16)
    clip, group = torch.ones(1), torch.zeros(1, dtype=torch.int64)
    layer = library.Layer(
        weight=weight.data_ptr(), weight_bytes=size, clip_lower=clip.data_ptr(), clip_upper=clip.data_ptr(), out=y.data_ptr(),
        in_features=k, out_features=n, groups=1, clips=1, activation_bits=activation_bits, out_dtype=1,
    )  # fmt: skip
    source = library.Input(
        x=x.data_ptr(), samples=1, tokens=m, timestep_group=group.data_ptr(), timestep_groups=1, dtype=1
    )  # fmt: skip
    layer.alive, source.alive = (weight, clip, y), (x, group)  # for as long as the call points to them

    def call(name: str) -> None:
        library.check(functions.qvgen_linear(name.encode(), ctypes.byref(layer), 1, ctypes.byref(source), 1))

    return call


def measure_attention(names: Sequence[str], queries: int = QUERIES) -> dict[str, float]:
    """Milliseconds of attention, as many keys as queries, in the compiled kernels `names` and in PyTorch."""
    from qvgen.kernels.cpu import block_functions

    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, queries, HEADS, FEATURES, generator=generator).bfloat16()

    def pytorch() -> None:
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        y.transpose(1, 2).contiguous()

    actions: dict[str, Callable[[], object]] = {name: partial(block_functions.attention, q, k, v, name) for name in names}
    actions[PYTORCH] = pytorch
    with torch.no_grad(), _one_thread():
        return _fastest(actions, ATTENTION_ROUNDS, time.thread_time)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Several threads wait for each other, and on a busy machine the kernel that was measured in a bad moment would lose: CPU
    time of one does not count that."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _fastest(actions: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Milliseconds of each action, taken in turns, in the fastest of its rounds: the others were disturbed. Measured twice
    if the first halves and the second differ."""

    def ms(action: Callable[[], object]) -> float:
        started = clock()
        action()
        return 1e3 * (clock() - started)

    for action in actions.values():  # memory, caches, clock rate
        action()
    first = {name: ms(action) for name, action in actions.items()}
    kept = {name: action for name, action in actions.items() if first[name] <= HOPELESS * min(first.values())}
    samples: dict[str, list[float]] = {}
    for _ in range(2):
        samples = {name: [] for name in kept}
        for turn in range(rounds):
            # There and back: with always the same one before it, an action would find the caches always as that leaves them.
            for name in list(kept)[:: 1 if turn % 2 else -1]:
                samples[name].append(ms(kept[name]))
        halves = [(median(s[: rounds // 2]), median(s[rounds // 2 :])) for s in samples.values()]
        if all(max(pair) <= UNSTEADY * min(pair) for pair in halves):
            break
    return {name: round(min(samples[name]) if name in kept else first[name], 3) for name in actions}


def _path(names: Sequence[str]) -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    build = Path(library.load()._name).read_bytes()
    told = json.dumps([_processor(), torch.__version__, list(names)]).encode()
    return folder / "qvgen" / "kernels" / f"{hashlib.sha256(told + build).hexdigest()[:16]}.json"


def _processor() -> str:
    """Model and features of the first processor; where the system does not tell, its family."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        told = [line for line in lines if line.startswith(("model name", "flags", "CPU implementer", "CPU part", "Features"))]
        if told:
            return "\n".join(told)
    return f"{platform.machine()} {platform.processor()}"


def _read(path: Path, names: Sequence[str]) -> Choice | None:
    """The content of the cache file; None if there is none, or it is not one of ours."""
    try:
        content = json.loads(path.read_text())
        kinds = ("linear_ms", "attention_ms", "weight_only_ms")
        linear, attention, weight_only = ({str(k): float(v) for k, v in content[kind].items()} for kind in kinds)
        found = Choice(content["isa"], content["attention"], linear, attention, weight_only, str(path))
        assert set(found.weight_only_ms) == {"cpu", PYTORCH}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError):
        return None
    return found if found.isa in names and found.attention in (*names, PYTORCH) else None


def _keep(measured: Choice, path: Path, names: Sequence[str], replace: bool) -> Choice:
    """Write it whole or not at all; if another process was first, and unless `replace`, take what that one wrote."""
    content = json.dumps({key: value for key, value in measured._asdict().items() if key != "path"}, indent=1)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
            file.write(content)
        try:
            if not replace and _read(path, names) is None:
                path.unlink(missing_ok=True)  # not one of ours
            if replace:
                Path(file.name).replace(path)
            else:
                with contextlib.suppress(FileExistsError):
                    os.link(file.name, path)
        finally:
            Path(file.name).unlink(missing_ok=True)
    except OSError:
        return measured  # a home that cannot be written to: each process measures
    return _read(path, names) or measured._replace(path=str(path))
