"""Verification on small random checkpoints; it must also fail where it should."""

import os
import re
import sys

import jax
import numpy as np
import pytest
import torch
from _compare import named_values
from _models import small_checkpoint, small_model
from peft import RoadConfig as PeftRoadConfig
from peft import get_peft_model
from rich.console import Console

import convert
from convert import _verify, _verify_flax, _verify_torch
from convert._verify import _compare
from road_core import AdapterError, read_flax, write_flax


def make(directory, kind="llama", layout="scanned", **fields):
    """Writes a checkpoint, an adapter by PEFT and its Flax form; returns the three folders."""
    base, theirs, flax = (directory / name for name in ("base", "peft", "flax"))
    small_checkpoint(base, kind)
    torch.manual_seed(1)
    config = PeftRoadConfig(**{"init_weights": False, "target_modules": "all-linear", "group_size": 8, **fields})
    get_peft_model(small_model(kind), config).save_pretrained(theirs)
    convert.to_flax(theirs, flax, family=kind, layout=layout)
    return flax, theirs, base


@pytest.fixture
def in_this_process(monkeypatch):
    """Runs both sides here, without the imports of the processes that they have otherwise, as in other tests."""
    sides = {"flax": _verify_flax.main, "torch": _verify_torch.main}
    monkeypatch.setattr(_verify, "_run", lambda side, _, *folders: sides[side](*map(str, folders)))
    # The Flax side sets it for its process.
    precision = jax.config.jax_default_matmul_precision
    yield
    jax.config.update("jax_default_matmul_precision", precision)


PROMPTS = ["one two three four", "ten nine", "five </s> six seven eight nine ten one"]


@pytest.mark.parametrize(
    ("kind", "layout", "fields"),
    [
        ("llama", "scanned", {"modules_to_save": ["lm_head"]}),
        ("qwen3", "unrolled", {"modules_to_save": ["lm_head"]}),
        ("gemma3_text", "scanned", {}),
        ("gemma3", "scanned", {"target_modules": r".*language_model.*_proj"}),
        ("qwen3_moe", "scanned", {}),
        ("phi3", "scanned", {"modules_to_save": ["lm_head"]}),
    ],
)
def test_both_frameworks_agree(kind, layout, fields, tmp_path, in_this_process):
    flax, theirs, base = make(tmp_path, kind, layout, **fields)
    with open(os.devnull, "w") as quiet:
        result = convert.verify(flax, theirs, base, prompts=PROMPTS, console=Console(file=quiet))
    assert result.positions == 4 + 2 + 8
    assert result.passed
    assert result.telling
    assert result.moved > 0.1
    assert result.greedy_agreement == 1
    assert 0 < result.mean_difference < result.max_difference < 1e-4 * result.scale
    assert result.base_difference < 1e-4 * result.scale


def test_an_adapter_that_differs_is_found(tmp_path, in_this_process):
    flax, theirs, base = make(tmp_path)
    adapter = read_flax(flax)
    theta, alpha = adapter.modules["model.layers.mlp.up_proj"]
    theta = theta.copy()
    theta[2, 5] += 0.5
    adapter.modules["model.layers.mlp.up_proj"] = (theta, alpha)
    write_flax(tmp_path / "other", adapter)
    result = convert.verify(tmp_path / "other", theirs, base, prompts=PROMPTS)
    assert not result.passed
    assert result.max_difference > 1e-3 * result.scale
    assert result.base_difference < 1e-4 * result.scale


def test_what_does_not_belong_together(tmp_path):
    flax, theirs, base = make(tmp_path)
    small_checkpoint(tmp_path / "wide", intermediate_size=256)
    with pytest.raises(AdapterError, match=r"(up|gate)_proj"):
        convert.verify(flax, theirs, tmp_path / "wide", prompts=PROMPTS)
    small_checkpoint(tmp_path / "deep", num_hidden_layers=4)
    with pytest.raises(AdapterError, match=r"flax: expected 4 layers, as in .*deep, found 3"):
        convert.verify(flax, theirs, tmp_path / "deep", prompts=PROMPTS)
    os.truncate(base / "model.safetensors", 1000)
    with pytest.raises(AdapterError, match=r"model\.safetensors"):
        convert.verify(flax, theirs, base, prompts=PROMPTS)


