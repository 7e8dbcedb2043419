"""Declares layer types of your own to `transform`: which axes of the result and of the kernel are outputs.

Flax's own layers need no declaration. These two do: `Turned` has its kernel as [out, in], as in PyTorch, and `Heads`
calls its kernel `w`, has heads before the inputs and gives the heads an axis of their own. The same functions can be
passed to `road_jax.nnx.wrap(model, config, layers=…)`.

    python examples/own_layer.py
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

import road_jax


class Turned(nn.Module):
    """``x @ kernel.T + bias`` with a kernel [out, in]."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[batch, time, in] to [batch, time, out]."""
        kernel = self.param("kernel", nn.initializers.normal(0.2), (self.features, x.shape[-1]))
        return x @ kernel.T + self.param("bias", nn.initializers.zeros, (self.features,))


class Heads(nn.Module):
    """A projection to heads as in many models: an einsum with a kernel ``w``."""

    heads: int
    size: int
    equation = "btd,hdk->bthk"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[batch, time, in] to [batch, time, heads, size]."""
        w = self.param("w", nn.initializers.normal(0.2), (self.heads, x.shape[-1], self.size))
        return jnp.einsum(self.equation, x, w)


class Model(nn.Module):
    """Both layers in sequence."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[batch, time, 32] to [batch, time, heads, size]."""
        return Heads(4, 16, name="heads")(nn.gelu(Turned(64, name="turned")(x)))


def main() -> None:
    model = Model()
    x = jax.random.normal(jax.random.key(0), (8, 10, 32))
    variables = model.init(jax.random.key(1), x)
    config = road_jax.RoadConfig(target_modules=["turned", "heads"], group_size=32)
    # By layer type: a function of the module and its call's arguments.
    layers: dict[type, Callable[..., road_jax.Layout | None]] = {
        Turned: lambda module, x: road_jax.Layout(kernel_axes=(0,)),
        Heads: lambda module, x: road_jax.einsum_layout(module.equation, kernel="w"),
    }
    road = road_jax.transform(model, config, layers=layers)
    adapter = road.init(jax.random.key(2), variables, x)
    for name, leaves in adapter.items():
        print(f"{name}: θ of shape {leaves['road_theta'].shape}")

    # The adapter should learn the outputs of the same model with a random adapter.
    hidden = jax.tree.map(lambda leaf: leaf + 0.5 * jax.random.normal(jax.random.key(3), leaf.shape), adapter)
    wanted = road.apply(variables, hidden, x)
    optimizer = optax.adam(3e-2)

    @jax.jit
    def step(adapter, state):
        loss, gradient = jax.value_and_grad(lambda a: jnp.mean((road.apply(variables, a, x) - wanted) ** 2))(adapter)
        updates, state = optimizer.update(gradient, state, adapter)
        return optax.apply_updates(adapter, updates), state, loss

    state = optimizer.init(adapter)
    for number in range(201):
        adapter, state, loss = step(adapter, state)
        if number % 100 == 0:
            print(f"step {number}: loss {loss:.6f}")

    adapted, merged = road.apply(variables, adapter, x), model.apply(road.merge(variables, adapter), x)
    print(f"merged model, greatest difference of an output: {jnp.abs(merged - adapted).max():.1e}")


if __name__ == "__main__":
    main()
