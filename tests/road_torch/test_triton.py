"""The Triton kernel: its logic in Triton's interpreter, and that it compiles for GPUs."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from road_torch import AdapterError, RoadConfig, RoadModel, _kernels

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@needs_triton
def test_in_the_interpreter():
    # In another process, because Triton reads TRITON_INTERPRET when it is imported.
    cases = Path(__file__).with_name("triton_cases.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "-p", "no:cacheprovider", str(cases)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=cases.parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from road_torch._kernels.triton import rotate_kernel
from triton.compiler import ASTSource

for dtype in ("fp32", "bf16", "fp16"):
    for indexed in (True, False) if dtype == "bf16" else (True,):
        signature = {
            "y": f"*{dtype}", "result": f"*{dtype}", "first": "*fp32", "cross": "*fp32", "index": "*i64",
            "pairs": "i32", "repeats": "i32", "stride": "i32",
            "half": "constexpr", "indexed": "constexpr", "block": "constexpr",
        }
        source = ASTSource(rotate_kernel, signature, {"half": 32, "indexed": indexed, "block": 1024})
        for capability in (80, 90):
            compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
            assert compiled.asm["cubin"]
            # Nothing is spilt.
            assert ".local" not in compiled.asm["ptx"]
print("compiled")
"""


@needs_triton
def test_it_compiles_for_gpus_that_are_not_there(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path)},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.stdout == "compiled\n", done.stderr[-3000:]


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu(dtype):
    from road_torch._kernels import default

    kernel = _kernels.choose("auto", torch.device("cuda"))
    assert kernel.gathers
    y = torch.randn(8, 33, 4096, device="cuda", dtype=dtype)
    first, cross = torch.randn(2, 5, 4096, device="cuda")
    index = torch.tensor([0, 1, 2, 3, 4, 0, 0, 2], device="cuda")
    expected = default.rotate(y.float(), first, cross, 64, index)
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype] * float(expected.abs().max())
    torch.testing.assert_close(kernel.rotate(y, first, cross, 64, index).float(), expected, rtol=0, atol=tolerance)
    kernel.rotate_(y, first, cross, 64, index)
    torch.testing.assert_close(y.float(), expected, rtol=0, atol=tolerance)
