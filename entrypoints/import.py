"""import: fold models and OOF made elsewhere become registered slots, once every check has passed.

    python entrypoints/import.py --bundle lite0.zip --manifest data/grocery15/manifest.csv
    python entrypoints/import.py --bundle folder/files.csv --manifest data/grocery15/manifest.csv
    python entrypoints/import.py --bundle theirs/ --manifest data/grocery15/manifest.csv --facts facts.yaml

Checked first: size and sha256 of every file, weights against their card, competition, class order, manifest hash, and
that the OOF is of exactly the samples of its fold. Importing twice is importing once; train does not train an imported
slot again.
"""

from octofold.commands import Import
from octofold.config import run_main


def run(config: Import) -> dict[str, object]:
    """Check, register."""
    from octofold.train import bundles

    return bundles.take_in(config)


if __name__ == "__main__":
    run_main(Import, run)
