"""Interventions in PyTorch against a decoder that is run block by block, with the float64 reference between blocks."""

import re
import threading
from unittest import mock

import numpy as np
import pytest
import torch
import transformers
from _compare import TOLERANCE, assert_close, named_values
from _graphs import counting
from _models import small_checkpoint, small_model
from torch import nn

from road_core import (
    AdapterError,
    Intervention,
    InterventionConfig,
    RoadConfig,
    intervene,
    parameter_size,
    position_mask,
    write_intervention,
)
from road_torch import InterventionModel, RoadModel, _intervention
from road_torch._kernels import default

HIDDEN = 128
CONFIGS = {
    "last": InterventionConfig(layers=(1, 2), positions="last", group_size=64),
    "ends": InterventionConfig(
        layers=(0, 2), positions="first:2+last:2", variant="road_4", group_size=8, subspace=(0, 0.5)
    ),
    "all": InterventionConfig(layers=(1, 2), positions="all", variant="road_2", group_size=64, subspace=(0.25, 1)),
}
NAMES = ["last", "ends", "all", "__base__"]
TEXTS = [[9, 8, 7, 6, 10], [20, 21, 22], [33, 34, 35, 36], [50, 51, 52, 53, 54, 55]]
pytestmark = pytest.mark.filterwarnings("ignore:.*inputs will be cast")


def made(name, hidden=HIDDEN, config=None):
    config = config or CONFIGS[name]
    size = parameter_size(config.variant, hidden)
    values = {
        i: (
            named_values(f"{name} {i} theta", size, std=1.5),
            named_values(f"{name} {i} alpha", size, mean=1.0, std=0.2),
        )
        for i in config.layers
    }
    return Intervention(config, values)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("interventions")
    for name in CONFIGS:
        write_intervention(root / name, made(name))
    return root


@pytest.fixture(scope="module")
def base():
    return small_model()


def with_interventions(base, folders, **options):
    model = InterventionModel(base, **options)
    for name in CONFIGS:
        model.load_adapter(folders / name, name)
    return model


def padded(texts, side="left"):
    longest = max(map(len, texts))
    rows = [[0] * (longest - len(t)) + t if side == "left" else t + [0] * (longest - len(t)) for t in texts]
    ids = torch.tensor(rows)
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def by_hand(base, name, text, prompt=None, dtype=torch.float32):
    """Returns logits ``[length, vocab]`` of one text by calling the decoder's modules directly, without padding."""
    ids = torch.tensor([text])
    length = ids.shape[1]
    position_ids = torch.arange(length)[None]
    causal = torch.full((length, length), torch.finfo(dtype).min, dtype=dtype).triu(1)[None, None]
    with torch.no_grad():
        h = base.model.embed_tokens(ids)
        turns = base.model.rotary_emb(h, position_ids)
        for i, layer in enumerate(base.model.layers):
            h = layer(h, attention_mask=causal, position_ids=position_ids, position_embeddings=turns)
            if name != "__base__" and i in CONFIGS[name].layers:
                config = CONFIGS[name]
                mask = position_mask((np.arange(length) < (prompt or length))[None], config.positions)
                turned = intervene(
                    h.double().numpy(),
                    *made(name).layers[i],
                    mask,
                    variant=config.variant,
                    group_size=config.group_size,
                    subspace=config.subspace,
                )
                h = torch.from_numpy(turned).to(h.dtype)
        return base.lm_head(base.model.norm(h))[0].float().numpy()


def greedy_by_hand(base, name, text, steps):
    tokens = list(text)
    for _ in range(steps):
        tokens.append(int(by_hand(base, name, tokens, prompt=len(text))[-1].argmax()))
    return tokens[len(text) :]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_mixed_batch_is_each_row_by_hand(base, folders, side):
    model = with_interventions(base, folders)
    batch = padded(TEXTS, side)
    with torch.no_grad():
        logits = model(**batch, adapter_names=NAMES).logits.numpy()
        plain = base(**batch).logits.numpy()
    for row, (name, text) in enumerate(zip(NAMES, TEXTS, strict=True)):
        real = batch["attention_mask"][row].bool().numpy()
        if name == "__base__":
            np.testing.assert_array_equal(logits[row], plain[row])
        else:
            assert_close(logits[row][real], by_hand(base, name, text), "float32", moved_from=plain[row][real])


