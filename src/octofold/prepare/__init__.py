"""Prepare: photos and labels of any shape become a manifest with honest folds."""
