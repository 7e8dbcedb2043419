"""The README's blocks run as they stand, on a small checkpoint, and so do the docstrings' examples."""

import doctest
import importlib
import json
import os
import pkgutil
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from _models import small_checkpoint

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_the_readmes_commands_and_code_run(tmp_path):
    """In the order of the page, in a folder that holds what they name."""
    small_checkpoint(tmp_path / "checkpoints" / "smollm2", hidden_size=128)
    data = tmp_path / "data"
    data.mkdir()
    line = {"prompt": "one two three", "completion": "four five"}
    data.joinpath("reviews.jsonl").write_text((json.dumps(line) + "\n") * 80)
    asked = [{"prompt": "one two", "adapter": "reviews"}, {"prompt": "three"}]
    data.joinpath("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))

    (commands,) = blocks("bash")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    modules = {"road-train": "road_jax.train", "road-convert": "convert", "road-generate": "road_torch"}
    for command in commands.strip().splitlines():
        name, *arguments = shlex.split(command)
        if name == "road-train":
            # The page trains a real model; here rows are short and steps few.
            arguments += ["--steps", "2", "--max-length", "32"]
        done = subprocess.run(
            [sys.executable, "-m", modules[name], *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stderr}"
    answers = [json.loads(row) for row in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [row["adapter"] for row in answers] == ["reviews", "__base__"]

    code = "\n".join(blocks("python"))
    assert "road_jax.transform" in code
    assert "adapter_names" in code
    # The page steps an optimiser of optax, which promotes dtypes by itself.
    environment["JAX_NUMPY_DTYPE_PROMOTION"] = "standard"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "adapters" / "mine" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("command", ["road-train", "road-convert", "road-generate"])
def test_the_installed_commands_are_those(command):
    path = Path(sys.executable).with_name(command)
    found = str(path) if path.is_file() else shutil.which(command)
    assert found, f"{command} isn't installed"
    done = subprocess.run([found, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert command in done.stdout


def test_every_link_of_the_pages_leads_somewhere():
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            if not target.startswith("https://"):
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_pages_hold_no_placeholders():
    for page in [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]:
        assert not re.findall(r"\b(TODO|FIXME|TBD|[A-Z]+-TABLE)\b", page.read_text(encoding="utf-8")), page.name


@pytest.mark.parametrize("package", ["road_core", "road_jax", "road_torch", "convert"])
def test_docstring_examples(package):
    root = importlib.import_module(package)
    names = [package, *(found.name for found in pkgutil.walk_packages(root.__path__, f"{package}."))]
    tried = failed = 0
    for name in names:
        # Entry points parse the command line; they hold no examples. Triton is for GPUs and an extra of its own.
        if name.endswith(("__main__", "_kernels.triton")):
            continue
        result = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
        tried, failed = tried + result.attempted, failed + result.failed
    assert tried > 0
    assert failed == 0
