"""A stack of Linen blocks with known weights, and the same in NumPy with the reference interventions between blocks."""

import jax
import jax.numpy as jnp
import numpy as np
from _compare import named_values
from flax import linen as nn

from road_core import intervene, position_mask

LAYERS, WIDTH = 4, 32
# Padding on the left, on the right, and an answer after the prompt.
PROMPT = np.array([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [0, 1, 1, 0, 0, 0]], np.int32)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return x + jnp.tanh(nn.Dense(WIDTH, name="dense")(x)), None


class Stack(nn.Module):
    """The same blocks in a loop or under scan, optionally with remat, and with params stacked on any axis."""

    how: str

    @nn.compact
    def __call__(self, x):
        body = nn.remat(Block) if "remat" in self.how else Block
        if "loop" in self.how:
            for i in range(LAYERS):
                x, _ = body(name=f"blocks_{i}")(x)
            return x
        scan = nn.scan(body, variable_axes={"params": axis_of(self.how)}, split_rngs={"params": True}, length=LAYERS)
        return scan(name="blocks")(x, None)[0]


def axis_of(how):
    return 1 if "axis1" in how else -1 if "last axis" in how else 0


def weights():
    return [
        (named_values(f"kernel {i}", WIDTH, WIDTH, std=0.2), named_values(f"bias {i}", WIDTH)) for i in range(LAYERS)
    ]


def variables_of(how):
    trees = [{"dense": {"kernel": kernel, "bias": bias}} for kernel, bias in weights()]
    if "loop" in how:
        return {"params": jax.tree.map(jnp.asarray, {f"blocks_{i}": tree for i, tree in enumerate(trees)})}
    return {"params": {"blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves, axis_of(how)), *trees)}}


def with_values(tree):
    def fill(path, leaf):
        name = jax.tree_util.keystr(path)
        return jnp.asarray(named_values(name, *leaf.shape, mean=float("alpha" in name), std=0.4))

    return jax.tree_util.tree_map_with_path(fill, tree)


def by_hand(x, config, tree):
    """Computes the stack in NumPy float64, with the reference interventions between its blocks."""
    x = np.asarray(x, np.float64)
    mask = position_mask(PROMPT, config.positions)
    for i, (kernel, bias) in enumerate(weights()):
        x = x + np.tanh(x @ kernel.astype(np.float64) + bias)
        if i in config.layers:
            leaves = tree["layers"][str(i)]
            x = intervene(
                x,
                leaves["road_theta"],
                leaves["road_alpha"],
                mask,
                variant=config.variant,
                group_size=config.group_size,
                subspace=config.subspace,
            )
    return x


FIELDS = {
    "last": {"layers": (1, 3), "positions": "last"},
    "all": {"layers": (2,), "positions": "all", "variant": "road_2", "subspace": (0.25, 0.75)},
    "ends": {"layers": (0, 1, 2, 3), "positions": "first:2+last:3", "variant": "road_4", "subspace": (0, 0.5)},
}
