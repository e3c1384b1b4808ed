"""The commands themselves. Imports are lazy: `--help` must not wait for torch or MLflow."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

anywhere = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Models of MLflow's registry, outside of a project; inside of one there is more.",
)


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


def main() -> None:
    """Bad input and a bad environment print one message and exit with 1; QVGEN_DEBUG=1 shows the traceback."""
    try:
        anywhere()
    except (ValueError, OSError) as error:
        if os.environ.get("QVGEN_DEBUG") == "1":
            raise
        print(f"qvgen: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
