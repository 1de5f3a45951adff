"""Figures and pages: drawn by matplotlib and jinja2, which are optional."""
