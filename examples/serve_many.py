"""Serves many adapters on one quantised base in PyTorch: loads a folder of them, answers mixed batches, swaps one.

Every folder in ADAPTERS that holds an adapter in PEFT's format is loaded under its name. At most --max-loaded adapters,
the most recently used, have their coefficients on the device at once; θ and α of all adapters stay in host memory. The
base answers the first row of a batch, and each other row has its own adapter. Then a newer version replaces one
adapter, without a pause and without recompilation.

    python examples/serve_many.py checkpoints/smollm2 adapters --prompt "Tell me about Paris."
"""

import argparse
from pathlib import Path

import torch

import road_torch
from road_torch import RoadModel


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="folder of a Hugging Face decoder")
    parser.add_argument("adapters", type=Path, help="folder of folders in PEFT's format")
    parser.add_argument("--prompt", default="Tell me about Paris.")
    parser.add_argument("--quantize", choices=("nf4", "int8", "none"), default="nf4")
    parser.add_argument("--max-loaded", type=int, default=32, help="adapters on the device at once")
    parser.add_argument(
        "--newer", type=Path, help="folder that replaces the first adapter; the last one's if not given"
    )
    parser.add_argument("--max-new-tokens", type=int, default=32)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    folders = sorted(path.parent for path in options.adapters.glob("*/adapter_config.json"))
    if not folders:
        raise SystemExit(f"{options.adapters}: expected folders with an adapter_config.json")
    quantize = None if options.quantize == "none" else options.quantize
    base, tokenizer = road_torch.load(options.checkpoint, quantize=quantize)
    model = RoadModel(base, max_loaded=options.max_loaded).eval()
    for folder in folders:
        model.load_adapter(folder, adapter_name=folder.name)
    model.set_adapter([])  # frees the place of the first adapter, which was active; rows name their adapters

    parameters = [p for name, p in model.named_parameters() if "road_" in name]
    size = sum(p.numel() * p.element_size() for p in parameters) / len(folders)
    print(f"{len(folders)} adapters, {size / 1e6:.2f} MB of θ and α each, at most {options.max_loaded} on the device")

    def answer(names: list[str]) -> list[str]:
        """Returns these adapters' answers to the prompt, in one batch."""
        text = options.prompt
        if tokenizer.chat_template:
            turn = [{"role": "user", "content": text}]
            text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        rows = tokenizer([text] * len(names), return_tensors="pt", add_special_tokens=not tokenizer.chat_template)
        rows = {key: rows[key].to(base.device) for key in ("input_ids", "attention_mask")}
        with torch.inference_mode():
            given = model.generate(**rows, adapter_names=names, max_new_tokens=options.max_new_tokens, do_sample=False)
        new = given[:, rows["input_ids"].shape[1] :]
        return [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]

    # A batch has at most --max-loaded adapters; the next batch replaces them by others.
    asked = [folder.name for folder in folders]
    for start in range(0, len(asked), options.max_loaded):
        names = ["__base__", *asked[start : start + options.max_loaded]]
        for name, text in zip(names, answer(names), strict=True):
            print(f"{name}: {text}")

    newer = options.newer or folders[-1]
    before = answer([asked[0]])
    model.hotswap_adapter(newer, asked[0])
    after = answer([asked[0]])
    print(f"{asked[0]} was replaced by {newer}: {'another answer' if before != after else 'the same answer'}")
    print(f"{asked[0]}: {after[0]}")


if __name__ == "__main__":
    main()