def test_prompts_and_tokens(tmp_path):
    flax, theirs, base = make(tmp_path)
    with pytest.raises(AdapterError, match="prompts: expected at least one, found none"):
        convert.verify(flax, theirs, base, prompts=[])
    with pytest.raises(AdapterError, match="prompt ' ': expected tokens below vocab_size 160, found none"):
        convert.verify(flax, theirs, base, prompts=[" "])
    with pytest.raises(AdapterError, match=r"tolerance: expected a number above 0, found -1\.0"):
        convert.verify(flax, theirs, base, tolerance=-1.0)
    (base / "tokenizer.json").write_text("{")
    with pytest.raises(AdapterError, match=r"tokenizer\.json: expected a tokenizer, found a file that can't be read"):
        convert.verify(flax, theirs, base, prompts=PROMPTS)
    (base / "tokenizer.json").unlink()
    with pytest.raises(AdapterError, match=r"expected a tokenizer\.json for the prompts, found none"):
        convert.verify(flax, theirs, base, prompts=PROMPTS)
    result = convert.verify(flax, theirs, base)
    assert result.passed
    assert result.positions == 5 + 16 + 11 + 24


def test_the_command_says_by_its_exit_code(tmp_path, monkeypatch, capsys):
    from convert.__main__ import main

    run, logits = _verify._run, {}

    def run_once(side, name, base, adapter, work):
        """Neither framework needs to compute the same logits again."""
        if side not in logits:
            run(side, name, base, adapter, work)
            logits[side] = {path.name: path.read_bytes() for path in work.glob(f"{side}_*.npy")}
        for file, content in logits[side].items():
            (work / file).write_bytes(content)

    monkeypatch.setattr(_verify, "_run", run_once)
    flax, theirs, base = map(str, make(tmp_path))
    line = ["road-convert", "verify", flax, theirs, "--base", base, "--prompt", PROMPTS[0], "--prompt", PROMPTS[1]]
    monkeypatch.setattr(sys, "argv", line)
    main()
    out = capsys.readouterr().out
    assert re.search(r"same greedy next token +100\.0% of 6 positions", out)
    assert "within the tolerance of 0.0001 of the greatest logit" in out
    monkeypatch.setattr(sys, "argv", [*line, "--tolerance", "1e-12"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1
    assert "past the tolerance of 1e-12" in capsys.readouterr().out


def test_the_figures():
    base = named_values("base", 3, 5)
    torch_logits = base + np.float32([[0, 1, 0, 0, 0]])
    flax_logits = torch_logits.copy()
    flax_logits[1, 2] += 0.25
    found = {
        ("flax", "base"): base + np.float32(0.125),
        ("torch", "base"): base,
        ("flax", "adapted"): flax_logits,
        ("torch", "adapted"): torch_logits,
    }
    result = _compare(found, 1e-4)
    assert result.max_difference == pytest.approx(0.25, rel=1e-6)
    assert result.mean_difference == pytest.approx(0.25 / 15, rel=1e-6)
    assert result.base_difference == pytest.approx(0.125, rel=1e-5)
    assert result.scale == np.abs(torch_logits).max()
    assert result.moved == pytest.approx(1, rel=1e-6)
    assert not result.passed
    assert _compare(found, 0.25).passed
    found["flax", "adapted"] = np.where(np.arange(5) == torch_logits.argmax(-1)[1], torch_logits - 9, torch_logits)
    assert _compare(found, 1e-4).greedy_agreement < 1
    found["flax", "adapted"] = np.full_like(base, np.nan)
    assert not _compare(found, 1e-4).passed
    found["flax", "adapted"] = base[:2]
    with pytest.raises(AdapterError, match=r"logits of one shape, found \[2, 5\] and \[3, 5\]"):
        _compare(found, 1e-4)
