"""The model that `mlflow.pyfunc.load_model` gives: a table of prompts in, a table of videos, or images, out.

MLflow keeps the few lines of `CODE` as the model's code, and runs them when it loads the model; nothing is pickled.
"""

from __future__ import annotations

import base64
import hashlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qvgen.hub.store import faults_of
from qvgen.serving.limits import SUFFIXES, Limits

CODE_FILE = "qvgen_model.py"
CODE = '''"""What MLflow loads; the model itself is in `artifacts/packed`, and its code in the package qvgen."""

from mlflow.models import set_model

from qvgen.serving.pyfunc import make_model

set_model(make_model())
'''
# Parameter of a request -> field of SamplingSettings.
PARAMETERS = {
    "steps": "inference_steps",
    "guidance_scale": "guidance_scale",
    "frames": "frames",
    "height": "height",
    "width": "width",
    "fps": "fps",
}
IMAGE = "image"  # column of first frames, of models that read one
OUTPUTS = ("base64", "path")
_TYPES = {"guidance_scale": "double"}  # of parameters; the others are whole numbers


def make_model() -> Any:
    """A new `PythonModel`, which loads nothing before MLflow gives it a context."""
    from mlflow.pyfunc import PythonModel, PythonModelContext

    class QvgenModel(PythonModel):
        """A packed pipeline."""

        def load_context(self, context: PythonModelContext) -> None:
            self._served = Served.of(Path(context.artifacts["packed"]), context.model_config or {})

        def predict(self, context, model_input, params=None):  # hints would be taken for a schema, which is the signature's
            return self._served.answer(model_input, params or {})

    return QvgenModel()


def signature_of(settings: Mapping[str, Any], reads_image: bool = False, makes: str = "video") -> Any:
    """MLflow's signature of a model with these settings (generation.json), its own defaults in it."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    inputs: list[Any] = [
        ColSpec("string", "prompt"),
        ColSpec("string", "negative_prompt", required=False),
        ColSpec("long", "seed", required=False),
    ]
    if reads_image:
        inputs.append(ColSpec("string", IMAGE))
    parameters = [ParamSpec(name, _TYPES.get(name, "long"), settings[field]) for name, field in PARAMETERS.items()]
    return ModelSignature(
        inputs=Schema(inputs),
        outputs=Schema([ColSpec("string", makes), ColSpec("string", "sha256")]),
        params=ParamSchema([*parameters, ParamSpec("output", "string", OUTPUTS[0])]),
    )


class Served:
    """An engine, and tables around it."""

    def __init__(self, engine: Any, name: str) -> None:
        self.engine, self.name = engine, name

    @classmethod
    def of(cls, folder: Path, config: Mapping[str, Any]) -> Served:
        """Raises ValueError if the folder's files are not those whose hashes `config` names."""
        from qvgen.serving.engine import Engine

        if faults := faults_of(folder, config.get("files") or {}):
            raise ValueError(f"{folder} is not the registered model: {'; '.join(faults[:3])}; nothing is loaded")
        limits = config.get("limits")
        return cls(Engine(folder, Limits(**limits) if limits else None), str(config.get("name", "")))

    def predict(self, table: Any, params: Mapping[str, Any]) -> Any:
        """A pandas table, a row for each prompt: column video or image (an .mp4 or .png as base64, or its path on the
        server), and sha256.

        Raises ValueError for bad input, BusyError.
        """
        import pandas

        if "prompt" not in getattr(table, "columns", ()):
            raise ValueError("the input has no column prompt")
        if len(table) > self.engine.limits.videos:
            raise ValueError(f"limit videos = {self.engine.limits.videos}: {len(table)} prompts in one request")
        output = params.get("output", OUTPUTS[0])
        if output not in OUTPUTS:
            raise ValueError(f"output = {output!r:.100} must be one of {', '.join(OUTPUTS)}")
        overrides = {field: params.get(name) for name, field in PARAMETERS.items()}
        orders = []
        for row in table.to_dict("records"):
            seed, negative = row.get("seed"), row.get("negative_prompt")
            seed = 0 if seed is None or seed != seed else seed  # a column that some rows lack holds NaN
            if not isinstance(row["prompt"], str) or not isinstance(seed, int | float) or seed % 1 != 0:
                found = f"{row['prompt']!r:.100} and {seed!r:.100}"
                raise ValueError(f"prompt must be text and seed a whole number, found {found}")
            text = negative if isinstance(negative, str) else ""
            orders.append(self.engine.order(row["prompt"], int(seed), text, overrides, _image(row.get(IMAGE))))
        rows = []
        makes = self.engine.makes
        for made in self.engine.make(orders):
            digest = hashlib.sha256(made).hexdigest()
            text = base64.b64encode(made).decode() if output == "base64" else str(_keep(made, digest + SUFFIXES[makes]))
            rows.append({makes: text, "sha256": digest})
        return pandas.DataFrame(rows)

    def answer(self, table: Any, params: Mapping[str, Any]) -> Any:
        """`predict`, with the errors of MLflow's servers: 400 for bad input, 503 for too many requests."""
        from mlflow.exceptions import MlflowException
        from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, TEMPORARILY_UNAVAILABLE

        from qvgen.serving.engine import BusyError

        try:
            return self.predict(table, params)
        except ValueError as error:
            raise MlflowException(str(error), INVALID_PARAMETER_VALUE) from None
        except BusyError as error:
            raise MlflowException(str(error), TEMPORARILY_UNAVAILABLE) from None


def _image(cell: Any) -> bytes | None:
    """The file in a cell of column image. Raises ValueError if it is no base64."""
    if not isinstance(cell, str) or not cell:
        return None
    try:
        return base64.b64decode(cell, validate=True)
    except ValueError:
        raise ValueError("image must be a file (PNG, JPEG, WEBP) as base64, without a prefix") from None


def _keep(made: bytes, name: str) -> Path:
    """In the server's own folder, under a name that no request chooses."""
    folder = Path(os.environ.get("QVGEN_VIDEOS") or Path(tempfile.gettempdir()) / "qvgen-videos")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    draft = path.with_name(f".{name}.{os.getpid()}")
    draft.write_bytes(made)
    draft.replace(path)
    return path
