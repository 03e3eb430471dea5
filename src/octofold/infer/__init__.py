"""Infer: models over images become Predictions, scores, and MLflow models that serve."""
