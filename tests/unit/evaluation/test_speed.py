import time
from pathlib import Path

import pytest
import torch

from qvgen.evaluation.cost.hardware import describe, hardware
from qvgen.evaluation.cost.memory import peak_resident_mb
from qvgen.evaluation.cost.size import write_variant
from qvgen.evaluation.cost.speed import interleaved, load_variant, peak_memory_mb, torch_threads
from qvgen.models.tiny import tiny_pipeline


def test_actions_take_turns_and_warm_up_is_not_counted() -> None:
    calls: list[str] = []
    rounds: list[int] = []
    timings = interleaved(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3, warm_up=1, on_round=rounds.append
    )
    assert calls == ["a", "b"] * 4
    assert rounds == [1] * 4
    assert {name: timing.repetitions for name, timing in timings.items()} == {"a": 3, "b": 3}


def test_the_median_ignores_one_slow_call() -> None:
    durations = iter([0.01, 0.01, 0.3, 0.01, 0.01])
    timing = interleaved({"a": lambda: time.sleep(next(durations))}, 5, warm_up=0)["a"]
    assert timing.lower_quartile <= timing.median <= timing.upper_quartile
    assert 0.01 <= timing.median < 0.2


def test_one_repetition_has_no_quartiles() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        interleaved({"a": lambda: None}, 1)


def test_threads_are_restored_after_an_error() -> None:
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError, match="stop"), torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise RuntimeError("stop")
    assert torch.get_num_threads() == before
    with torch_threads(None):
        assert torch.get_num_threads() == before


def test_peak_memory_counts_what_was_freed() -> None:
    before = peak_resident_mb()
    block = torch.ones(50_000_000)  # 200 MB
    del block
    assert peak_resident_mb() >= before
    assert peak_resident_mb() > 200


def test_hardware_names_the_machine(tmp_path: Path) -> None:
    facts = hardware()
    assert facts["cpu"] and facts["logical_cores"] >= facts["cores"] >= 1
    text = describe(facts)
    assert facts["cpu"] in text and torch.__version__ in text and f"{torch.get_num_threads()} threads" in text


@pytest.mark.slow
def test_variants_on_disk_and_their_memory(tmp_path: Path) -> None:
    """Real processes: each loads its own variant and takes one step."""
    from safetensors.torch import save_file

    inputs = {"latents": torch.zeros(1, 4, 3, 4, 4), "timestep": torch.tensor([500.0]), "text": torch.zeros(1, 8, 16)}
    save_file(inputs, tmp_path / "inputs.safetensors")
    source = tiny_pipeline("wan", tmp_path / "source")
    for dtype in ("float32", "bfloat16"):
        write_variant(source, tmp_path / dtype, dtype)
    sizes = {
        d: (tmp_path / d / "transformer/diffusion_pytorch_model.safetensors").stat().st_size for d in ("float32", "bfloat16")
    }
    parameters = sum(p.numel() for p in load_variant(source, "float32").transformer.parameters())
    assert sizes["float32"] - sizes["bfloat16"] == pytest.approx(2 * parameters, rel=0.01)
    assert load_variant(tmp_path / "bfloat16", "bfloat16").transformer.dtype == torch.bfloat16

    memory = peak_memory_mb(tmp_path / "bfloat16", tmp_path / "inputs.safetensors", "bfloat16", threads=1)
    assert memory["peak"] >= memory["imports"] > 50
    with pytest.raises(RuntimeError, match="nowhere"):
        peak_memory_mb(tmp_path / "nowhere", tmp_path / "inputs.safetensors", "float32")
