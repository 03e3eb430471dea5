"""score: what the boards said is recorded on the submission's run, and held against what was expected.

    python entrypoints/score.py --submission runs/blend/<run id>/submission.csv --public 0.87 --private 0.86
    python entrypoints/score.py --competition grocery15 --history past_submissions.csv

The CSV has columns date,submission_file,public_score,private_score,category,notes. Without either, the report alone.
The CSV may be the first that is known of a competition; without one, a name that has neither data nor runs is refused.
"""

from typing import Any

from octofold.commands import Score
from octofold.config import log, run_main


def run(config: Score) -> dict[str, Any]:
    """Record, then report."""
    import dataclasses

    from octofold.reports import boards, picks, scores
    from octofold.track import tracking

    competition = boards.asked_for(config)
    sign = boards.direction(competition, config.metric)
    if config.history is not None:
        scores.read_history(config.history)  # refused before a run is opened
    if config.submission is None and boards.is_new(competition, config.history is not None):
        log.warning("%s is a new competition here: neither data nor runs of that name were known", competition)
    with tracking.run("score", config, competition) as run:
        if config.submission is not None:
            boards.record(config.submission, config.public, config.private, config.notes)
        if config.history is not None:
            boards.import_history(config.history, competition, run)
        found = boards.recorded(competition, config.metric)
        lines = [*scores.told(found, sign), *picks.told(competition, config.metric)]
        numbers = scores.summary(found)
        run.log_text("\n".join(lines) + "\n", "boards.txt")
        run.log_dict([dataclasses.asdict(score) for score in found], "boards.json")
        run.log_metrics({f"boards/{name}": value for name, value in numbers.items()})
        for line in lines:
            log.info("%s", line)
        return {"run_id": run.id, "submissions": len(found)} | {f"boards/{k}": v for k, v in numbers.items()}


if __name__ == "__main__":
    run_main(Score, run)
