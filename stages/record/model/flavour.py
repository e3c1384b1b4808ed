"""The small files by which MLflow can load and serve a packed model, made by MLflow itself and without loading the model.

Run as a process of its own by stage register (`python -m stages.record.model.flavour`), a description in JSON in, the files as
JSON out: MLflow takes seconds to import, and the stage seals the hashes of what was made.
"""

from __future__ import annotations

import base64
import io
import json
import re
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from qvgen.models.files import GENERATION, read_json
from qvgen.serving.limits import Limits
from qvgen.serving.pyfunc import CODE, CODE_FILE, IMAGE, PARAMETERS, signature_of

OPEN = ("torch",)  # not pinned: which build is right depends on the device


def make_flavour(about: dict[str, Any]) -> dict[str, str]:
    """Path -> text. `about`: name, settings (of SamplingSettings), files (path -> sha256), constraints (path of pins), prompt
    (an example), task (what the hub calls it), licence."""
    import mlflow.pyfunc
    import pandas

    settings = about["settings"]
    limits, reads_image = vars(Limits.of(settings)), about["task"] == "image-to-video"
    example = {"prompt": about["prompt"], "negative_prompt": "", "seed": 1} | ({IMAGE: _grey()} if reads_image else {})
    with tempfile.TemporaryDirectory() as folder:
        code, packed, out = Path(folder) / CODE_FILE, Path(folder) / "packed", Path(folder) / "model"
        code.write_text(CODE)
        packed.mkdir()  # in the place of the packed folder, whose files are uploaded from where they lie
        (packed / "placeholder").write_text("")
        mlflow.pyfunc.save_model(
            str(out),
            python_model=str(code),
            artifacts={"packed": str(packed)},
            signature=signature_of(settings, reads_image, "image" if about["task"] == "text-to-image" else "video"),
            input_example=pandas.DataFrame([example]),
            pip_requirements=requirements(Path(about["constraints"])),
            model_config={"name": about["name"], "files": about["files"], "limits": limits},
            metadata={"licence": about["licence"], "card": "artifacts/packed/README.md", "limits": limits},
        )
        files = [path for path in sorted(out.rglob("*")) if path.is_file() and "artifacts" not in path.relative_to(out).parts]
        return {path.relative_to(out).as_posix(): path.read_text().replace(folder, "") for path in files}


def _grey() -> str:
    """A picture as a request has it."""
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (16, 16), "grey").save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def requirements(constraints: Path) -> list[str]:
    """What serving needs, pinned as in constraints.txt, else as installed here."""
    pins = {}
    if constraints.is_file():
        for line in constraints.read_text().splitlines():
            if match := re.match(r"([\w.-]+)==(\S+)", line):
                pins[_canonical(match[1])] = match[2]
    lines = []
    for spec in (requires("qvgen") or []) if _installed("qvgen") else []:
        name, marker = re.split(r"[^\w.-]", spec)[0], spec.partition(";")[2]
        if "extra" in marker and not re.search(r"""extra\s*==\s*['"]serve['"]""", marker):
            continue
        if _canonical(name) in OPEN:
            lines.append(spec.partition(";")[0].strip())
        elif found := pins.get(_canonical(name)) or _installed(name):
            lines.append(f"{name}=={found}")
    return [f"qvgen=={_installed('qvgen') or '0.1.0'}", *sorted(set(lines), key=str.lower)]


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def flavour_of(packed: Path, name: str, files: dict[str, str], root: Path, prompt: str) -> dict[str, str]:
    """`make_flavour` in a process of its own, of the packed pipeline `packed`. {} with a warning if it fails: a model without
    it can be pulled, and a run does not fail for it."""
    card = (packed / "README.md").read_text(encoding="utf-8") if (packed / "README.md").is_file() else ""
    task = re.search(r"^pipeline_tag: *(\S+)", card, re.MULTILINE)
    licence = re.search(r"^license: *(.+)$", card, re.MULTILINE)
    about = {
        "name": name,
        "settings": _settings(packed),
        "files": files,
        "constraints": str(root / "constraints.txt"),
        "prompt": prompt,
        "task": task[1] if task else "text-to-video",
        "licence": licence[1].strip() if licence else "that of the base model",
    }
    command = [sys.executable, "-m", __name__]
    done = subprocess.run(command, input=json.dumps(about), capture_output=True, text=True, cwd=root, check=False)
    if done.returncode:
        *_, last = done.stderr.strip().splitlines() or ["no message"]
        print(f"warning: the model gets no MLflow flavour, so MLflow cannot load it ({last[:200]})", file=sys.stderr)
        return {}
    return json.loads(done.stdout)


def _settings(packed: Path) -> dict[str, Any]:
    """Of generation.json; of its family, which takes torch, where that leaves something open."""
    own = read_json(packed / GENERATION) if (packed / GENERATION).is_file() else {}
    if all(field in own for field in PARAMETERS.values()):
        return own
    from qvgen.sampling.settings import read_settings

    return vars(read_settings(packed))


if __name__ == "__main__":
    json.dump(make_flavour(json.load(sys.stdin)), sys.stdout)
