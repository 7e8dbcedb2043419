"""Merged checkpoints, compared with PEFT, road_torch and the reference."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import bitsandbytes as bnb
import pytest
import safetensors.numpy
import safetensors.torch
import torch
import transformers
from _compare import assert_close, named_values
from _models import small_checkpoint, small_model
from peft import RoadConfig as PeftRoadConfig
from peft import get_peft_model

import convert
import road_core
import road_torch
from convert import _merge
from convert._mapping import map_to_flax
from road_core import Adapter, AdapterError, RoadConfig, read_peft, write_flax, write_peft

IDS = torch.arange(3, 20)[None]
ROOT = Path(__file__).parents[2]


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits


def load(directory, dtype=torch.float32):
    """Loads a merged checkpoint; a missing or unexpected weight is an error."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info.values()), info
    return model.eval()


def gpt2(directory, **changes):
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=160, n_embd=128, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2, **changes
    )
    model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3 if parameter.ndim == 1 else parameter.shape[0] ** -0.5)
    model.save_pretrained(directory, max_shard_size="200KB")
    return model.eval()


def peft_adapter(directory, kind="llama", **fields):
    torch.manual_seed(1)
    config = PeftRoadConfig(**{"init_weights": False, "target_modules": "all-linear", "group_size": 8, **fields})
    model = get_peft_model(small_model(kind), config)
    model.save_pretrained(directory)
    return model


def contents(directory):
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


