"""Adapters that were trained apart, used together: ``python -m benchmarks.composition``."""
