"""What README shows in Python does what it says."""

from pathlib import Path

import pytest

from qvgen.checkpoint.packed import verify_folder

ROOT = Path(__file__).parents[2]
LAYERS = 40  # of the four blocks of the embedded model


def test_the_recipe_packs_a_model_and_makes_a_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = (ROOT / "README.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    monkeypatch.chdir(tmp_path)
    exec(compile(recipe, "README.md", "exec"), {})
    assert verify_folder(tmp_path / "packed") == LAYERS
    assert (tmp_path / "three.mp4").stat().st_size > 1000
