import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from qvgen.params import Params, ParamsError, load_params

ROOT = Path(__file__).parents[2]
DEFAULT = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))


def with_(changes: dict[str, Any]) -> dict[str, Any]:
    """The default tree with {"qat.steps": 3} set."""
    tree = copy.deepcopy(DEFAULT)
    for path, value in changes.items():
        *parents, key = path.split(".")
        node = tree
        for parent in parents:
            node = node[parent]
        node[key] = value
    return tree


def load(tree: Any, folder: Path) -> Params:
    path = folder / "params.yaml"
    path.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree), encoding="utf-8")
    return load_params(path)


def refusal(tree: Any, folder: Path) -> str:
    with pytest.raises(ParamsError) as caught:
        load(tree, folder)
    return str(caught.value)


def test_values_arrive(tmp_path: Path) -> None:
    params = load(with_({"qat.steps": 7, "scheme.weights.num_bits": 3, "register.name": "other"}), tmp_path)
    assert (params.qat.steps, params.scheme.weights.num_bits, params.register_.name) == (7, 3, "other")
    assert params.calibrate.clip_candidates == tuple(DEFAULT["calibrate"]["clip_candidates"])


def test_all_faults_come_at_once(tmp_path: Path) -> None:
    tree = with_({"qat.stepz": 1, "qat.batch_size": 0, "method": "awq", "scheme.weights.num_bits": "four"})
    del tree["pack"]["dtype"]
    lines = refusal(tree, tmp_path).splitlines()
    assert "5 fault(s)" in lines[0]
    assert {line.split()[0].rstrip(":") for line in lines[1:]} == {
        "qat.stepz",
        "qat.batch_size",
        "method",
        "scheme.weights.num_bits",
        "pack.dtype",
    }


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("qat.stepz", 1, "qat.stepz = 1: unknown key; allowed here: steps, batch_size, learning_rate"),
        ("qatt", {}, "unknown key; allowed here: seed, method, fetch"),
        ("typo", 3, "typo = 3: unknown key; allowed here: seed, method, fetch, prepare"),
        ("scheme.input_activations.bits", 4, "allowed here: num_bits, symmetric, strategy"),
        ("registerr", None, "evaluate, benchmark, register"),
        ("method", "awq", "method = 'awq': unknown method; choose one of rtn, mse, "),
        ("qat.steps", -1, "qat.steps = -1: Input should be greater than or equal to 0"),
        ("qat.steps", 1.5, "qat.steps = 1.5: Input should be a valid integer"),
        ("qat.steps", True, "qat.steps = True: Input should be a valid integer"),
        ("qat.steps", "3", "qat.steps = '3': Input should be a valid integer"),
        ("qat.learning_rate", float("nan"), "qat.learning_rate = nan: Input should be a finite number"),
        ("scheme.weights.num_bits", 9, "scheme.weights.num_bits = 9: Input should be less than or equal to 8"),
        ("prepare.width", 40, "prepare.width = 40: Input should be a multiple of 16"),
        ("prepare.buckets", [[32, 32], [32, 40]], "prepare.buckets.1.1 = 40: Input should be a multiple of 16"),
        ("prepare.buckets", [[32, 32, 32]], "prepare.buckets.0 = [32, 32, 32]: Tuple should have at most 2 items"),
        ("evaluate.prompts_file", "", "evaluate.prompts_file = '': String should have at least 1 character"),
        ("fetch.revision", "main", "fetch.revision = 'main': String should match pattern '^[0-9a-f]{40}$'"),
        ("qat", 3, "qat = 3:"),
        ("flow.retries", {"fetch": -2}, "flow.retries.fetch = -2: Input should be greater than or equal to 0"),
        ("flow.deadlines", {"qat": 0}, "flow.deadlines.qat = 0: Input should be greater than 0"),
    ],
)
def test_a_fault_names_path_value_and_what_is_allowed(path: str, value: Any, said: str, tmp_path: Path) -> None:
    message = refusal(with_({path: value}), tmp_path)
    assert "1 fault(s)" in message
    assert said in message


