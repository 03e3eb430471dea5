"""Flags, recipes and their errors."""

import runpy
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from conftest import REPOSITORY, House
from octofold import commands, config
from octofold.errors import UserError
from octofold.recipe import Recipe

SCRIPTS = sorted(path.stem for path in (REPOSITORY / "entrypoints").glob("*.py"))


def test_strength_is_schema_then_recipe_then_flags(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("batch_size: 8\noptim: {lr: 0.5, weight_decay: 0.1}\n")
    loaded = config.load(commands.Train, ["--manifest", "m.csv", "--config", str(path), "--optim.lr", "3e-4"])
    assert (loaded.optim.lr, loaded.optim.weight_decay, loaded.batch_size, loaded.metric) == (3e-4, 0.1, 8, "accuracy")


@pytest.mark.parametrize(
    ("flags", "field", "value"),
    [
        (["--folds", "0,2"], "folds", [0, 2]),
        (["--folds", "[1]"], "folds", [1]),
        (["--folds=null"], "folds", None),
        (["--member", "012"], "member", "012"),
        (["--batch-size", "4"], "batch_size", 4),
        (["--config", ""], "config", None),
        (["--early_stop", "3"], "early_stop", 3),
    ],
)
def test_flag_text_takes_its_fields_type(flags: list[str], field: str, value: object) -> None:
    assert getattr(config.load(commands.Train, ["--manifest", "m.csv", *flags]), field) == value


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--optim.learn_rate", "1"], "optim: name, lr, weight_decay"),
        (["--nosuch", "1"], "Valid here: member, model"),
        (["--optim.lr", "-1"], "(from --optim.lr)"),
        (["--optim.lr", "abc"], "optim.lr"),
        (["lr"], "--field value"),
        (["--batch_size", "1", "--batch_size", "2"], "one value"),
        (["--config", "no/such.yaml"], "no such file"),
        (["--member", "a/b"], "member"),
        (["--seeds", "-1"], "seeds"),
        (["--seeds", "0,0"], "seeds must be different"),
        (["--augment.mixup_prob", "0.7", "--augment.cutmix_prob", "0.7"], "at most 1"),
    ],
)
def test_mistakes_name_the_flag_and_the_choice(flags: list[str], words: str) -> None:
    with pytest.raises(UserError) as caught:
        config.load(commands.Train, ["--manifest", "m.csv", *flags])
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "text", ["- a\n- b\n", "a: [1\n", "\x00", "optim: 3\n", "3: 4\n", "optim: {lr: 1}\noptim: {}\n"]
)
def test_a_bad_recipe_is_the_users_mistake(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad recipe.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match="bad recipe"):
        config.load(commands.Train, ["--manifest", "m.csv", "--config", str(path)])


@given(st.binary(max_size=200))
def test_any_bytes_as_a_recipe_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, blob: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_bytes(blob)
    try:
        recipe = config.build(Recipe, config.read_yaml(path), path)
    except UserError:
        return
    assert recipe == Recipe() or blob.strip(), "only settings change a recipe"


def test_dump_and_load_are_inverse(tmp_path: Path) -> None:
    recipe = Recipe(member="x", folds=[1], early_stop=2)
    assert config.build(Recipe, yaml.safe_load(config.dump(recipe)), "dump") == recipe


def test_flatten_names_every_leaf() -> None:
    flat = config.flatten(Recipe())
    assert flat["optim.lr"] == 1e-3
    assert flat["phases"] == [Recipe().phases[0].model_dump(mode="json")]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_lists_every_field_without_heavy_imports(script: str, house: House) -> None:
    done = house.run(script, "--help", timeout=30)
    assert done.code == 0, done.err
    from test_mlproject import schema_of

    rows = [name for name, _, _ in config._rows(schema_of(script), "")]
    assert rows
    assert all(f"--{name} " in done.out or f"--{name}\n" in done.out for name in rows)
    assert f"python entrypoints/{script}.py" in done.out, "the docstring shows the command"


def test_help_imports_nothing_heavy() -> None:
    import subprocess
    import sys

    code = "import sys, octofold.commands, octofold.config; print(sorted({m.split('.')[0] for m in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {name for name in ("torch", "mlflow", "pandas", "numpy", "timm", "sklearn") if f"'{name}'" in loaded}


def test_weights_by_hand_beside_a_method_are_refused() -> None:
    blend = runpy.run_path(str(REPOSITORY / "entrypoints" / "blend.py"))["run"]
    flags = ["--competition", "x", "--weights", '{"a": 1.0}']
    with pytest.raises(UserError, match="weights or --method"):
        blend(config.load(commands.Blend, [*flags, "--method", "lr_mse"]))
    assert "method" not in config.load(commands.Blend, [*flags, "--method", ""]).model_fields_set, "MLflow's default"
