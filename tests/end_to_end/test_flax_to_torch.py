"""One adapter in three implementations, trained in Flax or made by PEFT: the same numbers and text in all of them."""

import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from _compare import assert_close, named_values
from _models import WORDS, small_checkpoint
from rich.console import Console

import convert
import road_jax
import road_torch
from road_core import RoadConfig
from road_jax.train import TrainOptions, train

NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
IDS = np.array([[0, 0, 0, 6, 7, 8, 9], [6, 8, 10, 12, 14, 15, 3], [0, 9, 9, 10, 15, 11, 13]], np.int32)
MASK = (IDS != 0).astype(np.int32)
SAID = MASK.astype(bool)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A vocabulary of only the tokenizer's words, so that all generated text is visible."""
    return small_checkpoint(tmp_path_factory.mktemp("base"), num_hidden_layers=2, vocab_size=len(WORDS))


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """A few training steps in Flax, and the result of `convert`: the two folders."""
    folder = tmp_path_factory.mktemp("trained")
    starts = np.random.default_rng(0).integers(0, 7, 100)
    rows = [{"prompt": NUMBERS[i], "completion": " ".join(NUMBERS[i + 1 : i + 4])} for i in starts]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = TrainOptions(
        base=base,
        data=folder / "data.jsonl",
        out=folder / "flax",
        eval_lines=0,
        steps=10,
        batch_size=8,
        max_length=64,
        learning_rate=3e-2,
        dtype="float32",
        group_size=32,
    )
    train(options, console=Console(file=io.StringIO()))
    convert.to_torch(folder / "flax", folder / "torch")
    return folder / "flax", folder / "torch"


@pytest.fixture(scope="module")
def made(base, tmp_path_factory):
    """Another adapter, saved in Flax, with another variant and on other layers."""
    folder = tmp_path_factory.mktemp("made")
    module, variables = road_jax.models.load(base)
    config = RoadConfig(variant="road_4", group_size=8, target_modules=["q_proj", "v_proj", "down_proj"])
    adapter = road_jax.transform(module, config).init(jax.random.key(0), variables, jnp.zeros((1, 4), jnp.int32))

    def fill(path, leaf):
        name = jax.tree_util.keystr(path)
        return jnp.asarray(named_values(name, *leaf.shape, mean=float("alpha" in name), std=0.4))

    road_jax.save_adapter(folder / "flax", jax.tree_util.tree_map_with_path(fill, adapter), config)
    convert.to_torch(folder / "flax", folder / "torch")
    return folder / "torch"


def decoder(base):
    return transformers.AutoModelForCausalLM.from_pretrained(base).eval()


@torch.no_grad()
def torch_logits(model):
    ids, mask = torch.from_numpy(IDS).long(), torch.from_numpy(MASK).long()
    return model(input_ids=ids, attention_mask=mask).logits.numpy()[SAID]


def flax_logits(base, adapter_folder=None):
    module, variables = road_jax.models.load(base, dtype=jnp.float32)
    adapter, config = {}, RoadConfig(target_modules="all-linear")
    if adapter_folder is not None:
        adapter, config = road_jax.load_adapter(adapter_folder)
    road = road_jax.transform(module, config)
    with jax.default_matmul_precision("highest"):
        logits = jax.jit(road.apply)(variables, adapter, jnp.asarray(IDS), attention_mask=jnp.asarray(MASK))
    return np.asarray(logits)[SAID]


def test_a_trained_adapter_has_the_same_logits_in_flax_road_torch_and_peft(base, trained):
    flax_folder, torch_folder = trained
    plain = torch_logits(decoder(base))
    theirs = torch_logits(peft.PeftModel.from_pretrained(decoder(base), torch_folder).eval())
    ours = torch_logits(road_torch.RoadModel.from_pretrained(decoder(base), torch_folder))
    assert_close(ours, theirs, "float32", moved_from=plain)
    assert_close(flax_logits(base, flax_folder), theirs, "float32", moved_from=plain)
    assert_close(flax_logits(base), plain, "float32", moved_from=theirs)


def test_a_trained_adapter_says_the_same_in_flax_road_torch_and_peft(base, trained):
    flax_folder, torch_folder = trained
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    asked = ["one", "three", "six seven", "ten two five"]
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)
        for prompt in asked
    ]
    prompts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]

    module, variables = road_jax.models.load(base, dtype=jnp.float32)
    adapter, config = road_jax.load_adapter(flax_folder)
    road = road_jax.transform(module, config)
    end = tokenizer.eos_token_id
    tokens = road_jax.generate(road, variables, prompts, adapter=adapter, max_new_tokens=12, eos_token_id=end)
    in_flax = tokenizer.batch_decode(tokens, skip_special_tokens=True)

    model = road_torch.RoadModel.from_pretrained(decoder(base), torch_folder, "a")
    rows = [{"prompt": prompt, "adapter": "a"} for prompt in asked]
    ours = [row["completion"] for row in road_torch.generate(model, tokenizer, rows, max_new_tokens=12)]

    theirs = []
    peer = peft.PeftModel.from_pretrained(decoder(base), torch_folder).eval()
    for ids in prompts:
        given = peer.generate(
            input_ids=torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=12,
            do_sample=False,
            pad_token_id=0,
        )
        theirs.append(tokenizer.decode(given[0, len(ids) :], skip_special_tokens=True))

    assert in_flax == ours == theirs
    plain = road_torch.generate(model, tokenizer, [{**row, "adapter": None} for row in rows], max_new_tokens=12)
    assert all(row["completion"] != said for row, said in zip(plain, theirs, strict=True))


@pytest.mark.parametrize("group_size", [2, 8, 64])
@pytest.mark.parametrize("variant", ["road_1", "road_2", "road_4"])
def test_an_adapter_of_pefts_has_the_same_logits_in_flax(variant, group_size, base, tmp_path):
    torch.manual_seed(2)
    config = peft.RoadConfig(
        variant=variant, group_size=group_size, target_modules="all-linear", init_weights=False, task_type="CAUSAL_LM"
    )
    theirs = peft.get_peft_model(decoder(base), config).eval()
    theirs.save_pretrained(tmp_path / "torch")
    convert.to_flax(tmp_path / "torch", tmp_path / "flax")
    assert_close(
        flax_logits(base, tmp_path / "flax"), torch_logits(theirs), "float32", moved_from=torch_logits(decoder(base))
    )


@pytest.mark.parametrize(
    ("quantize", "dtype"), [(None, "float32"), ("nf4", "float32"), ("nf4", "bfloat16"), ("int8", "float32")]
)
def test_a_mixed_batch_answers_each_row_as_if_it_were_alone(quantize, dtype, base, trained, made):
    decoder, tokenizer = road_torch.load(base, quantize=quantize, dtype=dtype)
    model = road_torch.RoadModel(decoder)
    model.load_adapter(trained[1], "trained")
    model.load_adapter(made, "made")
    model.eval()
    names = ["trained", "__base__", "made", "made", "trained", "__base__"]
    asked = ["one", "one", "one", "six seven eight", "three", "nine ten two"]
    rows = [{"prompt": prompt, "adapter": name} for prompt, name in zip(asked, names, strict=True)]
    mixed = road_torch.generate(model, tokenizer, rows, max_new_tokens=8)
    assert mixed == road_torch.generate(model, tokenizer, rows, max_new_tokens=8, batch_size=1)
    # The three answer the same question differently.
    assert len({row["completion"] for row in mixed[:3]}) == 3
