"""Changes of what MLflow keeps: rows of runs and of the registry, and files of runs."""

from __future__ import annotations

from tests.support.tampers.spoiled import Tamper

STAGES = ("prepare", "pack", "measure", "register")
_JOURNAL = "SELECT value FROM tags WHERE key = 'journal.id' AND run_uuid = ?"
_WRONG = "0" * 32


def _tag_of(table: str, key: str, value: str) -> str:
    return f"UPDATE {table} SET value = '{value}' WHERE key = '{key}'"


_PROMOTION = "UPDATE registered_model_tags SET value = replace(value, ?, ?) WHERE key LIKE 'promotion.champion.%'"

DELETED = {
    **{f"every input of {stage}": Tamper("dvc.lock", lambda p, s=stage: p.tag(s, "dvc.dep.%", None)) for stage in STAGES},
    "one input of pack": Tamper("dvc.lock", lambda p: p.tag("pack", "dvc.dep.artifacts/data", None)),
    "one input of register": Tamper("dvc.lock", lambda p: p.tag("register", "dvc.dep.metrics/evaluate.json", None)),
    "the output of pack": Tamper("producers", lambda p: p.tag("pack", "dvc.out.%", None)),
    "the output of measure": Tamper("dvc.lock", lambda p: p.tag("measure", "dvc.out.metrics/evaluate.json", None)),
    "the output of register": Tamper("dvc.lock", lambda p: p.tag("register", "dvc.out.%", None)),
    "a parameter of prepare": Tamper(
        "dvc.lock", lambda p: p.sql("DELETE FROM params WHERE run_uuid = ? AND key = 'seed'", p.run("prepare"))
    ),
    "every parameter of pack": Tamper("dvc.lock", lambda p: p.sql("DELETE FROM params WHERE run_uuid = ?", p.run("pack"))),
    "the code of measure": Tamper("dvc.lock", lambda p: p.sql("DELETE FROM params WHERE key = 'code.measure'")),
    **{
        f"the row of {stage}": Tamper(check, lambda p, s=stage: p.delete_run(s))
        for stage, check in (("prepare", "producers"), ("pack", "producers"), ("measure", "producers"), ("register", "runs"))
    },
    "the row of the execution": Tamper("parent runs", lambda p: p.delete_run("")),
    "whose run prepare is": Tamper("parent runs", lambda p: p.tag("prepare", "mlflow.parentRunId", None)),
    "the journal of pack": Tamper("seal", lambda p: p.tag("pack", "journal.id", None)),
    "the stage of pack": Tamper("seal", lambda p: p.tag("pack", "dvc.stage", None)),
    "the key of pack": Tamper("seal", lambda p: p.tag("pack", "dvc.key", None)),
    "the commit of prepare": Tamper("commit", lambda p: p.tag("prepare", "git.commit", None)),
    "whether the tree was clean": Tamper("clean tree", lambda p: p.tag("prepare", "git.dirty", None)),
    "a loss curve": Tamper(
        "seal",
        lambda p: (p.sql("DELETE FROM metrics WHERE key = 'loss'"), p.sql("DELETE FROM latest_metrics WHERE key = 'loss'")),
    ),
    "a point of a loss curve": Tamper("seal", lambda p: p.sql("DELETE FROM metrics WHERE key = 'loss' AND step = 1")),
    "a file of pack": Tamper("seal", lambda p: p.artifact("pack", "table.md", None)),
    "every file of the execution": Tamper("seal", lambda p: p.artifact("", "", None)),
    "environment.txt": Tamper("seal", lambda p: p.artifact("", "environment.txt", None)),
    "the datasets of pack": Tamper(
        "datasets", lambda p: p.sql("DELETE FROM inputs WHERE destination_id = ? AND source_type = 'DATASET'", p.run("pack"))
    ),
    "a hash of the version": Tamper("sha256", lambda p: p.sql("DELETE FROM model_version_tags WHERE key LIKE 'sha256.%'")),
    "a hash of the logged model": Tamper(
        "logged model", lambda p: p.sql("DELETE FROM logged_model_tags WHERE tag_key LIKE 'sha256.%'")
    ),
    "the device of the version": Tamper("metrics", lambda p: p.sql("DELETE FROM model_version_tags WHERE key = 'device'")),
    "a metric of the logged model": Tamper(
        "metrics", lambda p: p.sql("DELETE FROM logged_model_metrics WHERE metric_name = 'packed.psnr_db'")
    ),
    "the parameters of the logged model": Tamper("seal", lambda p: p.sql("DELETE FROM logged_model_params")),
    "the logged model": Tamper(
        "logged model", lambda p: p.client.delete_logged_model(p.ask("SELECT model_id FROM logged_models"))
    ),
    "every promotion": Tamper(
        "alias", lambda p: p.sql("DELETE FROM registered_model_tags WHERE key LIKE 'promotion.champion.%'")
    ),
    "the alias": Tamper("alias", lambda p: p.sql("DELETE FROM registered_model_aliases WHERE alias = 'champion'")),
    "the run of pack, as MLflow deletes": Tamper("runs", lambda p: p.client.delete_run(p.run("pack"))),
}

