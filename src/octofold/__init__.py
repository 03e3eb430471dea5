"""Octofold: honest, tracked image competitions.

The hall (this folder) holds what everybody uses: errors, files, config, recipe, commands, predictions, metrics, tta,
plots, compute, workers. Each room is named for what is done there. Follow a datum through `prepare.preparing`,
`train.training`, `track.registry`, `blend.assembly`; the contract between the rooms is `predictions`.
"""
