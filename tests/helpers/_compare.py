"""Comparison with one table of tolerances, and tensors whose values depend on their names."""

import zlib

import numpy as np
from numpy.testing import assert_allclose

# Relative to the greatest expected magnitude, by the dtype of the computation.
TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}


def assert_close(actual, expected, dtype: str, *, moved_from=None) -> None:
    """Asserts closeness, and that the expected values are more than ten tolerances away from ``moved_from``."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    atol = TOLERANCE[dtype] * float(np.abs(expected).max())
    assert_allclose(actual, expected, rtol=0, atol=atol)
    if moved_from is not None:
        moved = float(np.abs(expected - np.asarray(moved_from, np.float64)).max())
        assert moved > 10 * atol, f"the adapter moves the output by {moved} only"


def named_values(name: str, *shape: int, mean: float = 0.0, std: float = 0.5) -> np.ndarray:
    """Returns float32 values that depend on the name, so that swapped or transposed tensors are noticed."""
    return np.random.default_rng(zlib.crc32(name.encode())).normal(mean, std, shape).astype(np.float32)
