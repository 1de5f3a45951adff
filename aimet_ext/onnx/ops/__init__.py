"""ONNX operators as differentiable torch functions."""
