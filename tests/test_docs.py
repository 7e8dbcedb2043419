"""The README's blocks run as they stand, on a small checkpoint, and so do the docstrings' examples."""

import doctest
import importlib
import json
import os
import pkgutil
import re
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
    """In the order of the page, in an empty folder; but for the download, whose place a small checkpoint takes."""
    (commands,) = blocks("bash")
    download, _, commands = commands.partition("\n")
    assert download.startswith("hf download ")
    small_checkpoint(tmp_path / download.split()[-1], hidden_size=128)
    # The page trains a real model; here a few steps do.
    assert "--steps 60" in commands
    commands = commands.replace("--steps 60", "--steps 2")
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        # The page's batches are for one device; tests of this process may have set more.
        "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
        # The page steps an optimiser of optax, which promotes dtypes by itself.
        "JAX_NUMPY_DTYPE_PROMOTION": "standard",
    }

    def run(*command):
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("bash", "-euc", commands)
    answers = [json.loads(row) for row in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [row["adapter"] for row in answers] == ["reviews", "__base__"]

    code = "\n".join(blocks("python"))
    for name in ("road_jax.transform", "adapter_names", "hotswap_adapter", "stack_adapters"):
        assert name in code
    # It trains, and a batch takes two adapters, a composition and the base.
    code += "\nassert logits.shape[0] == 4\nassert model.adapter_names == ['mine', 'reviews']\n"
    losses = [
        float(loss) for loss in re.findall(r"^step \d+: loss (.+)$", run(sys.executable, "-c", code), re.MULTILINE)
    ]
    assert len(losses) == 20
    assert losses[-1] < losses[0] / 2
    assert (tmp_path / "adapters" / "mine" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("command", ["road-train", "road-convert", "road-generate"])
def test_the_installed_commands_are_those(command):
    path = Path(sys.executable).with_name(command)
    found = str(path) if path.is_file() else shutil.which(command)
    assert found, f"{command} isn't installed"
    done = subprocess.run([found, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert command in done.stdout


PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "road_core/README.md", "road_jax/models/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]


def anchors(page):
    """What GitHub makes of a page's headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


def test_anchors_are_those_of_headings(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# From Flax, to `PyTorch`\n\n```\n# a comment\n```\n## What isn't there\n")
    assert anchors(page) == {"from-flax-to-pytorch", "what-isnt-there"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_the_pages_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        there = page.parent / path if path else page
        assert there.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(there), f"{page.name} links to {target}"


def test_every_file_of_figures_has_its_command():
    _, _, table = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8").partition("## Files and commands")
    named = set(re.findall(r"`(\w[\w-]*\.json)`", table))
    assert named == {path.name for path in (ROOT / "benchmarks" / "results").glob("*.json")}
    for module in set(re.findall(r"`(benchmarks\.\w+)", table)):
        assert (ROOT / module.replace(".", "/")).with_suffix(".py").is_file() or (
            ROOT / module.replace(".", "/")
        ).is_dir()


def test_pages_hold_no_placeholders():
    for page in [*PAGES, ROOT / "CHANGELOG.md"]:
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
