"""Files of a model: loading pipelines, writing packed ones, keeping a training that can go on.

    transformer = load_transformer("artifacts/model")         # nothing else of the pipeline is read
    export_pipeline("artifacts/model", transformer, scheme, "artifacts/packed", torch.bfloat16)   # after prepare_, convert_
    verify_folder("artifacts/packed")                         # every tensor whole, as many packed layers as config.json says
    pipeline = load_pipeline("artifacts/packed")              # packed or not, one call

safetensors only, read from this machine only. Calibrated grids (grids.py) and training states (training.py) are read back by
the stages.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qvgen.lazy import lazy

if TYPE_CHECKING:
    from qvgen.checkpoint.assembled import fuse_adapters, import_single_file
    from qvgen.checkpoint.grids import load_folds, load_grids, save_folds, save_grids
    from qvgen.checkpoint.loadable import check_loadable
    from qvgen.checkpoint.packed import export_pipeline, load_packed_transformer, verify_folder
    from qvgen.checkpoint.pipeline import load_pipeline, load_transformer
    from qvgen.checkpoint.rounded import pack_pipeline
    from qvgen.checkpoint.training import load_training_state, save_training_state
    from qvgen.checkpoint.unpack import unpack_folder

__all__ = [
    "check_loadable",
    "export_pipeline",
    "fuse_adapters",
    "import_single_file",
    "load_folds",
    "load_grids",
    "load_packed_transformer",
    "load_pipeline",
    "load_training_state",
    "load_transformer",
    "pack_pipeline",
    "save_folds",
    "save_grids",
    "save_training_state",
    "unpack_folder",
    "verify_folder",
]

__getattr__ = lazy(
    {
        **dict.fromkeys(("load_folds", "load_grids", "save_folds", "save_grids"), "qvgen.checkpoint.grids"),
        **dict.fromkeys(("export_pipeline", "load_packed_transformer", "verify_folder"), "qvgen.checkpoint.packed"),
        **dict.fromkeys(("load_pipeline", "load_transformer"), "qvgen.checkpoint.pipeline"),
        **dict.fromkeys(("load_training_state", "save_training_state"), "qvgen.checkpoint.training"),
        "check_loadable": "qvgen.checkpoint.loadable",
        **dict.fromkeys(("fuse_adapters", "import_single_file"), "qvgen.checkpoint.assembled"),
        "pack_pipeline": "qvgen.checkpoint.rounded",
        "unpack_folder": "qvgen.checkpoint.unpack",
    }
)
