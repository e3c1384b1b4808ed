"""Result files of the comparison: one small JSON file per case, with what made it.

    made     revision of the method and hash of its fingerprint, DVC hashes of model and data, parameters by dotted name:
             most cases share them, so each section is a file of its own, named in `sections` (results/params)
    scores   numbers of the case, see case.py
    curve    of compared cases: loss and gradient norm of training, means over windows of steps; rank and factor u of Φ
    spectrum of compared cases with Φ: its singular values

A result is stale once its parameters, its data or the revision of its method differ from those wanted now. Code is not among
them: a method's behaviour is watched by fingerprint.py, and its revision is raised by hand (params.yaml) when results must be
measured again.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from pydantic import BaseModel, TypeAdapter

from qvgen.params import Params
from stages.runtime.dvc import flatten
from stages.runtime.outputs import write_whole

if TYPE_CHECKING:
    import torch

PARAMS = "params"  # folder beside the results
POINTS = 60  # of a kept curve
# They change no result.
WITHOUT_EFFECT = {"evaluate.videos", "qat.checkpoint_every"}


def origin(params: Params, revision: int, data: Mapping[str, str]) -> dict[str, Any]:
    """What makes a result: {"revision", "data": {path: DVC hash}, "params": {dotted name: value}}.

    Parameters of data are left out, because the data's hash says more; those of training where a method does not train.
    """
    sections = {"seed", "method", "scheme", "calibrate", "pack", "evaluate"} | (
        {"qat", "decay"} if params.chosen.trained else set()
    )
    flat = flatten(params.model_dump(mode="json", include=sections, exclude_none=True))
    kept = {name: flat[name] for name in sorted(flat) if name not in WITHOUT_EFFECT}
    return {"revision": revision, "data": dict(data), "params": kept}


def differences(made: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Reasons why a result is stale, such as "qat.steps: 45, now 60"; [] if it is not.

    A parameter that the result does not name did not exist when it was made: it counts as its declared default.
    """
    found = [f"revision: {made['revision']}, now {wanted['revision']}"] if made["revision"] != wanted["revision"] else []
    found += [f"{path} is other data" for path in sorted(wanted["data"]) if made["data"].get(path) != wanted["data"][path]]
    for name in sorted({**made["params"], **wanted["params"]}):
        before, now = (side["params"][name] if name in side["params"] else declared_default(name) for side in (made, wanted))
        if before != now:
            found.append(f"{name}: {before}, now {now}")
    return found


def declared_default(name: str) -> Any:
    """Default of a parameter such as "qat.ema_decay", as JSON has it; None without one, and for an unknown name."""
    model: Any = Params
    *sections, last = name.split(".")
    for section in sections:
        info = model.model_fields.get(section)
        kinds = (info.annotation, *get_args(info.annotation)) if info else ()
        model = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
        if model is None:
            return None
    info = model.model_fields.get(last)
    if info is None or info.is_required():
        return None
    return TypeAdapter(Any).dump_python(info.get_default(call_default_factory=True), mode="json")


def read_result(path: Path) -> dict[str, Any] | None:
    """The result file with all its parameters, None if there is none. Raises ValueError for one that is not whole."""
    if not path.is_file():
        return None
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        for name in result.get("made", {}).pop("sections", ()):
            text = (path.parent / PARAMS / f"{name}.json").read_text(encoding="utf-8")
            if _section_name(text) != name:
                raise ValueError(f"{PARAMS}/{name}.json was edited")
            result["made"]["params"] |= json.loads(text)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not whole ({error}); delete it and run the comparison again") from error
    return result


def write_result(path: Path, result: Mapping[str, Mapping[str, Any]]) -> None:
    """The file that `read_result` reads, and the sections of its parameters that no other case has written."""
    sections: dict[str, dict[str, Any]] = {}
    made = result["made"]
    for name, value in made["params"].items():
        sections.setdefault(name.partition(".")[0], {})[name] = value
    own = {name: sections.pop(name)[name] for name in list(sections) if name in sections[name]}
    texts = {_section_name(text): text for text in (json.dumps(section, indent=1) + "\n" for section in sections.values())}
    for name, text in texts.items():
        if not (kept := path.parent / PARAMS / f"{name}.json").exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            new = kept.with_suffix(f".{os.getpid()}")  # two cases may come to the same section at once
            new.write_text(text, "utf-8")
            new.replace(kept)
    with write_whole(path) as new:
        new.write_text(result_text({**result, "made": {**made, "params": own, "sections": list(texts)}}), "utf-8")


def _section_name(text: str) -> str:
    """Such as qat-1a2b3c4d: the section that all names of the text begin with, and a hash of what it says."""
    return f"{next(iter(json.loads(text))).partition('.')[0]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def result_text(result: Mapping[str, Mapping[str, Any]]) -> str:
    """JSON with an entry of a section on each line, so that a difference can be read."""
    sections = []
    for name, section in result.items():
        values = {key: json.dumps(value, ensure_ascii=False, separators=(",", ":")) for key, value in section.items()}
        lines = ",\n".join(f"  {json.dumps(key)}: {value}" for key, value in values.items())
        sections.append(f" {json.dumps(name)}: {{\n{lines}\n }}")
    return "{\n" + ",\n".join(sections) + "\n}\n"


def thinned(rows: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """At most POINTS points of a row per training step, as columns.

    step, loss and gradient_norm: means over a window. rank and u: those of the window's middle step; absent without Φ.
    """
    width = max(1, -(-len(rows) // POINTS))
    windows = [rows[i : i + width] for i in range(0, len(rows), width)]
    columns = {"step": [short(statistics.fmean(r["step"] for r in w)) for w in windows]}
    columns |= {key: [short(statistics.fmean(r[key] for r in w), 4) for w in windows] for key in ("loss", "gradient_norm")}
    if any(row["rank"] for row in rows):
        columns |= {key: [short(w[len(w) // 2][key], 4) for w in windows] for key in ("rank", "u")}
    return columns


def shortened(scores: Mapping[str, Any]) -> dict[str, Any]:
    """Six digits of each number."""
    return {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in scores.items()}


def short(value: float, digits: int = 6) -> float:
    """Six digits are enough to show three of, four to draw."""
    short = float(f"{value:.{digits}g}")
    return int(short) if short.is_integer() else short


def save_clips(path: Path, clips: torch.Tensor, prompts: Sequence[str], count: int) -> None:
    """`count` of the clips (n, 3, t, h, w) in [-1, 1], evenly spread, as uint8 with their prompts."""
    import torch

    from qvgen.tensors import save_tensors

    chosen = [i * len(prompts) // count for i in range(count)]
    pixels = ((clips[chosen].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    words = json.dumps([prompts[i] for i in chosen], ensure_ascii=False)
    save_tensors(path, {"clips": pixels}, {"prompts": words})


def read_clips(path: Path) -> tuple[list[str], torch.Tensor] | None:
    """Prompts and clips (n, 3, t, h, w) in [-1, 1]; None if there are none."""
    from safetensors import safe_open

    if not path.is_file():
        return None
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["prompts"]), file.get_tensor("clips").float() / 127.5 - 1
