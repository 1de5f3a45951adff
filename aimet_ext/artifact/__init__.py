"""A simulation as a folder of files, and the way back."""
