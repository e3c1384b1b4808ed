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
    prompt: Annotated[str, typer.Option(help="What the video shows")],
    out: Annotated[Path, typer.Option(help="File to write: .mp4, .gif, or .png (frames in a row)")],
    seed: Annotated[int, typer.Option(help="Of the noise; the same seed gives the same video")] = 0,
    steps: Annotated[int | None, typer.Option(help="Denoising steps")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="1 turns guidance off")] = None,
    frames: Annotated[int | None, typer.Option()] = None,
    height: Annotated[int | None, typer.Option(help="Pixels, multiple of 16")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels, multiple of 16")] = None,
    max_sequence_length: Annotated[int | None, typer.Option(help="Text tokens the model was trained with")] = None,
    fps: Annotated[int | None, typer.Option(help="Frames per second of the file")] = None,
) -> None:
    """One video from a prompt. Sizes and steps default to generation.json in MODEL, else to the family's own."""
    from pipelines.generate import generate as run

    run(
        model,
        prompt,
        seed,
        out,
        inference_steps=steps,
        guidance_scale=guidance_scale,
        frames=frames,
        height=height,
        width=width,
        max_sequence_length=max_sequence_length,
        fps=fps,
    )
    print(out)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def repro(context: typer.Context) -> None:
    """Run every stage that is not up to date, then show the results. More arguments go to `dvc repro`."""
    from pipelines.repro import repro as run
    from pipelines.results import show

    root = project_root()
    code = run(root, context.args)
    if code:
        raise typer.Exit(code)
    show(root)


@app.command()
def compare(
    fast: Annotated[bool, typer.Option("--fast", help="Six methods, W4A4, one seed: minutes")] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Cases that run at a time")] = 2,
) -> None:
    """Every method side by side (comparison/dvc.yaml), then the report. Hours; it goes on where it was interrupted."""
    from pipelines.compare import compare as run

    root = project_root()
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
