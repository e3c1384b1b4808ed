"""Where Prefect keeps its things and which server it talks to. Call `use_prefect` before anything imports prefect."""

from __future__ import annotations

import os
from pathlib import Path

from pipelines.health import fetch

LOCAL_API = "http://127.0.0.1:4200/api"
_STARTUP_SECONDS = 120  # of a temporary server; Prefect's own 20 are not enough on a busy machine


def use_prefect(root: Path) -> str | None:
    """Set Prefect's environment and return the address of the server that flows will report to.

    That is PREFECT_API_URL, else the server on 127.0.0.1:4200 if one answers, else None: Prefect then starts a temporary
    one for the time of the flow. Its database is in .qvgen/prefect.
    """
    os.environ.setdefault("PREFECT_HOME", str(root / ".qvgen" / "prefect"))
    Path(os.environ["PREFECT_HOME"]).mkdir(parents=True, exist_ok=True)  # its server dies without
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", str(_STARTUP_SECONDS))
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    if "PREFECT_API_URL" not in os.environ and answers(LOCAL_API):
        os.environ["PREFECT_API_URL"] = LOCAL_API
    return os.environ.get("PREFECT_API_URL")


def answers(api: str, seconds: float = 1.0) -> bool:
    """Whether a Prefect server answers at this address."""
    return fetch(f"{api.rstrip('/')}/health", seconds) is not None
