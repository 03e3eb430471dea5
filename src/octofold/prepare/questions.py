"""Questions: the test images, and under which names a submission must answer for each."""

import json

import numpy as np
import pandas as pd

from octofold.commands import Prepare
from octofold.data.manifest import Manifest
from octofold.errors import UserError, preview
from octofold.files import existing
from octofold.nets import landmarks
from octofold.prepare import checks, sources
from octofold.prepare.findings import Findings
from octofold.prepare.lineage import Fingerprints


def read_test(
    config: Prepare, source: sources.Source, found: Findings
) -> tuple[Manifest | None, pd.DataFrame, Fingerprints]:
    """The test manifest (one row per content; `names` lists every id that shares it), its looks and fingerprints.

    Raises:
        UserError: see `sources.from_test`; a test image that cannot be read.
    """
    if config.test_images is None:
        return (
            None,
            pd.DataFrame(),
            Fingerprints(np.zeros(0, "U16"), np.zeros(0, np.uint64), np.zeros((0, 0), np.uint8)),
        )
    given = (config.test_images, config.sample_submission, config.image_column, config.label_column)
    rows, info = sources.from_test(*given, source, config.task)
    folder = existing(config.test_images, "test images").resolve()
    looks = checks.look(rows["file"].tolist(), folder, "look at test")
    table = looks.table.assign(name=rows["name"])
    broken = table[table["problem"] != ""]
    if len(broken):
        raise UserError(
            folder,
            expected="test images that can be read",
            got=f"{len(broken)} cannot: {preview(broken['file'] + ': ' + broken['problem'])}",
            fix="replace the files, or take their rows out of the sample submission",
        )
    for row in table[table["odd"] != ""].itertuples():
        found.add("test", row, str(row.odd))
    if config.sample_submission is None:
        found.absent("test", folder)
    names: dict[str, list[str]] = {}
    for name, sample in zip(table["name"], table["sample_id"], strict=True):
        names.setdefault(sample, []).append(name)
    first = ~table["sample_id"].duplicated().to_numpy()
    for row in table[~first].itertuples():
        found.add("test", row, "copy", f"same bytes as {names[str(row.sample_id)][0]}", "predicted once")
    kept = table[first].reset_index(drop=True).rename(columns={"file": "path"})
    kept["names"] = [json.dumps(names[name], ensure_ascii=False) for name in kept["sample_id"]]
    columns = kept[["sample_id", "path", "names", "width", "height"]]
    info = {**source.info, **info}
    if config.test_points is not None:
        asked = landmarks.read_asked(config.test_points, len(source.names), config.image_column)
        lost = [name for name in table["name"] if name not in asked]
        if lost:
            raise UserError(config.test_points, expected="a row for every test image", got=f"none for {preview(lost)}")
        columns = columns.assign(points=[json.dumps({n: asked[n] for n in names[s]}) for s in kept["sample_id"]])
        info |= {"style": landmarks.STYLE, "image_column": config.image_column}
    test = Manifest(columns, config.task, source.names, config.competition, folder, info)
    return test, kept, Fingerprints(test.sample_ids, looks.phash[first], looks.tiny[first])
