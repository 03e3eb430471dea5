"""Zoo: weights and OOF made elsewhere are taken in when facts, weights and predictions agree, else refused by name."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from conftest import House
from labelled import CLASSES, make_manifest
from octofold.data.images import PixelSpec, load, square
from octofold.data.manifest import Manifest
from octofold.errors import UserError
from octofold.files import sha256_file
from octofold.infer.passes import predict_rows
from octofold.nets.models import ModelCard, build, read_model
from octofold.recipe import Model, Recipe
from octofold.train import bundles, zoo

THEIRS = CLASSES[::-1]  # they count classes in another order
NETWORK = {"name": "small_cnn", "input_size": 32, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
FACTS: dict[str, Any] = {
    "member": "theirs", "model": NETWORK, "classes": list(THEIRS), "weights": "run/f{fold}_s{seed}.pth",
    "oof": "run/f{fold}.csv",
}  # fmt: skip


@pytest.fixture
def abroad(tmp_path: Path) -> tuple[Manifest, Path]:
    """A manifest, and a folder of two fold models with their OOF, as another project would leave them."""
    manifest, _ = make_manifest(tmp_path / "data" / "world")
    (tmp_path / "zoo" / "run").mkdir(parents=True)
    model = Model(name="small_cnn", input_size=32, normalize="imagenet")
    for fold in (0, 1):
        torch.manual_seed(fold)
        net = build(model, 3)
        with torch.no_grad():
            net.head[-1].weight.mul_(30)  # sure enough to tell facts apart
        trunk = {name.removeprefix("trunk."): value for name, value in net.trunk.state_dict().items()}
        head = {f"head.{name}": value for name, value in net.head.state_dict().items()}
        whole = {f"trunk.{name}": value for name, value in trunk.items()} | head
        torch.save({"model_state_dict": whole, "epoch": 3}, tmp_path / "zoo" / "run" / f"f{fold}_s7.pth")
        rows = np.flatnonzero(manifest.fold == fold)
        squares = (square(load(manifest.paths[row], PixelSpec.of(model))[0], 32)[None] for row in rows)
        card = ModelCard(Recipe(model=model).model_dump(mode="json"), "classify", THEIRS, "world", "t", fold, 7, "")
        values = predict_rows(net, card, squares, views="none")["none"]
        table = pd.DataFrame({"image": manifest.table["path"].iloc[rows].to_numpy(), "fold": fold})
        for column, name in enumerate(THEIRS):
            table[f"p_{name}"] = values[:, column]
        table.to_csv(tmp_path / "zoo" / "run" / f"f{fold}.csv", index=False)
    return manifest, tmp_path / "zoo"


def facts(folder: Path, **changes: Any) -> Path:
    """Write the facts."""
    path = folder / "facts.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in {**FACTS, **changes}.items() if value is not None}))
    return path


def test_a_folder_becomes_slots_in_our_order_of_classes(abroad: tuple[Manifest, Path], tmp_path: Path) -> None:
    manifest, folder = abroad
    homes = zoo.adopt(facts(folder), folder, manifest, tmp_path / "made")
    assert [home.name for home in homes] == ["theirs.f0.s7", "theirs.f1.s7"]
    for home in homes:
        card, (oof,) = bundles.check(home, manifest)
        assert card.classes == oof.classes == manifest.classes
        net, _ = read_model(home / "model")
        theirs = pd.read_csv(folder / "run" / f"f{card.fold}.csv").set_index("image")
        row = manifest.table.set_index("sample_id")["path"]
        for sample, values in zip(oof.sample_ids, oof.values, strict=True):
            np.testing.assert_allclose(values, theirs.loc[row[sample], [f"p_{name}" for name in CLASSES]], atol=1e-6)
        assert net.head[-1].weight.shape[0] == 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"member": None}, "member"),
        ({"classes": None}, "classes"),
        ({"classes": ["a", "b"]}, "classes"),
        ({"classes": [*THEIRS[:2], THEIRS[0]]}, "classes"),
        ({"classes": list(CLASSES)}, "weights that give the OOF"),
        ({"model": {"input_size": 32, "normalize": "imagenet"}}, "model.name"),
        ({"model": {"name": "small_cnn", "normalize": "imagenet"}}, "model.input_size"),
        ({"model": {"name": "small_cnn", "input_size": 32}}, "model.normalize"),
        ({"model": NETWORK | {"mean": [0.1, 0.2, 0.3]}}, "model.normalize"),
        ({"model": NETWORK | {"normalize": "half"}}, "model.normalize"),
        ({"model": {"name": "small_cnn", "input_size": 32, "normalize": "none"}}, "weights that give the OOF"),
        ({"model": NETWORK | {"name": "resnet18"}}, "weights of this"),
        ({"model": NETWORK | {"name": "no_such_net"}}, "near ones"),
        ({"weights": "run/{fold}.pt"}, "f0_s7.pth"),
        ({"weights": None}, "patterns with {fold}"),
        ({"oof": "run/nothing{fold}.csv"}, "no such file"),
        ({"oof": "../f{fold}.csv"}, "a file inside"),
        ({"views": "geo9"}, "views"),
        ({"colour": "red"}, "colour"),
        ({"slots": "../slots.csv"}, "a file inside"),
        ({"slots": [{"weights": "run/f0_s7.pth", "oof": "run/f0.csv", "fold": 0, "sha256": "0" * 64}]}, "sha256"),
        ({"slots": [{"weights": "/etc/passwd", "oof": "run/f0.csv", "fold": 0}]}, "a file inside"),
        ({"slots": [{"weights": "run/f0_s7.pth", "oof": "run/f0.csv", "fold": 0}] * 2}, "once"),
        ({"slots": [{"weights": "run/f0_s7.pth", "oof": "run/f0.csv"}]}, "fold"),
    ],
    ids=str,
)
def test_facts_that_are_missing_or_wrong_are_refused(
    abroad: tuple[Manifest, Path], tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    manifest, folder = abroad
    with pytest.raises(UserError, match=words.replace("{", r"\{")):
        zoo.adopt(facts(folder, **changes), folder, manifest, tmp_path / "made")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda table: table.drop(columns="p_" + CLASSES[0]), "a column per class"),
        (lambda table: table.rename(columns={"image": "picture"}), "sample_id or image"),
        (lambda table: table.assign(image="nobody.png"), "that are not"),
        (lambda table: table.assign(**{f"p_{CLASSES[0]}": 3.0}), "sum to 1"),
        (lambda table: table.assign(**{f"p_{CLASSES[0]}": "high"}), "numbers"),
        (lambda table: pd.concat([table, table]), "once"),
        (lambda table: table.iloc[1:], "OOF of exactly"),
        (lambda table: table.assign(fold=1), "OOF of exactly"),
        (lambda table: table.drop(columns="fold").iloc[:0], "OOF of exactly"),
    ],
)
def test_oof_that_does_not_fit_is_refused(
    abroad: tuple[Manifest, Path], tmp_path: Path, change: Any, words: str
) -> None:
    manifest, folder = abroad
    path = folder / "run" / "f0.csv"
    change(pd.read_csv(path)).to_csv(path, index=False)
    with pytest.raises(UserError, match=words):
        [bundles.check(home, manifest) for home in zoo.adopt(facts(folder), folder, manifest, tmp_path / "made")]


def test_pickled_code_is_never_run(abroad: tuple[Manifest, Path], tmp_path: Path) -> None:
    manifest, folder = abroad
    torch.save({"model_state_dict": Path("/")}, folder / "run" / "f0_s7.pth")  # an object, not tensors
    with pytest.raises(UserError, match="pickled code is never run"):
        zoo.adopt(facts(folder), folder, manifest, tmp_path / "made")


@given(st.text(max_size=80) | st.lists(st.text(max_size=8), max_size=12).map(",".join))
def test_any_table_of_slots_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    folder = tmp_path_factory.getbasetemp() / "slots"
    folder.mkdir(exist_ok=True)
    for header in ("", "weights,oof,fold,seed\n"):
        (folder / "slots.csv").write_text(header + text, encoding="utf-8", errors="surrogatepass", newline="")
        told = zoo.Facts.model_validate(FACTS | {"slots": "slots.csv"})
        try:
            found = zoo.slots(told, folder, "facts")
        except UserError:
            continue
        assert all(one.weights and one.oof and one.fold >= 0 for one in found)


COMMAND = """
import sys
from pathlib import Path
from octofold.commands import Import
from octofold.train import bundles
bundle, manifest, facts = map(Path, sys.argv[1:])
for new in (2, 0):
    done = bundles.take_in(Import(bundle=bundle, manifest=manifest, facts=facts))
    assert (done["slots"], done["new"]) == (["world.theirs.f0.s7/1", "world.theirs.f1.s7/1"], new), done
