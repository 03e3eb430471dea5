"""Track: the MLflow store, its runs, the registry, and promotion. Start reading at `tracking`."""
