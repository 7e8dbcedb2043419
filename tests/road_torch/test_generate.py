"""Generation in mixed batches, and the road-generate command."""

import copy
import inspect
import io
import json
import re
import sys

import pytest
import torch
import transformers
from _graphs import counting
from _models import small_checkpoint, small_model, word_tokenizer

import road_torch
from road_torch import AdapterError, RoadConfig, RoadModel
from road_torch import __main__ as cli

IDS = torch.tensor([[0, 0, 6, 7, 8], [0, 9, 10, 11, 12], [6, 8, 10, 12, 14], [0, 0, 0, 15, 6]])
MASK = (IDS != 0).long()
GREEDY = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
ADAPTERS = {
    "a": {"variant": "road_1", "group_size": 64, "target_modules": "all-linear"},
    "b": {"variant": "road_4", "group_size": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "c": {"variant": "road_2", "group_size": 8, "target_modules": ["gate_proj"]},
}


def with_adapters(base=None):
    torch.manual_seed(4)
    model = RoadModel(small_model() if base is None else base)
    for name, fields in ADAPTERS.items():
        model.add_adapter(name, RoadConfig(**fields, init_weights=False, inference_mode=True))
    return model.eval()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return small_checkpoint(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapter_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters") / "all"
    with_adapters().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("way", ["greedy", "beams", "sequences", "no_cache", "static"])
def test_a_row_of_a_mixed_batch_is_what_it_is_alone(way):
    model = with_adapters()
    kwargs = {
        "greedy": {},
        "beams": {"num_beams": 3, "num_return_sequences": 2},
        "sequences": {"do_sample": True, "top_k": 1, "num_return_sequences": 3},
        "no_cache": {"use_cache": False},
        "static": {"cache_implementation": "static", "disable_compile": True},
    }[way]
    kwargs = {**GREEDY, **kwargs}
    names = ["b", "__base__", "a", "c"]
    mixed = model.generate(IDS, attention_mask=MASK, adapter_names=names, **kwargs).reshape(4, -1, 15)
    texts = []
    for row, name in enumerate(names):
        model.set_adapter([] if name == "__base__" else name)
        alone = model.generate(IDS[row : row + 1], attention_mask=MASK[row : row + 1], **kwargs)
        assert torch.equal(mixed[row], alone), name
        plain = small_model().generate(IDS[row : row + 1], attention_mask=MASK[row : row + 1], **kwargs)
        texts.append(torch.equal(alone, plain))
    assert texts == [False, True, False, False]


def test_compiled_decoding_has_one_graph_for_all_mixes():
    """With transformers' own compilation, a cache of fixed size and one graph."""
    torch.compiler.reset()
    model, (backend, graphs) = with_adapters(), counting()
    compiling = transformers.CompileConfig(backend=backend, mode=None, dynamic=False)
    # On a CPU transformers compiles only if told to.
    compiling._compile_all_devices = True
    static = {"cache_implementation": "static", "compile_config": compiling}
    for names in (
        ["b", "__base__", "a", "c"],
        ["a", "a", "a", "a"],
        ["a", "a", "c", "b"],
        ["c", "b+b", "__base__", "a"],
    ):
        kwargs = {**GREEDY, "attention_mask": MASK, "adapter_names": names}
        assert torch.equal(model.generate(IDS, **kwargs, **static), model.generate(IDS, **kwargs))
        assert len(graphs) == 1
    # The active adapter on all rows is another graph, one for each group size.
    for name in ("b", "c"):
        model.set_adapter(name)
        kwargs = {**GREEDY, "attention_mask": MASK}
        assert torch.equal(model.generate(IDS, **kwargs, **static), model.generate(IDS, **kwargs))
        assert len(graphs) == 2


def test_assisted_generation_with_an_adapted_assistant():
    model, assistant = with_adapters(), with_adapters(small_model(seed=1))
    assistant.set_adapter("b")
    expected = model.generate(IDS[2:3], adapter_names=["b"], **GREEDY)
    given = model.generate(IDS[2:3], adapter_names=["b"], assistant_model=assistant.base_model, **GREEDY)
    assert torch.equal(given, expected)


def test_sampled_rows_are_those_of_the_adapter_alone():
    model = with_adapters()
    kwargs = {**GREEDY, "do_sample": True, "temperature": 1.5, "attention_mask": MASK}

    def drawn(**names):
        torch.manual_seed(7)
        return model.generate(IDS, **names, **kwargs)

    names = ["b", "__base__", "a", "c"]
    mixed = drawn(adapter_names=names)
    assert not torch.equal(mixed, model.generate(IDS, adapter_names=names, **kwargs))
    for row, name in enumerate(names):
        model.set_adapter([] if name == "__base__" else name)
        assert torch.equal(drawn()[row], mixed[row])


def test_a_prompt_that_stands_in_a_cache():
    model, names = with_adapters(), ["b", "__base__", "a", "c"]
    ids = IDS.clamp(min=3)
    kwargs = {**GREEDY, "attention_mask": torch.ones_like(ids), "adapter_names": names}
    expected = model.generate(ids, **kwargs)
    # Called past_key_values before transformers 5.24.
    known = inspect.signature(transformers.LlamaModel.forward).parameters
    cache = {"cache" if "cache" in known else "past_key_values": transformers.DynamicCache(config=model.config)}
    with torch.no_grad():
        model(ids[:, :3], use_cache=True, adapter_names=names, **cache)
    assert torch.equal(model.generate(ids, **cache, **kwargs), expected)


def test_gpt2_whose_layers_are_conv1d():
    torch.manual_seed(0)
    fields = {"vocab_size": 160, "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.3}
    base = transformers.GPT2LMHeadModel(transformers.GPT2Config(**fields)).eval()
    model = RoadModel(base)
    for name, changes in {
        "a": {"variant": "road_1", "group_size": 64, "target_modules": "all-linear"},
        "b": {"variant": "road_4", "group_size": 8, "target_modules": ["c_attn", "c_fc"]},
        "c": {"variant": "road_2", "group_size": 2, "target_modules": ["c_proj"]},
    }.items():
        model.add_adapter(name, RoadConfig(**changes, init_weights=False, inference_mode=True))
    names = ["b", "__base__", "a", "c"]
    kwargs = {**GREEDY, "attention_mask": MASK}
    mixed = model.generate(IDS, adapter_names=names, **kwargs)
    for row, name in enumerate(names):
        model.set_adapter([] if name == "__base__" else name)
        alone = model.generate(IDS, **kwargs)
        assert torch.equal(mixed[row], alone[row])
        if name == "b":
            merged, logits = copy.deepcopy(model).merge_and_unload(), model(IDS).logits
            torch.testing.assert_close(merged(IDS).logits, logits, rtol=1e-4, atol=1e-4)
    assert len({tuple(row[5:].tolist()) for row in mixed}) == 4


def test_a_gather_serves_a_whole_call(monkeypatch):
    from road_torch._layer import RoadLayer

    model = with_adapters()
    made = []
    gather = RoadLayer._gather
    monkeypatch.setattr(RoadLayer, "_gather", lambda self, *args: made.append(self) or gather(self, *args))
    model.generate(IDS, attention_mask=MASK, adapter_names=["a", "b", "c", "a"], **GREEDY)
    assert len(made) == len(set(made)) == 21


@pytest.mark.parametrize(
    ("quantize", "dtype"),
    [(None, "float32"), (None, "bfloat16"), ("nf4", "bfloat16"), ("nf4", "float32"), ("int8", "bfloat16")],
)
def test_token_for_token_on_every_kind_of_base(quantize, dtype, checkpoint):
    """Compares batches of the same shape, so that not even the order of a sum differs."""
    base, _ = road_torch.load(checkpoint, quantize=quantize, dtype=dtype)
    model = with_adapters(base)
    names = ["a", "b", "__base__", "c", "b", "a", "c", "a"]
    ids, mask = (torch.cat([v, v.flip(0)]).to(base.device) for v in (IDS, MASK))
    kwargs = {**GREEDY, "output_logits": True, "return_dict_in_generate": True}
    mixed = model.generate(ids, attention_mask=mask, adapter_names=names, **kwargs)
    for name in dict.fromkeys(names):
        model.set_adapter([] if name == "__base__" else name)
        alone = model.generate(ids, attention_mask=mask, **kwargs)
        rows = [i for i, other in enumerate(names) if other == name]
        assert torch.equal(mixed.sequences[rows], alone.sequences[rows])
        assert torch.equal(mixed.logits[0][rows], alone.logits[0][rows])
    assert len({tuple(row.tolist()) for row in mixed.sequences[:, 5:]}) > 4


ROWS = [
    {"prompt": "one two three", "adapter": "a", "id": 7},
    {"messages": [{"role": "system", "content": "ten"}, {"role": "user", "content": "two"}], "adapter": "b"},
    {"prompt": "four five", "adapter": "__base__"},
    {"prompt": "four five"},
    {"prompt": "four five", "adapter": "c", "completion": "what was here before"},
]


def test_generate_in_batches():
    model, tokenizer = with_adapters(), word_tokenizer()
    given = road_torch.generate(model, tokenizer, ROWS, max_new_tokens=6)
    assert [row["adapter"] for row in given] == ["a", "b", "__base__", "__base__", "c"]
    assert given[0]["prompt"] == "one two three"
    assert given[0]["id"] == 7
    assert given[1]["messages"] == ROWS[1]["messages"]
    assert given[2]["completion"] == given[3]["completion"]
    assert len({row["completion"] for row in given}) == 4
    assert road_torch.generate(model, tokenizer, ROWS, max_new_tokens=6, batch_size=2) == given
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "four five"}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    out = small_model().generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    assert given[2]["completion"] == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    assert model.active_adapters != []
    with pytest.raises(AdapterError, match=r"row 2: expected an adapter out of a, b, c, __base__, found 'z'"):
        road_torch.generate(model, tokenizer, [ROWS[0], {"prompt": "one", "adapter": "z"}])


def test_the_likeliest_token_is_taken_whatever_the_checkpoint_prefers():
    model, tokenizer = with_adapters(), word_tokenizer()
    expected = road_torch.generate(model, tokenizer, ROWS, max_new_tokens=6)
    preferred = {"repetition_penalty": 3.0, "no_repeat_ngram_size": 1, "num_beams": 2, "min_new_tokens": 6}
    for name, value in {**preferred, "do_sample": True, "temperature": 9.0}.items():
        setattr(model.generation_config, name, value)
    assert road_torch.generate(model, tokenizer, ROWS, max_new_tokens=6) == expected
    # The caller's own options take effect, and the model's config is restored.
    assert road_torch.generate(model, tokenizer, ROWS, max_new_tokens=6, no_repeat_ngram_size=1) != expected
    assert {name: getattr(model.generation_config, name) for name in preferred} == preferred


def test_a_row_may_name_a_mix():
    model, tokenizer = with_adapters(), word_tokenizer()
    model.add_weighted_adapter(["b", "c"], [1, 1], "both")
    names, prompts = ("b+c", "both", "b", "c"), ("one two three", "nine", "five six seven eight")
    rows = [{"prompt": prompt, "adapter": name} for name in names for prompt in prompts]
    given = road_torch.generate(model, tokenizer, rows, max_new_tokens=40)
    assert [row["adapter"] for row in given] == [row["adapter"] for row in rows]
    texts = [tuple(row["completion"] for row in given[i : i + 3]) for i in range(0, 12, 3)]
    assert texts[0] == texts[1]
    assert len(set(texts)) == 3
    with pytest.raises(AdapterError, match=r"row 1: expected an adapter out of .*, found 'a\+z'"):
        road_torch.generate(model, tokenizer, [{"prompt": "one", "adapter": "a+z"}])


def call(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["road-generate", *map(str, arguments)])
    code = 0
    try:
        cli.main()
    except SystemExit as done:
        code = done.code
    out, err = capsys.readouterr()
    return code, out, err


def lines(path, rows):
    path.write_text("\n\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


@pytest.mark.parametrize("quantize", ["none", "nf4", "int8"])
def test_the_command(quantize, checkpoint, adapter_folder, tmp_path, monkeypatch, capsys):
    prompts = lines(tmp_path / "prompts.jsonl", ROWS)
    given = ["--base", checkpoint, "--prompts", prompts, "--quantize", quantize, "--max-new-tokens", 6]
    given += [
        "--adapter",
        f"a={adapter_folder / 'a'}",
        f"b={adapter_folder / 'b'}",
        "--adapter",
        f"c={adapter_folder / 'c'}",
    ]
    code, out, err = call(monkeypatch, capsys, *given)
    assert code == 0, err
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["adapter"] for row in rows] == ["a", "b", "__base__", "__base__", "c"]
    if quantize == "none":
        expected = road_torch.generate(with_adapters(), word_tokenizer(), ROWS, max_new_tokens=6)
        assert rows == expected
    assert "5/5" in err
    assert "cast" not in err
    target = tmp_path / "out.jsonl"
    code, again, _ = call(monkeypatch, capsys, *given, "--out", target, "--batch-size", 3)
    assert code == 0
    assert again == ""
    assert len(target.read_text().splitlines()) == 5
    before = target.read_text()
    code, out, err = call(monkeypatch, capsys, *given, "--out", target)
    assert (code, out) == (2, "")
    assert "expected a new file" in err
    assert target.read_text() == before
    code, drawn, _ = call(monkeypatch, capsys, *given, "--temperature", 2.0, "--seed", 3)
    assert code == 0
    assert drawn == call(monkeypatch, capsys, *given, "--temperature", 2.0, "--seed", 3)[1]
    assert drawn != call(monkeypatch, capsys, *given, "--temperature", 2.0, "--seed", 4)[1]


def test_an_interrupted_command_goes_on_behind_its_finished_batches(
    checkpoint, adapter_folder, tmp_path, monkeypatch, capsys
):
    prompts, target, part = (tmp_path / name for name in ("prompts.jsonl", "out.jsonl", "out.jsonl.part"))
    lines(prompts, ROWS)
    names = [argument for name in "abc" for argument in ("--adapter", f"{name}={adapter_folder / name}")]
    given = ["--base", checkpoint, "--prompts", prompts, "--max-new-tokens", 6, *names, "--out", target]
    given += ["--batch-size", 2]
    whole, calls = RoadModel.generate, []

    def counted(self, *args, **kwargs):
        calls.append(len(kwargs["adapter_names"]))
        if sum(calls) > 4 and len(calls) == 3:
            raise KeyboardInterrupt
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(RoadModel, "generate", counted)
    assert call(monkeypatch, capsys, *given)[0] == 130
    assert not target.exists()
    assert len(part.read_text().splitlines()) == 1 + 4
    with open(part, "a") as file:
        file.write('{"prompt": "four f')
    code, out, err = call(monkeypatch, capsys, *given, "--max-new-tokens", 7)
    check_refused(code, out, err, r"out\.jsonl\.part: expected what this very command left")
    code, _, err = call(monkeypatch, capsys, *given)
    assert code == 0, err
    assert calls == [2, 2, 1, 1]
    assert not part.exists()
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    assert rows == road_torch.generate(with_adapters(), word_tokenizer(), ROWS, max_new_tokens=6)


def test_one_process_at_a_time_writes_answers(checkpoint, tmp_path, monkeypatch, capsys):
    prompts, target, part = (tmp_path / name for name in ("prompts.jsonl", "out.jsonl", "out.jsonl.part"))
    lines(prompts, [{"prompt": "one"}, {"prompt": "two"}])
    given = ["--base", checkpoint, "--prompts", prompts, "--max-new-tokens", 4, "--out", target, "--batch-size", 1]
    whole, calls = RoadModel.generate, []

    def beside(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            before = part.read_bytes()
            check_refused(
                *call(monkeypatch, capsys, *given), r"out\.jsonl\.part: expected a file that no other process"
            )
            assert part.read_bytes() == before
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(RoadModel, "generate", beside)
    code, _, err = call(monkeypatch, capsys, *given)
    assert (code, len(calls)) == (0, 2), err
    assert [json.loads(line)["prompt"] for line in target.read_text().splitlines()] == ["one", "two"]
    assert not part.exists()


def test_answers_that_are_not_those_of_the_lines_are_not_gone_on_from(checkpoint, tmp_path, monkeypatch, capsys):
    prompts, target, part = (tmp_path / name for name in ("prompts.jsonl", "out.jsonl", "out.jsonl.part"))
    lines(prompts, [{"prompt": "one"}, {"prompt": "two"}, {"prompt": "three"}])
    given = ["--base", checkpoint, "--prompts", prompts, "--max-new-tokens", 4, "--out", target, "--batch-size", 1]
    whole, calls = RoadModel.generate, []

    def stopped(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(RoadModel, "generate", stopped)
    assert call(monkeypatch, capsys, *given)[0] == 130
    head, first, second = part.read_text().splitlines(keepends=True)
    for spoilt in (head + first + first, head + first + second[:9] + "\n"):
        part.write_text(spoilt)
        check_refused(*call(monkeypatch, capsys, *given), r"out\.jsonl\.part: expected what this very command left")
        assert part.read_text() == spoilt
    part.write_text(head + first + second)
    assert call(monkeypatch, capsys, *given)[0] == 0
    assert len(target.read_text().splitlines()) == 3


def test_answers_are_utf8_whatever_the_terminal_has(checkpoint, tmp_path, monkeypatch):
    prompts, raw = lines(tmp_path / "prompts.jsonl", [{"prompt": "one", "id": "θ"}]), io.BytesIO()
    given = ["--base", checkpoint, "--prompts", prompts, "--max-new-tokens", 2]
    monkeypatch.setattr(sys, "argv", ["road-generate", *map(str, given)])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    cli.main()
    assert json.loads(raw.getvalue().decode())["id"] == "θ"


@pytest.mark.parametrize("kind", ["gemma3", "mistral3"])
def test_a_model_with_vision_answers_texts(kind, tmp_path):
    base, _ = road_torch.load(small_checkpoint(tmp_path, kind, tie_word_embeddings=False), quantize="nf4")
    config = RoadConfig(target_modules=r".*language_model.*_proj", group_size=8, init_weights=False)
    model = RoadModel(base, config, "a").eval()
    mixed = model.generate(IDS, attention_mask=MASK, adapter_names=["a", "__base__"] * 2, **GREEDY)
    alone = model.generate(IDS, attention_mask=MASK, **GREEDY)
    with model.disable_adapter():
        plain = model.generate(IDS, attention_mask=MASK, **GREEDY)
    assert torch.equal(mixed[0::2], alone[0::2])
    assert torch.equal(mixed[1::2], plain[1::2])
    assert not torch.equal(alone, plain)


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_a_gate_with_one_output_stays_plain(quantize, tmp_path):
    """In nf4 on a CPU, bitsandbytes can't compute with one."""
    base, _ = road_torch.load(small_checkpoint(tmp_path, "qwen2_moe"), quantize=quantize)
    kinds = {name.rpartition(".")[2]: type(module).__name__ for name, module in base.named_modules()}
    assert (kinds["shared_expert_gate"], kinds["lm_head"]) == ("Linear", "Linear")
    assert kinds["q_proj"] == {"nf4": "Linear4bit", "int8": "Linear8bitLt"}[quantize]
    model = RoadModel(base, RoadConfig(target_modules="all-linear", group_size=8, init_weights=False), "a").eval()
    mixed = model.generate(IDS, attention_mask=MASK, adapter_names=["a", "__base__"] * 2, **GREEDY)
    alone = model.generate(IDS, attention_mask=MASK, **GREEDY)
    assert torch.equal(mixed[0::2], alone[0::2])
    assert not torch.equal(mixed[1::2], alone[1::2])


@pytest.mark.parametrize("dtype", ["auto", torch.bfloat16])
def test_a_dtype_is_named_or_given(dtype, checkpoint):
    base, _ = road_torch.load(checkpoint, dtype=dtype)
    assert base.dtype == (torch.float32 if dtype == "auto" else dtype)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"quantize": "int4"}, "^quantize: expected 'nf4', 'int8' or None, found 'int4'$"),
        ({"quantize": "none"}, "^quantize: expected 'nf4', 'int8' or None, found 'none'$"),
        ({"dtype": "bf16"}, "^dtype: expected 'auto', 'float32', 'bfloat16' or 'float16', found 'bf16'$"),
        ({"dtype": torch.int8}, "^dtype: expected 'auto', 'float32', 'bfloat16' or 'float16', found 'int8'$"),
        ({"dtype": None}, "^dtype: expected 'auto', 'float32', 'bfloat16' or 'float16', found None$"),
    ],
)
def test_another_kind_or_dtype_is_refused(wrong, message, checkpoint):
    with pytest.raises(AdapterError, match=message):
        road_torch.load(checkpoint, **wrong)