@pytest.mark.parametrize("name", NAMES)
def test_a_plain_call_applies_the_active_one(base, folders, name):
    model = with_interventions(base, folders)
    assert model.active_adapter == "last"
    model.set_adapter(None if name == "__base__" else name)
    with torch.no_grad():
        logits = model(**padded(TEXTS[:1])).logits[0].numpy()
        named = model(**padded(TEXTS[:1]), adapter_names=[name]).logits[0].numpy()
    np.testing.assert_array_equal(logits, named)
    assert_close(logits, by_hand(base, name, TEXTS[0]), "float32")


def test_generation_is_greedy_by_hand(base, folders):
    model = with_interventions(base, folders)
    expected = [greedy_by_hand(base, name, text, 6) for name, text in zip(NAMES, TEXTS, strict=True)]
    batch = padded(TEXTS)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    width = batch["input_ids"].shape[1]
    assert model.generate(**batch, adapter_names=NAMES, **options)[:, width:].tolist() == expected
    # Each text alone, without padding and without a mask.
    for name, text, tokens in zip(NAMES, TEXTS, expected, strict=True):
        alone = model.generate(torch.tensor([text]), adapter_names=[name], **options)
        assert alone[0, len(text) :].tolist() == tokens
    # With a static cache, generate passes the model masks with four axes.
    static = model.generate(
        **batch, adapter_names=NAMES, cache_implementation="static", disable_compile=True, **options
    )
    assert static[:, width:].tolist() == expected
    plain = base.generate(**batch, **options)[:, width:].tolist()
    assert [a == b for a, b in zip(plain, expected, strict=True)] == [False, False, False, True]


def test_beams_follow_their_row(base, folders):
    model = with_interventions(base, folders)
    options = {"max_new_tokens": 4, "num_beams": 3, "num_return_sequences": 2, "eos_token_id": None, "pad_token_id": 0}
    batch = padded(TEXTS)
    width = batch["input_ids"].shape[1]
    together = model.generate(**batch, adapter_names=NAMES, **options)[:, width:].tolist()
    for row, (name, text) in enumerate(zip(NAMES, TEXTS, strict=True)):
        alone = model.generate(torch.tensor([text]), adapter_names=[name], **options)
        assert together[2 * row : 2 * row + 2] == alone[:, len(text) :].tolist()


@pytest.mark.parametrize("name", ["last", "ends", "all"])
def test_what_follows_the_cache_is_no_prompt(base, folders, name):
    model = with_interventions(base, folders)
    text, expected = torch.tensor([TEXTS[3]]), by_hand(base, name, TEXTS[3], prompt=5)
    with torch.no_grad():
        begun = model(text[:, :5], adapter_names=[name], use_cache=True)
        mask = torch.ones(1, 6, dtype=torch.long)
        rest = model(text[:, 5:], adapter_names=[name], past_key_values=begun.past_key_values, attention_mask=mask)
    assert_close(begun.logits[0], expected[:5], "float32")
    assert_close(rest.logits[0], expected[5:], "float32")


