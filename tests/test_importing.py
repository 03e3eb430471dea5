"""Data from elsewhere: archives that are safe or refused, folders of every layout, hub formats from local copies."""

import io
import json
import socket
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from octofold.commands import Prepare
from octofold.errors import UserError
from octofold.prepare import archives, hub, importing, preparing, sources
from octofold.prepare.findings import Findings
from test_checks import scene
from test_sources import csv, fill


def picture(seed: int = 0, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    scene(seed, 32).save(buffer, kind)
    return buffer.getvalue()


def make_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in files.items():
            file.writestr(name, data)
    return path


def make_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as file:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def flags(tmp_path: Path, **more: object) -> Prepare:
    values = {"competition": "c", "folds": 2, "out": tmp_path / "out"} | more
    return Prepare.model_validate(values)


CLASSES = {f"top/{'ab'[row % 2]}/{row}.png": picture(row) for row in range(8)}


# ---- archives -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make", [lambda folder: make_zip(folder / "x.zip", CLASSES), lambda folder: make_tar(folder / "x.tar.gz", CLASSES)]
)
def test_an_archive_of_class_folders(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    config = importing.fetch(flags(tmp_path, source=str(make(tmp_path))))
    made = preparing.prepare(config)
    assert sorted(made.manifest.table["path"]) == sorted(name[4:] for name in CLASSES)
    assert config.images == tmp_path / "out" / "raw" / "top"


def test_re_zipping_changes_no_id(tmp_path: Path) -> None:
    one = importing.fetch(flags(tmp_path, source=str(make_zip(tmp_path / "x.zip", CLASSES))))
    renamed = {name.replace("top/", "other/").replace(".png", " neu.png"): data for name, data in CLASSES.items()}
    two = importing.fetch(flags(tmp_path, source=str(make_tar(tmp_path / "y.tar", renamed)), out=tmp_path / "second"))
    assert preparing.prepare(one).manifest.hash == preparing.prepare(two).manifest.hash


def test_unpacking_twice_does_nothing_and_another_archive_is_refused(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "x.zip", CLASSES)
    folder = archives.unpack(path, tmp_path / "raw")
    (folder / "top" / "a" / "0.png").write_bytes(b"mine")
    assert archives.unpack(path, folder) == folder
    assert (folder / "top" / "a" / "0.png").read_bytes() == b"mine"
    with pytest.raises(UserError, match="empty folder"):
        archives.unpack(make_zip(tmp_path / "y.zip", CLASSES), folder)


class Unflagged(zipfile.ZipInfo):
    """A member whose name is not said to be UTF-8."""

    encoding = "utf-8"

    def _encodeFilenameFlags(self) -> tuple[bytes, int]:
        return self.filename.encode(self.encoding), self.flag_bits & ~archives.UTF8


@pytest.mark.parametrize("encoding", ["utf-8", "cp437"])
def test_names_in_a_zip_that_does_not_say_how_they_are_written(tmp_path: Path, encoding: str) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
        info = Unflagged("kühe/1.png")
        info.encoding = encoding
        file.writestr(info, picture())
    assert (archives.unpack(tmp_path / "x.zip", tmp_path / "raw") / "kühe" / "1.png").read_bytes() == picture()


def test_imagenet_style_tar_of_tars(tmp_path: Path) -> None:
    inner = {}
    for label in (1, 2):
        files = {f"{label}_{row}.png": picture(row + 10 * label) for row in range(3)}
        inner[f"n{label}.tar"] = make_tar(tmp_path / "t.tar", files).read_bytes()
    config = importing.fetch(flags(tmp_path, source=str(make_tar(tmp_path / "train.tar", inner))))
    assert preparing.prepare(config).manifest.classes == ("n1", "n2")


def test_only_images_and_tables_are_taken_out(tmp_path: Path) -> None:
    folder = archives.unpack(
        make_zip(tmp_path / "x.zip", {"a.png": b"x", "run.sh": b"rm -rf", "t.csv": b"a,b"}), tmp_path / "raw"
    )
    assert sorted(path.name for path in folder.iterdir()) == [archives.MARK, "a.png", "t.csv"]


def link_tar(path: Path, kind: bytes) -> Path:
    with tarfile.open(path, "w") as file:
        info = tarfile.TarInfo("link.png")
        info.type, info.linkname = kind, "/etc/passwd"
        file.addfile(info)
    return path


def link_zip(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        info = zipfile.ZipInfo("link.png")
        info.external_attr = 0o120777 << 16
        file.writestr(info, "/etc/passwd")
    return path


def lying_zip(path: Path) -> Path:
    """The header says 10 bytes, the data are 5000."""
    make_zip(path, {"a.png": bytes(5000)})
    raw = path.read_bytes()
    path.write_bytes(raw.replace(struct.pack("<I", 5000), struct.pack("<I", 10)))
    return path


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: make_zip(p / "x.zip", {"../evil.png": b"x"}), "../evil.png"),
        (lambda p: make_zip(p / "x.zip", {"a/../../evil.png": b"x"}), "evil.png"),
        (lambda p: make_zip(p / "x.zip", {"/tmp/evil.png": b"x"}), "/tmp/evil.png"),
        (lambda p: make_zip(p / "x.zip", {"C:\\evil.png": b"x"}), "evil.png"),
        (lambda p: make_zip(p / "x.zip", {"..\\evil.png": b"x"}), "evil.png"),
        (lambda p: make_tar(p / "x.tar", {"../evil.png": b"x"}), "../evil.png"),
        (lambda p: make_tar(p / "x.tar", {"/evil.png": b"x"}), "/evil.png"),
        (lambda p: link_tar(p / "x.tar", tarfile.SYMTYPE), "a link: 'link.png'"),
        (lambda p: link_tar(p / "x.tar", tarfile.LNKTYPE), "a link: 'link.png'"),
        (lambda p: link_tar(p / "x.tar", tarfile.CHRTYPE), "a device: 'link.png'"),
        (lambda p: link_zip(p / "x.zip"), "a link: 'link.png'"),
        (lambda p: make_zip(p / "x.zip", {"a.png": bytes(150_000_000)}), "bytes unpacked"),
        (lambda p: lying_zip(p / "x.zip"), "x.zip"),
        (lambda p: make_zip(p / "x.zip", {"a.png": b"x", "b/../a.png": b"y"}), "b/../a.png"),
        (lambda p: make_zip(p / "x.zip", {"a.png": b"x", "./a.png": b"y"}), "twice"),
        (lambda p: csv(p / "x.zip", "no zip"), "zip or tar"),
        (lambda p: csv(p / "x.tar", ""), "zip or tar"),
        (lambda p: csv(p / "x.rar", ""), "one of .zip"),
    ],
)  # fmt: skip
def test_bad_archives_are_refused_and_leave_nothing(tmp_path: Path, make: Callable[[Path], Path], words: str) -> None:
    path = make(tmp_path)
    with pytest.raises(UserError) as caught:
        importing.fetch(flags(tmp_path, source=str(path)))
    assert words in str(caught.value)
    assert [found.name for found in tmp_path.rglob("*") if found.is_file()] == [path.name]


