"""tune: a search space over a recipe becomes a study, and a better recipe if there is one.

    python entrypoints/tune.py --manifest data/grocery15/manifest.csv --config configs/tune/grocery_head.yaml
    python entrypoints/tune.py --manifest data/grocery15/manifest.csv --config configs/tune/grocery_head.yaml \\
        --trials 80 --study grocery15.again

Interrupt or kill it and give the same command again: the study goes on, in the same MLflow runs. docs/tuning.md says
how to write a search space and how to read the verdict.
"""

from octofold.commands import Tune
from octofold.config import run_main


def run(config: Tune) -> dict[str, object]:
    """Search, confirm on fresh seeds, write the recipe."""
    from octofold.tune import sweep

    return sweep.tune(config)


if __name__ == "__main__":
    run_main(Tune, run)
