"""Small random Hugging Face models for tests to compare with."""

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

WORDS = [
    *("<pad>", "[UNK]", "</s>", "<user>", "<assistant>", "<system>"),
    *("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
]

# Models with vision, and the type of their decoder.
WITH_VISION = {"gemma3": "gemma3_text", "mistral3": "mistral"}


# What configs of mixtures of experts have besides.
_MIXTURE = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
MIXTURES = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**_MIXTURE, "num_experts": 6, "shared_expert_intermediate_size": 128},
    "qwen3_moe": {**_MIXTURE, "num_experts": 6, "norm_topk_prob": True},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 3},
}


def small_config(kind: str = "llama", **changes) -> transformers.PretrainedConfig:
    """Returns a decoder's config with grouped-query attention and output sizes that are multiples of 64."""
    fields = {
        "vocab_size": 160,
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if kind in WITH_VISION:
        sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
        vision = {**sizes, "image_size": 28, "patch_size": 14}
        text = {**fields, "model_type": WITH_VISION[kind], **changes}
        tied = changes.get("tie_word_embeddings", True)
        return transformers.AutoConfig.for_model(kind, text_config=text, vision_config=vision, tie_word_embeddings=tied)
    return transformers.AutoConfig.for_model(kind, **{**fields, **MIXTURES.get(kind, {}), **changes})


def small_model(kind: str = "llama", *, seed: int = 0, **changes) -> transformers.PreTrainedModel:
    """Returns a random float32 decoder in eval mode whose logits are far from uniform."""
    torch.manual_seed(seed)
    auto = transformers.AutoModelForImageTextToText if kind in WITH_VISION else transformers.AutoModelForCausalLM
    model = auto.from_config(small_config(kind, **changes), attn_implementation="eager")
    # Hugging Face's initial values (std 0.02, norms 1, biases 0) would hide mistakes.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.normal_(std=0.5 if "embed" in name else parameter.shape[-1] ** -0.5)
    return model.eval()


class Net(nn.Module):
    """Two linear layers, ``up`` to ``outputs`` and ``down`` again, with the same weights in every instance."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(inputs, outputs), nn.Linear(outputs, inputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x))


def word_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Returns a tokenizer of a few words with a chat template; its ids are in the vocabulary of `small_model`."""
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="</s>", unk_token="[UNK]", pad_token="<pad>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}> {{ m.content }} </s>\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant> {% endif %}"
    )
    return tokenizer


def small_checkpoint(directory: Path, kind: str = "llama", *, dtype: torch.dtype = torch.float32, **changes) -> Path:
    """Writes a `small_model` and its tokenizer as a Hugging Face folder."""
    small_model(kind, **changes).to(dtype).save_pretrained(directory)
    word_tokenizer().save_pretrained(directory)
    return directory
