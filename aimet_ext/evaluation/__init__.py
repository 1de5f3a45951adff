"""Measures of a model's or a simulation's quality."""