def test_a_prompt_may_end_behind_the_cache(base, folders):
    """The cache has the prompt's first four tokens as the base computed them, which "last" doesn't touch."""
    model = with_interventions(base, folders)
    text, marked = torch.tensor([TEXTS[3]]), torch.tensor([[1, 1, 1, 1, 1, 0]])
    with torch.no_grad():
        cache = base(text[:, :4], use_cache=True).past_key_values
        rest = model(text[:, 4:], adapter_names=["last"], prompt_mask=marked, past_key_values=cache).logits[0]
    assert_close(rest, by_hand(base, "last", TEXTS[3], prompt=5)[4:], "float32")


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_mixed_batches_on_quantised_weights(folders, kind, tmp_path):
    small_checkpoint(tmp_path, dtype=torch.bfloat16)
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=kind == "nf4",
        load_in_8bit=kind == "int8",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    base = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=quantization, dtype=torch.bfloat16, attn_implementation="eager"
    ).eval()
    model = with_interventions(base, folders)
    batch = padded(TEXTS)
    with torch.no_grad():
        logits = model(**batch, adapter_names=NAMES).logits
        plain = base(**batch).logits.float().numpy()
    assert logits.dtype == torch.bfloat16
    for row, (name, text) in enumerate(zip(NAMES, TEXTS, strict=True)):
        expected = by_hand(base, name, text, dtype=torch.bfloat16)
        real = batch["attention_mask"][row].bool().numpy()
        # int8 also rounds inputs, which amplifies differences in a last bfloat16 digit: the mean error is compared.
        error = np.abs(logits[row].float().numpy()[real] - expected).mean() / np.abs(expected).mean()
        assert error < TOLERANCE["bfloat16"], name
        # Every intervention touches the last token.
        moved = np.abs(plain[row][real][-1] - expected[-1]).mean() / np.abs(expected[-1]).mean()
        assert moved > 10 * TOLERANCE["bfloat16"] or name == "__base__", name
    tokens = model.generate(**batch, adapter_names=NAMES, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert tokens.shape == (4, 9)


def test_nothing_is_left_on_the_base(base, folders):
    model = with_interventions(base, folders)

    def changed():
        kinds = ("forward", "_forward_hooks", "_forward_pre_hooks")
        return [name for name, module in base.named_modules() if any(vars(module).get(kind) for kind in kinds)]

    batch = padded(TEXTS)
    second = InterventionModel.from_pretrained(base, folders / "last")
    with torch.no_grad():
        plain, turned = base(**batch).logits, second(**batch).logits
        during, others = [], []

        def look(block, args, output):
            during.append(changed())
            # Meanwhile another thread calls the base itself, and another model on it.
            thread = threading.Thread(target=lambda: others.extend([_logits(base, batch), _logits(second, batch)]))
            if len(during) == 1:
                thread.start()
                thread.join()

        handle = base.model.layers[0].mlp.register_forward_hook(look)
        model(**batch, adapter_names=NAMES)
        handle.remove()
        assert "model.layers.2" in during[0]
        assert changed() == []
        torch.testing.assert_close(others[0], plain, rtol=0, atol=0)
        torch.testing.assert_close(others[1], turned, rtol=0, atol=0)

        def fail(block, args, output):
            raise KeyboardInterrupt

        handle = base.model.layers[1].register_forward_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            model(**batch, adapter_names=NAMES)
        handle.remove()
        assert changed() == []
        torch.testing.assert_close(base(**batch).logits, plain, rtol=0, atol=0)


def _logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


CHOICES = [NAMES, NAMES[::-1], ["all", "last", "all", "last"], ["__base__"] * 4]


@pytest.mark.parametrize("which", ["model", "base"])
@torch.no_grad()
def test_another_choice_is_not_compiled_anew(which, base, folders):
    torch.compiler.reset()
    model, batch, (backend, graphs) = with_interventions(base, folders), padded(TEXTS), counting()
    expected = [_logits_of(model, batch, names) for names in (*CHOICES, None)]
    if which == "model":
        compiled = torch.compile(model, backend=backend)
    else:
        compiled = model
        base.compile(backend=backend, fullgraph=True)
    try:
        if which == "base":
            # A graph without interventions must not be reused with them, nor the other way round.
            plain = base(**batch).logits
        for names, logits in zip((*CHOICES, None), expected, strict=True):
            assert_close(compiled(**batch, adapter_names=names).logits, logits, "float32")
        if which == "base":
            np.testing.assert_array_equal(base(**batch).logits, plain)
        # Loading and deleting interventions needs no new graph either, although the banks grow.
        model.delete_adapter("ends")
        for name in ("b", "c"):
            model.load_adapter(folders / "ends", name)
        found = compiled(**batch, adapter_names=["last", "c", "all", "__base__"]).logits
        assert_close(found, expected[0], "float32")
    finally:
        base._compiled_call_impl = None
    assert len(graphs) == {"model": 1, "base": 2}[which]


def test_compiled_generation(base, folders):
    torch.compiler.reset()
    model, batch, (backend, graphs) = with_interventions(base, folders), padded(TEXTS), counting()
    compiling = transformers.CompileConfig(backend=backend, mode=None)
    compiling._compile_all_devices = True
    options = {"max_new_tokens": 4, "eos_token_id": None, "pad_token_id": 0, "cache_implementation": "static"}
    counts = []
    for names in CHOICES:
        # Alternate between the base's graphs and those with interventions.
        for given, kwargs in ((base, {}), (model, {"adapter_names": names})):
            tokens = given.generate(**batch, **options, **kwargs, compile_config=compiling)
            assert torch.equal(tokens, given.generate(**batch, **options, **kwargs, disable_compile=True))
        counts.append(len(graphs))
    assert counts[0] > 1
    # The base's own graphs may be compiled a second time; after that there are no new graphs.
    assert counts[1:] == counts[1:2] * (len(CHOICES) - 1)


def test_a_road_model_as_base(folders):
    """Rotations of linear layers and of blocks act together."""
    base = small_model()
    road = RoadModel(base, RoadConfig(target_modules=["q_proj"], group_size=32, init_weights=False))
    model = with_interventions(road, folders)
    assert model.blocks == "base_model.model.layers"
    with torch.no_grad():
        logits = model(**padded(TEXTS[:1]), adapter_names=["last"]).logits[0].numpy()
        road.merge_and_unload()
    assert_close(logits, by_hand(base, "last", TEXTS[0]), "float32")


def test_another_family(tmp_path):
    """GPT-2 calls its blocks ``h``, and its config calls the hidden size ``n_embd``."""
    config = transformers.GPT2Config(vocab_size=60, n_positions=32, n_embd=32, n_layer=2, n_head=2)
    base = transformers.AutoModelForCausalLM.from_config(config).eval()
    placed = InterventionConfig(layers=(0,), positions="last", group_size=8)
    write_intervention(tmp_path / "it", made("gpt", 32, placed))
    model = InterventionModel.from_pretrained(base, tmp_path / "it")
    assert model.blocks == "transformer.h"
    ids = torch.tensor([TEXTS[0]])
    with torch.no_grad():
        actual = model(ids).logits
        states = base(ids, output_hidden_states=True).hidden_states[1].double().numpy()
        mask = position_mask(np.ones((1, 5)), "last")
        turned = intervene(states, *made("gpt", 32, placed).layers[0], mask, variant="road_1", group_size=8)
        block = base.transformer.h[1]
        h = block(torch.from_numpy(turned).float())
        h = h if isinstance(h, torch.Tensor) else h[0]
        # A block called alone has no causal mask, so only the last token is compared, which attends to all.
        expected = base.lm_head(base.transformer.ln_f(h))[0, -1]
        plain = base(ids).logits[0, -1]
    assert_close(actual[0, -1], expected, "float32", moved_from=plain)


def test_interventions_come_and_go(base, folders):
    model = with_interventions(base, folders)
    assert model.adapter_names == list(CONFIGS)
    assert model.configs == CONFIGS
    batch = padded(TEXTS[:2])
    before = _logits_of(model, batch, ["ends", "all"])
    active = _logits_of(model, batch, None)
    with pytest.raises(
        AdapterError, match=r"^delete_adapter: expected an intervention that is not active, found 'last'$"
    ):
        model.delete_adapter("last")
    with model.disable_adapter():
        np.testing.assert_array_equal(_logits_of(model, batch, None), _logits(base, batch))
    np.testing.assert_array_equal(_logits_of(model, batch, None), active)
    model.set_adapter(None)
    model.delete_adapter("last")
    assert model.adapter_names == [name for name in CONFIGS if name != "last"]
    np.testing.assert_array_equal(_logits_of(model, batch, None), _logits(base, batch))
    np.testing.assert_array_equal(_logits_of(model, batch, ["ends", "all"]), before)
    model.load_adapter(folders / "last", "new")
    with mock.patch.object(default, "coefficients", wraps=default.coefficients) as formed:
        model.load_adapter(folders / "last", "newer")
        _logits_of(model, batch, ["newer", "new"])
    # Only the new intervention's coefficients, at two blocks, are formed; the others' are kept.
    assert formed.call_count == 2
    np.testing.assert_array_equal(_logits_of(model, batch, ["ends", "all"]), before)
    assert_close(_logits_of(model, padded(TEXTS[:1]), ["new"])[0], by_hand(base, "last", TEXTS[0]), "float32")


@pytest.mark.parametrize("names", [None, ["last", "ends"]])
def test_an_intervention_in_use_is_not_deleted(names, base, folders):
    model = with_interventions(base, folders)
    batch, refused = padded(TEXTS[:2]), []
    expected = _logits_of(model, batch, names)

    def delete(*_):
        with pytest.raises(AdapterError, match="no call uses, found 'last'"):
            model.delete_adapter("last")
        refused.append(1)

    handle = base.model.layers[0].register_forward_pre_hook(delete)
    try:
        np.testing.assert_array_equal(_logits_of(model, batch, names), expected)
    finally:
        handle.remove()
    assert refused
    model.set_adapter(None)
    model.delete_adapter("last")


def test_of_two_threads_that_load_one_name_one_is_told(base, folders):
    model, read, errors = InterventionModel(base), threading.Barrier(2), []

    def read_both(*args, read_intervention=_intervention.read_intervention):
        found = read_intervention(*args)
        read.wait(30)
        return found

    def load(name):
        try:
            model.load_adapter(folders / name, "mine")
        except AdapterError as error:
            errors.append(str(error))

    with mock.patch.object(_intervention, "read_intervention", read_both):
        threads = [threading.Thread(target=load, args=(name,)) for name in ("last", "ends")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert errors == ["adapter_name: expected a new name, found 'mine', which is there already"]
    assert model.adapter_names == ["mine"]


def test_a_method_of_the_base_that_takes_no_names_refuses_them(base, folders):
    model = with_interventions(base, folders)
    assert model.get_base_model() is base
    with pytest.raises(AdapterError, match=r"^adapter_names: expected a call of the model or its generate, found gene"):
        model.generate_batch([TEXTS[0]], adapter_names=["last"])


def _logits_of(model, batch, names):
    with torch.no_grad():
        return model(**batch, adapter_names=names).logits


def test_what_does_not_fit_is_refused(base, folders, tmp_path):
    model = with_interventions(base, folders)
    batch = padded(TEXTS)

    def refused(message, call):
        with pytest.raises(AdapterError, match=re.escape(message)), torch.no_grad():
            call()

    refused("found 'nobody'", lambda: model(**batch, adapter_names=["nobody", *NAMES[1:]]))
    refused("one name for each of 4 rows, found 2", lambda: model(**batch, adapter_names=NAMES[:2]))
    refused("one name for each of 4 rows, found 2", lambda: model.generate(**batch, adapter_names=NAMES[:2]))
    refused("a list with one name a row, found the text 'last'", lambda: model(**batch, adapter_names="last"))
    refused("all inputs but the first by name, found 2", lambda: model(batch["input_ids"], batch["attention_mask"]))
    refused("expected an attention_mask beside prompts with padding", lambda: model.generate(batch["input_ids"]))
    refused(
        "prompt_mask: expected 6 places, those of the cache and of the new tokens, found shape [4, 5]",
        lambda: model(**batch, prompt_mask=torch.ones(4, 5)),
    )
    refused(
        "attention_mask: expected [batch, places], or a prompt_mask of that shape beside it, found [1, 1, 5, 5]",
        lambda: model(torch.tensor([TEXTS[0]]), attention_mask=torch.zeros(1, 1, 5, 5)),
    )
    four, ids = padded(TEXTS[:1] * 4), torch.tensor(TEXTS[:1] * 4)
    refused(
        "prompt_mask: expected [batch, places], found [5]",
        lambda: model(**four, prompt_mask=torch.ones(5)),
    )
    refused("prompt_mask: expected [batch, places], found list", lambda: model(**four, prompt_mask=[[1] * 5] * 4))
    # Rows are repeated for beams alone.
    for names in (None, ["last"] * 4, ["all"] * 4):
        for rows in (1, 2, 8):
            message = f"prompt_mask: expected 4 rows, those of the batch, found shape [{rows}, 5]"
            marked = torch.ones(rows, 5)
            refused(message, lambda names=names, m=marked: model(**four, adapter_names=names, prompt_mask=m))
    for call in (model, model.generate):
        for names in (None, ["last"] * 4):
            refused(
                "attention_mask: expected 4 rows, those of the batch, found shape [2, 5]",
                lambda call=call, names=names: call(ids, attention_mask=torch.ones(2, 5), adapter_names=names),
            )
        refused(
            "adapter_names: expected a name for each row, found ['last', 'all']",
            lambda call=call: call(**four, adapter_names=[["last", "all"], *NAMES[1:]]),
        )
    refused(
        "one name for each of 4 rows, found 2", lambda: InterventionModel(base)(ids, adapter_names=["__base__"] * 2)
    )
    refused("adapter: expected a name, found ['last']", lambda: model.set_adapter(["last"]))
    refused("adapter: expected a name, found ['all']", lambda: model.delete_adapter(["all"]))
    refused("expected a new name, found 'all'", lambda: model.load_adapter(folders / "all", "all"))
    refused("expected a name other than '__base__'", lambda: model.load_adapter(folders / "all", "__base__"))
    refused("adapter: expected one of 'last', 'ends', 'all', found 'x'", lambda: model.set_adapter("x"))
    write_intervention(tmp_path / "deep", made("deep", config=InterventionConfig(layers=(3,), group_size=8)))
    refused(
        "expected an intervention on the model's 3 blocks, found one on block 3",
        lambda: model.load_adapter(tmp_path / "deep", "x"),
    )
    write_intervention(tmp_path / "thin", made("thin", 64, InterventionConfig(layers=(0,), group_size=8)))
    refused("hidden vectors of size 128, found one on 64", lambda: model.load_adapter(tmp_path / "thin", "x"))
    refused("base: expected a decoder, found an InterventionModel", lambda: InterventionModel(model))
    refused(
        "blocks: expected the path of a ModuleList in the model, found 'model.norm'",
        lambda: InterventionModel(base, blocks="model.norm"),
    )
    refused(
        "expected one ModuleList of None blocks in Linear, found none; say by blocks=",
        lambda: InterventionModel(nn.Linear(2, 2)),
    )
    t5 = transformers.T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    refused(
        "expected a decoder alone, found T5ForConditionalGeneration",
        lambda: InterventionModel(transformers.T5ForConditionalGeneration(t5)),
    )
    assert model.adapter_names == list(CONFIGS)
    base.gradient_checkpointing_enable()
    try:
        model.train()
        with pytest.raises(AdapterError, match="expected a model without gradient checkpointing"):
            model(**batch)
    finally:
        base.gradient_checkpointing_disable()
        model.eval()
