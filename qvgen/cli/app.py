"""The commands themselves. Imports are lazy: `--help` must not wait for torch or MLflow."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from qvgen.device import lack_of_memory

_LESS = (
    "to need less, give fewer --frames, a smaller --height and --width, --batch-size or --processes where the command has "
    "them, end what else uses the memory, or choose another device with QVGEN_DEVICE"
)

anywhere = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Models of MLflow's registry, outside of a project; inside of one there is more.",
)


def name_of(command: Any) -> str:
    """Of one of the registered commands."""
    return str(command.name or command.callback.__name__)


@anywhere.callback()
def _several() -> None:
    """Models of MLflow's registry, outside of a project; inside of one there is more."""


@anywhere.command()
def pull(
    model: Annotated[str, typer.Argument(help="models:/NAME@ALIAS, models:/NAME/VERSION, or ORG/NAME@COMMIT")],
    out: Annotated[Path, typer.Option(help="New folder")],
) -> None:
    """Copy a registered model to a folder, every file checked by hash: for ComfyUI, vLLM-Omni, plain diffusers."""
    from qvgen.hub.resolve import pull as run

    print(run(model, out))


@anywhere.command()
def rollback(
    reason: Annotated[str, typer.Option(help="Recorded in the registry")],
    name: Annotated[str, typer.Argument(help="Registered model")] = "qvgen",
    to: Annotated[int | None, typer.Option(min=1, help="A former champion [default: the one before]")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The same, for programs")] = False,
) -> None:
    """Make a former champion champion again. Servers that follow the alias take it up."""
    from qvgen.hub.rollback import rollback as run

    show_rollback(run(name, to, reason=reason), as_json)


@anywhere.command()
def canary(
    model: Annotated[str, typer.Argument(help="models:/NAME@ALIAS or models:/NAME/VERSION")],
    as_json: Annotated[bool, typer.Option("--json", help="The same, for programs")] = False,
) -> None:
    """Make a version's registered videos again on this host, compare, and log the result to the version. Exit code 1: they are
    not as registered."""
    from qvgen.serving.canary import canary as run

    done = run(model)
    if as_json:
        import json
        from dataclasses import asdict

        print(json.dumps(asdict(done.outcome) | {"model": done.model, "host": done.host, "time": done.time}))
    else:
        print(f"{done.model} on {done.host}: {done.outcome}")
    if not done.outcome.ok:
        raise typer.Exit(1)


@anywhere.command(name="serve-model")
def serve_model(
    model: Annotated[str, typer.Argument(help="models:/NAME@ALIAS, which is followed, or models:/NAME/VERSION")],
    host: Annotated[str, typer.Option(help="Address to listen on; there is no login, so others need a proxy")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 5001,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks at the alias")] = 30.0,
    allowed_hosts: Annotated[str, typer.Option(help="Further names it is asked under, comma between; * for any")] = "",
) -> None:
    """Serve a registered model over HTTP as `mlflow models serve` does, and follow its alias without a restart."""
    from qvgen.serving.server import serve

    serve(model, host, port, interval, [name.strip() for name in allowed_hosts.split(",") if name.strip()])


def show_rollback(done: Any, as_json: bool) -> None:
    if as_json:
        import json
        from dataclasses import asdict

        print(json.dumps(asdict(done), indent=2))
    else:
        print(done.message)


def run_app(app: Callable[[], Any]) -> None:
    """Bad input, a bad environment and a lack of memory print a message and exit with 1; QVGEN_DEBUG=1 shows the traceback."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        lacking = lack_of_memory(error)
        if os.environ.get("QVGEN_DEBUG") == "1" or not (lacking or isinstance(error, (ValueError, OSError))):
            raise
        print(f"qvgen: {f'{lacking}; {_LESS}' if lacking else error}", file=sys.stderr)
        sys.exit(1)


def main() -> None:
    """The commands that need no project."""
    run_app(anywhere)
