"""Quantization simulations behind one protocol; the only code that imports AIMET."""
