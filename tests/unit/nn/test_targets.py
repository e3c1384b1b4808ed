import copy
import sys
import time
from functools import partial

import pytest
import torch
from torch import nn

from qvgen.nn.targets import match_linears, replace_module
from qvgen.quant.scheme import QuantScheme


class Special(nn.Linear):
    pass


def model() -> nn.Module:
    block = nn.ModuleDict(
        {"q": nn.Linear(2, 2), "norm": nn.LayerNorm(2), "ffn": nn.Sequential(Special(2, 4), nn.Linear(4, 2))}
    )
    blocks = nn.ModuleList([block, copy.deepcopy(block)])
    return nn.ModuleDict({"blocks": blocks, "head": nn.Linear(2, 1), "conv": nn.Conv1d(1, 1, 1)})


ALL = ["blocks.0.q", "blocks.0.ffn.0", "blocks.0.ffn.1", "blocks.1.q", "blocks.1.ffn.0", "blocks.1.ffn.1", "head"]


@pytest.mark.parametrize(
    ("targets", "ignore", "expected"),
    [
        (["Linear"], [], ALL),
        (["Special"], [], ["blocks.0.ffn.0", "blocks.1.ffn.0"]),
        (["head", "blocks.0.q"], [], ["blocks.0.q", "head"]),  # the model's order, not the patterns'
        ([r"re:blocks\..*"], [], ALL[:-1]),
        (["re:blocks"], ["re:.*ffn"], ["blocks.0.q", "blocks.1.q"]),
        (["Linear"], ["Special", "head"], ["blocks.0.q", "blocks.0.ffn.1", "blocks.1.q", "blocks.1.ffn.1"]),
        (["re:head", "head"], [], ["head"]),
    ],
)
def test_selects(targets: list[str], ignore: list[str], expected: list[str]) -> None:
    assert match_linears(model(), targets, ignore) == expected


def test_defaults() -> None:
    assert match_linears(model(), [], [], [r"re:blocks\.1"]) == ALL[3:6]
    assert match_linears(model(), ["head"], [], [r"re:blocks\.1"]) == ["head"]
    assert match_linears(model(), [], []) == ALL


@pytest.mark.parametrize(
    ("targets", "ignore", "said"),
    [
        (["head", "blocks.0.k"], [], r"targets: 'blocks.0.k' matches no linear layer; close: blocks.0.q"),
        (["Liner"], [], r"'Liner' matches no linear layer; close: Linear"),
        (["Linear"], ["re:q"], r"ignore: 're:q' matches no linear layer; close: blocks.0.q.*starts at the beginning"),
        (["q"], [], r"'q' matches no linear layer; close: blocks.0.q, blocks.1.q \(write the whole name\)"),
        (["re:blocks.("], [], r"targets: 're:blocks.\(' is not a regular expression"),
        (["blocks.0.norm"], [], r"'blocks.0.norm' matches no linear layer"),
        (["Conv1d"], [], r"'Conv1d' matches no linear layer"),
        (["head"], ["Linear"], r"nothing left to quantize: ignore \['Linear'\] removes every layer that targets \['head'\]"),
    ],
)
def test_refuses(targets: list[str], ignore: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        match_linears(model(), targets, ignore)


def test_a_model_without_linear_layers() -> None:
    with pytest.raises(ValueError, match="Sequential has no linear layers"):
        match_linears(nn.Sequential(nn.LayerNorm(2)), ["Linear"])


def test_replace_module() -> None:
    root, new = model(), nn.Identity()
    replace_module(root, "blocks.1.ffn.1", new)
    assert root.get_submodule("blocks.1.ffn.1") is new
    assert root.get_submodule("blocks.1.ffn")(torch.ones(1, 2)).shape == (1, 4)
    with pytest.raises(AttributeError):
        replace_module(root, "blocks.1.ffn.7", new)


@pytest.mark.parametrize("pattern", [r"re:(\w|[a-z]|bl)+\d$", r"re:(?:(?:\w|[a-z])+)+\d"])
def test_a_pattern_without_end_is_stopped(pattern: str) -> None:
    model = nn.Module()
    model.add_module("block" * 12, nn.Linear(2, 2))
    began = time.process_time()  # what the limit counts: on busy cores 2 s take longer
    with pytest.raises(ValueError, match=r"targets: matching .* takes more than 2 s"):
        match_linears(model, [pattern])
    assert time.process_time() - began < 20


def test_a_pattern_is_short_and_not_nested_without_end(request: pytest.FixtureRequest) -> None:
    request.addfinalizer(partial(sys.setrecursionlimit, sys.getrecursionlimit()))
    sys.setrecursionlimit(1000)  # Python's own; some packages raise it for the whole process
    with pytest.raises(ValueError, match="characters, more than 1000"):
        QuantScheme(targets=("re:" + "a" * 1000,))
    with pytest.raises(ValueError, match="is not a regular expression"):
        QuantScheme(targets=("re:" + "(" * 490 + ")" * 490,))
