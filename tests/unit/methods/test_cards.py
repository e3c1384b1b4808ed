"""Every card says what it is, stands in a file of its own, and costs no import; schedules and batches by hand."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qvgen.methods.qvgen_plus import stratified
from qvgen.methods.registry import CARDS, METHODS
from qvgen.models.wan import WanFamily
from qvgen.phi.rank_decay import RankDecaySchedule

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "qvgen/methods"
WITHOUT_CARD = {"__init__", "method", "registry"}
MOST_LINES = 40  # of code, without the docstring
UNTRAINED = {"rtn", "mse", "svdquant", "viditq"}


def test_every_card_is_in_the_registry() -> None:
    files = {path.stem for path in FOLDER.glob("*.py")} - WITHOUT_CARD
    assert {card.__name__.rpartition(".")[2] for card in CARDS} == files
    assert {name.replace("+", "_plus") for name in METHODS} == files
    assert all(name == method.name for name, method in METHODS.items())


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.METHOD.name)
def test_a_card_is_short_and_says_what_it_is(card: object) -> None:
    source = Path(str(card.__file__)).read_text(encoding="utf-8")  # type: ignore[attr-defined]
    tree = ast.parse(source)
    assert (ast.get_docstring(tree) or "").startswith(f"{card.METHOD.name}: ")  # type: ignore[attr-defined]
    assert tree.body[0].end_lineno is not None
    assert len(source.splitlines()) - tree.body[0].end_lineno <= MOST_LINES


def test_cards_load_no_pytorch() -> None:
    code = "import sys, qvgen.methods, qvgen.params; print(sorted(m for m in ('torch', 'diffusers') if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", METHODS)
def test_all_trained_methods_take_the_same_number_of_steps(name: str) -> None:
    given = RankDecaySchedule(initial_rank=2, hold_steps=4, phase_steps=2, final_steps=4)  # 4 + 2 * 2 + 4
    schedule = METHODS[name].schedule(given)
    assert schedule.total_steps == (0 if name in UNTRAINED else 12)
    assert (schedule.initial_rank > 0) == (name == "qvgen")


def test_phi_needs_a_rank() -> None:
    with pytest.raises(ValueError, match=r"decay\.initial_rank >= 1"):
        METHODS["qvgen"].schedule(RankDecaySchedule(initial_rank=0, hold_steps=4))


def test_half_of_the_timesteps_of_qvgen_plus_are_uniform_and_all_are_stratified() -> None:
    family, generator = WanFamily(shift=1.0), torch.Generator().manual_seed(0)
    found = METHODS["qvgen+"].timesteps(family, 8, generator)
    assert sorted((found[:4] / 250).floor().tolist()) == [0, 1, 2, 3]  # the uniform half: one in each quarter of [0, 1000]
    assert found.shape == (8,) and found.dtype == torch.float32
    plain = METHODS["kd"].timesteps(family, 8, torch.Generator().manual_seed(0))
    assert torch.equal(plain, family.sample_timesteps(8, torch.Generator().manual_seed(0)))
    assert METHODS["qvgen+"].caption_dropout(0.05) == 0.4 and METHODS["kd"].caption_dropout(0.05) == 0.05


def test_stratified_numbers_fall_one_into_each_part() -> None:
    u = stratified(8, torch.Generator().manual_seed(0))
    assert sorted((8 * u).floor().tolist()) == list(range(8))
    assert u.tolist() != sorted(u.tolist())
    assert stratified(0, torch.Generator()).tolist() == []
