"""Every YAML under configs/ is read by the schema of its folder; the file's name is the test's name."""

from pathlib import Path

import pytest
import yaml

from conftest import REPOSITORY
from octofold import config, recipe

RECIPES = [path for path in sorted((REPOSITORY / "configs").rglob("*.yaml")) if "tune" not in path.parts]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(REPOSITORY / "configs")))
def test_recipe_is_valid_and_says_its_command(path: Path) -> None:
    loaded = config.build(recipe.Recipe, config.read_yaml(path), path)
    assert config.build(recipe.Recipe, yaml.safe_load(config.dump(loaded)), path) == loaded
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any("train" in line for line in header), "the header comment names the command"
