"""What every test stands on: the frameworks' thread counts and quiet hubs."""

import os

# No test may reach a hub; the tokenizers' own threads would fork under pytest.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
