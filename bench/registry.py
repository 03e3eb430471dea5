"""Registry paths at 1,000 slots x 5 versions, on sqlite, on PostgreSQL, and through `mlflow server` over it.

    OMP_NUM_THREADS=1 python bench/registry.py [--slots 1000 --versions 5]

Rows are put in by SQL, as MLflow writes them, because making 5,000 versions through its API takes minutes; what is
timed goes through the product: `registry.resolve` (blend's first step), `promotion.newest` (promote's), a whole
promotion of one member, and the cost of each call that changes something. PostgreSQL's server binaries are needed
for the second half.
"""

import argparse
import json
import logging
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

TAGS = {"manifest_hash": "a" * 64, "classes_hash": "b" * 64, "model_sha": "c" * 64, "recipe_hash": "d" * 64,
        "git.commit": "e" * 40, "competition": "big", "member": "m", "fold": "0", "seed": "0"}  # fmt: skip


def main() -> None:
    """Fill, time, print a table and a JSON line."""
    from servers import MlflowServer, binaries, postgres

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slots", type=int, default=1000)
    parser.add_argument("--versions", type=int, default=5)
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the servers are stopped on the way out
    logging.disable(logging.INFO)
    folder = Path(tempfile.mkdtemp(prefix="octofold-bench-"))
    rows: dict[str, dict[str, tuple[float, float]]] = {}
    try:
        (folder / "mlruns").mkdir()
        store = f"sqlite:///{folder / 'mlruns' / 'mlflow.db'}"
        rows["sqlite"] = measure(store, store, asked.slots, asked.versions)
        if binaries() is not None:
            with postgres() as url:
                rows["postgresql"] = measure(url, url, asked.slots, asked.versions)
                server = MlflowServer(url, folder).start()
                try:
                    rows["server"] = measure(server.url, None, asked.slots, asked.versions)
                finally:
                    server.stop()
    finally:
        shutil.rmtree(folder)
    names = list(next(iter(rows.values())))
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; seconds (of which CPU of this process)")
    print(f"{'':34}" + "".join(f"{store:>18}" for store in rows))
    for name in names:
        print(f"{name:34}" + "".join(f"{row[name][0]:10.3f} ({row[name][1]:.3f})" for row in rows.values()))
    print(json.dumps(rows))


def measure(store: str, fill_store: str | None, slots: int, versions_each: int) -> dict[str, tuple[float, float]]:
    """Time the registry paths on one store."""
    os.environ["MLFLOW_TRACKING_URI"] = store
    from octofold.track import promotion, registry, tracking, versions

    tracking.client()
    if fill_store is not None:
        fill(fill_store, slots, versions_each)
    found = registry.resolve("big", "production")
    assert sum(map(len, found.values())) == slots
    member = sorted(found)[0]
    names = [slot.name for slot in found[member]]

    def promote(member: str) -> None:
        with tracking.run("promote", None, "big", parent=None) as run:
            moved = promotion.promote(
                run, "big", member, "staging", manifest_hash="a" * 64, all_folds=None, folds=None, seeds=None
            )
        assert len(moved) == len(names)

    api = tracking.client()
    run = api.create_run(tracking.experiment("big")).info.run_id
    made = {
        "blend: resolve a stage": timed(lambda: registry.resolve("big", "production")),
        "infer: resolve one member": timed(lambda: registry.resolve("big", "production", [member])),
        "promote: resolve every member": timed(lambda: promotion.newest("big", "")),
        "promote: resolve one member": timed(lambda: promotion.newest("big", member)),
        "promote: one member, whole": timed(lambda: promote(member), 1),
        "list every version": timed(lambda: registry.slots("big"), 2),
        "set an alias": timed(lambda: versions.set_alias(names[0], "staging", 1)),
        "set a stage": timed(lambda: versions.set_stage(names[0], 1, "Staging")),
        "tag a version": timed(lambda: versions.set_version_tags(names[0], 1, {"x": "y"})),
        "log 8 metrics of an epoch": timed(lambda: _log(run)),
        "make and end a run": timed(lambda: _run(tracking), 3),
    }
    return made


def _log(run: str) -> None:
    from mlflow.entities import Metric

    from octofold.track import tracking

    now = int(time.time() * 1000)
    tracking.client().log_batch(run, metrics=[Metric(f"m{i}", 0.5, now, now % 1000) for i in range(8)])


def _run(tracking: Any) -> None:
    with tracking.run("bench", None, "big", parent=None):
        pass


def timed(act: Callable[[], object], repeats: int = 5) -> tuple[float, float]:
    """Median seconds of a call, and the CPU seconds of this process in it."""
    took, worked = [], []
    for _ in range(repeats):
        start, busy = time.perf_counter(), time.process_time()
        act()
        took.append(time.perf_counter() - start)
        worked.append(time.process_time() - busy)
    return statistics.median(took), statistics.median(worked)


def fill(store: str, slots: int, versions_each: int) -> None:
    """Put registered models, versions, tags, aliases and stages in, as `train` and `promote` would."""
    import sqlalchemy

    engine = sqlalchemy.create_engine(store)
    meta = sqlalchemy.MetaData()
    meta.reflect(engine)
    names = [f"big.m{i // 10}.f{i % 5}.s{i % 10 // 5}" for i in range(slots)]
    now = int(time.time() * 1000)

    def put(table: str, rows: list[dict[str, Any]]) -> None:
        columns = meta.tables[table].columns
        extra = {"workspace": "default"} if "workspace" in columns else {}
        with engine.begin() as connection:
            connection.execute(meta.tables[table].insert(), [row | extra for row in rows])

    put("registered_models", [{"name": n, "creation_time": now, "last_updated_time": now} for n in names])
    put(
        "registered_model_tags", [{"name": n, "key": "octofold.production", "value": str(versions_each)} for n in names]
    )
    put("registered_model_aliases", [{"name": n, "alias": "production", "version": versions_each} for n in names])
    each = [(n, v) for n in names for v in range(1, versions_each + 1)]
    put("model_versions", [
        {"name": n, "version": v, "creation_time": now, "last_updated_time": now, "source": f"file:///nowhere/{n}/{v}",
         "run_id": "0" * 32, "status": "READY",
         "current_stage": "Production" if v == versions_each else "Archived"} for n, v in each
    ])  # fmt: skip
    put(
        "model_version_tags",
        [{"name": n, "version": v, "key": k, "value": x} for n, v in each for k, x in TAGS.items()],
    )
    with engine.begin() as connection:  # as autovacuum does within a minute; without it PostgreSQL plans blindly
        connection.execute(sqlalchemy.text("ANALYZE"))
    engine.dispose()


if __name__ == "__main__":
    main()
