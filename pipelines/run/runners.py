"""Where the flow's tasks run: threads of this process, or workers of Dask or Ray."""

from __future__ import annotations

import logging
import os
from importlib import import_module
from typing import Any

PACKAGES = {"dask": "prefect-dask", "ray": "prefect-ray"}


def task_runner(kind: str, workers: int) -> Any:
    """A Prefect task runner with room for `workers` stages at a time. Raises ValueError if its package is not installed.

    Dask and Ray start a local cluster; an existing one is named by DASK_ADDRESS or RAY_ADDRESS. Its workers must see the same
    checkout: DVC's locks hold process ids, so one checkout belongs to one host (docs/orchestration.md).
    """
    if kind == "threads":
        from prefect.task_runners import ThreadPoolTaskRunner

        return ThreadPoolTaskRunner(max_workers=workers)
    try:
        module = import_module(PACKAGES[kind].replace("-", "_"))
    except ImportError:
        raise ValueError(f"flow.runner is {kind}: pip install {PACKAGES[kind]}, or use flow.runner: threads") from None
    if kind == "dask":
        logging.getLogger("distributed").setLevel(logging.WARNING)  # it tells of every connection
        if address := os.environ.get("DASK_ADDRESS"):
            return module.DaskTaskRunner(address=address)
        return module.DaskTaskRunner(cluster_kwargs={"n_workers": workers, "threads_per_worker": 1, "dashboard_address": None})
    # Ray kills the children of a worker that ends, the guard of a stage too, which then could not end the stage.
    os.environ.setdefault("RAY_kill_child_processes_on_worker_exit", "0")
    if address := os.environ.get("RAY_ADDRESS"):
        return module.RayTaskRunner(address=address)
    return module.RayTaskRunner(init_kwargs={"num_cpus": workers, "include_dashboard": False})
