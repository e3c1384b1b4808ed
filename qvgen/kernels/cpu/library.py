"""libqvgen_cpu, loaded with ctypes: the declarations of api.h, and which instruction set runs.

`load` and `isa` are functions, not constants, so that tests replace what the machine has and a missing library is a
reason to report instead of an import error.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import os
import sys
from collections.abc import Iterator
from ctypes import POINTER, c_char_p, c_double, c_float, c_int, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch

ISA_ENVIRONMENT = "QVGEN_CPU_ISA"
LIBRARY_ENVIRONMENT = "QVGEN_CPU_LIBRARY"  # path of another build, such as that of `make sanitize`
_NAME = "libqvgen_cpu.dylib" if sys.platform == "darwin" else "libqvgen_cpu.so"
_PACKAGE_PATH = "qvgen/kernels/cpu"

ERRORS = {
    1: "the weight is not in this backend's layout, or of another shape",
    2: "a timestep group has no clips",
    3: "out of memory",
    4: "this machine does not have the instruction set",
    5: "too many layers share one input",
}


class Layer(ctypes.Structure):
    """qvgen_layer of api.h."""

    _fields_ = [
        ("weight", c_void_p),
        ("weight_bytes", c_int64),
        ("clip_lower", c_void_p),
        ("clip_upper", c_void_p),
        ("bias", c_void_p),
        ("out", c_void_p),
        ("in_features", c_int64),
        ("out_features", c_int64),
        ("groups", c_int64),
        ("clips", c_int64),
        ("activation_bits", c_int32),
        ("activation_symmetric", c_int32),
        ("bias_dtype", c_int32),
        ("out_dtype", c_int32),
        ("gelu", c_int32),
    ]


class Input(ctypes.Structure):
    """qvgen_input of api.h."""

    _fields_ = [
        ("x", c_void_p),
        ("samples", c_int64),
        ("tokens", c_int64),
        ("timestep_group", c_void_p),
        ("timestep_groups", c_int64),
        ("dtype", c_int32),
    ]


class BlockStep(ctypes.Structure):
    """qvgen_block_step of api.h."""

    _fields_ = [
        ("normalized", c_int32),
        ("norm_eps", c_float),
        ("norm_weight", c_void_p),
        ("norm_bias", c_void_p),
        ("scale", c_void_p),
        ("shift", c_void_p),
        ("gate", c_void_p),
        ("modulation_samples", c_int64),
        ("modulation_tokens", c_int64),
        ("gate_samples", c_int64),
        ("gate_tokens", c_int64),
        ("layers", POINTER(Layer)),
        ("heads", c_int32),
        ("query_eps", c_float),
        ("key_eps", c_float),
        ("attention_scale", c_float),
        ("query_weight", c_void_p),
        ("key_weight", c_void_p),
        ("cosine", c_void_p),
        ("sine", c_void_p),
        ("text", c_void_p),
        ("text_tokens", c_int64),
    ]


class LibraryMissing(RuntimeError):  # noqa: N818  it is the library that is missing, not an error of it
    """The library was not built, or does not load; the message says which and what to do."""


@cache
def load() -> ctypes.CDLL:
    """The library, its functions declared. Raises LibraryMissing."""
    candidates = _candidates()
    path = next((p for p in candidates if p.exists()), None)
    if path is None and os.environ.get(LIBRARY_ENVIRONMENT):
        raise LibraryMissing(f"{LIBRARY_ENVIRONMENT} names {candidates[0]}, which does not exist; unset it or build it there")
    if path is None:
        raise LibraryMissing(
            "the compiled kernels are not installed: no C++ compiler was found when qvgen was; "
            "install g++ or clang++ (Debian: apt install g++), then `pip install --force-reinstall --no-deps .`"
        )
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise LibraryMissing(f"{path} does not load ({error}); install qvgen again on this machine") from None
    _declare(library)
    if openmp := _openmp():
        library.qvgen_use_openmp(openmp)
    return library


def _candidates() -> list[Path]:
    """Where the library may be; with QVGEN_CPU_LIBRARY nowhere else than there."""
    if path := os.environ.get(LIBRARY_ENVIRONMENT):
        return [Path(path)]
    paths = [Path(__file__).with_name(_NAME)]
    # An editable install leaves the Python files in the source tree and puts compiled ones into site-packages.
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        paths.append(Path(str(importlib.metadata.distribution("qvgen").locate_file(f"{_PACKAGE_PATH}/{_NAME}"))))
    return paths


def _declare(library: ctypes.CDLL) -> None:
    layers, source = POINTER(Layer), POINTER(Input)
    signatures = {
        "qvgen_cycles_per_second": (c_double, []),
        "qvgen_peak": (c_double, [c_char_p]),
        "qvgen_isas": (POINTER(c_char_p), []),
        "qvgen_isa_supported": (c_int, [c_char_p]),
        "qvgen_isa_refusal": (c_char_p, [c_char_p]),
        "qvgen_isa_emulated": (c_int, [c_char_p]),
        "qvgen_use_strassen": (None, [c_int]),
        "qvgen_use_tiles": (None, [c_int64]),
        "qvgen_use_openmp": (None, [c_void_p]),
        "qvgen_panel_bytes": (c_int64, [c_int64, c_int64, c_int64, c_int]),
        "qvgen_pack_panels": (c_int, [c_void_p, c_int64, *[c_void_p] * 3, c_int64, c_int64, c_int64, c_int, c_void_p, c_int]),
        "qvgen_unpack_panels": (c_int, [c_void_p, c_int64, c_void_p, c_int64, c_int64, c_int]),
        "qvgen_linear": (c_int, [c_char_p, layers, c_int, source, c_int]),
        "qvgen_feed_forward": (c_int, [c_char_p, layers, source, c_int]),
        "qvgen_layer_norm": (
            c_int,
            [c_char_p, c_void_p, c_int, c_int64, c_int64, c_float, *[c_void_p] * 4, c_int64, c_void_p, c_int],
        ),
        "qvgen_rms_norm": (
            c_int,
            [c_char_p, c_void_p, c_int, c_int64, c_int64, c_float, *[c_void_p] * 3, c_int64, c_int64, c_void_p, c_int],
        ),
        "qvgen_add_gated": (c_int, [c_char_p, *[c_void_p] * 3, c_int, c_int64, c_int64, c_int64, c_void_p, c_int]),
        "qvgen_fake_quantize": (c_int, [c_char_p, *[c_void_p] * 3, c_int64, c_int64, c_int, c_int, c_void_p, c_int]),
        "qvgen_fake_quantize_backward": (
            c_int,
            [c_char_p, *[c_void_p] * 4, c_int64, c_int64, c_int, c_int, *[c_void_p] * 3, c_int],
        ),
        "qvgen_attention_kernels": (POINTER(c_char_p), []),
        "qvgen_attention_supported": (c_int, [c_char_p, c_int64]),
        "qvgen_attention": (c_int, [c_char_p, *[c_void_p] * 3, *[c_int64] * 5, c_float, c_void_p, c_int]),
        "qvgen_short_attention": (c_int, [c_char_p, c_int, *[c_void_p] * 3, *[c_int64] * 5, c_float, c_void_p, c_int]),
        "qvgen_transformer_block": (c_int, [c_char_p, POINTER(BlockStep), c_int, c_int64, source, c_void_p, c_int]),
        "qvgen_integer_part": (c_int, [c_char_p, c_void_p, c_int64, c_void_p, c_int64, c_int, c_void_p]),
        "qvgen_quantize_tokens": (c_int, [c_char_p, layers, source, c_void_p, c_void_p, c_void_p, c_void_p]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name, None)
        if function is None:
            raise LibraryMissing(
                f"the compiled kernels are older than this code, {name} is not in them: build them again, with "
                "`make .venv/.kernels` or `pip install --force-reinstall --no-deps .`"
            )
        function.restype, function.argtypes = result, arguments


def _openmp() -> int | None:
    """Address of GOMP_parallel in the OpenMP runtime that torch has loaded; None where it has none of that kind."""
    assert torch.__version__  # it is torch's import that loads the runtime
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, c_void_p).value
    except (AttributeError, OSError, TypeError):
        return None


def supported_isas() -> list[str]:
    """Instruction sets that this build has code for and this machine can run, best first."""
    library = load()
    return [name.decode() for name in _names(library.qvgen_isas()) if library.qvgen_isa_supported(name)]


def attention_kernels(features: int) -> list[str]:
    """Instruction sets that have attention for heads of `features` and can run here."""
    library = load()
    names = _names(library.qvgen_attention_kernels())
    return [name.decode() for name in names if library.qvgen_attention_supported(name, features)]


def _names(ending_with_null: Any) -> Iterator[bytes]:
    return iter(iter(ending_with_null).__next__, None)


def refusals() -> dict[str, str]:
    """Why those that cannot run here cannot, where more is to be said than that the processor lacks them."""
    library = load()
    told = {name.decode(): library.qvgen_isa_refusal(name) for name in _names(library.qvgen_isas())}
    return {name: reason.decode() for name, reason in told.items() if reason}


@cache
def isa() -> bytes:
    """The instruction set in use: the fastest (choice.py), or that of QVGEN_CPU_ISA. Raises ValueError if that one cannot
    run."""
    names, wanted = supported_isas(), os.environ.get(ISA_ENVIRONMENT)
    if not wanted:
        from qvgen.kernels.cpu.choice import choice  # which needs this module

        return choice().isa.encode()
    if wanted not in names:
        raise ValueError(f"{ISA_ENVIRONMENT}={wanted!r} cannot run here; this machine has {', '.join(names)}")
    return wanted.encode()


def refusal() -> str:
    """Why nothing compiled runs on this machine; empty if it does."""
    try:
        isa()
    except (LibraryMissing, ValueError) as error:
        return str(error)
    return ""


def check(status: int) -> None:
    """Raise RuntimeError for a status other than 0."""
    if status:
        raise RuntimeError(f"libqvgen_cpu: {ERRORS.get(status, f'status {status}')}")
