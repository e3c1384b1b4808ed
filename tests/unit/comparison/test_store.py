"""Result files: what makes one stale, and what is kept of a curve."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from comparison.cases import RESULTS, Case, case_params, read_settings, scored_cases, tuning_cases
from comparison.run import DATA, reference_origin, wanted
from comparison.store import (
    declared_default,
    differences,
    origin,
    read_clips,
    read_result,
    result_text,
    save_clips,
    thinned,
    write_result,
)

ROOT = Path(__file__).parents[3]


def made(**changed: Any) -> dict[str, Any]:
    return {"revision": 1, "data": {"artifacts/data": "a"}, "params": {"qat.steps": 45}} | changed


def test_a_result_is_stale_once_its_parameters_data_or_revision_differ() -> None:
    assert differences(made(), made()) == []
    assert differences(made(), made(revision=2)) == ["revision: 1, now 2"]
    assert differences(made(), made(data={"artifacts/data": "b"})) == ["artifacts/data is other data"]
    assert differences(made(), made(params={"qat.steps": 60})) == ["qat.steps: 45, now 60"]


def test_a_new_parameter_makes_no_result_stale_while_it_has_its_default() -> None:
    new = {"qat.steps": 45, "decay.redecompose": True}
    assert declared_default("decay.redecompose") is True
    assert differences(made(), made(params=new)) == []
    assert differences(made(), made(params=new | {"decay.redecompose": False})) == ["decay.redecompose: True, now False"]
    assert declared_default("scheme.targets") == [] and declared_default("scheme.input_activations.symmetric") is False
    assert declared_default("qat.steps") is declared_default("no.such") is declared_default("seed.x") is None


def test_what_makes_a_case() -> None:
    """The settings of training count where there is training; those without effect on results never do."""
    params = case_params(ROOT, Case("kd", "W3A3", 1))
    trained, untrained = (origin(case_params(ROOT, Case(m, "W3A3", 1)), 1, {})["params"] for m in ("kd", "rtn"))
    assert trained["qat.steps"] == params.qat.steps and trained["scheme.weights.num_bits"] == 3
    assert not [name for name in untrained if name.startswith(("qat.", "decay."))]
    assert "evaluate.videos" not in trained and "qat.checkpoint_every" not in trained
    assert json.loads(json.dumps(trained)) == trained


def test_recorded_results_are_those_that_are_wanted() -> None:
    """Each case's own key, with the data that the comparison's lock names: nothing would run again. (Not the pipeline's lock:
    `make repro` on another processor makes other data, to the last bit, and writes that.)"""
    lock = yaml.safe_load((ROOT / "comparison/dvc.lock").read_text(encoding="utf-8"))["stages"]
    hashes = {dependency["path"]: dependency["md5"] for dependency in lock["compare"]["deps"]}
    data, settings = {path: hashes[path] for path in DATA}, read_settings(ROOT)
    cases = [*tuning_cases(settings), *scored_cases(settings)]
    stale = {}
    for case in cases:
        result = read_result(ROOT / RESULTS / f"{case.name}.json")
        assert result is not None, case.name
        if found := differences(result["made"], wanted(ROOT, case, data)[2]):
            stale[case.name] = found
    assert stale == {}
    full = read_result(ROOT / RESULTS / "full_precision.json")
    assert full is not None and differences(full["made"], reference_origin(ROOT, data)) == []
    assert {path.stem for path in (ROOT / RESULTS).glob("*.json")} == {case.name for case in cases} | {"full_precision"}
    named = {name for path in (ROOT / RESULTS).glob("*.json") for name in json.loads(path.read_text())["made"]["sections"]}
    assert {path.stem for path in (ROOT / RESULTS / "params").iterdir()} == named


def test_a_curve_is_thinned_to_means_over_windows() -> None:
    rows = [{"step": s, "loss": float(s), "gradient_norm": 1.0, "rank": 2 if s < 90 else 0, "u": 1.0} for s in range(120)]
    curve = thinned(rows)
    assert curve.keys() == {"step", "loss", "gradient_norm", "rank", "u"} and {len(c) for c in curve.values()} == {60}
    assert curve["loss"][:2] == [0.5, 2.5] and curve["rank"][44:46] == [2, 0]
    assert thinned([row | {"rank": 0} for row in rows]).keys() == {"step", "loss", "gradient_norm"}


def test_a_result_file_is_json_with_an_entry_a_line(tmp_path: Path) -> None:
    result = {"made": {"revision": 1}, "scores": {"psnr_db": 1.5, "by_timestep": {"50.0": 2.0}}}
    (tmp_path / "case.json").write_text(result_text(result))
    assert read_result(tmp_path / "case.json") == result and len(result_text(result).splitlines()) == 9
    assert read_result(tmp_path / "other.json") is None
    (tmp_path / "case.json").write_text("{")
    with pytest.raises(ValueError, match=r"case\.json is not whole"):
        read_result(tmp_path / "case.json")


def test_cases_share_the_files_of_their_parameters(tmp_path: Path) -> None:
    """By section; one that is edited or gone is refused, because it would say of a result what did not make it."""
    scheme = {"scheme.weights.num_bits": 4, "scheme.targets": []}
    results = [{"made": made(params={"qat.steps": n, "seed": n} | scheme), "scores": {"bits": n}} for n in (45, 60)]
    for number, result in enumerate(results):
        write_result(tmp_path / f"{number}.json", result)
    assert [read_result(tmp_path / f"{number}.json") for number in range(2)] == results
    kept = sorted((tmp_path / "params").iterdir())
    assert [path.name.partition("-")[0] for path in kept] == ["qat", "qat", "scheme"]
    kept[2].write_text(kept[2].read_text().replace("4", "3"))
    with pytest.raises(ValueError, match=r"0\.json is not whole .*scheme-\w+\.json was edited"):
        read_result(tmp_path / "0.json")
    kept[2].unlink()
    with pytest.raises(ValueError, match=r"0\.json is not whole .*No such file.*delete it"):
        read_result(tmp_path / "0.json")


def test_clips_keep_their_prompts(tmp_path: Path) -> None:
    clips = torch.linspace(-1, 1, 4)[:, None, None, None, None].expand(4, 3, 2, 4, 4)
    save_clips(tmp_path / "x.safetensors", clips, ["a", "b", "c", "Φ"], 2)
    found = read_clips(tmp_path / "x.safetensors")
    assert found is not None and found[0] == ["a", "c"]
    assert torch.allclose(found[1], clips[[0, 2]], atol=1 / 127)
    assert read_clips(tmp_path / "absent.safetensors") is None
