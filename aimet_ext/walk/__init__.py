"""Walks: bring calibration data past the layers of a torch model in the order of data flow."""
