"""The PyTorch side of `verify`: a process of its own that loads one model and leaves logits in a folder."""

from pathlib import Path

import numpy as np

from road_core import AdapterError
from road_core._command import run
from road_core._files import inside, read_json


def main(base: str, adapter: str, work: str) -> None:
    """Writes ``torch_base.npy`` and ``torch_adapted.npy``, float32 ``[positions, vocab]``."""
    run(lambda: _run(base, adapter, Path(work)))


def _run(base: str, directory: str, work: Path) -> None:
    import torch

    import road_torch
    from road_torch._load import auto_class

    kind = read_json(inside(base, "config.json")).get("model_type")
    try:
        model = auto_class(kind).from_pretrained(base, dtype=torch.float32, local_files_only=True, use_safetensors=True)
    except Exception as error:  # a broken file can raise nearly anything in there
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise AdapterError(f"{base}: expected a checkpoint that transformers loads, found {reason[0]}") from None
    model.eval()
    ids, mask = (torch.from_numpy(np.load(work / f"{name}.npy")).long() for name in ("input_ids", "attention_mask"))
    with torch.inference_mode():
        for kind in ("base", "adapted"):
            if kind == "adapted":
                model = road_torch.RoadModel.from_pretrained(model, directory).eval()
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            np.save(work / f"torch_{kind}.npy", logits[mask.bool()].numpy())
