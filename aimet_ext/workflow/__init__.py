"""Whole tasks, each a call: build a simulation, evaluate, export, load."""
