"""Triton kernels compiled for a GPU that is not here, with the very arguments and configurations of qvgen's launches."""

import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.float8_e4m3fn: "fp8e4nv",
}
_DIVISIBLE = [["tt.divisibility", 16]]
_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
_PRODUCT = re.compile(r"(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\S*")


class Launch(NamedTuple):
    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, Any]


class Compiled(NamedTuple):
    products: set[str]  # tensor-core instructions in the PTX
    ptx: str
    shared_bytes: int
    local_bytes: int  # stack and local memory of a thread: what spilled
    registers: int


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """What would be launched, instead of launching it."""
    launches: list[Launch] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **named: Any) -> None:
        options = {name: named.pop(name) for name in _OPTIONS if name in named}
        launches.append(Launch(self, dict(zip(self.arg_names, args, strict=False)) | named, options))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", run)
        yield launches


def launches_of(action: Callable[[], object]) -> list[Launch]:
    with recorded() as launches:
        action()
    return launches


def compile_for(launch: Launch, capability: tuple[int, int]) -> Compiled:
    """As Triton does at the first launch: pointers and sizes that are multiples of 16 are known to be."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name], attributes[i,] = f"*{_TYPES[value.dtype]}", _DIVISIBLE
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32"
            if value % 16 == 0:
                attributes[i,] = _DIVISIBLE
    source = ASTSource(launch.kernel, signature, constexprs=constants, attrs=attributes)
    target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
    built = triton.compile(source, target=target, options=launch.options)
    ptx = built.asm["ptx"]
    return Compiled(set(_PRODUCT.findall(ptx)), ptx, built.metadata.shared, *_resources(built.asm["cubin"]))


def _resources(cubin: bytes) -> tuple[int, int]:
    """Local memory and registers, as the tool of the triton wheel reads them from the machine code."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    path = Path(subprocess.check_output(["mktemp", "--suffix=.cubin"], text=True).strip())
    try:
        path.write_bytes(cubin)
        text = subprocess.check_output([str(tool), "-res-usage", str(path)], text=True)
    finally:
        path.unlink()
    found = {name: int(re.findall(rf"{name}:(\d+)", text)[-1]) for name in ("REG", "STACK", "LOCAL")}
    return found["STACK"] + found["LOCAL"], found["REG"]
