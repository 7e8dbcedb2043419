"""The Triton kernel: its logic in Triton's interpreter, that it compiles for GPUs, and how it is launched.

With a GPU, ``pytest -m gpu`` runs the same cases on it; without one these are skipped.
"""

import importlib.util
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from road_torch import AdapterError, RoadConfig, RoadModel, _kernels

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def in_another_process(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **environment},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )


def run_cases(**environment):
    cases = str(Path(__file__).with_name("triton_cases.py"))
    return in_another_process("-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", cases, **environment)


@needs_triton
def test_in_the_interpreter():
    # In another process, because Triton reads TRITON_INTERPRET when it is imported.
    done = run_cases(TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert re.search(r"^\d+ passed", done.stdout, re.MULTILINE), done.stdout[-1000:]


@pytest.mark.gpu
@needs_gpu
@needs_triton
def test_on_a_gpu():
    done = run_cases(TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert re.search(r"^\d+ passed", done.stdout, re.MULTILINE), done.stdout[-1000:]


COMPILE = """
import re
import triton
from triton.backends.compiler import GPUTarget
from road_torch._kernels.triton import rotate_kernel
from triton.compiler import ASTSource

# Of y, of the coefficients, half of the group size, whether there is an index, and whether halves are loaded together.
CASES = [
    ("fp32", "fp32", 32, True, False),
    ("bf16", "fp32", 32, True, False),
    ("bf16", "bf16", 32, False, False),
    ("fp16", "fp32", 32, True, False),
    ("fp32", "fp32", 1, True, True),
    ("bf16", "fp32", 4, True, True),
    ("bf16", "fp32", 3, True, False),
]
for dtype, wide, half, indexed, tiled in CASES:
    signature = {
        "y": f"*{dtype}", "result": f"*{dtype}", "first": f"*{wide}", "cross": f"*{wide}", "index": "*i64",
        "pairs": "i32", "stride": "i32", "repeats": "i32", "chunks": "i32", "rows": "i32",
        "half": "constexpr", "indexed": "constexpr", "tiled": "constexpr", "block": "constexpr",
    }
    constants = {"half": half, "indexed": indexed, "tiled": tiled, "block": 512 if dtype == "fp32" else 1024}
    # What Triton finds out about addresses and sizes by itself when a kernel is launched.
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(7)}
    source = ASTSource(rotate_kernel, signature, constants, aligned)
    for capability in (80, 90):
        target = GPUTarget("cuda", capability, 32)
        compiled = triton.compile(source, target=target, options={"num_warps": 4, "enable_fp_fusion": False})
        assert compiled.asm["cubin"]
        ptx = compiled.asm["ptx"]
        # Nothing is spilt or exchanged between threads.
        assert ".local" not in ptx and ".shared" not in ptx
        if half != 3:
            # All is moved 16 bytes at a time, but for the index.
            moves = re.findall(r"((?:ld|st)\\.global[.\\w]*)", ptx)
            assert {move for move in moves if ".v4." not in move} <= {"ld.global.b64"}, moves
            assert sum(move.startswith("st") for move in moves) == 2
print("compiled")
"""


@needs_triton
def test_it_compiles_for_gpus_that_are_not_there(tmp_path):
    done = in_another_process("-c", COMPILE, TRITON_CACHE_DIR=str(tmp_path))
    assert done.stdout == "compiled\n", done.stderr[-3000:]


LAUNCH = """
import contextlib
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

launches = []

class Utils:
    def load_binary(self, *args): return 1, 1, 32, 0, 1024
    def unload_module(self, *args): pass
    def get_device_properties(self, device): return {"max_shared_mem": 1 << 17}

class Launcher:
    def __init__(self, *args): pass
    def __call__(self, *args):
        # The grid, the stream, the kernel, and without what profilers get: its arguments.
        launches.append([getattr(a, "data_ptr", lambda a=a: a)() for a in (*args[:5], *args[9:])])

class Driver:
    # A GPU that isn't there: kernels are compiled for it, and launches are written down.
    utils, launcher_cls = Utils(), Launcher
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0
    def get_current_target(self): return GPUTarget("cuda", 90, 32)

driver.set_active(Driver())
torch.cuda.current_device = lambda: -1
from road_torch._kernels import triton

searched = []
search = type(triton.rotate_kernel).run
type(triton.rotate_kernel).run = lambda *args, **kwargs: searched.append(args) or search(*args, **kwargs)

y = torch.zeros(4 * 24 * 192 + 1, dtype=torch.bfloat16)
first, cross = torch.zeros(2, 3, 192)
index = torch.tensor([2, 0, 1, 2])
plain = [y[: 4 * tokens * 192].view(4, tokens, 192) for tokens in (1, 24)]
for one in plain:
    triton.rotate_(one, first, cross, 64, index)
expected = [launch for launch in launches]
assert len(expected) == 2 and expected[0] != expected[1]
for again in range(2):
    searched.clear()
    prepared = triton.prepare_(first, cross, 64, index)
    for one, launch in zip(plain, expected):
        for _ in range(3):
            prepared(one)
            assert launches[-1] == launch, (launches[-1], launch)
            triton.rotate_(one, first, cross, 64, index)
            assert launches[-1] == launch, (launches[-1], launch)
    # Triton looked for none of them: the first launches above found them.
    assert not searched, searched
# Another alignment is another kernel, in which Triton's own search is trusted.
prepared(y[1 : 1 + 4 * 192].view(4, 1, 192))
assert len(searched) == 1
assert launches[-1][-14] % 16 == 2
print("launched")
"""


@needs_triton
def test_it_is_launched_directly(tmp_path):
    done = in_another_process("-c", LAUNCH, TRITON_CACHE_DIR=str(tmp_path))
    assert done.stdout == "launched\n", done.stderr[-3000:]


@pytest.fixture
def fresh():
    """Forgets where Triton was tried, before and after."""
    caches = _kernels._fault, _kernels._warn
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def test_the_choice_of_a_kernel(monkeypatch):
    config = RoadConfig(target_modules=["0"], group_size=8)
    with pytest.raises(AdapterError, match="kernel: expected one of auto, default, triton, found 'cuda'"):
        RoadModel(torch.nn.Sequential(torch.nn.Linear(8, 8)), config, kernel="cuda")
    monkeypatch.setattr(_kernels, "_has_triton", lambda: False)
    assert _kernels.choose("auto", torch.device("cuda")) is _kernels.DEFAULT
    with pytest.raises(AdapterError, match="expected the package triton"):
        RoadModel(torch.nn.Sequential(torch.nn.Linear(8, 8)), config, kernel="triton")
    monkeypatch.setattr(_kernels, "_has_triton", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    model = RoadModel(torch.nn.Sequential(torch.nn.Linear(8, 8)), config, kernel="triton")
    with pytest.raises(AdapterError, match="expected a model on a GPU"), torch.no_grad():
        model(torch.randn(2, 8))


@needs_triton
def test_where_triton_cannot_launch(fresh, monkeypatch):
    from road_torch._kernels import triton

    def fail(device):
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")

    monkeypatch.setattr(triton, "launch_once", fail)
    device = torch.device("cuda", 0)
    message = (
        "kernel: expected that Triton can launch a kernel on cuda:0, found RuntimeError: Failed to find C compiler."
    )
    with pytest.warns(UserWarning, match="'auto' is plain PyTorch there") as found:
        assert _kernels.choose("auto", device) is _kernels.DEFAULT
    assert str(found[0].message).startswith(message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # It isn't tried, and nobody is warned, a second time.
        assert _kernels.choose("auto", device) is _kernels.DEFAULT
    with pytest.raises(AdapterError) as error:
        _kernels.choose("triton", device)
    assert str(error.value) == message


WITHOUT_A_COMPILER = """
import torch
from road_torch import RoadConfig, RoadModel

config = RoadConfig(target_modules=["0"], group_size=8, init_weights=False)
model = RoadModel(torch.nn.Sequential(torch.nn.Linear(8, 16)).cuda(), config)
with torch.no_grad():
    model(torch.randn(2, 8, device="cuda"))
"""


@pytest.mark.gpu
@needs_gpu
@needs_triton
def test_without_a_compiler(tmp_path):
    done = in_another_process("-c", WITHOUT_A_COMPILER, TRITON_CACHE_DIR=str(tmp_path), CC="/nowhere/cc")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("expected that Triton can launch a kernel on cuda:0") == 1, done.stderr[-3000:]
