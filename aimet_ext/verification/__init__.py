"""Comparison of an export, as its target computes it, with the simulation."""
