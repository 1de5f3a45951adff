"""A walk over an ONNX graph, run stage by stage in onnxruntime."""
