"""A trained embedding that is shared by the head, between Flax, PEFT and merged checkpoints."""

import json

import jax
import numpy as np
import peft
import pytest
import safetensors.torch
import torch
import transformers
from _compare import assert_close
from _models import small_checkpoint

import convert
import road_jax
from convert._tied import is_tied, read_model
from road_core import Adapter, AdapterError, RoadConfig, read_flax, read_peft, write_peft
from road_jax import models
from road_jax.models._config import MODEL_TYPES

EMBEDDING = "model.embed_tokens.weight"

# Both adapters name the head, which is all that PEFT warns about.
pytestmark = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")


def logits(model):
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def load(directory):
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def test_an_embedding_trained_in_flax_takes_a_tied_head_along(tmp_path):
    small_checkpoint(tmp_path / "base", num_hidden_layers=2, tie_word_embeddings=True)
    module, variables = models.load(tmp_path / "base")
    config = RoadConfig(target_modules=["up_proj"], modules_to_save=["embed_tokens"], group_size=8, init_weights=False)
    road, ids = road_jax.transform(module, config), np.arange(3, 20)[None]
    adapter = road.init(jax.random.key(0), variables, ids)
    adapter["model"]["embed_tokens"]["embedding"] *= 1.5
    road_jax.save_adapter(tmp_path / "flax", adapter, config)
    expected = torch.from_numpy(np.array(road.apply(variables, adapter, ids)))
    plain = logits(load(tmp_path / "base"))

    with pytest.raises(AdapterError, match=r"model\.embed_tokens\.weight: expected a model \(base\) whose config"):
        convert.to_torch(tmp_path / "flax", tmp_path / "torch")
    convert.to_torch(tmp_path / "flax", tmp_path / "torch", base=tmp_path / "base")
    peer = peft.PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "torch").eval()
    assert_close(logits(peer), expected, "float32", moved_from=plain)
    for kind in ("flax", "torch"):
        convert.merge(tmp_path / "base", tmp_path / kind, tmp_path / f"merged-{kind}")
        assert_close(logits(load(tmp_path / f"merged-{kind}")), expected, "float32", moved_from=plain)

    assert convert.diff(tmp_path / "flax", tmp_path / "torch").same()

    # The same bytes come back, whether the record or the model says that the head is tied.
    back = {"record": {}, "model": {"base": tmp_path / "base"}}
    for name, options in back.items():
        convert.to_flax(tmp_path / "torch", tmp_path / name, **options)
        for file in ("road_adapter.safetensors", "road_config.json"):
            assert (tmp_path / name / file).read_bytes() == (tmp_path / "flax" / file).read_bytes()

    # In PEFT, the embedding alone is another function, which a tied model in Flax can't express.
    whole = read_peft(tmp_path / "torch")
    saved = {name: array for name, array in whole.modules_to_save.items() if name != "lm_head.weight"}
    write_peft(tmp_path / "alone", Adapter(config, whole.modules, saved))
    with pytest.raises(AdapterError, match=r"expected lm_head\.weight of the same numbers beside it, found none"):
        convert.to_flax(tmp_path / "alone", tmp_path / "x", base=tmp_path / "base")
    with pytest.raises(AdapterError, match=r"expected a model \(base\)"):
        convert.to_flax(tmp_path / "alone", tmp_path / "x")
    write_peft(
        tmp_path / "apart", Adapter(whole.config, whole.modules, {**saved, "lm_head.weight": saved[EMBEDDING] * 2})
    )
    with pytest.raises(AdapterError, match=r"lm_head\.weight: expected the numbers of model\.embed_tokens\.weight"):
        convert.to_flax(tmp_path / "apart", tmp_path / "x", base=tmp_path / "base")


def test_what_peft_saved_of_a_tied_model_comes_back_from_flax(tmp_path):
    small_checkpoint(tmp_path / "base", num_hidden_layers=2, tie_word_embeddings=True)
    config = peft.RoadConfig(
        target_modules=["up_proj"], modules_to_save=["embed_tokens", "lm_head"], group_size=8, init_weights=False
    )
    peer = peft.get_peft_model(load(tmp_path / "base"), config)
    peer.save_pretrained(tmp_path / "peft")
    convert.to_flax(tmp_path / "peft", tmp_path / "flax", base=tmp_path / "base")
    found = read_flax(tmp_path / "flax")
    assert found.config.modules_to_save == ["embed_tokens"]
    assert list(found.modules_to_save) == ["model.embed_tokens.embedding"]
    convert.to_torch(tmp_path / "flax", tmp_path / "back")
    first, second = (safetensors.torch.load_file(tmp_path / d / "adapter_model.safetensors") for d in ("peft", "back"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert read_peft(tmp_path / "back").config.modules_to_save == ["embed_tokens", "lm_head"]


def test_a_tied_head_has_no_adapter_in_flax(tmp_path):
    """The base also says how many layers there are."""
    small_checkpoint(tmp_path / "base", num_hidden_layers=2, tie_word_embeddings=True)
    pair, head = (
        (np.zeros(64, np.float32), np.ones(64, np.float32)),
        (np.zeros(80, np.float32), np.ones(80, np.float32)),
    )
    layer = "model.layers.{}.self_attn.q_proj"
    config = RoadConfig(target_modules=["q_proj", "lm_head"], group_size=2)
    write_peft(tmp_path / "rotated", Adapter(config, {layer.format(0): pair, layer.format(1): pair, "lm_head": head}))
    saved = RoadConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], group_size=2)
    whole = {"lm_head.weight": np.ones((160, 128), np.float32)}
    write_peft(tmp_path / "saved", Adapter(saved, {layer.format(0): pair, layer.format(1): pair}, whole))
    for kind in ("rotated", "saved"):
        convert.to_flax(tmp_path / kind, tmp_path / f"{kind}-flax", family="llama")
        with pytest.raises(AdapterError, match=r"lm_head.*: expected no head apart from the embedding, .* found one"):
            convert.to_flax(tmp_path / kind, tmp_path / "x", base=tmp_path / "base", family="llama")
        assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("kind", [*MODEL_TYPES, "gpt2", "opt"])
def test_whether_a_head_is_tied_where_the_config_does_not_say(kind):
    assert is_tied({"model_type": kind}) == transformers.AutoConfig.for_model(kind).tie_word_embeddings
    assert is_tied({"model_type": "another"}) is None


@pytest.mark.parametrize("said", [True, False])
@pytest.mark.parametrize("kind", ["gemma3", "mistral3"])
def test_of_a_model_with_vision_the_texts_part_does_not_say_it(kind, said, tmp_path):
    small_checkpoint(tmp_path, kind, tie_word_embeddings=True)
    fields = json.loads((tmp_path / "config.json").read_text())
    fields["text_config"]["tie_word_embeddings"] = False
    if not said:
        del fields["tie_word_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert is_tied(read_model(tmp_path))
    module, _ = models.load(tmp_path)
    assert module.config.tie_word_embeddings
    with torch.no_grad():
        auto = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert auto.lm_head.weight is auto.get_input_embeddings().weight
