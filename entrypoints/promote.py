"""promote: a member's fold models move to staging or production, and can move back.

    python entrypoints/promote.py --competition grocery15 --member lite0 --stage production
    python entrypoints/promote.py --competition grocery15 --stage production --rollback

The alias on each registered model is the truth, MLflow's legacy stage its mirror. Every promotion is a run in MLflow
whose promotion.json says what moved and what it replaced.
"""

from octofold.commands import Promote
from octofold.config import log, run_main


def run(config: Promote) -> dict[str, object]:
    """Open the run that keeps the audit trail, move, say what moved."""
    from octofold.data import manifest
    from octofold.errors import UserError
    from octofold.files import ROOT
    from octofold.track import promotion, tracking

    file = ROOT / "data" / config.competition / "manifest.csv"
    at_hand = manifest.read(file) if file.exists() else None
    partial = (config.folds is not None, not config.force, not config.rollback)
    if all(partial):
        raise UserError(
            "--folds", expected="--force with it: a member whose folds are not all promoted", got="no --force"
        )
    if config.rollback and (config.folds is not None or config.seeds is not None):
        raise UserError(
            "--rollback", expected="no --folds or --seeds: it undoes a whole promotion", got="some slots only"
        )
    title = f"{'rollback of' if config.rollback else 'promote'} {config.member or 'all'} ({config.stage})"
    with tracking.run("promote", config, config.competition, name=title, tags={"member": config.member}) as run:
        if config.rollback:
            moves = promotion.rollback(run, config.competition, config.member, config.stage)
        else:
            moves = promotion.promote(
                run, config.competition, config.member, config.stage,
                manifest_hash=at_hand.hash if at_hand else None, all_folds=at_hand.folds if at_hand else None,
                folds=config.folds, seeds=config.seeds, force=config.force,
            )  # fmt: skip
    changed = [move for move in moves if move.before != move.after]
    log.info("%d slot(s) moved, %d stood there already", len(changed), len(moves) - len(changed))
    return {
        "run_id": run.id,
        "stage": config.stage,
        "moved": [{"name": move.name, "version": move.version, "replaced": move.replaced} for move in changed],
        "slots": len(moves),
    }


if __name__ == "__main__":
    run_main(Promote, run)
