"""The code inside a registered model: MLflow runs this file (models from code, no pickle) when it loads one.

In: a column ``image`` of bytes (base64 in JSON and CSV requests), each an image file as a camera wrote it. Out: a
column per class with its probability, or ``<point>_x`` and ``<point>_y`` in pixels of the photo. There is no way to
name a file on the server. Everything needed lies inside the model: no registry and no network are asked.
"""

import base64
import os
from collections.abc import Sequence
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

        images = list(model_input["image"])
        names = ensemble.output_names(self.crew.task, self.crew.classes)
        rows = [np.zeros((0, len(names)), np.float32)]
        for start in range(0, len(images), BATCH):
            batch = []
            for number, data in enumerate(images[start : start + BATCH], start=start):
                try:
                    batch.append(_look(data, f"image {number}", self.crew.specs))
                except UserError as error:
                    raise _refuse(str(error)) from error
            inference.equip(self.crew, batch, self.how, ENOUGH)
            values = inference.predict_looks(self.crew, batch, self.how.views)
            rows.append(values.reshape(len(batch), -1))
        return pd.DataFrame(np.concatenate(rows), columns=names)


def _look(cell: Any, where: str, specs: Sequence[Any]) -> Any:
    """Decode a cell, out of base64 where MLflow has left it in: it takes out what comes as ``dataframe_…`` alone."""
    from octofold.errors import UserError
    from octofold.infer.looks import decode

    try:
        return decode(_file(cell, where), where, specs)
    except (UserError, MlflowException):
        inner = _out_of_base64(cell)
        if not inner:
            raise
        return decode(_file(inner, where), where, specs)


def _file(cell: Any, where: str) -> bytes:
    if not isinstance(cell, bytes | bytearray) or len(cell) > MOST_BYTES:
        got = f"{len(cell)} bytes" if isinstance(cell, bytes | bytearray) else type(cell).__name__
        raise _refuse(f"{where}: expected the bytes of an image file, at most 64 MiB, got {got}")
    return bytes(cell)


def _out_of_base64(cell: Any) -> bytes:
    """What base64 text says, line breaks aside; nothing where it is none."""
    if not isinstance(cell, bytes | bytearray | str):
        return b""
    try:
        text = cell.encode("ascii") if isinstance(cell, str) else bytes(cell)
        return base64.b64decode(b"".join(text.split()), validate=True)
    except ValueError:
        return b""


def _refuse(message: str) -> MlflowException:
    return MlflowException(message, error_code=INVALID_PARAMETER_VALUE)


set_model(Served())
