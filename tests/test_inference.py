"""Inference: views are exact, memory is bounded, names and ids survive, bad images are named."""

import logging
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import House, Outcome
from octofold import recipe, tta
from octofold.data.images import PixelSpec, load, square
from octofold.errors import UserError
from octofold.infer import combining, ensemble, inference, looks, passes, results, shards
from octofold.infer.inference import How
from octofold.nets import engine, models
from octofold.predictions import Predictions

CLASSES = ("red", "green", "blue")


def checkpoint(folder: Path, fold: int = 0, member: str = "tiny", size: int = 16, **card: Any) -> models.ModelCard:
    """Write a small untrained fold model."""
    torch.manual_seed(100 + fold + size)
    settings = recipe.Recipe(member=member, model=recipe.Model(name="small_cnn", input_size=size))
    fields: dict[str, Any] = {"task": "classify", "classes": CLASSES, "seed": 0, "manifest_hash": "m" * 64, **card}
    made = models.ModelCard(settings.model_dump(mode="json"), competition="tiny", member=member, fold=fold, **fields)
    net = models.build(settings.model, made.outputs)
    with torch.no_grad():  # an untrained head hardly tells images apart
        list(net.head.parameters())[0].mul_(20)
    return models.write_model(folder, net, made)


def photos(folder: Path, count: int = 7, size: tuple[int, int] = (40, 30)) -> list[Path]:
    """Write small distinct JPEG photos."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(count)
    paths = []
    for number in range(count):
        coarse = rng.integers(0, 255, (3, 4, 3), np.uint8)
        path = folder / f"photo {number}.jpg"
        Image.fromarray(coarse).resize(size).save(path, quality=95)
        paths.append(path)
    return paths


@pytest.fixture
def crew(tmp_path: Path) -> ensemble.Ensemble:
    """Two fold models of one member."""
    for fold in range(2):
        checkpoint(tmp_path / "models" / f"f{fold}", fold)
    return ensemble.load(tmp_path / "models")


def say(crew: ensemble.Ensemble, images: np.ndarray, views: str) -> np.ndarray:
    """Probabilities of square images ``(B, S, S, 3)``."""
    voice = crew.voices[0]
    return passes.predict_rows(voice.net, voice.card, [images], None, views)[views]


def test_nested_views_of_one_pass_equal_passes_of_their_own(crew: ensemble.Ensemble) -> None:
    images = np.random.default_rng(0).integers(0, 255, (5, 16, 16, 3), np.uint8)
    voice = crew.voices[0]
    found = passes.predict_rows(voice.net, voice.card, [images[:2], images[2:]], None, "geo8")
    assert list(found) == ["none", "flip", "geo4", "geo8"]
    for name, values in found.items():
        np.testing.assert_allclose(values, say(crew, images, name), atol=1e-6)
    assert np.abs(found["geo8"] - found["none"]).max() > 1e-3  # the views matter to this network
    np.testing.assert_allclose(found["geo8"].sum(axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("view", tta.D4)
def test_geo8_does_not_care_how_the_image_is_turned(crew: ensemble.Ensemble, view: tta.View) -> None:
    images = np.random.default_rng(1).integers(0, 255, (4, 16, 16, 3), np.uint8)
    turned = tta.apply(torch.from_numpy(images).permute(0, 3, 1, 2), view).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(say(crew, turned, "geo8"), say(crew, images, "geo8"), atol=1e-6)


def test_the_originals_views_are_seven_with_one_twice(crew: ensemble.Ensemble) -> None:
    sets = {"none": 1, "flip": 2, "geo8_original": 8}
    assert passes.nested("geo8_original") == sets
    assert len(set(tta.VIEWS["geo8_original"])) == 7
    images = np.random.default_rng(1).integers(0, 255, (2, 16, 16, 3), np.uint8)
    voice = crew.voices[0]
    assert list(passes.predict_rows(voice.net, voice.card, [images], None, "geo8_original")) == list(sets)


def test_points_come_back_in_pixels_of_the_original(tmp_path: Path) -> None:
    """A network that always answers one unit point: undone views average it; the frame takes it to the photo."""
    card = checkpoint(tmp_path / "m", task="keypoints", classes=("left", "right"), swap=[1, 0])
    net, card = models.read_model(tmp_path / "m")
    with torch.no_grad():
        for parameter in net.head.parameters():
            parameter.zero_()
        list(net.head.parameters())[-1].copy_(torch.tensor([-0.25, 0.0, 0.25, 0.0]))  # (.25, .5) and (.75, .5)
    path = photos(tmp_path / "in", 1, size=(40, 20))[0]
    spec = PixelSpec(16, "squash")
    pixels, frame = load(path, spec)
    found = passes.predict_rows(net, card, [square(pixels, 16)[None]], [frame], "flip")
    for values in found.values():  # mirrored, the twins change places: the mean is the same two points
        np.testing.assert_allclose(values[0], [[9.5, 9.5], [29.5, 9.5]], atol=1e-3)
    with pytest.raises(UserError, match="frame per image"):
        passes.predict_rows(net, card, [square(pixels, 16)[None]], None, "none")


def test_mirrored_points_need_a_swap_table(tmp_path: Path) -> None:
    checkpoint(tmp_path / "m", task="keypoints", classes=("a", "b"), swap=None)
    crew = ensemble.load(tmp_path / "m")
    with pytest.raises(UserError, match="swap table"):
        next(inference.stream(crew, [], How("geo8")))


def test_diverged_weights_are_named(tmp_path: Path) -> None:
    checkpoint(tmp_path / "m")
    net, card = models.read_model(tmp_path / "m")
    with torch.no_grad():
        list(net.parameters())[0].fill_(float("nan"))
    with pytest.raises(UserError, match="finite"):
        passes.predict_rows(net, card, [np.zeros((1, 16, 16, 3), np.uint8)])


def test_an_ensemble_is_the_mean_of_its_voices_and_matches_classes_by_name(tmp_path: Path) -> None:
    checkpoint(tmp_path / "m" / "a", 0)
    checkpoint(tmp_path / "m" / "b", 1, classes=CLASSES[::-1])
    crew = ensemble.load(tmp_path / "m")
    items = looks.find(photos(tmp_path / "in")[0].parent).items
    both = next(inference.stream(crew, items, How("flip"))).values
    first, second = (next(inference.stream(ensemble.load(tmp_path / "m" / x), items, How("flip"))).values for x in "ab")
    np.testing.assert_allclose(both, (first + second[:, ::-1]) / 2, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"classes": ("red", "green", "grey")}, "the same classes"),
        ({"manifest_hash": "n" * 64}, "the same manifest hash"),
        ({"task": "keypoints"}, "one task"),
    ],
)
def test_fold_models_that_answer_other_questions_are_refused(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    checkpoint(tmp_path / "m" / "a", 0)
    checkpoint(tmp_path / "m" / "b", 1, **change)
    with pytest.raises(UserError, match=words):
        ensemble.load(tmp_path / "m")


def test_ahead_is_in_order_and_looks_only_so_far() -> None:
    started, lock = [], threading.Lock()

    def work(item: int) -> int:
        with lock:
            started.append(item)
        return item * 2

    results_seen = []
    for count, value in enumerate(looks.ahead(work, iter(range(50)), depth=4, workers=2)):
        results_seen.append(value)
        with lock:
            assert len(started) <= count + 6
    assert results_seen == [2 * item for item in range(50)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Seven photos, a copy in a folder below, and three files that are no photos."""
    paths = photos(tmp_path / "in")
    (tmp_path / "in" / "below").mkdir()
    (tmp_path / "in" / "below" / "photo 3.jpg").write_bytes(paths[3].read_bytes())
    (tmp_path / "in" / "empty.jpg").write_bytes(b"")
    (tmp_path / "in" / "cut.jpg").write_bytes(paths[0].read_bytes()[:200])
    (tmp_path / "in" / "text.png").write_text("not a picture")
    (tmp_path / "in" / "phone.heic").write_bytes(b"x")
    return tmp_path / "in"


