"""Bytes on disk: encodings, scales, manifests, and folders that are replaced whole."""
