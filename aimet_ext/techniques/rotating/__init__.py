"""Rotations of a model: folded into weights, proved part by part, noted in the ledger."""
