"""Decoder blocks found in an ONNX graph, their roles and scale pairs."""
