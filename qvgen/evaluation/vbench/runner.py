"""Run by the python of VBench's own environment, as a file; that environment has none of our packages.

python -I runner.py facts                              prints {"version", "prompts": {dimension: [prompt]}}
python -I runner.py run DIMENSION VIDEOS RESULTS       VBench writes RESULTS/DIMENSION_eval_results.json
"""

import importlib
import importlib.metadata
import importlib.util
import json
import os
import sys
import threading
from pathlib import Path

_DOWNLOADERS = {"wget", "curl", "git"}


def full_info() -> Path:
    """The package's list of prompts and their dimensions, found without importing the package."""
    spec = importlib.util.find_spec("vbench")
    if spec is None or spec.origin is None:
        sys.exit(f"{sys.executable} has no package vbench")
    return Path(spec.origin).with_name("VBench_full_info.json")


def facts() -> dict:
    prompts: dict = {}
    for entry in json.loads(full_info().read_text(encoding="utf-8")):
        for dimension in entry["dimension"]:
            prompts.setdefault(dimension, []).append(entry["prompt_en"])
    return {"version": importlib.metadata.version("vbench"), "prompts": prompts}


def refuse_downloads(event: str, arguments: tuple) -> None:
    """Audit hook: the package fetches what it misses with wget, git and urllib, and nothing here downloads unasked."""
    if event == "socket.connect" and not isinstance(arguments[1], str | bytes):  # a str is a socket of this machine
        raise PermissionError(f"vbench wanted to connect to {arguments[1]}: nothing is downloaded unasked")
    if event == "socket.getaddrinfo":
        raise PermissionError(f"vbench wanted to connect to {arguments[0]}: nothing is downloaded unasked")
    if event == "subprocess.Popen" and Path(str(arguments[0])).name in _DOWNLOADERS:
        raise PermissionError(f"vbench wanted to run {' '.join(map(str, arguments[1]))}: nothing is downloaded unasked")


def end_with_parent() -> None:
    """The parent holds the other end of stdin: when it is gone, however it went, nobody waits for hours of work."""

    def watch() -> None:
        while os.read(0, 1):
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run(dimension: str, videos: str, results: str) -> None:
    end_with_parent()
    sys.addaudithook(refuse_downloads)
    torch = importlib.import_module("torch")
    vbench = importlib.import_module("vbench")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bench = vbench.VBench(device, str(full_info()), results)
    with torch.no_grad():  # scene does without, and took 23 GB for one video on the CPU
        bench.evaluate(videos_path=videos, name=dimension, dimension_list=[dimension], local=True)


if __name__ == "__main__":
    if sys.argv[1] == "facts":
        print(json.dumps(facts()))
    else:
        run(*sys.argv[2:])
