"""Checks that the files of an export are whole and agree with each other."""
