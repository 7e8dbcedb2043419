"""The scripts in examples/, each run as a user runs it: they print what their pages say."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from _models import WORDS, small_checkpoint

import road_torch
from road_core import read_flax
from road_torch import RoadConfig, RoadModel

ROOT = Path(__file__).parents[2]


def run(name, *arguments, folder):
    """Runs a script in a folder and returns what it prints."""
    # A user's JAX promotes dtypes and ranks.
    user = {"JAX_NUMPY_DTYPE_PROMOTION": "standard", "JAX_NUMPY_RANK_PROMOTION": "allow"}
    environment = {**os.environ, **user, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, ROOT / "examples" / name, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def losses(text):
    return [float(loss) for loss in re.findall(r"^step \d+: loss (.+)$", text, re.MULTILINE)]


def difference(text):
    return float(re.findall(r"^merged model, greatest difference of .*: (.+)$", text, re.MULTILINE)[0])


@pytest.mark.parametrize(("name", "default"), [("train_linen.py", "example-linen"), ("train_nnx.py", "example-nnx")])
def test_an_adapter_is_trained_saved_and_merged(name, default, tmp_path):
    text = run(name, folder=tmp_path)
    first, *_, last = losses(text)
    assert last < first / 50
    assert difference(text) < 1e-4
    ((base, adapter),) = re.findall(r"held-out accuracy: base (.+), adapter (.+)", text)
    assert float(base) < 0.5
    assert float(adapter) > 0.9
    saved = read_flax(tmp_path / "runs" / default)
    assert set(saved.modules) == {"up", "middle"}
    # θ and α of 128 outputs each.
    assert "trained: 256 numbers" in text
    if name == "train_nnx.py":
        assert "the base is as it was" in text


def test_layers_of_ones_own_are_adapted(tmp_path):
    text = run("own_layer.py", folder=tmp_path)
    assert "turned: θ of shape (32,)" in text
    assert "heads: θ of shape (32,)" in text
    first, *_, last = losses(text)
    assert last < first / 1000
    assert difference(text) < 1e-4


def test_skills_that_were_trained_apart_add(tmp_path):
    text = run("compose.py", folder=tmp_path)
    assert "composed in either order: the same numbers" in text
    rows = re.findall(r"^(\w+) +directions (\S+) +rings (\S+)$", text, re.MULTILINE)
    scores = {name: (float(directions), float(rings)) for name, directions, rings in rows}
    # Rows in one batch may differ in the last bit, and so may a point on a border.
    assert scores["both"] == pytest.approx((scores["directions"][0], scores["rings"][1]), abs=0.005)
    assert scores["neither"] == pytest.approx((scores["rings"][0], scores["directions"][1]), abs=0.005)
    for question in range(2):
        assert scores["both"][question] > 0.95
        assert scores["neither"][question] < 0.75


def test_many_adapters_are_served(tmp_path):
    """More adapters than may be loaded at once; each answers as it does by itself."""
    checkpoint = small_checkpoint(tmp_path / "base", vocab_size=len(WORDS))
    names = ["a", "b", "c"]
    for seed, name in enumerate(names):
        model = RoadModel(road_torch.load(checkpoint)[0], RoadConfig(target_modules="all-linear"))
        torch.manual_seed(seed)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "road_" in key:
                    parameter.add_(torch.randn_like(parameter) * 0.5)
        model.save_pretrained(tmp_path / "adapters" / name)
    base, tokenizer = road_torch.load(checkpoint, quantize="nf4")
    alone = RoadModel(base).eval()
    for name in names:
        alone.load_adapter(tmp_path / "adapters" / name, adapter_name=name)
    expected = {}
    for name in ["__base__", *names]:
        row = {"prompt": "one two three", "adapter": name}
        (answer,) = road_torch.generate(alone, tokenizer, [row], max_new_tokens=6)
        expected[name] = answer["completion"].strip()
    assert len(set(expected.values())) > 2

    arguments = ["--prompt", "one two three", "--max-loaded", "2", "--max-new-tokens", "6"]
    text = run("serve_many.py", "base", "adapters", *arguments, folder=tmp_path)
    size = sum(p.numel() * p.element_size() for n, p in alone.named_parameters() if "road_" in n) / len(names)
    assert f"3 adapters, {size / 1e6:.2f} MB of θ and α each, at most 2 on the device" in text
    lines = text.splitlines()
    swapped = next(i for i, line in enumerate(lines) if "was replaced by" in line)
    for name, answer in expected.items():
        assert f"{name}: {answer}" in lines[:swapped]
    assert lines[swapped] == "a was replaced by adapters/c: another answer"
    assert lines[swapped + 1] == f"a: {expected['c']}"
