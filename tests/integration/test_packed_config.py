"""config.json of packed folders: impossible sizes are refused before anything is built, and nothing else than a ValueError."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from qvgen.checkpoint.packed import export_pipeline
from qvgen.checkpoint.pipeline import load_transformer
from qvgen.models.registry import load_family
from qvgen.models.tiny import tiny_pipeline
from qvgen.nn.swap import convert_, prepare_
from qvgen.quant.scheme import QuantScheme

pytestmark = pytest.mark.integration

CASES = 55  # of each family
SLOWEST = 5.0  # seconds that one configuration may take
VALUES: list[Any] = [
    None, True, False, "", "x", -1, 0, 3, 0.5, 1.0, -0.0, 2**16, 2**31, 2**64, 10**400, 1e308, float("nan"), float("inf"), [],
    [2**31, 2, 2], [[]], [""], {}, {"self": 1}, [None], [1, 2],
]  # fmt: skip


@pytest.fixture(scope="module", params=["wan", "cogvideox"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("packed")
    source = tiny_pipeline(request.param, root / "source")
    transformer, scheme = load_transformer(source), QuantScheme(timestep_groups=4)
    prepare_(transformer, scheme, default_targets=load_family(source).default_targets)
    convert_(transformer)
    export_pipeline(source, transformer, scheme, root / "packed", torch.bfloat16)
    return root / "packed"


def places(tree: Any) -> list[tuple[Any, Any]]:
    """Every place of a tree: what holds it and its key; of lists the first entry."""
    inside = list(tree.items()) if isinstance(tree, dict) else list(enumerate(tree[:1]))
    deeper = [place for _, value in inside if isinstance(value, dict | list) for place in places(value)]
    return [(tree, key) for key, _ in inside] + deeper


@pytest.mark.parametrize("verify", ["0", "1"])
def test_fuzzed_values_end_in_a_sentence(folder: Path, verify: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With hashes every change is found; without them what is left must be found or load."""
    monkeypatch.setenv("QVGEN_VERIFY", verify)
    path = folder / "transformer/config.json"
    whole, faults, refused = path.read_text(), [], 0
    try:
        for seed in range(CASES if verify == "0" else CASES // 5):
            chance = random.Random(seed)
            config = json.loads(whole)
            holder, key = chance.choice(places(config))
            before, holder[key] = holder[key], chance.choice(VALUES)
            path.write_text(json.dumps(config))
            began, said = time.monotonic(), f"seed {seed}: {key} = {str(holder[key])[:40]} (was {str(before)[:40]})"
            try:
                load_transformer(folder)
                unseen = key.startswith("_") if isinstance(key, str) else False
                if verify == "1" and not unseen and json.dumps(before) != json.dumps(holder[key]):
                    faults.append(f"{said}: loaded")
            except ValueError as error:
                refused += 1
                if not str(error).strip() or isinstance(error, UnicodeError | json.JSONDecodeError):
                    faults.append(f"{said}: {error!r}")
            except Exception as error:
                faults.append(f"{said}: {type(error).__name__}: {str(error)[:200]}")
            if (took := time.monotonic() - began) > SLOWEST:
                faults.append(f"{said}: took {took:.0f} s")
    finally:
        path.write_text(whole)
    assert not faults, "\n".join(faults)
    assert refused > CASES // 10
