"""The `qvgen` command of an installed library: it hands over to pipelines/cli of the project at hand, and where there is none
has the commands of qvgen/cli.

Only the library is installed, because packages named `pipelines` and `stages` belong to a project and not into everybody's
site-packages. The command is found at run time and not imported: the library must not depend on what is built on it.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

PIPELINES = Path("pipelines") / "cli" / "everyday.py"


def main() -> None:
    """Run the command of the checkout that is installed (`pip install -e .`), else of the project that the current folder lies
    in. Where there is neither: the commands that need no project, and for any other one line and exit code 1."""
    if not _is_importable():
        project = _project(Path.cwd())
        if project is None:
            _anywhere()
            return
        sys.path.insert(0, str(project))
    import_module("pipelines.cli").main()


def _anywhere() -> None:
    from qvgen.cli.app import anywhere, main, name_of

    known = [name_of(command) for command in anywhere.registered_commands]
    wanted = next((argument for argument in sys.argv[1:] if not argument.startswith("-")), None)
    if wanted is not None and wanted not in known:
        print(
            "qvgen: no project here (dvc.yaml and pipelines/, in this folder or above): call it in a checkout of QVGen; "
            f"without one there are {', '.join(known)}",
            file=sys.stderr,
        )
        sys.exit(1)
    main()


def _is_importable() -> bool:
    """Whether `pipelines` on the path is ours: others may have a package of that name."""
    found = find_spec("pipelines")
    folders = (found.submodule_search_locations or []) if found else []
    return any(_is_project(Path(folder).parent) for folder in folders)


def _project(here: Path) -> Path | None:
    return next((folder for folder in (here, *here.parents) if _is_project(folder)), None)


def _is_project(folder: Path) -> bool:
    return (folder / "dvc.yaml").is_file() and (folder / PIPELINES).is_file()
