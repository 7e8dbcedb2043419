"""What every test stands on: the frameworks' thread counts and quiet hubs."""

import os

# No test may reach a hub; the tokenizers' own threads would fork under pytest.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Processes of pytest-xdist share the cores.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
