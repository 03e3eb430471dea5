"""report: one self-contained HTML page of a competition: leaderboard, progress, ablations, risk, what to do next.

    mlflow run . -e report --env-manager local -P competition=grocery15
    python entrypoints/report.py --competition grocery15

The page is also an artifact of the run, so MLflow's UI shows it.
"""

from octofold.commands import Report
from octofold.config import run_main


def run(config: Report) -> dict[str, object]:
    """Open the run and make the page."""
    from octofold.reports import report
    from octofold.track import tracking

    with tracking.run("report", config, config.competition) as run:
        return report.write(config, run)


if __name__ == "__main__":
    run_main(Report, run)
