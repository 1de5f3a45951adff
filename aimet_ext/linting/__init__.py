"""Checks of a simulation's quantizers against what a chip supports."""