VIDEOS = {"prepare.source": "videos", "prepare.folder": "clips"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"fetch.source": "models:/qvgen@champion"}, "a model of the registry, which is packed"),
        ({"fetch.source": f"org/name@{'0' * 40}"}, "the commit after @ belongs into fetch.revision"),
        ({"prepare.source": "videos"}, "source 'videos' needs it"),
        ({"prepare.folder": "clips"}, "folder belongs to source 'videos'"),
        ({"prepare.buckets": [[32, 32]]}, "buckets belong to source 'videos'"),
        ({**VIDEOS, "prepare.buckets": [[32, 48], [48, 32]]}, "buckets must hold [height, width] = [32, 32]"),
        ({**VIDEOS, "prepare.buckets": [[32, 32], [32, 48], [64, 96]]}, "two buckets have the same aspect ratio"),
        ({"calibrate.clip_candidates": [0.5, 1.0]}, "strictly between 0 and 1, found [1.0]"),
        ({"decay.initial_rank": 0}, "method qvgen needs decay.initial_rank >= 1"),
        ({"evaluate.videos": 201}, "evaluate.videos = 201 but only evaluate.prompts = 200"),
        ({"scheme.weights.strategy": "group"}, "strategy 'group' needs it"),
        ({"scheme.weights.strategy": "token"}, "weights have no tokens"),
        ({"scheme.weights.symmetric": True}, "use zero_point_domain 'integer'"),
        ({"scheme.input_activations.strategy": "tensor"}, "strategy must be token"),
        ({"scheme.input_activations.zero_point_domain": "float"}, "zero_point_domain must be integer"),
    ],
)
def test_impossible_combinations_are_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    assert said in refusal(with_(changes), tmp_path)


@pytest.mark.parametrize(("text", "said"), [("a: [", "not valid YAML"), ("- 1", "found list"), ("", "found NoneType")])
def test_files_that_hold_no_sections(text: str, said: str, tmp_path: Path) -> None:
    assert said in refusal(text, tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match=r"nowhere\.yaml is not a file"):
        load_params(tmp_path / "nowhere.yaml")


def test_the_tree_is_frozen() -> None:
    params = Params.model_validate(DEFAULT)
    for section, field in ((params, "seed"), (params.qat, "steps"), (params.scheme.weights, "num_bits")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, field, 1)


def test_methods_share_one_step_budget() -> None:
    steps = {"qat.steps": 10, "decay.initial_rank": 16, "decay.phase_steps": 7, "decay.final_steps": 20}
    schedule = {m: Params.model_validate(with_({"method": m, **steps})).schedule for m in ("rtn", "mse", "kd", "qvgen")}
    assert schedule["qvgen"].phase_ranks == (16, 8, 4, 2, 1)
    assert schedule["kd"].phase_ranks == ()
    assert schedule["kd"].total_steps == schedule["qvgen"].total_steps == 10 + 5 * 7 + 20
    assert schedule["rtn"].total_steps == schedule["mse"].total_steps == 0


def test_a_method_changes_the_scheme_unless_params_do() -> None:
    plain = Params.model_validate(with_({"method": "mse"}))
    assert plain.effective_scheme == plain.scheme
    changes = {"method": "svdquant", "scheme.weights.num_bits": 3}
    params = Params.model_validate(with_(changes))
    assert params.effective_scheme.extras == {"input_scaling": True, "low_rank": 32}
    assert params.effective_scheme.weights.num_bits == 3
    assert params.effective_scheme.timestep_groups == params.scheme.timestep_groups
    given = Params.model_validate(with_(changes | {"scheme.low_rank": 4}))
    assert given.effective_scheme.low_rank == 4
    assert given.scheme_of("mse") == given.scheme_of("rtn") == params.scheme
    rotated = Params.model_validate(with_({"method": "viditq", "scheme.input_rotation": 8}))
    assert rotated.effective_scheme.extras == {"input_scaling": True, "input_rotation": 8}


