"""Percept: reconstruct and retrieve what a person saw from their fMRI."""
