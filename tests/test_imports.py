"""Which package imports which, each in a child process where the forbidden ones can't be imported."""

import ast
import subprocess
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Importing the package must work where these are not installed.
WITHOUT = {
    "road_core": ("jax", "flax", "torch", "transformers", "matplotlib", "ml_dtypes"),
    "convert": ("jax", "flax", "torch", "transformers", "matplotlib", "ml_dtypes"),
    "road_jax": ("torch", "bitsandbytes", "convert"),
    "road_torch": ("jax", "flax", "convert", "bitsandbytes"),
}

BLOCKED = """
import sys
blocked = set({blocked!r})

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"blocked: {{name}}", name=name)

sys.meta_path.insert(0, Refuse())
import {package}
"""

PUBLIC = {
    "road_core": "Adapter AdapterError Intervention InterventionConfig RoadConfig bfloat16 check_group_size "
    "coefficients compose intervene inverse merge output_size parameter_size position_mask read_flax read_intervention "
    "read_peft rotate select_modules subspace_blocks subspace_mask to_float32 unmerge write_flax write_intervention "
    "write_peft",
    "road_jax": "AdapterError Intervened InterventionConfig Layout QuantizedKernel Road RoadConfig compose dequantize "
    "einsum_layout generate intervene load_adapter load_intervention models nnx quantize rotate save_adapter "
    "save_intervention shardings stack_adapters transform",
    "road_torch": "AdapterError InterventionModel RoadConfig RoadLayer RoadModel generate load",
    "convert": "AdapterError Comparison Summary Verification compose convert_all diff inspect merge to_flax to_torch "
    "verify",
}


def run(package, blocked):
    code = BLOCKED.format(package=package, blocked=tuple(blocked))
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("package", WITHOUT)
def test_a_package_imports_without_the_other_framework(package):
    done = run(package, WITHOUT[package])
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("package", "needs"), [("road_jax", "jax"), ("road_torch", "torch"), ("convert", "road_core")])
def test_the_test_above_can_fail(package, needs):
    done = run(package, [needs])
    assert done.returncode != 0
    assert f"blocked: {needs}" in done.stderr


@pytest.mark.parametrize("package", WITHOUT)
def test_no_module_imports_what_its_package_must_not(package):
    """Of every file, imports within functions too; only convert's verification runs both frameworks."""
    forbidden = {
        "road_core": {"jax", "flax", "torch", "transformers", "road_jax", "road_torch", "convert"},
        "road_jax": {"torch", "road_torch", "convert"},
        "road_torch": {"jax", "flax", "road_jax", "convert"},
        "convert": {"flax"},
    }[package]
    for path in sorted((ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            found = {name.partition(".")[0] for name in names} & forbidden
            assert not found, f"{path}:{node.lineno} imports {found}"


@pytest.mark.parametrize(("package", "missing"), [("convert", "tyro"), ("road_torch", "transformers")])
def test_a_command_names_the_package_that_it_lacks(package, missing):
    code = BLOCKED.format(package=f"{package}.__main__", blocked=(missing,)) + f"{package}.__main__.main()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == (
        f"error: expected an installed {missing}, found none (pip install 'road-adapters[all]' has all)\n"
    )


@pytest.mark.parametrize("package", PUBLIC)
def test_public_names(package):
    module = __import__(package)
    names = {name for name in dir(module) if not name.startswith("_")} - {"Any", "TYPE_CHECKING"}
    modules = {name for name in names if isinstance(getattr(module, name), types.ModuleType)}
    assert names - modules == set(PUBLIC[package].split()) - {"models", "nnx"}
