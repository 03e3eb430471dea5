"""Octofold: honest, tracked image competitions. Start reading at `training`, `blending` and `predictions`."""
