"""Calibration data: batches and their tokens, caches, and second moments of layer inputs."""
