"""Rewrites of an ONNX graph into forms that a target computes correctly."""
