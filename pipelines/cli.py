"""The command line, `qvgen ...`. Imports are lazy: `--help` must not wait for torch, DVC or MLflow."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # plain help: half the start-up time
    pretty_exceptions_enable=False,
    help="4-bit video diffusion models: train, pack, measure, generate.",
)


@app.command()
def generate(
    model: Annotated[Path, typer.Option(help="Folder of a diffusers pipeline, packed or not: artifacts/packed")],
    out: Annotated[Path, typer.Option(help="File to write: .mp4, .gif, or .png (frames in a row); with --prompts, a folder")],
    prompt: Annotated[str | None, typer.Option(help="What the video shows")] = None,
    prompts: Annotated[Path | None, typer.Option(help="Text file, one prompt per line: writes OUT/{prompt}-{0..}.mp4")] = None,
    seed: Annotated[int, typer.Option(help="Of the noise; the same seed gives the same video")] = 0,
    steps: Annotated[int | None, typer.Option(help="Denoising steps")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="1 turns guidance off")] = None,
    frames: Annotated[int | None, typer.Option()] = None,
    height: Annotated[int | None, typer.Option(help="Pixels, multiple of 16")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels, multiple of 16")] = None,
    max_sequence_length: Annotated[int | None, typer.Option(help="Text tokens the model was trained with")] = None,
    fps: Annotated[int | None, typer.Option(help="Frames per second of the file")] = None,
    samples: Annotated[int | None, typer.Option(help="With --prompts: videos per prompt [default: 5]")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="With --prompts: samples of a prompt made at once [default: 1]")
    ] = None,
    processes: Annotated[int | None, typer.Option(help="With --prompts: each loads the model [default: 1]")] = None,
    threads: Annotated[int | None, typer.Option(help="With --prompts: per process [default: the cores, shared out]")] = None,
    shard: Annotated[str | None, typer.Option(help="With --prompts: i/n, the part of the work to do here")] = None,
) -> None:
    """A video from a prompt, or a folder of them from a list; run again, it goes on where it stopped.

    Sizes and steps default to generation.json in MODEL, else to the family's own.
    """
    overrides = {
        "inference_steps": steps,
        "guidance_scale": guidance_scale,
        "frames": frames,
        "height": height,
        "width": width,
        "max_sequence_length": max_sequence_length,
        "fps": fps,
    }
    folder = {"samples": samples, "batch_size": batch_size, "processes": processes, "threads": threads, "shard": shard}
    given = {name: value for name, value in folder.items() if value is not None}
    if (prompt is None) == (prompts is None):
        raise ValueError("give either --prompt, for one video, or --prompts, for a folder of them")
    if prompts is not None:
        from pipelines.generate_folder import generate_folder

        done = generate_folder(model, prompts, out, seed, **given, **overrides)
        print(f"{out}: {done.made} videos made, {done.kept} were there")
        return
    if given:
        raise ValueError(f"{', '.join('--' + name.replace('_', '-') for name in given)}: only with --prompts")
    from pipelines.generate import generate as run

    run(model, str(prompt), seed, out, **overrides)
    print(out)


@app.command()
def repro(
    targets: Annotated[list[str] | None, typer.Argument(help="Stages, with what they need [default: all]")] = None,
) -> None:
    """Run every stage that is not up to date as a Prefect flow, then show the results.

    Without a Prefect server on 127.0.0.1:4200 (`qvgen ui`) or at PREFECT_API_URL, a temporary one is started: some 20 s.
    `dvc repro` does the same without Prefect.
    """
    from pipelines.prefect_home import use_prefect
    from pipelines.results import show

    root = project_root()
    use_prefect(root)
    from pipelines.flow import StageError, run_pipeline

    try:
        run_pipeline(root, targets)
    except StageError as error:
        raise ValueError(str(error)) from None
    if targets:
        return
    from pipelines.promote import promote_after_run

    show(root)
    if verdict := promote_after_run(root):
        print(verdict)


@app.command()
def serve(
    cron: Annotated[
        str | None, typer.Option(help="minute hour day month weekday [default: flow.schedule of params.yaml]")
    ] = None,
) -> None:
    """Retrain on a schedule, and on demand (`prefect deployment run qvgen-retrain/retrain`), if anything has changed.

    Needs a Prefect server (`qvgen ui`, or PREFECT_API_URL): a temporary one has no scheduler.
    """
    from pipelines.prefect_home import answers, use_prefect
    from qvgen.params import load_params

    root = project_root()
    api = use_prefect(root)
    if api is None or not answers(api):
        raise ValueError(f"no Prefect server answers at {api or '127.0.0.1:4200'}: start `qvgen ui`, or set PREFECT_API_URL")
    settings = load_params(root / "params.yaml").flow
    from pipelines.retrain import serve as wait

    wait(root, cron or settings.schedule, settings.timezone)


@app.command()
def status(
    targets: Annotated[list[str] | None, typer.Argument(help="Stages, with what they need [default: all]")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs")] = False,
) -> None:
    """Which stages would run, and why."""
    from pipelines.status import read_status, show

    if as_json:
        import json
        from dataclasses import asdict

        found = read_status(project_root(), targets or ())
        print(json.dumps([asdict(entry) | {"runs": entry.runs} for entry in found]))
    else:
        show(project_root(), targets or ())


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="For programs")] = False) -> None:
    """Is everything set up? A line per check, each with its remedy. Exit code 1: something has failed."""
    from pipelines.doctor import examine, show

    checks = examine(project_root())
    if as_json:
        import json
        from dataclasses import asdict

        print(json.dumps([asdict(check) for check in checks]))
    else:
        show(checks)
    if any(check.verdict == "FAIL" for check in checks):
        raise typer.Exit(1)


@app.command()
def ui(
    browser: Annotated[bool, typer.Option(help="Open a browser")] = True,
    mlflow_port: Annotated[int, typer.Option()] = 5000,
    prefect_port: Annotated[int, typer.Option()] = 4200,
) -> None:
    """MLflow and Prefect on 127.0.0.1, until Ctrl-C. What runs there already is used."""
    from pipelines.ui import show

    raise typer.Exit(show(project_root(), mlflow_port, prefect_port, browser))


lineage = typer.Typer(no_args_is_help=True, help="The record of runs in MLflow.")
app.add_typer(lineage, name="lineage")


@lineage.command()
def sync(as_json: Annotated[bool, typer.Option("--json", help="For programs")] = False) -> None:
    """Send what MLflow has not got yet, such as while its server was down, and record stages that were up to date."""
    import json
    from dataclasses import asdict

    from pipelines.lineage import sync as run

    done = run(project_root())
    if as_json:
        print(json.dumps(asdict(done)))
    else:
        print(f"{len(done.sent)} runs sent, {len(done.unsent)} left")
        for name, reason in done.unsent.items():
            print(f"  {name}: {reason}")
    if done.unsent:
        raise typer.Exit(1)


@app.command()
def compare(
    fast: Annotated[
        bool, typer.Option("--fast", help="Six methods, W4A4, one seed, with the recorded learning rates")
    ] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Cases that run at a time")] = 2,
    table: Annotated[bool, typer.Option("--table", help="Run nothing: print the table of the README")] = False,
) -> None:
    """Every method side by side (comparison/dvc.yaml), then the report. Hours; it goes on where it was interrupted."""
    from pipelines.compare import compare as run

    root = project_root()
    if table:
        from qvgen.evaluation.report import markdown_table

        print(markdown_table(root / "comparison/results"))
        return
    code = run(root, jobs, fast)
    if code:
        raise typer.Exit(code)
    print(f"report: {root / 'reports/comparison.html'}")


@app.command()
def results(
    markdown: Annotated[bool, typer.Option("--markdown", help="The table of the README, with commands")] = False,
) -> None:
    """Full precision against the packed model: quality, size, latency; where the videos and the MLflow run are."""
    from pipelines.results import markdown_table, show

    root = project_root()
    if markdown:
        print(markdown_table(root))
    else:
        show(root)


@app.command()
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

    from pipelines.promote import promote as run
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


@app.command()
def audit(
    model: Annotated[str | None, typer.Argument(help="NAME@ALIAS or NAME/VERSION, such as qvgen@champion")] = None,
    data: Annotated[str | None, typer.Option("--uses", help="Path or DVC hash: list the versions that used it")] = None,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Also make it again in a clone and compare: hours")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The same, for programs")] = False,
) -> None:
    """From a registered model back to its data, code and parameters, every claim checked. Exit code 1: one does not hold."""
    import json
    from dataclasses import asdict

    if (model is None) == (data is None):
        raise ValueError("give either a model, such as qvgen@champion, or --uses PATH")
    from pipelines.audit import audit as run
    from pipelines.audit import find_uses

    root = project_root()
    if data is not None:
        md5, found = find_uses(root, data)
        if as_json:
            print(json.dumps({"md5": md5, "uses": [asdict(use) for use in found]}, indent=2))
            return
        for use in found:
            print(f"{use.model} ({', '.join(use.aliases) or 'no alias'}): {use.path}, read by {', '.join(use.stages)}")
        print(f"{md5}: {len(found)} model versions")
        return
    report = run(root, str(model), rebuild_too=rebuild)
    print(json.dumps(report.as_dict(), indent=2) if as_json else report)
    if not report.ok:
        raise typer.Exit(1)


@app.command()
def kernels(
    as_json: Annotated[bool, typer.Option("--json", help="The same, for programs")] = False,
) -> None:
    """What runs packed layers here, and why. The environment variable QVGEN_KERNELS (auto, cpu, reference) chooses."""
    from pipelines.kernels import show

    try:
        show(as_json)
    except ValueError as error:
        print(f"qvgen: {error}", file=sys.stderr)
        raise typer.Exit(2) from None


@app.command()
def vbench(
    videos: Annotated[Path | None, typer.Option(help="Folder of {prompt}-{0..4}.mp4; without: which files are needed")] = None,
    dims: Annotated[str | None, typer.Option(help="Dimensions, comma between [default: the 8 of the papers]")] = None,
    python: Annotated[str | None, typer.Option(help="Of VBench's environment [default: QVGEN_VBENCH_PYTHON]")] = None,
    partial: Annotated[bool, typer.Option("--partial", help="Evaluate although videos are missing")] = False,
    keep: Annotated[Path | None, typer.Option(help="Folder for VBench's own results and logs")] = None,
    list_prompts: Annotated[bool, typer.Option("--list-prompts", help="Print the prompts of the dimensions")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The same, for programs")] = False,
) -> None:
    """Scores of the real VBench over generated videos. Exit code 3: some dimensions were refused, and the table says why."""
    from pipelines.vbench import run

    code = run(videos, dims, python, partial=partial, keep=keep, list_prompts=list_prompts, as_json=as_json)
    if code:
        raise typer.Exit(code)


@app.command()
def proxies(
    videos: Annotated[Path, typer.Option(help="Folder of .mp4 files")],
    as_json: Annotated[bool, typer.Option("--json", help="Per video too, for programs")] = False,
) -> None:
    """Motion, smoothness and consistency of generated videos without any weights; no VBench scores."""
    from pipelines.proxies import show

    show(videos, as_json)


def project_root() -> Path:
    """The nearest folder, from here upwards, that holds dvc.yaml. Raises ValueError if there is none."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "dvc.yaml").is_file():
            return folder
    raise ValueError(f"no dvc.yaml in {here} or above: run this inside the project")


def main() -> None:
    """Bad input and a bad environment print one message and exit with 1; QVGEN_DEBUG=1 shows the traceback."""
    try:
        app()
    except (ValueError, OSError) as error:
        if os.environ.get("QVGEN_DEBUG") == "1":
            raise
        print(f"qvgen: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
