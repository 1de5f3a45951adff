"""Simulations of ``aimet_onnx``, which has to be installed."""

from aimet_ext.errors import require

require("aimet_onnx", "onnx")
