"""`python -m qvgen.evaluation.cost.memory FOLDER INPUTS DTYPE THREADS DEVICE [COMPONENT]`: load the transformer of a
pipeline folder, take one step, print the peak memory and how long loading took.

Run by `qvgen.evaluation.cost.speed.peak_memory_mb` in a process of its own.
"""

from __future__ import annotations

import json
import sys
import time

import torch

from qvgen.device import peak_resident_mb


@torch.no_grad()
def main(
    folder: str, inputs: str, dtype: str, threads: int, device: str = "cpu", component: str = "transformer"
) -> dict[str, float]:
    from safetensors.torch import load_file

    from qvgen.checkpoint.pipeline import load_transformer, transformer_class
    from qvgen.models.registry import load_family

    if threads:
        torch.set_num_threads(threads)
    tensors, family = load_file(inputs, device), load_family(folder)
    transformer_class(folder)  # diffusers imports lazily: now, not while loading
    imports = peak_resident_mb()
    started = time.perf_counter()
    model = load_transformer(folder, getattr(torch, dtype), device, component)
    load_s, loaded = time.perf_counter() - started, peak_resident_mb()
    latents, *condition = (tensors[name].to(model.dtype) for name in ("latents", "text", "image") if name in tensors)
    family.predict(model, latents, tensors["timestep"], *condition)
    on_card = {"device_peak": torch.cuda.max_memory_allocated(device) / 1e6} if model.device.type == "cuda" else {}
    return on_card | {"peak": peak_resident_mb(), "imports": imports, "loaded": loaded, "load_s": load_s}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), *sys.argv[5:])))
