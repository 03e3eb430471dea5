"""blend: every member in a stage becomes one submission, with an estimate for the actual test images.

    mlflow run . -e blend --env-manager local -P competition=grocery15
    python entrypoints/blend.py --competition grocery15 --stage production --method lr_mse --tta geo8

The report's first line says what to expect on the test images, and by how much the folds flatter.
"""

from typing import Any

from octofold.commands import Blend
from octofold.config import run_main


def run(config: Blend) -> dict[str, Any]:
    """Check the names, open the run, assemble."""
    from octofold.blend import assembly, blending
    from octofold.errors import UserError, known
    from octofold.track import tracking
    from octofold.tta import VIEWS

    if config.weights and "method" in config.model_fields_set:
        raise UserError("--weights", expected="weights or --method", got="both", fix="leave one of them out")
    known("blend method", config.method, blending.METHODS)
    known("views", config.tta, [*VIEWS, "auto"])
    with tracking.run("blend", config, config.competition) as run:
        return assembly.blend(config, run)


if __name__ == "__main__":
    run_main(Blend, run)