VIDEOS = {"prepare.source": "videos", "prepare.folder": "clips"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"scheme.input_rotation": 8},
            "scheme.input_rotation = 8 is of no use to method qvgen; it is for viditq",
        ),
        ({"method": "viditq", "scheme.low_rank": 8}, "scheme.low_rank = 8 is of no use to method viditq; it is for svdquant"),
        ({"method": "viditq", "scheme.input_rotation": 12}, "input_rotation must be a power of two, found 12"),
    ],
)
def test_extras_belong_to_methods_that_use_them(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    assert said in refusal(with_(changes), tmp_path)


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    """Plain YAML keeps the last one without a word."""
    twice = tmp_path / "params.yaml"
    twice.write_text("seed: 0\nseed: 1\n")
    with pytest.raises(ParamsError, match="'seed' is given twice"):
        load_params(twice)


def test_counts_that_no_machine_finishes_are_refused(tmp_path: Path) -> None:
    assert "qat.steps = 1000000000001: Input should be less than" in refusal(with_({"qat.steps": 10**12 + 1}), tmp_path)
    text = yaml.safe_dump(with_({"qat.steps": 0})).replace("steps: 0", "steps: 1e29", 1)
    assert "qat.steps = '1e29'" in refusal(text, tmp_path)
    message = refusal(with_({"qat.steps": "x" * 10**5}), tmp_path)
    assert len(message) < 500


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a: 0150\n", "0150 is octal or counts in sixties here, and something else for DVC"),
        ("a: -1:30\n", "-1:30 is octal or counts in sixties"),
        ("a: [10:00:00.5]\n", "10:00:00.5 is octal or counts in sixties"),
        ("? [a, b]\n: 1\n", "a list or mapping is no key"),
        ("? {a: b}\n: 1\n", "a list or mapping is no key"),
        (
            "a: &a [1]\n"
            + "".join(f"{'bcdefghi'[n]}: &{'bcdefghi'[n]} [{', '.join(['*' + 'abcdefgh'[n]] * 9)}]\n" for n in range(8)),
            "more than 10000 values",
        ),
        ("a: &a {k: 1}\nb: &b {<<: [*a, *a, *a]}\n" + "c: &c [*c]\n", "more than 10000 values"),
        ("[" * 5000, "nests brackets too deeply"),
        ("{" * 5000, "nests brackets too deeply"),
        ("a: 2001-99-99\n", "is not valid YAML: month"),
        ("a: !!int ''\n", "is not valid YAML"),
        ("a: !!bool 7\n", "is not valid YAML"),
        ("a: !!python/object/apply:os.system [ls]\n", "is not valid YAML"),
        ("# " + "x" * 1_000_000, "more than 1000000"),
    ],
    ids=lambda value: value[:20],
)
def test_yaml_that_means_harm_gets_a_sentence(content: str, said: str, tmp_path: Path) -> None:
    message = refusal(content, tmp_path)
    assert said in message and str(tmp_path / "params.yaml") in message and len(message) < 500


def test_another_encoding_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_bytes("seed: 0 # größe".encode("latin-1"))
    with pytest.raises(ParamsError, match=r"params\.yaml is not UTF-8"):
        load_params(path)
    path.write_bytes("seed: 0".encode("utf-16"))
    with pytest.raises(ParamsError, match=r"params\.yaml is not UTF-8"):
        load_params(path)


@pytest.mark.parametrize("path", sorted((ROOT / "presets").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_preset_is_a_whole_params_file(path: Path) -> None:
    """It states every knob that params.yaml states, and its rules ask nothing that only the embedded digits can answer."""
    preset = load_params(path)
    stated, ours = (yaml.safe_load(file.read_text(encoding="utf-8")) for file in (path, ROOT / "params.yaml"))
    assert stated.keys() == ours.keys()
    for section in ours.keys() - {"gate", "seed", "method"}:
        assert stated[section].keys() == ours[section].keys(), section
    assert not {"colour", "direction", "digit"} & {rule.metric.rpartition(".")[2] for rule in preset.gate.rules.values()}
