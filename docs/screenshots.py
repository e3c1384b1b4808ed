"""Takes the pictures in docs/: `qvgen ui --no-browser &`, then `python docs/screenshots.py`, after `make repro`."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from mlflow import MlflowClient
from playwright.sync_api import sync_playwright

MLFLOW, PREFECT = "http://127.0.0.1:5000", "http://127.0.0.1:4200"
OPTIONS = ("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")
FOLDER = Path(__file__).parent
SETTLE_MS = 6_000  # both pages load their data after they have loaded themselves


def main() -> None:
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    client = MlflowClient(MLFLOW)
    experiment = client.get_experiment_by_name("qvgen")
    if experiment is None:
        raise SystemExit(f"{MLFLOW} has no experiment qvgen: run `make repro` first")
    finished = client.search_runs(
        [experiment.experiment_id], "attributes.status = 'FINISHED'", order_by=["attributes.start_time DESC"]
    )
    execution = next(run for run in finished if "mlflow.note.content" in run.data.tags)
    qat = next(run for run in finished if run.data.tags.get("dvc.stage") == "qat" and "stage.state" not in run.data.tags)
    base = f"{MLFLOW}/#/experiments/{experiment.experiment_id}"
    pages = {
        "mlflow-runs": f"{base}/runs",
        "mlflow-execution": f"{base}/runs/{execution.info.run_id}",
        "mlflow-qat": f"{base}/runs/{qat.info.run_id}/model-metrics",
        "mlflow-model": f"{MLFLOW}/#/models/qvgen",
        "prefect-runs": f"{PREFECT}/runs",
    }
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=OPTIONS)
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        for name, address in pages.items():
            page.goto(address)
            page.wait_for_timeout(SETTLE_MS)
            page.screenshot(path=FOLDER / f"{name}.png")
        page.get_by_role("link").filter(has_text="-").first.wait_for()
        link = page.locator("a[href*='/runs/flow-run/']").first.get_attribute("href")
        page.goto(f"{PREFECT}{link}")
        page.wait_for_timeout(SETTLE_MS)
        page.screenshot(path=FOLDER / "prefect-flow.png")
        browser.close()


if __name__ == "__main__":
    main()
