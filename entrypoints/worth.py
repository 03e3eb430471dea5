"""worth: did cleaning help? One recipe on the old and the new manifest, scored on the same trusted rows.

    python entrypoints/worth.py --manifest data/grocery15/manifest.csv --config configs/grocery/lite0.yaml
    python entrypoints/worth.py --manifest new/manifest.csv --old old/manifest.csv --config … --folds 0,1 --seeds 0,1,2

Same folds, same seeds, paired rows, an interval. What is trained already is not trained again.
"""

from octofold.commands import Worth
from octofold.config import run_main


def run(config: Worth) -> dict[str, object]:
    """Train both, compare them, say whether they differ."""
    from octofold.tune import worth

    return worth.worth(config)


if __name__ == "__main__":
    run_main(Worth, run)
