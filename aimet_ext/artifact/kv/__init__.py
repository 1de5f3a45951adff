"""Exported graphs with a key-value cache."""