@pytest.mark.parametrize(("stored", "asked"), [("nf4", "int8"), ("int8", "nf4"), ("nf4", "nf4")])
def test_a_quantised_checkpoint_is_quantised_no_other_way(stored, asked, checkpoint, tmp_path, monkeypatch, capsys):
    base, _ = road_torch.load(checkpoint, quantize=stored)
    base.save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    capsys.readouterr()
    prompts = lines(tmp_path / "prompts.jsonl", [{"prompt": "one"}])
    given = ["--base", tmp_path / "base", "--prompts", prompts, "--max-new-tokens", 2, "--quantize", asked]
    code, out, err = call(monkeypatch, capsys, *given)
    if stored == asked:
        assert code == 0, err
    else:
        check_refused(code, out, err, f"expected weights to quantise to {asked}, found some that are {stored} already")


def test_tokens_beyond_the_vocabulary_are_found_before_the_first_batch(tmp_path, monkeypatch, capsys):
    base = small_checkpoint(tmp_path / "base", vocab_size=12)
    capsys.readouterr()
    prompts = lines(tmp_path / "prompts.jsonl", [{"prompt": "one"}, {"prompt": "ten"}])
    given = ["--base", base, "--prompts", prompts, "--batch-size", 1, "--out", tmp_path / "out.jsonl"]
    monkeypatch.setattr(RoadModel, "generate", None)
    message = r"line 3: expected tokens below the model's vocab_size 12, found \d+ \('ten'\)"
    check_refused(*call(monkeypatch, capsys, *given), message)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "prompts.jsonl"]


