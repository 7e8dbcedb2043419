"""What every test stands on: the frameworks' thread counts and devices, quiet hubs and strict numerics."""

import gc
import os

# No test may reach a hub; the tokenizers' own threads would fork under pytest.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# JAX's tests are for the CPU: meshes of pretend devices, float32 that is float32, and a GPU's memory left to PyTorch,
# whose tests use it.
os.environ["JAX_PLATFORMS"] = "cpu"
# In JAX no dtype or rank is promoted silently, neither here nor in the commands that tests start.
os.environ.setdefault("JAX_NUMPY_DTYPE_PROMOTION", "strict")
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
# Processes of pytest-xdist share the cores.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_finish():
    """Spares Python from searching all that was imported for garbage, again and again: a tenth of the time."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()
