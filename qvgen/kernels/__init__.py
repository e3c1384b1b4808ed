"""Packed layers' arithmetic: ops, and the backends that run them.

An op is a schema with a fake implementation, registered with torch.library (linear_ops.py, block_ops.py). A backend is a
class that runs some of them on some devices (registry.Backend): `reference` in PyTorch, which defines every result, `cpu` in
C++, and `triton` on NVIDIA GPUs. The registry takes the fastest backend that can run what it is given, and says why no faster
one did:

    from qvgen.kernels import explain
    for row in explain("cpu"):
        print(row.op, row.backend, row.reason or "used")

Another backend only registers itself: docs/add-a-kernel-backend.md.
"""

from qvgen.kernels import training
from qvgen.kernels.cpu.backend import CpuBackend
from qvgen.kernels.reference import ReferenceBackend
from qvgen.kernels.registry import Backend, BlockOp, KernelPreference, backends, choose, explain, register
from qvgen.kernels.triton.backend import TritonBackend
from qvgen.quant import primitives

__all__ = ["Backend", "BlockOp", "KernelPreference", "backends", "choose", "explain", "register"]

register(ReferenceBackend())
register(CpuBackend())
register(TritonBackend())
primitives.choose_fused = training.choose
