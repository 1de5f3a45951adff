"""Recipes: grids, calibration and techniques in one file, named and repeatable."""
