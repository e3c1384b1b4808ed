"""The command line, `qvgen ...`. Imports are lazy: `--help` must not wait for torch, DVC or MLflow."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from pipelines.cli.models import models
from pipelines.cli.operations import operations
from pipelines.run import nearby
from pipelines.run.checkout import check_git, project_root
from qvgen.cli.app import anywhere, name_of, run_app

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # plain help: half the start-up time
    pretty_exceptions_enable=False,
    help="4-bit video diffusion models: train, pack, measure, generate.",
)


@app.command()
def generate(
    model: Annotated[
        str, typer.Option(help="artifacts/packed or another pipeline folder, models:/qvgen@champion, or ORG/NAME@COMMIT")
    ],
    out: Annotated[Path, typer.Option(help="File to write: .mp4, .gif, or .png (frames in a row); with --prompts, a folder")],
    prompt: Annotated[str | None, typer.Option(help="What the video shows")] = None,
    prompts: Annotated[Path | None, typer.Option(help="Text file, one prompt per line: writes OUT/{prompt}-{0..}.mp4")] = None,
    image: Annotated[Path | None, typer.Option(help="With --prompt: the first frame, for image-to-video models")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="With --prompt: what guidance leads away from")] = None,
    seed: Annotated[int, typer.Option(help="Of the noise; the same seed gives the same video")] = 0,
    steps: Annotated[int | None, typer.Option(help="Denoising steps")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="1 turns guidance off")] = None,
    guidance_stop: Annotated[
        float | None, typer.Option(help="Without guidance from this share of the way on; 1: guided to the end")
    ] = None,
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
        "guidance_stop": guidance_stop,
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
    from qvgen.hub.resolve import model_folder

    folder_of_model = model_folder(model)
    if prompts is not None and negative_prompt is not None:
        raise ValueError("--negative-prompt: only with --prompt")
    if prompts is not None and image is not None:
        raise ValueError("--image: only with --prompt")
    if prompts is not None:
        from pipelines.commands.generate.folder import generate_folder

        done = generate_folder(folder_of_model, prompts, out, seed, **given, **overrides)
        print(f"{out}: {done.made} videos made, {done.kept} were there")
        return
    if given:
        raise ValueError(f"{', '.join('--' + name.replace('_', '-') for name in given)}: only with --prompts")
    from pipelines.commands.generate.video import generate as run

    run(folder_of_model, str(prompt), seed, out, negative_prompt or "", image, **overrides)
    print(out)


@app.command()
def repro(
    targets: Annotated[list[str] | None, typer.Argument(help="Stages, with what they need [default: all]")] = None,
) -> None:
    """Run every stage that is not up to date as a Prefect flow, show the results, and make the new model champion if it passes
    the gate.

    Without a Prefect server on 127.0.0.1:4200 (`qvgen ui`) or at PREFECT_API_URL, a temporary one is started: some 20 s.
    `dvc repro` does the same without Prefect.
    """
    import signal

    from pipelines.commands.results import show
    from pipelines.run.prefect_home import some_server

    root = project_root()
    check_git(root)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # a shell that starts us with `&` would ignore Ctrl-C
        signal.signal(number, signal.default_int_handler)
    try:
        with some_server(root):
            from pipelines.run.flow import StageError, run_pipeline

            try:
                run_pipeline(root, targets)
            except StageError as error:
                raise ValueError(str(error)) from None
    except KeyboardInterrupt:
        print("\nInterrupted. Finished stages are kept; `qvgen repro` goes on, training from its last checkpoint.")
        raise
    if targets:
        return
    from pipelines.champion.promote import promote_after_run

    show(root)
    if verdict := promote_after_run(root):
        print(verdict)


@app.command()
def compare(
    fast: Annotated[
        bool, typer.Option("--fast", help="Six methods, W4A4, one seed, with the recorded learning rates")
    ] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Cases that run at a time")] = 2,
    table: Annotated[bool, typer.Option("--table", help="Run nothing: print the table of the README")] = False,
) -> None:
    """Every method side by side (comparison/dvc.yaml), then the report. Hours; it goes on where it was interrupted."""
    from pipelines.commands.compare import PAGE
    from pipelines.commands.compare import compare as run

    root = project_root()
    if table:
        from comparison.report.page import markdown_table

        print(markdown_table(root / "comparison/results"))
        return
    code = run(root, jobs, fast)
    if code:
        raise typer.Exit(code)
    print(f"report: {root / PAGE}")


@app.command()
def results(
    markdown: Annotated[bool, typer.Option("--markdown", help="The table of the README, with commands")] = False,
) -> None:
    """Full precision against the packed model: quality, size, latency; where the videos and the MLflow run are."""
    from pipelines.commands.results import markdown_table, show

    root = project_root()
    if markdown:
        print(markdown_table(root))
    else:
        show(root)


@app.command()
def kernels(
    as_json: Annotated[bool, typer.Option("--json", help="The same, for programs")] = False,
    measure: Annotated[bool, typer.Option("--measure", help="Measure anew which are fastest here")] = False,
) -> None:
    """What runs packed layers here, and why. The environment variable QVGEN_KERNELS (auto, cpu, reference) chooses."""
    from pipelines.commands.kernels import show

    try:
        show(as_json, measure)
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
    from pipelines.commands.vbench import run

    code = run(videos, dims, python, partial=partial, keep=keep, list_prompts=list_prompts, as_json=as_json)
    if code:
        raise typer.Exit(code)


@app.command()
def proxies(
    videos: Annotated[Path, typer.Option(help="Folder of .mp4 files")],
    as_json: Annotated[bool, typer.Option("--json", help="Per video too, for programs")] = False,
) -> None:
    """Motion, smoothness and consistency of generated videos without any weights; no VBench scores."""
    from pipelines.commands.proxies import show

    show(videos, as_json)


app.add_typer(models)  # no names: their commands stand beside the others
app.add_typer(operations)
IN_A_PROJECT = {"rollback"}  # which have more to do in a project, and are in operations.py
app.registered_commands += [command for command in anywhere.registered_commands if name_of(command) not in IN_A_PROJECT]
nearby.offer()


def main() -> None:
    """All commands, those that need no project too."""
    run_app(app)
