"""Readers on hostile input: they raise only `AdapterError`, memory stays bounded, and nothing is written."""

import itertools
import json
import os
import pickle
import random
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import convert
from road_core import Adapter, AdapterError, RoadConfig, read_flax, read_peft, write_flax, write_peft
from road_core._files import inside, read_json
from road_core._safetensors import read_header, read_tensors

PATH = "model.layers.0.self_attn.q_proj"
CONFIG = RoadConfig(target_modules=["q_proj"], group_size=8)
NAMES = {
    "peft": ("adapter_config.json", "adapter_model.safetensors"),
    "flax": ("road_config.json", "road_adapter.safetensors"),
}
READ = {"peft": read_peft, "flax": read_flax}
# Files are a few kB; a reader that trusted a header would allocate far more.
BOUND = 8 << 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("hostile")


def valid(folder, form="peft"):
    """Returns the bytes of a valid adapter's config and tensors."""
    pair = (np.linspace(-1, 1, 16, dtype=np.float32), np.ones(16, np.float32))
    adapter = Adapter(CONFIG, {PATH: pair}, metadata={"note": "kept"})
    (write_peft if form == "peft" else write_flax)(folder / f"valid {form}", adapter, overwrite=True)
    return tuple((folder / f"valid {form}" / name).read_bytes() for name in NAMES[form])


def read_all(folder, form, config, tensors):
    """Puts the files into a folder and runs every reader on it; returns each one's result or its `AdapterError`.

    Asserts that they raise nothing else, that nothing is written, and that memory stays bounded.
    """
    target = folder / "case"
    target.mkdir(exist_ok=True)
    for other in target.iterdir():
        other.unlink()
    for name, data in zip(NAMES[form], (config, tensors), strict=True):
        (target / name).write_bytes(data)
    # The same files as a checkpoint, into which a valid adapter is merged.
    (target / "config.json").write_bytes(config)
    (target / "model.safetensors").write_bytes(tensors)
    valid(folder)
    listing = sorted(os.listdir(folder)), sorted(os.listdir(target))
    readers = [
        lambda: READ[form](target),
        lambda: convert.inspect(target),
        lambda: read_header(target / NAMES[form][1]),
        lambda: (convert.to_flax if form == "peft" else convert.to_torch)(target, folder / "new", dry_run=True),
        lambda: convert.merge(target, folder / "valid peft", folder / "new"),
    ]
    found = []
    tracemalloc.start()
    for reader in readers:
        try:
            found.append(reader())
        except AdapterError as error:
            found.append(error)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < BOUND
    assert (sorted(os.listdir(folder)), sorted(os.listdir(target))) == listing
    if isinstance(found[0], Adapter):
        assert all(
            np.isfinite(array).all()
            for pair in found[0].modules.values()
            for array in pair
            if array.dtype.fields is None
        )
    return dict(zip(("adapter", "inspected", "header", "converted", "merged"), found, strict=True))


FUZZ = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 9)
    | st.integers()
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["road_1", "(", ".*", "q_proj", "all-linear", "CAUSAL_LM", PATH]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@FUZZ
@given(form=st.sampled_from(sorted(NAMES)), seed=st.integers(0, 2**32), edits=st.integers(1, 6))
def test_damaged_bytes(folder, form, seed, edits):
    config, tensors = valid(folder, form)
    dice = random.Random(seed)
    data = bytearray(tensors)
    for _ in range(edits):
        at = dice.randrange(len(data) + 1) if dice.random() < 0.3 else dice.randrange(min(len(data), 420) + 1)
        kind = dice.randrange(4)
        if kind == 0:
            del data[at : at + dice.randrange(1, 9)]
        elif kind == 1:
            data[at:at] = dice.randbytes(dice.randrange(1, 9))
        elif kind == 2:
            data[at : at + 1] = bytes([dice.randrange(256)])
        else:
            data[at : at + 1] = dice.choice([b"9", b"-", b"[", b"]", b"{", b'"', b",", b":", b"0"])
    found = read_all(folder, form, config, bytes(data))
    # What one reader accepts as an adapter, the one that draws it accepts too, with the header's tensors.
    assert isinstance(found["adapter"], Adapter) == (not isinstance(found["inspected"], AdapterError))
    if isinstance(found["adapter"], Adapter):
        tensors = {name: entry.shape for name, entry in found["header"][0].items()}
        arrays = [array.shape for pair in found["adapter"].modules.values() for array in pair]
        assert sorted(arrays) == sorted(map(tuple, tensors.values()))


SIZES = st.integers(0, 40) | st.sampled_from([-1, 2**31, 2**62, 2**64, 10**30])
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "F64", "I64", "BOOL", "F8_E4M3", "F4", "C64", "X"]),
        "shape": st.lists(SIZES, max_size=3) | st.just([1] * 70) | JUNK,
        "data_offsets": st.lists(SIZES, min_size=2, max_size=2) | JUNK,
    }
)
KEYS = st.sampled_from(
    [f"base_model.model.{PATH}.road_theta", f"base_model.model.{PATH}.road_alpha", "", "../x"]
) | st.text(max_size=5)