def test_a_job_in_parts_equals_one_job_and_names_what_it_skipped(
    crew: ensemble.Ensemble, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "ROOT", tmp_path)
    source = looks.find(folder)
    whole = shards.run(crew, source, How("geo4", 4), progress=False)
    assert whole is not None
    shards.clear(whole)
    assert [one.name for one in whole.skipped] == ["cut.jpg", "empty.jpg", "text.png", "phone.heic"]
    assert len(whole.files) == 8  # the copy is a file,
    assert len(whole.predictions.sample_ids) == 7  # but not another sample
    assert shards.run(crew, source, How("geo4", 4), shards=3, shard=1, progress=False) is None
    done = list((tmp_path / "mlruns").rglob("part-*.parquet"))
    stamp = done[0].stat().st_mtime_ns
    assert shards.run(crew, source, How("geo4", 4), shards=3, shard=0, progress=False) is None
    assert done[0].stat().st_mtime_ns == stamp
    calls: list[int] = []
    stream = inference.stream

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(len(arguments[1]))
        return stream(*arguments, **options)

    monkeypatch.setattr(inference, "stream", counted)
    parts = shards.run(crew, source, How("geo4", 4), shards=3, progress=False)
    assert parts is not None
    assert len(calls) == 1  # only the missing third
    assert parts.files == whole.files
    np.testing.assert_array_equal(parts.predictions.values, whole.predictions.values)
    assert len(list((tmp_path / "mlruns").rglob("part-*"))) == 3  # until the result is written
    shards.clear(parts)
    assert not list((tmp_path / "mlruns").rglob("part-*"))
    with pytest.raises(UserError, match="number in 0..2"):
        shards.run(crew, source, How("geo4", 4), shards=3, shard=3, progress=False)


