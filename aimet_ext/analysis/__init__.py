"""The cost of each quantizer of a simulation: ``aimet_ext.analyze``."""
