"""Eight pretend devices, set before JAX looks at its flags."""

import os

# Most of the time goes into compiling small programs, so code is made without optimising it; what XLA does to a program
# before that (fusion, collectives, counts of operations) stays as it is.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Compiled programs of all files together would take gigabytes."""
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True)
def no_leaks(request):
    """No tracer outlives its trace. JAX then traces anew at every call, so that not all tests can afford it."""
    if request.node.get_closest_marker("no_leaks"):
        with jax.checking_leaks():
            yield
    else:
        yield
