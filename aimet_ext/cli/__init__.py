"""The command line, ``aimet-ext``: quantize, evaluate, inspect, demo."""

from aimet_ext.cli.app import app, main
from aimet_ext.cli.errors import EXIT_CODES

__all__ = ["EXIT_CODES", "app", "main"]
