"""Implementations of the rotation, one file each, all with the same signatures."""
