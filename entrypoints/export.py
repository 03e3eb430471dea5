"""export: a member's fold models and OOF become one bundle, checked by sha256, that another machine imports.

python entrypoints/export.py --competition grocery15 --member lite0
python entrypoints/export.py --competition grocery15 --member lite0 --stage production --out lite0.zip
"""

from octofold.commands import Export
from octofold.config import run_main


def run(config: Export) -> dict[str, object]:
    """Write the bundle."""
    from octofold.train import bundles

    return bundles.export(config)


if __name__ == "__main__":
    run_main(Export, run)