ODD = {
    "a dtype": (
        "config.json",
        {"dtype": "torch.bfloat16"},
        "expected a dtype of torch in config.json, found 'torch.bf",
    ),
    "a function for a dtype": (
        "config.json",
        {"dtype": "sum"},
        "expected a dtype of torch in config.json, found 'sum'",
    ),
    "a model type": ("config.json", {"model_type": ["llama"]}, r"that transformers knows, found \['llama'\]"),
    "an end": ("generation_config.json", {"eos_token_id": "</s>"}, "as eos_token_id, found '</s>'"),
}


@pytest.mark.parametrize("case", ODD)
def test_odd_configs(case, checkpoint, tmp_path, monkeypatch, capsys):
    name, fields, message = ODD[case]
    base = broken_checkpoint(checkpoint, tmp_path / "base", None)
    (base / name).write_text(json.dumps({**json.loads((base / name).read_text()), **fields}))
    prompts = lines(tmp_path / "prompts.jsonl", [{"prompt": "one"}])
    check_refused(*call(monkeypatch, capsys, "--base", base, "--prompts", prompts, "--quantize", "nf4"), message)


def test_an_adapter_is_read_before_the_base(checkpoint, adapter_folder, tmp_path, monkeypatch, capsys):
    from road_torch import _generate

    monkeypatch.setattr(_generate, "load", None)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "adapter_config.json").write_bytes((adapter_folder / "a" / "adapter_config.json").read_bytes())
    prompts = lines(tmp_path / "prompts.jsonl", [{"prompt": "one", "adapter": "a"}])
    given = ["--base", checkpoint, "--prompts", prompts, "--adapter", f"a={tmp_path / 'a'}"]
    check_refused(*call(monkeypatch, capsys, *given), "expected a file adapter_model.safetensors, found none")


