"""Combines adapters that were trained separately: ``python -m benchmarks.composition``."""
