"""ONNX models as graphs: nodes, types, layers with weights, and parts that run alone."""