BAD_LINES = {
    "half a character": (r'{"prompt": "one", "id": "\ud83d"}', "line 3: expected JSON, .* surrogates not allowed"),
    "no json": ('{"prompt": "one"', "line 3: expected JSON"),
    "no object": ("[1]", "line 3: expected a JSON object, found list"),
    "no prompt": ('{"text": "one"}', "line 3: expected text in the field 'prompt' .* found no such field"),
    "a number": ('{"prompt": 1}', "line 3: expected text in the field 'prompt' .* found int"),
    "prompt and messages": (
        '{"prompt": "one", "messages": [{"role": "user", "content": "x"}]}',
        "line 3: expected a field 'prompt' or a field 'messages', found both",
    ),
    "no messages": ('{"messages": []}', "line 3: expected messages"),
    "an answer": ('{"messages": [{"role": "assistant", "content": "x"}]}', "line 3: .* not the assistant's"),
    "an adapter": ('{"prompt": "one", "adapter": "z"}', "line 3: expected an adapter out of a, __base__, found 'z'"),
    "an odd adapter": ('{"prompt": "one", "adapter": ["a"]}', "line 3: expected an adapter"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_bad_lines_are_named(case, checkpoint, adapter_folder, tmp_path, monkeypatch, capsys):
    line, message = BAD_LINES[case]
    prompts = lines(tmp_path / "prompts.jsonl", [ROWS[0], line])
    target = tmp_path / "out.jsonl"
    code, out, err = call(
        monkeypatch,
        capsys,
        "--base",
        checkpoint,
        "--prompts",
        prompts,
        "--adapter",
        f"a={adapter_folder / 'a'}",
        "--out",
        target,
    )
    check_refused(code, out, err, message)
    assert not target.exists()


def check_refused(code, out, err, message):
    assert (code, out) == (2, "")
    assert re.fullmatch(rf"error: .*{message}.*\n", err), err


def broken_checkpoint(checkpoint, folder, how):
    folder.mkdir()
    for file in checkpoint.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights, config = folder / "model.safetensors", folder / "config.json"
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif how == "no weights":
        weights.unlink()
    elif how == "model type":
        config.write_text(config.read_text().replace('"llama"', '"lama"'))
    elif how == "wrong size":
        config.write_text(config.read_text().replace('"intermediate_size": 192', '"intermediate_size": 256'))
    elif how == "more layers":
        config.write_text(config.read_text().replace('"num_hidden_layers": 3', '"num_hidden_layers": 4'))
    return folder


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", "expected a whole Hugging Face checkpoint"),
        ("no weights", "expected a whole Hugging Face checkpoint"),
        ("model type", "expected a model type that transformers knows, found 'lama'"),
        ("wrong size", "for every weight, found none for .*mlp.* and 6 more"),
        ("more layers", "found none for model.layers.3"),
    ],
)
def test_a_broken_checkpoint(how, message, checkpoint, tmp_path, monkeypatch, capsys):
    base = broken_checkpoint(checkpoint, tmp_path / "base", how)
    prompts = lines(tmp_path / "prompts.jsonl", [{"prompt": "one"}])
    check_refused(*call(monkeypatch, capsys, "--base", base, "--prompts", prompts), message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--adapter", "a"], "expected NAME=FOLDER, found 'a'"),
        (["--adapter", "a=/nowhere"], "/nowhere: expected a folder, found nothing"),
        (["--batch-size", "0"], "expected numbers from 1 up"),
        (["--temperature", "-1"], "expected 0 or more"),
        (["--temperature", "nan"], "expected 0 or more, found nan"),
        (["--temperature", "inf"], "expected 0 or more, found inf"),
        (["--seed", "-1"], "--seed: expected a number from 0 to 9223372036854775807, found -1"),
        (["--seed", str(1 << 70)], "--seed: expected a number from 0 to"),
        (["--base", "/nowhere"], "/nowhere: expected a folder, found nothing"),
        (["--prompts", "/nowhere.jsonl"], "expected a file of JSON lines"),
        (["--out", "/nowhere/out.jsonl"], "expected a file in a folder that is there"),
    ],
)
def test_bad_arguments(arguments, message, checkpoint, tmp_path, monkeypatch, capsys):
    prompts = lines(tmp_path / "prompts.jsonl", [{"prompt": "one"}])
    given = {"--base": checkpoint, "--prompts": prompts, arguments[0]: arguments[1]}
    check_refused(*call(monkeypatch, capsys, *(part for pair in given.items() for part in pair)), message)


def test_an_adapter_for_another_model_names_module_and_sizes(adapter_folder, tmp_path, monkeypatch, capsys):
    base = small_checkpoint(tmp_path / "other", intermediate_size=256)
    capsys.readouterr()
    prompts = lines(tmp_path / "prompts.jsonl", [{"prompt": "one"}])
    given = ["--base", base, "--prompts", prompts, "--adapter", f"a={adapter_folder / 'a'}"]
    check_refused(*call(monkeypatch, capsys, *given), r"expected 128 θ for .* with 256 outputs .* found shape \[96\]")