"""


@pytest.mark.slow
def test_a_list_of_names_bytes_and_sha256_as_the_originals_keep_it(house: House, abroad: tuple[Manifest, Path]) -> None:
    manifest, folder = abroad
    facts(folder)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    rows = [f"x,{path.relative_to(folder)},{path.stat().st_size},{sha256_file(path)}" for path in files]
    (folder / "manifest.csv").write_text("\n".join(["id,name,bytes,sha256", *rows]) + "\n")
    command = [sys.executable, "-c", COMMAND, folder / "manifest.csv", manifest.file or "", folder / "facts.yaml"]
    done = subprocess.run([str(part) for part in command], env=house.environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with files[0].open("ab") as file:
        file.write(b"x")
    done = subprocess.run([str(part) for part in command], env=house.environment(), capture_output=True, text=True)
    assert "bytes" in done.stderr
    assert done.returncode != 0


@pytest.mark.parametrize("names", [("001", "002"), ("NA", "None"), ("1.0", "2.0")])
def test_labels_that_look_like_numbers_or_nothing_are_names(tmp_path: Path, names: tuple[str, str]) -> None:
    ids = [f"s{row}" for row in range(8)]
    table = pd.DataFrame({"sample_id": ids, "path": ids, "label": [*names] * 4, "group": ids, "fold": 0})
    oof = pd.DataFrame({"image": ids, "label": [*names] * 4, "fold": 0, names[0]: 0.25, names[1]: 0.75})
    oof.to_csv(tmp_path / "oof.csv", index=False)
    manifest = Manifest(table, "classify", names, "toy", tmp_path)
    told = zoo.Facts.model_validate(FACTS | {"classes": list(names)})
    found, values = zoo.read_oof(tmp_path / "oof.csv", told, 0, manifest)
    assert found.tolist() == ids
    np.testing.assert_array_equal(values, np.tile(np.float32([0.25, 0.75]), (8, 1)))
