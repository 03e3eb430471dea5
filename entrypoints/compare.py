"""compare: which rows differ between two submissions, and which members changed them.

python entrypoints/compare.py --submission runs/blend/<new>/submission.csv --other runs/blend/<old>/submission.csv
"""

from typing import Any

from octofold.commands import Compare
from octofold.config import log, run_main


def run(config: Compare) -> dict[str, Any]:
    """Load both ledgers, find the differences, write them."""
    from octofold.blend import ledger
    from octofold.files import ROOT, atomic
    from octofold.track import tracking

    new, old = ledger.load(config.submission), ledger.load(config.other)
    changed = ledger.differences(old, new)
    with tracking.run("compare", config, str(new.about["competition"])) as run:
        path = config.out or ROOT / "runs" / "compare" / f"{run.id}.csv"
        with atomic(path) as temporary:
            changed.to_csv(temporary, index=False)
        run.log_artifact(path)
        run.log_metrics({"compare/rows": len(new.rows), "compare/changed": len(changed)})
        for row in changed.head(config.show).itertuples():
            log.info("%s: %s -> %s (%s)", row.names, row[2], row.to, row.who)
        blame = changed["who"].str.split(", ").explode().value_counts().to_dict()
        return {"run_id": run.id, "differences": path, "rows": len(new.rows), "changed": len(changed), "by": blame}


if __name__ == "__main__":
    run_main(Compare, run)
