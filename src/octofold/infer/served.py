"""The code inside a registered model: MLflow runs this file (models from code, no pickle) when it loads one.

In: a column ``image`` of bytes (base64 in JSON requests), each an image file as a camera wrote it. Out: a column per
class with its probability, or ``<point>_x`` and ``<point>_y`` in pixels of the photo. There is no way to name a file
on the server. Everything needed lies inside the model: no registry and no network are asked.
"""

import os
from typing import Any

import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc.model import PythonModel, PythonModelContext

BATCH = 8  # images per pass: memory does not grow with the request
ENGINE = (
    "OCTOFOLD_ENGINE"  # environment: eager, or openvino / auto, which take seconds a fold model at the first request
)
ENOUGH = 10_000  # images a server is expected to see: what making an engine must pay for
MOST_BYTES = 64 * 2**20  # of one image file


class Served(PythonModel):
    """An ensemble behind MLflow's `predict`."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the weights."""
        from octofold.infer import ensemble, inference

        self.crew = ensemble.load(context.artifacts["model"])
        self.how = inference.How(self.crew.views, BATCH, os.environ.get(ENGINE, "eager"))

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Predict images.

        Args:
            context: not needed.
            model_input: a column ``image`` of bytes.
            params: none are known.

        Returns:
            ``(N, K)`` float32 probabilities, or ``(N, 2P)`` points in pixels of the photos.

        Raises:
            MlflowException: a cell that is no image (the server answers 400); it says which.
        """
        from octofold.errors import UserError
        from octofold.infer import ensemble, inference
        from octofold.infer.looks import decode

        images = list(model_input["image"])
        names = ensemble.output_names(self.crew.task, self.crew.classes)
        rows = [np.zeros((0, len(names)), np.float32)]
        for start in range(0, len(images), BATCH):
            batch = []
            for number, data in enumerate(images[start : start + BATCH], start=start):
                where = f"image {number}"
                if not isinstance(data, bytes | bytearray) or len(data) > MOST_BYTES:
                    got = f"{len(data)} bytes" if isinstance(data, bytes | bytearray) else type(data).__name__
                    raise _refuse(f"{where}: expected the bytes of an image file, at most 64 MiB, got {got}")
                try:
                    batch.append(decode(bytes(data), where, self.crew.specs))
                except UserError as error:
                    raise _refuse(str(error)) from error
            inference.equip(self.crew, batch, self.how, ENOUGH)
            values = inference.predict_looks(self.crew, batch, self.how.views)
            rows.append(values.reshape(len(batch), -1))
        return pd.DataFrame(np.concatenate(rows), columns=names)


def _refuse(message: str) -> MlflowException:
    return MlflowException(message, error_code=INVALID_PARAMETER_VALUE)


set_model(Served())
