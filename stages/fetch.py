"""Stage fetch: the full-precision pipeline, checked, in artifacts/model.

Reads the folder or hub revision of `fetch.source`; writes the pipeline's components and manifest.json, which records
source, revision, the sha256 of every file, and of two transformers which one is trained.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict

from stages.runtime.run import Stage, stage_main


def run(stage: Stage) -> None:
    from qvgen.checkpoint.loadable import check_loadable
    from qvgen.models.files import EXPERT, MANIFEST
    from qvgen.models.hashes import check_hashes, hash_files, recorded_hashes
    from qvgen.models.registry import load_family
    from qvgen.models.source import check_expert, check_links, read_pipeline, resolve_source

    source, revision = stage.params.fetch.source, stage.params.fetch.revision
    pipeline = read_pipeline(resolve_source(source, revision, stage.root))
    check_links(pipeline)
    load_family(pipeline.folder)  # refuses a scheduler that training would not follow
    expert = check_expert(stage.params.fetch.expert, pipeline)
    check_loadable(pipeline, expert)
    sizes = {name: (pipeline.folder / name).stat().st_size for name in pipeline.files}
    with stage.outputs("artifacts/model") as folder:
        with stage.progress(sum(sizes.values()), desc="copy", unit="B") as progress:
            for name, size in sizes.items():
                target = folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(pipeline.folder / name, target)
                progress.update(size)
        # The copy is hashed, not the source: it is what every later stage reads.
        with stage.progress(sum(sizes.values()), desc="sha256", unit="B") as progress:
            files = hash_files(folder, pipeline.files, progress.update)
        recorded = recorded_hashes(pipeline.folder)
        if recorded is not None:
            check_hashes(files, recorded, pipeline.folder)
        manifest = {
            "source": source,
            "revision": revision,
            "pipeline": pipeline.pipeline_class,
            "files": {name: asdict(record) for name, record in files.items()},
        } | ({} if expert is None else {EXPERT: expert})
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    stage.log_metrics({"files": len(files), "bytes": sum(sizes.values())})
    stage.log_artifact(f"artifacts/model/{MANIFEST}")


if __name__ == "__main__":
    stage_main("fetch", run)
