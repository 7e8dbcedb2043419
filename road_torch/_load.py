"""Loads decoders from Hugging Face checkpoints, plain or quantised, for `generate`."""

import logging
import os
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import nn

from road_core import AdapterError
from road_core._errors import listed
from road_core._files import inside, read_json


def load(
    directory: str | os.PathLike, *, quantize: str | None = None, dtype: str | torch.dtype = "auto"
) -> tuple[Any, Any]:
    """Loads a decoder and its tokenizer from a Hugging Face folder: local safetensors only, no code from the folder.

    Args:
        directory: the folder.
        quantize: ``"nf4"`` or ``"int8"``; None takes the weights as they are.
        dtype: dtype of the computation: ``"auto"`` (the checkpoint's), or float32, bfloat16 or float16 as a name or a
            ``torch.dtype``.

    Returns:
        ``(model, tokenizer)``. The model is in eval mode, on a GPU if there is one.

    Raises:
        AdapterError: an argument is invalid, or the checkpoint is incomplete, broken or of an unknown kind.
    """
    if quantize not in (None, "nf4", "int8"):
        raise AdapterError(f"quantize: expected 'nf4', 'int8' or None, found {quantize!r}")
    if isinstance(dtype, torch.dtype):
        dtype = str(dtype).removeprefix("torch.")
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise AdapterError(f"dtype: expected 'auto', 'float32', 'bfloat16' or 'float16', found {dtype!r}")
    fields = read_json(inside(directory, "config.json"))
    kind = fields.get("model_type")
    if not isinstance(kind, str) or kind not in transformers.CONFIG_MAPPING:
        raise AdapterError(f"{directory}: expected a model type that transformers knows, found {kind!r}")
    stored = _stored_kind(fields.get("quantization_config"))
    if quantize is not None and stored not in (None, quantize):
        raise AdapterError(
            f"{directory}: expected weights to quantise to {quantize}, found some that are {stored} already"
        )
    where = {"device_map": {"": 0}} if torch.cuda.is_available() else {}
    chosen: Any = dtype if dtype == "auto" else getattr(torch, dtype)
    kwargs: dict[str, Any] = {"dtype": chosen, "use_safetensors": True, "output_loading_info": True, **where}
    # Mismatches are reported below by name; transformers would print a table.
    kwargs["ignore_mismatched_sizes"] = True
    if quantize is not None or stored is not None:
        # Its warnings about missing kernels and casts at every call are nothing that users could fix.
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if quantize is not None and stored is None:
        if dtype == "auto":
            named = fields.get("dtype", fields.get("torch_dtype")) or "float32"
            chosen = getattr(torch, named, None) if isinstance(named, str) else None
            if not isinstance(chosen, torch.dtype):
                raise AdapterError(f"{directory}: expected a dtype of torch in config.json, found {named!r}")
        kwargs["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=quantize == "nf4",
            load_in_8bit=quantize == "int8",
            # Above 0, every row of a batch influences which columns are computed in 16 bits for all rows, so an answer
            # would depend on the other rows. 0 costs some accuracy.
            llm_int8_threshold=0.0,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=chosen,
        )
    # If torchao is installed, transformers imports it, and it warns about kernels and enums on import.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    bars, level = transformers.utils.logging.is_progress_bar_enabled(), transformers.utils.logging.get_verbosity()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
        if "quantization_config" in kwargs:
            kwargs["quantization_config"].llm_int8_skip_modules = _left_plain(directory, auto_class(kind))
        model, info = auto_class(kind).from_pretrained(directory, local_files_only=True, **kwargs)
    except Exception as error:  # a broken file can raise nearly anything in there
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise AdapterError(
            f"{directory}: expected a whole Hugging Face checkpoint, found one that can't be loaded ({reason[0]})"
        ) from None
    finally:
        transformers.utils.logging.set_verbosity(level)
        if bars:
            transformers.utils.logging.enable_progress_bar()
    wrong = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
    if wrong:
        raise AdapterError(
            f"{directory}: expected a tensor of the right shape for every weight, found none for {listed(wrong, 3)}"
        )
    return model.eval(), tokenizer


def _left_plain(directory: str | os.PathLike, auto: Any) -> list[str]:
    """Returns the modules that aren't quantised: those that transformers leaves, and layers with an odd output size.

    These are gates with one output, with which bitsandbytes fails on CPUs (nf4).
    """
    # Imports torchao if it is there, whose warnings are silent by now.
    from transformers.quantizers.base import HfQuantizer

    config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
    with torch.device("meta"):
        shell = auto.from_config(config)
    odd = [name for name, module in shell.named_modules() if isinstance(module, nn.Linear) and module.out_features % 2]
    return HfQuantizer.get_modules_to_not_convert(shell, odd, add_default_skips=True)


def auto_class(model_type: object) -> Any:
    """Returns the class that loads a decoder; transformers doesn't count all decoders with vision as causal LMs."""
    causal = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return transformers.AutoModelForCausalLM if model_type in causal else transformers.AutoModelForImageTextToText


def _stored_kind(quantization: object) -> str | None:
    """Returns how a checkpoint's weights are quantised according to its config; None if they aren't."""
    if not isinstance(quantization, Mapping):
        return None
    if quantization.get("load_in_8bit"):
        return "int8"
    if quantization.get("load_in_4bit"):
        return str(quantization.get("bnb_4bit_quant_type", "fp4"))
    return str(quantization.get("quant_method"))
