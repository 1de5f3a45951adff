"""Sphinx settings; the build needs no network."""

import pathlib
import sys

import aimet_ext

sys.path.insert(0, str(pathlib.Path(__file__).parent / "extensions"))

project = "aimet_ext"
author = "aimet_ext contributors"
copyright = "2026, aimet_ext contributors"
version = release = aimet_ext.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx_design",
    "mathml",
    "offline",
    "troubleshooting",
    "measurements",
    "licences",
    "notebooks",
    "unbuilt",
]
html_math_renderer = "mathml"
html_static_path = ["static"]
html_css_files = ["formulas.css"]
exclude_patterns = ["_build", "conf.py", "extensions"]
html_theme = "furo"
html_title = f"aimet_ext {release}"

autodoc_member_order = "bysource"
# Docstrings say what each parameter is; pydantic's annotations would bury it.
autodoc_typehints = "none"
python_maximum_signature_line_length = 80
