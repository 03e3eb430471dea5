"""probe: one idea against another, on the same folds and seeds: a paired difference with an interval, and a verdict.

    python entrypoints/probe.py --manifest data/grocery15/manifest.csv --config configs/grocery/lite0.yaml \\
        --field augment.preset --values no_color,full --folds 0 --seeds 0,1,2
    python entrypoints/probe.py --manifest data/grocery15/manifest.csv --config configs/grocery/lite0.yaml \\
        --others configs/grocery/lite1.yaml,configs/grocery/lite2.yaml

The first value (or --config) is the reference. Each arm is trained as a member of its own, so it resumes, and what is
trained already is not trained again. The verdict is "not separable" when the interval holds zero.
"""

from octofold.commands import Probe
from octofold.config import run_main


def run(config: Probe) -> dict[str, object]:
    """Train the arms, compare them, say whether they differ."""
    from octofold.tune import probing

    return probing.probe(config)


if __name__ == "__main__":
    run_main(Probe, run)
