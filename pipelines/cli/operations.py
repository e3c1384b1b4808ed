"""Commands that run and watch the pipeline as a service, and those of the registry. The others are in everyday.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from pipelines.run.checkout import check_git, check_owner, project_root

operations = typer.Typer()


@operations.command()
def serve(
    cron: Annotated[
        str | None, typer.Option(help="minute hour day month weekday [default: flow.schedule of params.yaml]")
    ] = None,
) -> None:
    """Retrain on a schedule, and on demand (`prefect deployment run qvgen-retrain/retrain`), if anything has changed.

    Needs a Prefect server (`qvgen ui`, or PREFECT_API_URL): a temporary one has no scheduler.
    """
    from pipelines.run.prefect_home import answers, use_prefect
    from qvgen.params import load_params

    root = project_root()
    api = use_prefect(root)
    if api is None or not answers(api):
        from stages.record.connection import public_uri  # without a password

        where = public_uri(api, root) if api else "127.0.0.1:4200"
        raise ValueError(f"no Prefect server answers at {where}: start `qvgen ui`, or set PREFECT_API_URL")
    settings = load_params(root / "params.yaml").flow
    from pipelines.run.retrain import serve as wait

    wait(root, cron or settings.schedule, settings.timezone)


@operations.command()
def status(
    targets: Annotated[list[str] | None, typer.Argument(help="Stages, with what they need [default: all]")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs")] = False,
) -> None:
    """Which stages would run, and why."""
    check_git(project_root())
    from pipelines.commands.status import read_status, show

    if as_json:
        import json
        from dataclasses import asdict

        found = read_status(project_root(), targets or ())
        print(json.dumps([asdict(entry) | {"runs": entry.runs} for entry in found]))
    else:
        show(project_root(), targets or ())


@operations.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="For programs")] = False) -> None:
    """Is everything set up? A line per check, each with its remedy. Exit code 1: something has failed."""
    from pipelines.commands.doctor import examine, show

    checks = examine(project_root())
    if as_json:
        import json
        from dataclasses import asdict

        print(json.dumps([asdict(check) for check in checks]))
    else:
        show(checks)
    if any(check.verdict == "FAIL" for check in checks):
        raise typer.Exit(1)


@operations.command()
def ui(
    browser: Annotated[bool, typer.Option(help="Open a browser")] = True,
    mlflow_port: Annotated[int, typer.Option()] = 5000,
    prefect_port: Annotated[int, typer.Option()] = 4200,
) -> None:
    """MLflow and Prefect on 127.0.0.1, until Ctrl-C. What runs there already is used."""
    from pipelines.commands.ui import show

    raise typer.Exit(show(project_root(), mlflow_port, prefect_port, browser))


lineage = typer.Typer(no_args_is_help=True, help="The record of runs in MLflow.")
operations.add_typer(lineage, name="lineage")


@lineage.command()
def sync(as_json: Annotated[bool, typer.Option("--json", help="For programs")] = False) -> None:
    """Send what MLflow has not got yet, such as while its server was down, and record stages that were up to date."""
    import json
    from dataclasses import asdict

    from pipelines.run.lineage import sync as run

    done = run(project_root())
    if as_json:
        print(json.dumps(asdict(done)))
    else:
        print(f"{len(done.sent)} runs sent, {len(done.unsent)} left")
        for name, reason in done.unsent.items():
            print(f"  {name}: {reason}")
    if done.unsent:
        raise typer.Exit(1)


@operations.command()
def promote(
    name: Annotated[str | None, typer.Argument(help="Registered model [default: register.name of params.yaml]")] = None,
    version: Annotated[int | None, typer.Option(min=1, help="Instead of an alias")] = None,
    alias: Annotated[str, typer.Option(help="Whose version")] = "challenger",
    force: Annotated[bool, typer.Option("--force", help="Even if rules fail; needs --reason")] = False,
    reason: Annotated[str | None, typer.Option(help="Recorded in the registry")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The same, for programs")] = False,
) -> None:
    """Make the challenger champion if it passes the gate of params.yaml. Exit code 1: it does not, and the champion stays."""
    import json

    from pipelines.champion.promote import promote as run
    from qvgen.params import load_params

    root = project_root()
    params = load_params(root / "params.yaml")
    outcome = run(root, params, name, version=version, alias=alias, force=force, reason=reason)
    if as_json:
        print(json.dumps(outcome.as_dict(), indent=2))
    else:
        print("\n".join([*map(str, outcome.rules), outcome.message]))
    if not outcome.ok:
        raise typer.Exit(1)


@operations.command()
def rollback(
    reason: Annotated[str, typer.Option(help="Recorded in the registry, and sealed")],
    name: Annotated[str | None, typer.Argument(help="Registered model [default: register.name of params.yaml]")] = None,
    to: Annotated[int | None, typer.Option(min=1, help="A former champion [default: the one before]")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The same, for programs")] = False,
) -> None:
    """Make a former champion champion again. Servers that follow the alias take it up."""
    from pipelines.champion.rollback import rollback as run
    from qvgen.cli.app import show_rollback
    from qvgen.params import load_params

    root = project_root()
    show_rollback(run(root, load_params(root / "params.yaml"), name, to, reason), as_json)


@operations.command()
def gc(
    all_commits: Annotated[bool, typer.Option("--all-commits", help="Keep what any commit names")] = False,
    run: Annotated[bool, typer.Option("--run", help="If nothing is lost, also run `dvc gc`")] = False,
) -> None:
    """What `dvc gc` (of all branches and tags, or of all commits) and MLflow's gc would delete that a registered version still
    needs. Exit code 1: something, and nothing is deleted."""
    from pipelines.champion.kept import check_gc

    root = project_root()
    check_owner(root)
    if check_gc(root, all_commits=all_commits, run=run):
        raise typer.Exit(1)


@operations.command()
def sign(
    key: Annotated[Path | None, typer.Option(help="SSH key [default: user.signingkey of git]")] = None,
) -> None:
    """Sign metrics/seal.jsonl, the record of all runs so far, with an SSH key. `qvgen audit` then checks it."""
    from pipelines.audit.project import Project
    from pipelines.audit.signature import SIGNERS
    from pipelines.audit.signature import sign as run

    root = project_root()
    check_owner(root)
    chosen = key or Path(Project(root).git("config", "--type=path", "user.signingkey") or "no key")
    done = run(root, chosen.expanduser())
    print(
        f"{done.lines} lines of metrics/seal.jsonl are signed; `git add metrics/seal.jsonl && git commit -m Signed` keeps it"
    )
    if done.by is None:
        print(f"warning: {SIGNERS} does not name this key, so no audit counts it; see docs/audit.md", file=sys.stderr)


@operations.command()
def audit(
    model: Annotated[str | None, typer.Argument(help="NAME@ALIAS or NAME/VERSION, such as qvgen@champion")] = None,
    data: Annotated[str | None, typer.Option("--uses", help="Path or DVC hash: list the versions that used it")] = None,
    slsa: Annotated[Path | None, typer.Option(metavar="FILE", help="Write SLSA provenance, if no check fails")] = None,
    signers: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Keys that count, instead of allowed_signers in git")
    ] = None,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Also make it again in a clone and compare: hours")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The same, for programs")] = False,
) -> None:
    """From a registered model back to its data, code and parameters, every claim checked. Exit code 1: one does not
    hold; 2: results are not committed yet; 3: the record is right, but artifacts/packed here is another model."""
    import json
    from dataclasses import asdict

    if (model is None) == (data is None):
        raise ValueError("give either a model, such as qvgen@champion, or --uses PATH")
    from pipelines.audit.report import audit as run
    from pipelines.audit.report import find_uses

    root = project_root()
    check_git(root)
    if data is not None:
        md5, found = find_uses(root, data)
        if as_json:
            print(json.dumps({"md5": md5, "uses": [asdict(use) for use in found]}, indent=2))
            return
        for use in found:
            print(f"{use.model} ({', '.join(use.aliases) or 'no alias'}): {use.path}, read by {', '.join(use.stages)}")
        print(f"{md5}: {len(found)} model versions")
        return
    if signers is not None and not signers.is_file():
        raise ValueError(f"--signers {signers}: there is no such file")
    report = run(root, str(model), rebuild_too=rebuild, signers=signers, provenance=slsa is not None)
    print(json.dumps(report.as_dict(), indent=2) if as_json else report)
    if slsa is not None and report.exit_code not in (0, 3):
        print(f"{slsa} is not written: not every claim holds", file=sys.stderr)
    elif slsa is not None:
        draft = slsa.with_name(f"{slsa.name}.new")
        draft.write_text(json.dumps(report.provenance, indent=2) + "\n")
        draft.replace(slsa)
    if report.exit_code:
        raise typer.Exit(report.exit_code)