CHANGED = {
    "a number of the register run": Tamper(
        "seal",
        lambda p: p.sql(
            "UPDATE metrics SET value = value + 1 WHERE key = 'packed.psnr_db' AND run_uuid = ?", p.run("register")
        ),
    ),
    "a point of a loss curve": Tamper(
        "seal", lambda p: p.sql("UPDATE metrics SET value = 0.1 WHERE key = 'loss' AND step = 1")
    ),
    "the step of a point": Tamper("seal", lambda p: p.sql("UPDATE metrics SET step = 7 WHERE key = 'loss' AND step = 1")),
    "a point more": Tamper(
        "seal",
        lambda p: p.sql(
            "INSERT INTO metrics (key, value, timestamp, run_uuid, step, is_nan) VALUES ('loss', 0.0, 1, ?, 99, 0)",
            p.run("pack"),
        ),
    ),
    "a parameter of prepare": Tamper(
        "parameters", lambda p: p.sql("UPDATE params SET value = '1' WHERE key = 'seed' AND run_uuid = ?", p.run("prepare"))
    ),
    "a parameter more": Tamper(
        "dvc.lock", lambda p: p.sql("INSERT INTO params (key, value, run_uuid) VALUES ('qat.steps', '9', ?)", p.run("pack"))
    ),
    "the code of pack": Tamper("code", lambda p: p.sql(f"UPDATE params SET value = '{_WRONG}' WHERE key = 'code.pack'")),
    "an input of pack": Tamper("dvc.lock", lambda p: p.tag("pack", "dvc.dep.artifacts/data", f"{_WRONG}.dir")),
    "an input more": Tamper("dvc.lock", lambda p: p.tag("pack", "dvc.dep.assets/more.txt", _WRONG)),
    "an output more": Tamper("dvc.lock", lambda p: p.tag("pack", "dvc.out.artifacts/more", _WRONG)),
    "the output of prepare": Tamper("producers", lambda p: p.tag("prepare", "dvc.out.artifacts/data", f"{_WRONG}.dir")),
    "the key of measure": Tamper("seal", lambda p: p.tag("measure", "dvc.key", "measure-0")),
    "the stage of measure": Tamper("dvc.lock", lambda p: p.tag("measure", "dvc.stage", "prepare")),
    "a stage that was up to date": Tamper("producers", lambda p: p.tag("pack", "stage.state", "cached")),
    "the commit of prepare": Tamper("commit", lambda p: p.tag("prepare", "git.commit", "1" * 40)),
    "the commit of the execution": Tamper("commit", lambda p: p.tag("", "git.commit", "1" * 40)),
    "a dirty tree": Tamper("clean tree", lambda p: p.tag("pack", "git.dirty", "true")),
    "the journal of pack is that of prepare": Tamper(
        "seal",
        lambda p: p.tag("pack", "journal.id", p.ask(_JOURNAL, p.run("prepare"))),
    ),
    "the execution of pack": Tamper("parent runs", lambda p: p.tag("pack", "mlflow.parentRunId", "1" * 32)),
    "the execution of pack is a stage": Tamper("seal", lambda p: p.tag("pack", "mlflow.parentRunId", p.run("prepare"))),
    "a failed run": Tamper("runs", lambda p: p.of_run("measure", "status", "FAILED")),
    "a run that ends before it begins": Tamper("times", lambda p: p.of_run("pack", "end_time", 1000)),
    "a run that never ended": Tamper("times", lambda p: p.of_run("pack", "end_time", None)),
    "a run after its reader": Tamper(
        "times",
        lambda p: p.sql(
            "UPDATE runs SET start_time = start_time + 3600000, end_time = end_time + 3600000 WHERE run_uuid = ?",
            p.run("prepare"),
        ),
    ),
    "a run a year ago": Tamper(
        "times", lambda p: p.sql("UPDATE runs SET start_time = start_time - 31536000000 WHERE run_uuid = ?", p.run("pack"))
    ),
    "a run a second later": Tamper(
        "seal", lambda p: p.sql("UPDATE runs SET end_time = end_time + 1000 WHERE run_uuid = ?", p.run("pack"))
    ),
    "an execution that began later": Tamper(
        "seal", lambda p: p.sql("UPDATE runs SET start_time = start_time + 1 WHERE run_uuid = ?", p.parent)
    ),
    "environment.txt": Tamper("seal", lambda p: p.artifact("", "environment.txt", "# Python 2.7\na==1\n")),
    "machine.txt": Tamper("seal", lambda p: p.artifact("", "machine.txt", "a supercomputer\n")),
    "params.yaml of the execution": Tamper("seal", lambda p: p.artifact("", "params.yaml", "seed: 1\n")),
    "dvc.yaml of the execution": Tamper("seal", lambda p: p.artifact("", "dvc.yaml", "stages: {}\n")),
    "a file of pack": Tamper("seal", lambda p: p.artifact("pack", "table.md", "better\n")),
    "the digest of a dataset": Tamper(
        "datasets", lambda p: p.sql("UPDATE datasets SET digest = 'f00' WHERE name = 'artifacts/data'")
    ),
    "the name of a dataset": Tamper(
        "datasets", lambda p: p.sql("UPDATE datasets SET name = 'artifacts/other' WHERE name = 'artifacts/data'")
    ),
    "a number of the logged model": Tamper(
        "metrics", lambda p: p.sql("UPDATE logged_model_metrics SET metric_value = 99 WHERE metric_name = 'packed.psnr_db'")
    ),
    "a parameter of the logged model": Tamper(
        "seal", lambda p: p.sql("UPDATE logged_model_params SET param_value = 'W2A2' WHERE param_key = 'quantization'")
    ),
    "the device of the version": Tamper("metrics", lambda p: p.sql(_tag_of("model_version_tags", "device", "abacus"))),
    "the kernel of the version": Tamper("metrics", lambda p: p.sql(_tag_of("model_version_tags", "kernel", "faster"))),
    "the device of the logged model": Tamper(
        "metrics", lambda p: p.sql("UPDATE logged_model_tags SET tag_value = 'abacus' WHERE tag_key = 'device'")
    ),
    "the stage of the version": Tamper("logged model", lambda p: p.sql(_tag_of("model_version_tags", "dvc.stage", "other"))),
    "the fingerprint of the version": Tamper(
        "fingerprint", lambda p: p.sql(_tag_of("model_version_tags", "qvgen.fingerprint", "0"))
    ),
    "the packed model of the version": Tamper(
        "packed model", lambda p: p.sql(_tag_of("model_version_tags", "dvc.md5", _WRONG))
    ),
    "the path of the version": Tamper(
        "dvc.lock", lambda p: p.sql(_tag_of("model_version_tags", "dvc.path", "artifacts/data"))
    ),
    "a sha256 of the version": Tamper(
        "sha256", lambda p: p.sql("UPDATE model_version_tags SET value = '00' WHERE key LIKE 'sha256.%'")
    ),
    "the run of the version": Tamper("fingerprint", lambda p: p.sql("UPDATE model_versions SET run_id = ?", p.run("prepare"))),
    "the reason of a promotion": Tamper("promotion", lambda p: p.sql(_PROMOTION, "passed the gate", "best ever")),
    "the author of a promotion": Tamper("promotion", lambda p: p.sql(_PROMOTION, '"by": "', '"by": "not ')),
    "a forced promotion": Tamper("promotion", lambda p: p.sql(_PROMOTION, '"forced": false', '"forced": true')),
    "a value of the gate": Tamper("promotion", lambda p: p.sql(_PROMOTION, '"psnr_db": [', '"psnr_db": [1')),
    "a limit of the gate": Tamper("promotion", lambda p: p.sql(_PROMOTION, ">= 27", ">= 20")),
    "the time of a promotion": Tamper("promotion", lambda p: p.sql(_PROMOTION, '"time": 1', '"time": 2')),
    "the version of a promotion": Tamper("alias", lambda p: p.sql(_PROMOTION, '"version": 1', '"version": 2')),
    "a promotion that is no record": Tamper("error", lambda p: p.sql(_PROMOTION, "{", "[")),
    "a note of a user": Tamper("", lambda p: p.tag("pack", "reviewed", "yes"), "tags that no check relies on are anybody's"),
    "the name of a run": Tamper(
        "", lambda p: p.of_run("pack", "name", "other"), "a run is found by its tags; its name is for people"
    ),
}
