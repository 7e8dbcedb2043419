"""Eight pretend devices of the CPU (tests/conftest.py), set before JAX reads its flags."""

import importlib.metadata
import os

# Most of the time is spent compiling small programs. So the backend doesn't optimise, and LLVM's code comes from the
# simpler of XLA's two generators, in one piece. What XLA does to a program before that (fusion, collectives, operation
# counts) stays the same. XLA ends the process if it doesn't know a flag, which later versions may not.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    + (
        " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
        if importlib.metadata.version("jaxlib").startswith("0.10.")
        else ""
    )
)

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Drops compiled programs after each file; those of all files together would take gigabytes."""
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True)
def no_leaks(request):
    """Checks, in marked tests, that no tracer outlives its trace. JAX then traces anew at every call, which is slow."""
    if request.node.get_closest_marker("no_leaks"):
        with jax.checking_leaks():
            yield
    else:
        yield
