"""The adaptor to aimet_onnx."""
