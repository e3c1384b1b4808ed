"""Takes the pictures in docs/, after `make repro`: `qvgen ui --no-browser &`, `qvgen repro`, then `python docs/screenshots.py
LINK` with the link to Prefect that `qvgen ui` prints. It needs Chromium (.ci/programs)."""

from __future__ import annotations

import io
import os
import shutil
import sys
from pathlib import Path

from mlflow import MlflowClient
from PIL import Image
from playwright.sync_api import Page, sync_playwright

from pipelines.commands.ui import TRAINING

MLFLOW, PREFECT = "http://127.0.0.1:5000", "http://127.0.0.1:4200"
OPTIONS = ("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")
FOLDER = Path(__file__).parent
SETTLE_MS = 6_000  # both pages load their data after they have loaded themselves
COLOURS = 16  # more are hardly seen on these pages, and the repository keeps every picture for ever


def take(page: Page, name: str) -> None:
    page.wait_for_timeout(SETTLE_MS)
    picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    small = picture.quantize(COLOURS, dither=Image.Dither.NONE).convert("RGB")
    small.save(FOLDER / f"{name}.webp", lossless=True, quality=100, method=6)


def main(login: str) -> None:
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    client = MlflowClient(MLFLOW)
    experiment = client.get_experiment_by_name("qvgen")
    if experiment is None:
        raise SystemExit(f"{MLFLOW} has no experiment qvgen: run `make repro` first")
    base = f"{MLFLOW}/#/experiments/{experiment.experiment_id}"
    pages = {"mlflow-model": f"{MLFLOW}/#/models/qvgen{TRAINING}"}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=OPTIONS)
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        page.goto(login)
        page.wait_for_timeout(SETTLE_MS)
        page.goto(f"{base}/runs{TRAINING}")
        page.get_by_role("button", name="Close", exact=True).click()  # an assistant that nobody asked for
        for name, address in pages.items():
            page.goto(address)
            take(page, name)
        page.goto(f"{PREFECT}/runs")
        page.get_by_role("link").filter(has_text="-").first.wait_for()
        link = page.locator("a[href*='/runs/flow-run/']").first.get_attribute("href")
        page.goto(f"{PREFECT}{link}")
        take(page, "prefect-flow")
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1])
