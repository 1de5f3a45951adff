"""Connections to other tools; each module is imported on use and needs its own extra."""
