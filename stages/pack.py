"""Stage pack: the trained student as a diffusers pipeline folder with packed low-bit weights.

Reads artifacts/model, artifacts/calibration and artifacts/decay; writes artifacts/packed and the sizes in metrics/pack.json.
"""

from __future__ import annotations

import json

from stages.runtime.run import Stage, stage_main


def run(stage: Stage) -> None:
    import torch
    from safetensors.torch import load_file

    from qvgen.checkpoint.packed import export_pipeline
    from qvgen.checkpoint.pipeline import load_transformer
    from qvgen.models.registry import load_family
    from qvgen.nn.swap import convert_, prepare_

    params, source = stage.params, stage.root / "artifacts/model"
    scheme = params.effective_scheme
    family = load_family(source)
    student = load_transformer(source, component=family.component).float()
    prepare_(student, scheme, default_targets=family.default_targets)
    student.load_state_dict(load_file(stage.root / "artifacts/decay/student.safetensors"))
    names = convert_(student)
    with stage.outputs("artifacts/packed") as folder:
        # A pipeline that fixes guidance before its first step is sampled with it to the end.
        stop = params.chosen.guidance_stop if family.guidance_can_stop else 1.0
        dtype = getattr(torch, params.pack.dtype)
        export_pipeline(source, student, scheme, folder, dtype, params.method, stop, family.component)
    packed = _bytes(stage.root / "artifacts/packed" / family.component)
    summary = {
        "layers": len(names),
        "transformer_bytes": packed,
        "source_transformer_bytes": _bytes(source / family.component),
    }
    with stage.outputs("metrics/pack.json") as path:
        path.write_text(json.dumps(summary, indent=2) + "\n")
    stage.log_metrics(summary)
    stage.log_tags({"quantization": scheme.name, "method": params.method})


def _bytes(folder) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


if __name__ == "__main__":
    stage_main("pack", run)
