"""train: a recipe over folds and seeds becomes a member: registered fold models and out-of-fold predictions.

    python entrypoints/train.py --manifest data/digits/manifest.csv --config configs/digits/cnn.yaml
    python entrypoints/train.py --manifest data/grocery15/manifest.csv --config configs/grocery/lite0.yaml \\
        --folds 0,1 --optim.lr 3e-4

Interrupt it (Ctrl-C, kill, a file called `stop` in mlruns/work/<competition>/<member>/) and give the same command
again: finished slots are skipped, the broken one goes on where it stood, in the same MLflow run.
"""

from octofold.commands import Train
from octofold.config import run_main


def run(config: Train) -> dict[str, object]:
    """Train every slot, register it, score the member."""
    from octofold.train import members

    return members.train(config)


if __name__ == "__main__":
    run_main(Train, run)