def test_two_machines_that_join_at_once(
    crew: ensemble.Ensemble, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "ROOT", tmp_path)
    source, how, real = looks.find(folder), How("none", 4), Predictions.load
    cut = shards.plan(crew, source, how, 2)
    for place in (0, 1):
        shards.make(crew, cut, how, place)

    def load(path: Path) -> Predictions:
        monkeypatch.setattr(Predictions, "load", real)
        other = shards.run(crew, source, how, 2, 0, progress=False)
        assert other is not None
        shards.clear(other)  # the other machine was faster
        return Predictions.load(path)

    monkeypatch.setattr(Predictions, "load", load)
    assert shards.run(crew, source, how, 2, 1, progress=False) is None


@pytest.mark.parametrize("moment", ["while the last part is made", "while the parts are joined"])
def test_an_equal_command_that_is_done_first_costs_nobody_the_result(
    crew: ensemble.Ensemble, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    monkeypatch.setattr(shards, "ROOT", tmp_path)
    source, how = looks.find(folder), How("none", 4)
    cut = shards.plan(crew, source, how, 2)
    shards.make(crew, cut, how, 0)
    where, name = (Predictions, "load") if moment.endswith("joined") else (shards, "_one")
    real = getattr(where, name)

    def late(*arguments: Any) -> Any:
        monkeypatch.setattr(where, name, real)
        other = shards.run(crew, source, how, 2, progress=False)
        assert other is not None
        shards.clear(other)
        return real(*arguments)

    monkeypatch.setattr(where, name, late)
    found = shards.run(crew, source, how, 2, progress=False)
    assert found is not None
    assert len(found.files) == 8
    shards.clear(found)
    assert not list((tmp_path / "mlruns").rglob("part-*"))


def test_jobs_of_other_shares_or_column_order_have_parts_of_their_own(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "ROOT", tmp_path)
    source, made = looks.find(folder), tmp_path / "made"
    for fold in (0, 1):
        checkpoint(made / f"f{fold}", fold)
    crews = [ensemble.load_bag([made / f"f{fold}" for fold in folds]) for folds in ((0, 1), (0, 0, 1), (1, 0, 1))]
    crews += [replace(crews[0], classes=CLASSES[::-1])]
    works = [shards.plan(crew, source, How("none")).work for crew in crews]
    assert len(set(works)) == 4
    assert works[0] == shards.plan(ensemble.load(made), source, How("none", engine="eager")).work


def test_a_path_that_no_table_can_hold_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    photo = photos(folder, 1)[0]
    single = tmp_path / os.fsdecode(b"x\xe9.jpg")
    single.write_bytes(photo.read_bytes())
    for path in (folder, photo, single):
        with pytest.raises(UserError, match=r"\\udce9(.|\n)*a name that is not UTF-8"):
            looks.find(path)


def test_nothing_readable_is_an_error(crew: ensemble.Ensemble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "ROOT", tmp_path)
    (tmp_path / "in").mkdir()
    with pytest.raises(UserError, match="images"):
        looks.find(tmp_path / "in")
    (tmp_path / "in" / "a.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="at least one readable"):
        shards.run(crew, looks.find(tmp_path / "in"), How("none"), progress=False)


def test_results_by_file_and_sorted_copies(
    crew: ensemble.Ensemble, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "ROOT", tmp_path)
    source = looks.find(folder)
    result = shards.run(crew, source, How("none"), progress=False)
    assert result is not None
    paths = results.write(result, tmp_path / "out")
    lines = Path(paths["predictions_csv"]).read_text().splitlines()
    assert lines[0] == "file,sample_id,predicted,confidence,red,green,blue"
    assert len(lines) == 9
    assert Path(paths["skipped_csv"]).read_text().count("\n") == 5
    for _ in range(2):  # twice: the same files again
        assert results.sort_into(result, source, tmp_path / "sorted") == 8
        copies = [path for path in (tmp_path / "sorted").rglob("*") if path.is_file()]
        assert len(copies) == 8
        assert {path.parent.name for path in copies} <= set(CLASSES)
    with pytest.raises(UserError, match="outside"):
        results.sort_into(result, source, folder / "sorted")
    for task, target, words in (("classify", folder / "sorted", "outside"), ("keypoints", tmp_path / "s", "points")):
        with pytest.raises(UserError, match=words):
            results.check_sorting(task, source, target)


def test_a_folder_holds_what_its_last_job_found(
    crew: ensemble.Ensemble, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "ROOT", tmp_path)
    some = shards.run(crew, looks.find(folder), How("none"), progress=False)
    none = shards.run(crew, looks.find(photos(tmp_path / "fine", 3)[0].parent), How("none"), progress=False)
    assert some is not None
    assert none is not None
    out, exact = tmp_path / "out", {"predictions.csv", "predictions.parquet"}
    for write, result, files in (
        (results.write, some, {*exact, "skipped.csv"}),
        (results.write, none, exact),
        (results.write_labels, some, {"labels.csv", "skipped.csv"}),
        (results.write_labels, none, {"labels.csv"}),
        (results.write, some, {*exact, "skipped.csv"}),
    ):
        paths = write(result, out)
        assert {path.name for path in out.iterdir()} == {Path(path).name for path in paths.values()} == files
    (out / "labels.csv").write_text("file,label\nphoto 0.jpg,red\n")  # the user's own
    results.write(none, out)
    assert (out / "labels.csv").read_text() == "file,label\nphoto 0.jpg,red\n"


def test_sorting_into_a_folder_used_before_loses_no_photo(
    crew: ensemble.Ensemble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(shards, "ROOT", tmp_path)
    monkeypatch.setattr(logging.getLogger("octofold"), "propagate", True)
    target, rng = tmp_path / "sorted", np.random.default_rng(0)
    for number in range(12):  # more than classes: some of one name meet
        path = tmp_path / f"in{number}" / "photo.png"
        path.parent.mkdir()
        Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8)).save(path)
        source = looks.find(path)
        result = shards.run(crew, source, How("none"), progress=False)
        assert result is not None
        for _ in range(2):
            results.sort_into(result, source, target)
    taken = [path.read_bytes() for path in (tmp_path).glob("in*/photo.png")]
    assert sorted(path.read_bytes() for path in target.rglob("*.png")) == sorted(taken)
    assert not caplog.messages
    ids = result.predictions.values.argmax(axis=1)
    other = replace(result.predictions, values=np.roll(result.predictions.values, 1, axis=1))
    results.sort_into(replace(result, predictions=other), source, target)
    assert len(list(target.rglob("*.png"))) == 13  # nothing is removed
    assert f"(now {CLASSES[(int(ids[0]) + 1) % 3]})" in caplog.messages[0]
    assert len(caplog.messages) == 1


@pytest.mark.parametrize(
    ("classes", "expected"),
    [
        (["red", "Red"], ["red", "Red-2"]),
        (["a/b", "a\\b", "a_b"], ["a_b", "a_b-2", "a_b-3"]),
        (["..", ".", ""], ["_", "_-2", "_-3"]),
        (["con", "nul.txt", "früh \n"], ["_con", "_nul.txt", "früh _"]),
        (["x" * 300, "/etc/passwd"], ["x" * 100, "_etc_passwd"]),
    ],
)
def test_class_folders_are_safe_and_distinct(classes: list[str], expected: list[str]) -> None:
    assert results.folder_names(classes) == expected


def test_predict_manifest_is_each_voice_on_its_own(crew: ensemble.Ensemble, tmp_path: Path) -> None:
    import pandas as pd

    from octofold.data.manifest import Manifest

    paths = photos(tmp_path / "in")
    table = pd.DataFrame({"sample_id": [f"s{i}" for i in range(len(paths))], "path": [path.name for path in paths]})
    test = Manifest(table, "classify", CLASSES, "tiny", tmp_path / "in")
    found = inference.predict_manifest(crew, test, "flip", batch_size=3, progress=False)
    assert [list(sets) for sets in found] == [["none", "flip"]] * 2
    items = looks.find(tmp_path / "in").items
    bagged = np.concatenate([batch.values for batch in inference.stream(crew, items, How("flip", 4))])
    np.testing.assert_allclose(np.mean([sets["flip"].values for sets in found], axis=0), bagged, atol=1e-6)
    paths[4].write_bytes(b"")
    with pytest.raises(UserError, match="photo 4"):
        inference.predict_manifest(crew, test, "none", progress=False)


def counting(crew: ensemble.Ensemble) -> list[int]:
    """Make the voices count the images they are shown."""
    seen: list[int] = []
    for voice in crew.voices:
        net = voice.net

        def forward(images: torch.Tensor, net: torch.nn.Module = net) -> torch.Tensor:
            seen.append(len(images))
            return net(images)

        voice.forward = forward
    crew.equipped = ("eager", "fp32")
    return seen


@pytest.mark.slow
@pytest.mark.skipif(find_spec("openvino") is None, reason="needs the openvino extra")
def test_batches_that_overlap_say_what_batches_in_turn_say(
    crew: ensemble.Ensemble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)  # a stream each
    photos(tmp_path / "in", 23)
    (tmp_path / "in" / "photo 11.jpg").write_bytes(b"broken")
    items = looks.find(tmp_path / "in").items
    plain, dealt = (list(inference.stream(crew, items, How("geo8", 3, engine=name))) for name in ("eager", "openvino"))
    assert all(voice.forward.streams > 1 for voice in crew.voices)
    assert [one.items for one in dealt] == [one.items for one in plain]
    assert [one.skipped for one in dealt] == [one.skipped for one in plain]
    assert [one.reason for batch in dealt for one in batch.skipped] == ["cannot identify an image format"]
    for ours, other in zip(dealt, plain, strict=True):
        np.testing.assert_allclose(ours.values, other.values, atol=1e-5)


def test_what_fails_in_an_overlapping_batch_is_raised(crew: ensemble.Ensemble, tmp_path: Path) -> None:
    class Fails:
        streams, calls = 2, 0

        def __call__(self, images: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            if self.calls == 3:
                raise RuntimeError("out of memory")
            return torch.zeros(len(images), 3)

    photos(tmp_path / "in", 20)
    for voice in crew.voices:
        voice.forward = Fails()
    crew.equipped = ("auto", "fp32")
    with pytest.raises(RuntimeError, match="out of memory"):
        list(inference.stream(crew, looks.find(tmp_path / "in").items, How("geo8", 2)))


def test_early_exit_keeps_labels_and_saves_views(crew: ensemble.Ensemble, tmp_path: Path) -> None:
    items = looks.find(photos(tmp_path / "in", 9)[0].parent).items
    seen = counting(crew)

    def labels(early_exit: float) -> tuple[np.ndarray, int]:
        seen.clear()
        how = How("geo8", 4, "eager", early_exit=early_exit)
        values = np.concatenate([batch.values for batch in inference.stream(crew, items, how)])
        return values.argmax(axis=1), sum(seen)

    plain, every = labels(0)
    assert every == 9 * 8 * 2  # images, views, voices
    provable, fewer = labels(1)
    assert provable.tolist() == plain.tolist()
    assert fewer < every
    hasty, fewest = labels(1e-6)
    assert fewest == 9 * 2  # the first view decides


@pytest.mark.parametrize(
    ("rule", "params", "fits"),
    [("linear", {}, True), ("linear", {"experts": [{"a": 0}]}, False), ("gate", {}, True), ("geometric", {}, False)],
)
def test_early_exit_is_for_weighted_means(
    crew: ensemble.Ensemble, tmp_path: Path, rule: str, params: dict[str, Any], fits: bool
) -> None:
    crew.combine = combining.Blend("m", rule, np.ones(1), params).apply
    assert crew.is_mean == fits
    items = looks.find(photos(tmp_path / "in", 2)[0].parent).items
    if not fits:
        with pytest.raises(UserError, match="--early_exit"):
            next(inference.stream(crew, items, How("flip", 4, "eager", early_exit=1)))


def test_agreement_is_measured_against_every_view_in_float32(crew: ensemble.Ensemble, tmp_path: Path) -> None:
    items = looks.find(photos(tmp_path / "in", 9)[0].parent).items
    sound = inference.agreement(crew, items, How("geo8", 4, "eager", early_exit=1))
    assert sound["agreement/labels"] == 1
    assert sound["agreement/images"] == 9
    half = inference.agreement(crew, items, How("geo8", 4, "eager", "bf16"))
    assert 0 < half["agreement/change"] < 0.1
    assert not How(precision="bf16").is_exact


def test_agreement_is_that_of_the_engine_the_job_will_have(
    crew: ensemble.Ensemble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items, real, paid = looks.find(photos(tmp_path / "in", 9)[0].parent).items, engine.make, []

    def make(*arguments: Any) -> Any:
        paid.append(arguments[4])  # for how many passes the making must pay
        return real(*arguments)

    monkeypatch.setattr(engine, "make", make)
    found = inference.agreement(crew, items, How("geo8", 4, "eager", "bf16"), rows=4)
    assert found["agreement/images"] == 4
    assert set(paid) == {9 * 8}


@pytest.mark.slow
def test_the_command(house: House, refuses: Callable[[Outcome, str], None]) -> None:
    for fold in range(2):
        checkpoint(house.home / "models" / f"f{fold}", fold)
    paths = photos(house.home / "in")
    (house.home / "in" / "broken.png").write_bytes(b"")
    result = house.run("infer", "--model", "models", "--images", "in", "--sort_into", "sorted").result
    assert result["views"] == "geo8"  # the recipe's
    assert result["skipped"] == [{"file": "broken.png", "reason": "an empty file (0 bytes)"}]
    assert result["sorted"] == 7
    said = Predictions.load(result["predictions"])
    crew = ensemble.load(house.home / "models")
    for batch in inference.stream(crew, looks.find(paths[0].parent).items, How("geo8", 3)):
        ids = [item.sample_id for item in batch.items]
        np.testing.assert_allclose(said.take(ids).values, batch.values, atol=1e-6)
    fast = house.run("infer", "--model", "models", "--images", "in", "--early_exit", "1", "--out", "fast").result
    assert fast["agreement/labels"] == 1
    assert "predictions" not in fast  # labels only
    lines = [line.split(",") for line in (house.home / "fast" / "labels.csv").read_text().splitlines()]
    assert lines[0] == ["file", "sample_id", "predicted"]
    rows = {name: CLASSES[values.argmax()] for name, values in zip(said.sample_ids, said.values, strict=True)}
    assert {line[1]: line[2] for line in lines[1:]} == rows
    refuses(house.run("infer", "--images", "in"), "--model, or --competition")