@pytest.mark.parametrize(
    ("kind", "variant"),
    [
        ("llama", "road_1"),
        ("qwen2", "road_2"),
        ("qwen3", "road_4"),
        ("phi3", "road_1"),
        ("gemma3", "road_2"),
        ("mixtral", "road_1"),
    ],
)
def test_as_peft_merges(kind, variant, tmp_path):
    base = small_model(kind)
    base.save_pretrained(tmp_path / "base", max_shard_size="300KB")
    theirs = peft_adapter(tmp_path / "adapter", kind, variant=variant)
    expected = logits(theirs)
    convert.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base", "merged"]
    assert sorted(os.listdir(tmp_path / "merged")) == sorted(os.listdir(tmp_path / "base"))
    assert len(list((tmp_path / "merged").glob("*-of-*.safetensors"))) > 2

    merged = load(tmp_path / "merged")
    assert_close(logits(merged), expected, "float32", moved_from=logits(base))
    old, new = theirs.merge_and_unload().state_dict(), merged.state_dict()
    assert old.keys() == new.keys()
    for name, value in old.items():
        assert_close(new[name], value, "float32")
    # A layer without a bias stays without one, and layers without an adapter keep their bytes.
    (embedding,) = (name for name in new if name.endswith("embed_tokens.weight"))
    torch.testing.assert_close(new[embedding], base.state_dict()[embedding], rtol=0, atol=0)
    indices = [json.loads((tmp_path / d / "model.safetensors.index.json").read_text()) for d in ("base", "merged")]
    assert indices[0]["weight_map"] == indices[1]["weight_map"]
    assert indices[0]["metadata"]["total_size"] == indices[1]["metadata"]["total_size"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_rounded_once_to_the_stored_dtype(dtype, tmp_path, monkeypatch):
    # Blocks of rows that end within a group.
    monkeypatch.setattr(_merge, "_BLOCK", 4 * 128 * 11)
    small_checkpoint(tmp_path / "base", "qwen2", dtype=dtype)
    peft_adapter(tmp_path / "adapter", "qwen2", variant="road_2", group_size=64)
    convert.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    old, new = (safetensors.torch.load_file(tmp_path / d / "model.safetensors") for d in ("base", "merged"))
    adapter = read_peft(tmp_path / "adapter")
    name = "model.layers.1.self_attn.q_proj"
    theta, alpha = adapter.modules[name]
    for leaf in ("weight", "bias"):
        exact = road_core.merge(old[f"{name}.{leaf}"].double().numpy(), theta, alpha, variant="road_2", group_size=64)
        once = torch.from_numpy(exact).to(dtype)
        merged = new[f"{name}.{leaf}"]
        assert merged.dtype == dtype
        # Computed in float32, so now and then the result is the neighbour of the nearest value.
        if dtype != torch.float64:
            assert (merged == once).float().mean() > 0.999
        assert_close(merged.double(), exact, {torch.float64: "float64"}.get(dtype, str(dtype).removeprefix("torch.")))
    assert sorted(p.name for p in (tmp_path / "merged").iterdir()) == sorted(
        p.name for p in (tmp_path / "base").iterdir()
    )


@pytest.mark.parametrize("bare", [False, True])
def test_the_transposed_weights_of_gpt2(bare, tmp_path):
    base = gpt2(tmp_path / "base")
    config = RoadConfig(target_modules=["c_attn", "c_proj", "c_fc"], group_size=16, init_weights=False)
    model = road_torch.RoadModel(base, config)
    model.save_pretrained(tmp_path / "adapter")
    if bare:  # as on the hub: without the first name of the paths
        shutil.rmtree(tmp_path / "base")
        gpt2(tmp_path / "full").transformer.save_pretrained(tmp_path / "base")
    convert.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    with model.disable_adapter():
        plain = logits(model)
    assert_close(logits(load(tmp_path / "merged")), logits(model), "float32", moved_from=plain)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("change", ["rotated", "saved", "embedding"])
def test_a_head_tied_to_the_embedding_gets_its_own(change, kind, tmp_path):
    if kind == "gpt2":
        base, embedding = gpt2(tmp_path / "base"), "wte"
    else:
        base, embedding = small_model(kind, tie_word_embeddings=True), "embed_tokens"
        base.save_pretrained(tmp_path / "base", max_shard_size="300KB")
    plain = logits(base)
    targets, saved = ["lm_head"] if change == "rotated" else ["gate_proj", "c_fc"], None
    if change != "rotated":
        saved = ["lm_head"] if change == "saved" else [embedding]
    config = RoadConfig(target_modules=targets, modules_to_save=saved, group_size=8, init_weights=False)
    model = road_torch.RoadModel(base, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.mul_(1.5)
    model.save_pretrained(tmp_path / "adapter")
    convert.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged = load(tmp_path / "merged")
    assert not merged.config.tie_word_embeddings
    assert_close(logits(merged), logits(model), "float32", moved_from=plain)


def test_a_flax_adapter(tmp_path):
    small_checkpoint(tmp_path / "base")
    theirs = peft_adapter(tmp_path / "adapter", modules_to_save=["norm"])
    convert.to_flax(tmp_path / "adapter", tmp_path / "flax")
    convert.merge(tmp_path / "base", tmp_path / "flax", tmp_path / "merged")
    assert_close(logits(load(tmp_path / "merged")), logits(theirs), "float32", moved_from=logits(small_model()))
    assert (tmp_path / "merged" / "tokenizer.json").read_bytes() == (tmp_path / "base" / "tokenizer.json").read_bytes()


def test_what_stands_outside_of_a_subspace_is_not_merged(tmp_path):
    small_checkpoint(tmp_path / "base")
    peft_adapter(tmp_path / "whole")
    whole = read_peft(tmp_path / "whole")
    half = Adapter(dataclasses.replace(whole.config, subspace=(0, 0.5)), whole.modules)
    write_peft(tmp_path / "half", half)
    record = map_to_flax(half)
    # In Flax's format, θ and α outside of the subspace are kept as they are.
    write_flax(tmp_path / "flax", record)
    for name in ("half", "flax"):
        convert.merge(tmp_path / "base", tmp_path / name, tmp_path / f"merged {name}")
    assert contents(tmp_path / "merged half") == contents(tmp_path / "merged flax")
    model = road_torch.RoadModel.from_pretrained(small_model(), tmp_path / "half")
    found = load(tmp_path / "merged half")
    assert_close(logits(found), logits(model), "float32", moved_from=logits(small_model()))
    rows = found.model.layers[0].self_attn.q_proj.weight, small_model().model.layers[0].self_attn.q_proj.weight
    changed = (rows[0] != rows[1]).any(1)
    # The pairs of the first half of each layer, i.e. the first half of its groups.
    assert changed[:64].all()
    assert not changed[64:].any()


def test_an_interrupted_merge_goes_on(tmp_path, monkeypatch):
    small_model().save_pretrained(tmp_path / "base", max_shard_size="200KB")
    peft_adapter(tmp_path / "adapter")
    arguments = tmp_path / "base", tmp_path / "adapter", tmp_path / "merged"
    convert.merge(*arguments)
    whole = contents(tmp_path / "merged")
    shutil.rmtree(tmp_path / "merged")

    written = []
    write_shard = _merge._write_shard

    def interrupted(path, *rest):
        if len(written) == 3:
            path.with_name(f"{path.name}.part").write_bytes(b"half")
            raise KeyboardInterrupt
        written.append(path.name)
        return write_shard(path, *rest)

    monkeypatch.setattr(_merge, "_write_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert.merge(*arguments)
    assert sorted(os.listdir(tmp_path)) == [".merged.merging", "adapter", "base"]
    draft = tmp_path / ".merged.merging"
    # One of the three is damaged in the meantime.
    damaged = draft / written[1]
    damaged.write_bytes(damaged.read_bytes()[:-4] + b"abcd")

    again = []

    def noted(path, *rest):
        again.append(path.name)
        return write_shard(path, *rest)

    monkeypatch.setattr(_merge, "_write_shard", noted)
    convert.merge(*arguments)
    assert written[1] in again
    assert not {written[0], written[2]} & set(again)
    assert contents(tmp_path / "merged") == whole
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base", "merged"]

    # A merge of another adapter doesn't continue from these shards.
    shutil.rmtree(tmp_path / "merged")
    monkeypatch.setattr(_merge, "_write_shard", interrupted)
    written.clear()
    with pytest.raises(KeyboardInterrupt):
        convert.merge(*arguments)
    peft_adapter(tmp_path / "other", group_size=2)
    monkeypatch.setattr(_merge, "_write_shard", write_shard)
    convert.merge(tmp_path / "base", tmp_path / "other", tmp_path / "merged")
    assert contents(tmp_path / "merged").keys() == whole.keys()
    assert not any(contents(tmp_path / "merged")[name] == whole[name] for name in written[1:3])


@pytest.mark.parametrize("bits", [32, 4])
def test_a_few_rows_in_memory(bits, tmp_path):
    rows, columns = 4096, 2048
    weight = named_values("w", rows, columns)
    (tmp_path / "base").mkdir()
    parts = {"": torch.from_numpy(weight)}
    if bits == 4:
        # Each block covers two rows, so that not every row ends where a block does.
        codes, state = bnb.functional.quantize_4bit(parts[""], blocksize=4096, compress_statistics=True)
        weight = bnb.functional.dequantize_4bit(codes, state).numpy()
        parts = {"": codes, **{f".{side}": tensor for side, tensor in state.as_dict(packed=True).items()}}
    tensors = {f"model.layers.{i}.mlp.up_proj.weight{side}": parts[side].clone() for i in range(2) for side in parts}
    safetensors.torch.save_file(tensors, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text("{}")
    pair = (named_values("theta", rows // 2), named_values("alpha", rows // 2, mean=1.0))
    config = RoadConfig(target_modules=["up_proj"], group_size=rows)
    modules = dict.fromkeys(["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"], pair)
    write_peft(tmp_path / "adapter", Adapter(config, modules))
    tracemalloc.start()
    convert.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < weight.nbytes
    with safetensors.safe_open(tmp_path / "merged" / "model.safetensors", "np") as file:
        merged = file.get_tensor("model.layers.1.mlp.up_proj.weight")
    assert_close(merged[:, :9], road_core.merge(weight[:, :9], *pair, variant="road_1", group_size=rows), "float32")


def configured(**fields):
    def change(folder):
        path = folder / "base" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return change


QUANTISED = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4, double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4, double": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_quant_storage": "bfloat16",
    },
    "int8": {"load_in_8bit": True},
}


@pytest.mark.parametrize("kind", QUANTISED)
def test_a_checkpoint_of_bitsandbytes_is_dequantised(kind, tmp_path):
    base, saved, plain = (tmp_path / name for name in ("base", "saved", "plain"))
    small_checkpoint(base, dtype=torch.bfloat16)
    options = transformers.BitsAndBytesConfig(**QUANTISED[kind])
    load = transformers.AutoModelForCausalLM.from_pretrained
    load(base, quantization_config=options, dtype=torch.bfloat16).save_pretrained(saved, max_shard_size="100KB")
    theirs = load(saved, dtype=torch.bfloat16)
    expected = {}
    for name, module in theirs.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            values = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            assert values.dtype == torch.bfloat16
            expected[f"{name}.weight"] = values
        elif isinstance(module, bnb.nn.Linear8bitLt):
            expected[f"{name}.weight"] = bnb.functional.int8_vectorwise_dequant(module.weight.CB, module.weight.SCB)
    assert len(expected) == 3 * 7
    # Merging into plain float32 is tested above; transformers rounds int8 to the model's dtype.
    dequantised = theirs.dequantize().state_dict()
    model = load(base, dtype=torch.float32)
    model.load_state_dict({**dequantised, **expected})
    model.save_pretrained(plain)

    peft_adapter(tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    convert.merge(plain, tmp_path / "adapter", tmp_path / "wanted")
    convert.merge(saved, tmp_path / "adapter", tmp_path / "merged")
    wanted, merged = (load(tmp_path / name, dtype="auto") for name in ("wanted", "merged"))
    assert not hasattr(merged.config, "quantization_config")
    found = merged.state_dict()
    assert found.keys() == dequantised.keys()
    for name, tensor in wanted.state_dict().items():
        assert found[name].dtype == torch.bfloat16
        assert torch.equal(found[name], tensor.bfloat16()), name
        assert torch.equal(found[name], dequantised[name]) != ("q_proj" in name or "down_proj" in name), name


def broken_codes(change):
    def break_it(folder):
        path = folder / "base" / "model.safetensors"
        tensors, name = safetensors.torch.load_file(path), "model.layers.1.mlp.down_proj.weight"
        packed, state = bnb.functional.quantize_4bit(tensors[name], quant_type="nf4", compress_statistics=True)
        tensors.update({f"{name}.{side}": tensor for side, tensor in state.as_dict(packed=True).items()})
        tensors[name] = packed
        change(tensors, name)
        safetensors.torch.save_file(tensors, path, {"format": "pt"})

    return break_it


def restate(tensors, name, **fields):
    key = f"{name}.quant_state.bitsandbytes__nf4"
    text = json.dumps({**json.loads(bytes(tensors[key].tolist())), **fields}).encode()
    tensors[key] = torch.tensor(list(text), dtype=torch.uint8)


def other_width(folder):
    shutil.rmtree(folder / "base")
    small_checkpoint(folder / "base", intermediate_size=256)


def too_large(folder):
    shutil.rmtree(folder / "base")
    small_checkpoint(folder / "base", dtype=torch.float16)
    adapter = read_peft(folder / "adapter")
    modules = {path: (theta, alpha * 1e6) for path, (theta, alpha) in adapter.modules.items()}
    write_peft(folder / "adapter", Adapter(adapter.config, modules), overwrite=True)


def integers(folder):
    path = folder / "base" / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    name = "model.layers.0.self_attn.q_proj.weight"
    safetensors.torch.save_file({**tensors, name: tensors[name].to(torch.int8)}, path, {"format": "pt"})


BAD = {
    "quantised": (
        configured(quantization_config={"quant_method": "gptq"}),
        r"base: expected weights that bitsandbytes quantised or nobody did, found another",
    ),
    "a lost side": (
        broken_codes(lambda t, n: t.pop(f"{n}.nested_absmax")),
        r"base: model\.layers\.1\.mlp\.down_proj\.weight: expected bitsandbytes' nf4 parts, .*nested_absmax",
    ),
    "a short side": (
        broken_codes(lambda t, n: t.update({f"{n}.absmax": t[f"{n}.absmax"][1:]})),
        r"nf4 parts, found broken ones \(U8 \[383\] for 384 of U8\)",
    ),
    "another shape": (broken_codes(lambda t, n: restate(t, n, shape=[2, 192])), r"24576 codes for shape \[2, 192\]"),
    "blocks of none": (broken_codes(lambda t, n: restate(t, n, blocksize=0)), r"found broken ones \(a size of 0\)"),
    "a number as architecture": (configured(architectures=7), r"architectures: expected a list of names, found 7$"),
    "a list as model type": (configured(model_type=["llama"]), r"model_type: expected a name, found \['llama'\]$"),
    "width": (other_width, r"found model\.layers\.0\.mlp\.gate_proj\.weight \[256, 128\] for 192 outputs, "),
    "too large": (too_large, r"model\.layers\.\d\..*weight: expected finite values after merging, found \d+ that are"),
    "integers": (integers, r"in floating point, found model\.layers\.0\.self_attn\.q_proj\.weight of I8$"),
    "deep": (lambda d: small_checkpoint(d / "base", num_hidden_layers=2), r"found no model\.layers\.2\.mlp\.down_proj"),
    "pickle": (
        lambda d: (d / "base" / "model.safetensors").rename(d / "base" / "pytorch_model.bin"),
        "expected a file model.safetensors, found none",
    ),
    "truncated": (lambda d: os.truncate(d / "base" / "model.safetensors", 5000), "expected a whole safetensors file"),
    "taken": (lambda d: (d / "merged").write_text(""), "merged: expected an empty or new folder, found a file"),
    "a link": (
        lambda d: (d / "merged").symlink_to("nowhere"),
        "merged: expected an empty or new folder, found a link to nothing",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_leaves_nothing(case, tmp_path):
    break_it, message = BAD[case]
    small_checkpoint(tmp_path / "base")
    peft_adapter(tmp_path / "adapter")
    break_it(tmp_path)
    listing = sorted(os.listdir(tmp_path))
    with pytest.raises(AdapterError, match=message):
        convert.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert sorted(os.listdir(tmp_path)) == listing


def test_a_link_to_an_empty_folder_is_filled(tmp_path):
    small_checkpoint(tmp_path / "base")
    peft_adapter(tmp_path / "adapter")
    (tmp_path / "there").mkdir()
    (tmp_path / "merged").symlink_to("there")
    convert.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert (tmp_path / "there" / "model.safetensors").is_file()
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base", "merged", "there"]


def test_an_index_that_leads_out_of_the_folder(tmp_path):
    small_model().save_pretrained(tmp_path / "base", max_shard_size="300KB")
    peft_adapter(tmp_path / "adapter")
    path = tmp_path / "base" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["lm_head.weight"] = "../adapter/adapter_model.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(AdapterError, match=r"expected names of files in the folder, found '\.\./adapter"):
        convert.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")


def test_heads_that_cannot_be_untied_are_refused(tmp_path):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "base")
    pair = (named_values("theta", 32), named_values("alpha", 32, mean=1.0))
    adapter = Adapter(RoadConfig(target_modules=["decoder"]), {"cls.predictions.decoder": pair})
    write_peft(tmp_path / "adapter", adapter)
    with pytest.raises(AdapterError, match=r"found cls\.predictions\.decoder\.weight, which an embedding shares"):
        convert.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")


def test_the_command(tmp_path):
    small_checkpoint(tmp_path / "base")
    peft_adapter(tmp_path / "adapter")
    line = [sys.executable, "-m", "convert", "merge", "base", "adapter", "merged"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "merged checkpoint: merged\n", "")
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: merged: expected an empty or new folder, found one that already holds something\n"
