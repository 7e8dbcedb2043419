"""The model that benchmarks run: SmolLM2-135M-Instruct, or one of its shape with random weights."""

from pathlib import Path

from rich.console import Console

from road_core._files import new_directory

NAME = "SmolLM2-135M"

# As in SmolLM2-135M's config.json, but without end tokens: a random model must not stop early.
_SHAPE = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "max_position_embeddings": 8192,
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 100000.0, "rope_type": "default"},
    "tie_word_embeddings": True,
    "vocab_size": 49152,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def checkpoint(cache: Path, console: Console, *, random_weights: bool) -> Path:
    """Returns the model's folder in ``cache``, after making it unless it is there.

    Args:
        cache: folder for the model, and for the package that it is read from.
        console: where to draw a progress bar.
        random_weights: whether to take random weights, for which nothing is fetched. Times don't depend on values.
    """
    if random_weights:
        return _random(cache / "smollm2-135m-random", console)
    # The package that reads its file isn't needed for random weights.
    from examples.demo.model import prepare_model

    return prepare_model(cache / "smollm2-135m-instruct", cache, console=console)


def described(*, random_weights: bool) -> str:
    """Returns the model's name for titles."""
    return f"{NAME}'s shape, random weights" if random_weights else NAME


def _random(folder: Path, console: Console) -> Path:
    import tokenizers
    import torch
    import transformers

    # Renamed when complete.
    if folder.is_dir():
        return folder
    transformers.utils.logging.disable_progress_bar()
    with console.status("making a model with random weights"), new_directory(folder) as draft:
        # The generator of the whole process is left alone.
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**_SHAPE))
        model.to(torch.bfloat16).save_pretrained(draft)
        # The loaders expect one, but no benchmark with random weights tokenises text.
        inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<pad>": 0}, unk_token="<pad>"))
        transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>").save_pretrained(draft)
    return folder