@FUZZ
@given(
    entries=st.lists(st.tuples(KEYS | st.just("__metadata__"), ENTRY | JUNK), max_size=4),
    length=st.none() | st.sampled_from([0, 7, 2**20, 2**31, 2**40, 2**63, 2**64 - 1]),
    body=st.binary(max_size=64),
)
@example(entries=[("a", {"dtype": "F32", "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]})], length=None, body=b"")
@example(entries=[("a", {"dtype": "F32", "shape": [1] * 70, "data_offsets": [0, 4]})], length=None, body=b"1234")
def test_made_up_headers(folder, entries, length, body):
    # Written by hand, so that a name can occur twice.
    text = "{" + ", ".join(f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in entries) + "}"
    head = text.encode()
    data = struct.pack("<Q", len(head) if length is None else length) + head + body
    found = read_all(folder, "peft", valid(folder)[0], data)["header"]
    if not isinstance(found, AdapterError):
        # A header that is accepted accounts for every byte once.
        begin = 8 + (len(head) if length is None else length)
        spans = sorted((entry.start, entry.start + entry.nbytes) for entry in found[0].values())
        assert sum(stop - start for start, stop in spans) == len(data) - begin
        assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(spans))


FIELDS = [
    "variant",
    "group_size",
    "target_modules",
    "modules_to_save",
    "exclude_modules",
    "layers_to_transform",
    "peft_type",
    "x",
]


@FUZZ
@given(fields=st.dictionaries(st.sampled_from(FIELDS), JUNK, max_size=4), form=st.sampled_from(sorted(NAMES)))
def test_made_up_configs(folder, fields, form):
    config, tensors = valid(folder, form)
    found = read_all(folder, form, json.dumps({**json.loads(config), **fields}).encode(), tensors)["adapter"]
    if isinstance(found, Adapter):
        # The tensors' own metadata say what they are; a config that contradicts them is refused.
        assert (found.config.variant, found.config.group_size) == (CONFIG.variant, CONFIG.group_size)


@FUZZ
@given(text=st.binary(max_size=60) | JUNK.map(lambda value: json.dumps(value).encode()))
def test_what_is_no_config(folder, text):
    assert isinstance(read_all(folder, "peft", text, valid(folder)[1])["adapter"], AdapterError)


def header(text, body=b"1234"):
    return struct.pack("<Q", len(text)) + text + body


ONE = b'"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
BROKEN = {
    "a pickle": pickle.dumps({"a": [1.0] * 50}),
    "nothing": b"",
    "a name twice": header(b"{" + ONE + b", " + ONE + b"}"),
    "overlapping": header(b"{" + ONE + b", " + ONE.replace(b'"a"', b'"b"') + b"}"),
    "deep": header(b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "half a surrogate pair": header(b"{" + ONE.replace(b'"a"', b'"\\ud800"') + b"}"),
    "too long": struct.pack("<Q", 2**63) + b"{}",
    "bytes behind the last tensor": header(b"{" + ONE + b"}", b"12345678"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_tensors(name, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(BROKEN[name])
    for read in (read_header, read_tensors):
        with pytest.raises(
            AdapterError, match=r"a\.safetensors: expected a whole safetensors file, found a broken one"
        ):
            read(path)


JSONS = {
    "deep": ("[" * 200_000, "maximum recursion depth"),
    "deep objects": ('{"a":' * 100_000, "maximum recursion depth"),
    "a name twice": ('{"group_size": 2, "group_size": 4}', "'group_size' stands there twice"),
    "a name twice within": ('{"a": [{"b": 1, "b": 1}]}', "'b' stands there twice"),
    "half a surrogate pair": (r'{"target_modules": ["\uD800"]}', "surrogates not allowed"),
    "digits without end": ('{"group_size": ' + "9" * 5000 + "}", "Exceeds the limit"),
}


@pytest.mark.parametrize("name", JSONS)
def test_broken_json(name, tmp_path):
    text, message = JSONS[name]
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(AdapterError, match=rf"c\.json: expected a JSON object, .* can't be read \(.*{message}"):
        read_json(tmp_path / "c.json")


def test_a_json_file_without_end(tmp_path):
    with (tmp_path / "c.json").open("wb") as file:
        file.truncate(1 << 40)  # sparse: it takes no space
    with pytest.raises(AdapterError, match="1099511627776 bytes are too many"):
        read_json(tmp_path / "c.json")


@pytest.mark.parametrize("name", ["../a", "/etc/passwd", "x/../../a", "a\0b", "x" * 5000, "loop", "pipe", "sub", ""])
def test_names_that_are_no_file_of_the_folder(name, tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "sub").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(AdapterError, match=r"expected (a file|the name of a file)"):
        inside(tmp_path, name)
