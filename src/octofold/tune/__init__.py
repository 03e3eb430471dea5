"""Tune: searching a recipe's space, and telling whether one idea is better than another."""