@given(st.data())
def test_fuzzed_archives_unpack_or_are_refused(tmp_path: Path, data: st.DataObject) -> None:
    """Bytes changed or cut anywhere: whole files inside the folder, or a refusal; never anything outside."""
    import shutil

    shutil.rmtree(tmp_path / "raw", ignore_errors=True)
    files = {"a/1.png": b"one" * 50, "b/2.png": b"two" * 50}
    path = data.draw(st.sampled_from([make_zip(tmp_path / "x.zip", files), make_tar(tmp_path / "x.tar", files)]))
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw[: data.draw(st.sampled_from([len(raw), len(raw) // 2]))])
    try:
        archives.unpack(path, tmp_path / "raw")
    except UserError:
        assert not (tmp_path / "raw").exists()
    assert {found.name for found in tmp_path.iterdir()} <= {"x.zip", "x.tar", "raw"}


# ---- layouts --------------------------------------------------------------------------------------------------------


def test_kaggle_layout_with_its_test_set(tmp_path: Path) -> None:
    """train.csv beside train.zip, ids without suffix, columns called otherwise."""
    raw = tmp_path / "kaggle"
    raw.mkdir()
    make_zip(raw / "train.zip", {f"train/{row}.png": picture(row) for row in range(6)})
    fill(raw / "test", ["100.png", "101.png"])
    csv(raw / "train.csv", "id,target\n" + "".join(f"{row},{'xy'[row % 2]}\n" for row in range(6)))
    csv(raw / "sample_submission.csv", "id,target\n100,x\n101,x\n")
    before = sorted(raw.rglob("*"))
    made = preparing.prepare(importing.fetch(flags(tmp_path, source=str(raw))))
    assert sorted(raw.rglob("*")) == before
    assert (len(made.manifest.table), made.manifest.classes) == (6, ("x", "y"))
    assert made.test is not None
    assert made.test.info["image_column"] == "id"


def test_imagenet_layout_train_and_val(tmp_path: Path) -> None:
    raw = tmp_path / "raw data"
    for part, first in (("train", 0), ("val", 10)):
        for row in range(4):
            (raw / part / "ab"[row % 2]).mkdir(parents=True, exist_ok=True)
            scene(first + row, 32).save(raw / part / "ab"[row % 2] / f"{row}.png")
    made = preparing.prepare(importing.fetch(flags(tmp_path, source=str(raw))))
    assert made.manifest.classes == ("a", "b")
    assert sorted(made.manifest.table["split"].unique()) == ["train", "val"]


def class_folders(folder: Path, names: list[str], first: int = 0) -> Path:
    """Two pictures in each of these folders."""
    for seed, name in enumerate([f"{name}/{row}.png" for name in names for row in range(2)], start=first):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        scene(seed, 32).save(folder / name)
    return folder


def test_a_test_folder_is_no_class(tmp_path: Path) -> None:
    data = class_folders(tmp_path / "data", ["cat", "dog", "test"])
    for where in ({"images": data, "test_images": data / "test"}, {"source": str(data)}):
        made = preparing.prepare(importing.fetch(flags(tmp_path, **where)))
        assert made.manifest.classes == ("cat", "dog")
        assert made.test is not None
        assert len(made.test.table) == 2
        assert "copy in test" not in set(made.problems["kind"])


def test_a_folder_of_test_images_around_the_class_folders_hides_none(tmp_path: Path) -> None:
    data = class_folders(tmp_path / "all" / "labelled", ["cat", "dog"])
    made = preparing.prepare(importing.fetch(flags(tmp_path, images=data, test_images=tmp_path / "all")))
    assert made.manifest.classes == ("cat", "dog")


def test_parts_are_known_in_any_case(tmp_path: Path) -> None:
    parts = ["Train/cat", "Train/dog", "Valid/cat", "Valid/dog", "TEST/cat"]
    made = preparing.prepare(importing.fetch(flags(tmp_path, source=str(class_folders(tmp_path / "data", parts)))))
    assert made.manifest.classes == ("cat", "dog")
    assert made.manifest.table["split"].value_counts().to_dict() == {"Train": 4, "Valid": 4}
    assert made.test is not None
    assert len(made.test.table) == 2


def test_folders_of_images_left_aside_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Bus, car, train: is the last one a class, or the part to train on? Nobody can tell, so it is said."""
    data = class_folders(tmp_path / "data", ["bus/day", "bus/night", "car/day", "train/day", "train/night", "test/day"])
    (data / "docs").mkdir()
    found = Findings()
    with caplog.at_level("WARNING", "octofold"):
        config = importing.fetch(flags(tmp_path, source=str(data)), found)
    assert "left aside: bus, car; if they are classes too, --images" in caplog.text
    problems = preparing.prepare(config, found).problems
    told = problems[problems["kind"] == "not looked at"]
    assert dict(zip(told["file"], told["detail"], strict=True)) == dict.fromkeys(
        ("bus", "car"), "a folder of images beside train/"
    )


def test_a_repeated_call_on_its_own_folder_sees_new_images(tmp_path: Path) -> None:
    home = tmp_path / "out"
    class_folders(home, ["train/cat", "train/dog", "val/cat", "val/dog"])
    for more, classes in (([], ("cat", "dog")), (["train/cow", "val/cow"], ("cat", "cow", "dog"))):
        class_folders(home, more, first=50)
        config = importing.fetch(flags(tmp_path, source=str(home)))
        made = preparing.prepare(config)
        preparing.write(made, config)
        assert made.manifest.classes == classes
        assert len(made.manifest.table) == 8 + 2 * len(more)
    (home / "classes.json").write_text(json.dumps(["dog", "cow", "cat"]))  # an order of the user's own stays
    assert preparing.read_source(importing.fetch(flags(tmp_path, source=str(home)))).names == ("dog", "cow", "cat")


def test_a_table_whose_images_are_nowhere(tmp_path: Path) -> None:
    csv(
        tmp_path / "raw.d" / "train.csv" if (tmp_path / "raw.d").mkdir() is None else tmp_path, "image,label\nx.png,1\n"
    )
    with pytest.raises(UserError, match="'x.png' in none of them"):
        importing.fetch(flags(tmp_path, source=str(tmp_path / "raw.d")))


def test_lightning_pose_tables(tmp_path: Path) -> None:
    fill(tmp_path / "p" / "labeled-data" / "v", ["1.png", "2.png"])
    text = (
        "scorer,me,me,me,me,me\nbodyparts,nose,nose,nose,tail,tail\ncoords,x,y,likelihood,x,y\n"
        "labeled-data/v/1.png,1,2,0.9,3,4\nlabeled-data/v/2.png,,,0.1,5,6\n"
    )
    one = sources.from_csv(csv(tmp_path / "CollectedData.csv", text), tmp_path / "p", "image", "label", "keypoints")
    assert one.names == ("nose", "tail")
    assert one.table["nose_x"].isna().tolist() == [False, True]
    newer = (
        "scorer,,,me,me\nindividuals,,,m1,m1\nbodyparts,,,nose,nose\ncoords,,,x,y\n"
        "labeled-data,v,1.png,1,2\nlabeled-data,v,2.png,3,4\n"
    )
    two = sources.from_csv(csv(tmp_path / "new.csv", newer), tmp_path / "p", "image", "label", "keypoints")
    assert two.names == ("m1_nose",)
    assert two.table["file"].tolist() == ["labeled-data/v/1.png", "labeled-data/v/2.png"]
    with pytest.raises(UserError, match="bodyparts"):
        sources.read_table(csv(tmp_path / "bad.csv", "scorer,me\nx,1\n"))


def test_thousand_landmarks_tables(tmp_path: Path) -> None:
    """Original 004: tab-separated, file_name, Point_M0_X …, images in train/images."""
    raw = tmp_path / "faces"
    fill(raw / "train" / "images", ["1.jpg", "2.jpg"])
    csv(raw / "landmarks.csv", "file_name\tPoint_M0_X\tPoint_M0_Y\n1.jpg\t1\t2\n2.jpg\t3\t4\n")
    config = flags(tmp_path, source=str(raw), images=None, task="keypoints")
    made = sources.from_csv(raw / "landmarks.csv", raw / "train" / "images", "file_name", "label", "keypoints")
    assert made.names == ("Point_M0",)
    with pytest.raises(UserError, match="--image"):
        importing.fetch(config)
    (raw / "train" / "images").rename(raw / "images")
    assert preparing.read_source(importing.fetch(config)).names == ("Point_M0",)


# ---- hubs -----------------------------------------------------------------------------------------------------------

FEATURES = {
    "image": {"_type": "Image"},
    "label": {"_type": "ClassLabel", "names": ["zebra", "ant"]},
    "note": {"dtype": "string", "_type": "Value"},
}


def hf_rows(first: int, count: int) -> dict[str, list[object]]:
    return {
        "image": [{"bytes": picture(first + row, "JPEG"), "path": None} for row in range(count)],
        "label": [row % 2 for row in range(count)],
        "note": [f"n{row}" for row in range(count)],
    }


def test_hugging_face_parquet(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    source = tmp_path / "repo" / "data"
    source.mkdir(parents=True)
    for part, first, count in (("train", 0, 6), ("test", 20, 4)):
        table = pa.table(hf_rows(first, count)).replace_schema_metadata(
            {"huggingface": json.dumps({"info": {"features": FEATURES}})}
        )
        pq.write_table(table, source / f"{part}-00000-of-00001.parquet")
    for address in (f"hf:{tmp_path / 'repo'}", str(tmp_path / "repo")):
        config = importing.fetch(flags(tmp_path, source=address))
        made = preparing.prepare(config)
        assert made.manifest.classes == ("zebra", "ant")
        assert made.manifest.table["label"].tolist() == ["zebra", "ant"] * 3
        assert made.manifest.table["note"].tolist()[:2] == ["n0", "n1"]
        assert made.test is not None
        assert len(made.test.table) == 4
        assert (tmp_path / "out" / "raw" / "train" / "0000000.jpg").read_bytes() == picture(0, "JPEG")
        truth = pd.read_csv(tmp_path / "out" / "raw" / "test_truth.csv")
        assert truth["label"].tolist() == ["zebra", "ant"] * 2


def test_a_second_source_inherits_nothing_of_the_first(tmp_path: Path) -> None:
    for labels, tests in (("aab", "ab"), ("xy", "")):
        layout = hub.Layout(tmp_path / "raw")
        for part, letters in (("train", labels), ("test", tests)):
            for seed, letter in enumerate(letters):
                layout.add(part, picture(seed, "BMP"), {"label": letter})
        layout.close(["a", "b"] if tests else None)
    left = {path.relative_to(tmp_path / "raw").as_posix() for path in (tmp_path / "raw").rglob("*.*")}
    assert left == {hub.MARK, "train.csv", "train/0000000.bmp", "train/0000001.bmp"}
    found = importing.lay_out(tmp_path / "raw", tmp_path / "raw", flags(tmp_path, source="x", images=None))
    assert (found.test_images, found.sample_submission, found.classes) == (None, None, None)


@pytest.mark.parametrize("mine", ["train/photo.png", "train/0000000.png", "train.csv", "notes.txt"])
def test_an_import_never_takes_the_place_of_the_users_files(tmp_path: Path, mine: str) -> None:
    (tmp_path / "raw" / mine).parent.mkdir(parents=True)
    (tmp_path / "raw" / mine).write_bytes(b"mine")
    with pytest.raises(UserError, match="empty folder to import into"):
        hub.Layout(tmp_path / "raw")
    assert [path.name for path in (tmp_path / "raw").rglob("*") if path.is_file()] == [Path(mine).name]


def test_an_import_from_before_there_was_a_mark_may_be_repeated(tmp_path: Path) -> None:
    for seed in (0, 1):
        layout = hub.Layout(tmp_path / "raw")
        layout.add("train", picture(seed), {"label": "a"})
        layout.close(None)
        (tmp_path / "raw" / hub.MARK).unlink()
    (tmp_path / "raw" / "train" / "0000001.png").write_bytes(b"mine: no table lists it")
    with pytest.raises(UserError, match="empty folder to import into"):
        hub.Layout(tmp_path / "raw")


def test_a_repeated_import_leaves_images_that_are_not_its_own(tmp_path: Path) -> None:
    for count in (3, 2):
        layout = hub.Layout(tmp_path / "raw")
        for seed in range(count):
            layout.add("train", picture(seed), {"label": "a"})
        (tmp_path / "raw" / "train" / "mine.png").write_bytes(b"mine")
        layout.close(None)
    left = sorted(path.name for path in (tmp_path / "raw" / "train").iterdir())
    assert left == ["0000000.png", "0000001.png", "mine.png"]


@pytest.mark.parametrize("mine", ["images/train/photo.png", "images/test/photo.png", "train.csv"])
def test_the_digits_never_take_the_place_of_the_users_files(tmp_path: Path, mine: str) -> None:
    config = flags(tmp_path, builtin="digits")
    (tmp_path / "out" / mine).parent.mkdir(parents=True)
    (tmp_path / "out" / mine).write_bytes(b"mine")
    with pytest.raises(UserError, match=mine):
        importing.fetch(config)
    assert (tmp_path / "out" / mine).read_bytes() == b"mine"
    (tmp_path / "out" / mine).unlink()
    assert importing.fetch(config) == importing.fetch(config)


def test_hugging_face_rows_without_a_label(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """-1 stands for "nobody knows", not for the last class."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "repo").mkdir()
    for part, first, labels in (("train", 0, [0, 1, -1, 0, None, 1]), ("test", 20, [-1, -1, -1])):
        table = pa.table(hf_rows(first, len(labels)) | {"label": pa.array(labels, pa.int64())})
        described = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": FEATURES}})})
        pq.write_table(described, tmp_path / "repo" / f"{part}.parquet")
    with caplog.at_level("WARNING", "octofold"):
        folder = hub.hugging_face(str(tmp_path / "repo"), tmp_path / "raw")
    assert pd.read_csv(folder / "train.csv")["label"].tolist() == ["zebra", "ant", "zebra", "ant"]
    assert "2 training images have no label" in caplog.text
    assert len(pd.read_csv(folder / "sample_submission.csv")) == 3
    assert not (folder / "test_truth.csv").exists()


@pytest.mark.parametrize("described", [True, False])
def test_columns_that_are_called_like_ours_make_room(tmp_path: Path, described: bool) -> None:
    """Names of files in a column `image`, words in a column `label`: neither may stand for our image or our label."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "repo").mkdir()
    rows = hf_rows(0, 6)
    columns = {"img": rows["image"], "image": [f"{5 - row:07d}.jpg" for row in range(6)], "user_image": ["x"] * 6}
    labels = {"kind": rows["label"], "label": ["word"] * 6} if described else {"label": rows["label"]}
    table = pa.table(columns | labels)
    if described:
        info = {"features": {"img": FEATURES["image"], "kind": FEATURES["label"]}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": info})})
    pq.write_table(table, tmp_path / "repo" / "train.parquet")
    found = pd.read_csv(hub.hugging_face(str(tmp_path / "repo"), tmp_path / "raw") / "train.csv")
    assert found["image"].tolist() == [f"{row:07d}.jpg" for row in range(6)]
    assert found["label"].tolist() == (["zebra", "ant"] if described else [0, 1]) * 3
    assert found["user_user_image"].tolist() == columns["image"]
    assert not described or set(found["user_label"]) == {"word"}


def test_bringing_changed_data_changes_the_images(tmp_path: Path) -> None:
    """Bitmaps of one size in bytes: only the content tells that the third is another one now."""
    for seeds in ((0, 1, 2), (0, 1, 7)):
        layout = hub.Layout(tmp_path / "raw")
        for seed in seeds:
            layout.add("train", picture(seed, "BMP"), {"label": "ab"[seed % 2]})
        layout.close(None)
        files = sorted((tmp_path / "raw" / "train").iterdir())
        assert [path.read_bytes() for path in files] == [picture(seed, "BMP") for seed in seeds]
        assert len({path.stat().st_size for path in files}) == 1


def test_hugging_face_saved_to_disk(tmp_path: Path) -> None:
    import pyarrow as pa

    source = tmp_path / "saved" / "train"
    source.mkdir(parents=True)
    table = pa.table(hf_rows(0, 6))
    with (
        pa.OSFile(str(source / "data-00000-of-00001.arrow"), "wb") as sink,
        pa.ipc.new_stream(sink, table.schema) as writer,
    ):
        writer.write_table(table, max_chunksize=4)
    (source / "dataset_info.json").write_text(json.dumps({"features": FEATURES}))
    made = preparing.prepare(importing.fetch(flags(tmp_path, source=f"hf:{tmp_path / 'saved'}")))
    assert made.manifest.classes == ("zebra", "ant")
    assert len(made.manifest.table) == 6


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_broken_hugging_face_tables(tmp_path: Path, name: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "repo").mkdir()
    (tmp_path / "repo" / name).write_bytes(b"PAR1 nothing")
    with pytest.raises(UserError, match=name):
        hub.hugging_face(str(tmp_path / "repo"), tmp_path / "raw")
    (tmp_path / "repo" / name).unlink()
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "repo" / "b.parquet")
    with pytest.raises(UserError, match="image column"):
        hub.hugging_face(str(tmp_path / "repo"), tmp_path / "raw")


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No network: whoever asks for an address gets none."""

    def refuse(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("source", "words"),
    [("hf:timm/oxford-iiit-pet", "hf:FOLDER"), ("hf:not a name", "OWNER/NAME"),
     ("torchvision:MNIST", "copy torchvision's files"),
     ("torchvision:NoSuch", "one of"), ("nosuch:thing", "--source"), ("nowhere.zip", "no such file")],
)  # fmt: skip
def test_without_a_network_it_says_what_to_do(
    tmp_path: Path, source: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError) as caught:
        importing.fetch(flags(tmp_path, source=source))
    assert words in str(caught.value)


def test_kaggle_asks_for_its_client_and_never_shows_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    import types

    monkeypatch.setenv("KAGGLE_KEY", "0123456789abcdef")
    client = types.ModuleType("kagglehub")

    def fail(name: str) -> str:
        raise ValueError(f"403 for {name} with key 0123456789abcdef")

    client.competition_download = fail  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "kagglehub", client)
    with pytest.raises(UserError, match="KAGGLE_USERNAME") as caught:
        importing.fetch(flags(tmp_path, source="kaggle:birds"))
    assert "0123456789abcdef" not in str(caught.value)
    raw = tmp_path / "download"
    fill(raw / "train", ["1.png", "2.png"])
    csv(raw / "train.csv", "image,label\n1.png,a\n2.png,b\n")
    client.competition_download = lambda name: str(raw)  # type: ignore[attr-defined]
    assert preparing.read_source(importing.fetch(flags(tmp_path, source="kaggle:birds"))).names == ("a", "b")
    monkeypatch.setitem(sys.modules, "kagglehub", None)
    with pytest.raises(UserError, match="pip install kagglehub"):
        importing.fetch(flags(tmp_path, source="kaggle:birds"))


@pytest.mark.slow
def test_torchvision_from_a_local_copy(tmp_path: Path) -> None:
    """MNIST's own files, ten images long, where torchvision would have put them."""
    raw = tmp_path / "out" / "raw" / "download" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part, count in (("train", 10), ("t10k", 4)):
        pixels = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, count, 28, 28) + pixels.tobytes())
        labels = np.arange(count, dtype=np.uint8) % 2
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, count) + labels.tobytes())
    made = preparing.prepare(importing.fetch(flags(tmp_path, source="torchvision:MNIST")))
    assert made.manifest.classes[:2] == ("0 - zero", "1 - one")
    assert made.manifest.table["label"].tolist()[:2] == ["0 - zero", "1 - one"]
    assert made.test is not None
    assert len(made.test.table) == 4
    with Image.open(made.manifest.paths[0]) as image:
        assert image.size == (28, 28)
