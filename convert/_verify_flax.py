"""The Flax side of `verify`: a process of its own that loads one model and leaves logits in a folder."""

from pathlib import Path

import numpy as np

from road_core import AdapterError
from road_core._command import run


def main(base: str, adapter: str, work: str) -> None:
    """Writes ``flax_base.npy`` and ``flax_adapted.npy``, float32 ``[positions, vocab]``."""
    run(lambda: _run(base, adapter, Path(work)))


def _run(base: str, directory: str, work: Path) -> None:
    import jax
    import jax.numpy as jnp

    import road_jax
    from road_jax import models

    jax.config.update("jax_default_matmul_precision", "highest")
    adapter, config = road_jax.load_adapter(directory)
    depths = {
        leaf.shape[0]
        for path, leaf in jax.tree.leaves_with_path(adapter)
        if path[-1].key == "road_theta" and leaf.ndim == 2
    }
    # A stack of θ only fits a stack of layers.
    module, variables = models.load(base, dtype=jnp.float32, scan=bool(depths))
    if depths - {module.config.num_hidden_layers}:
        raise AdapterError(
            f"{directory}: expected {module.config.num_hidden_layers} layers, as in {base}, found {max(depths)}"
        )
    road = road_jax.transform(module, config)
    ids, mask = (jnp.asarray(np.load(work / f"{name}.npy")) for name in ("input_ids", "attention_mask"))
    plain = jax.jit(lambda variables: module.apply(variables, ids, attention_mask=mask))
    adapted = jax.jit(lambda variables, adapter: road.apply(variables, adapter, ids, attention_mask=mask))
    for kind, logits in (("base", plain(variables)), ("adapted", adapted(variables, adapter))):
        np.save(work / f"flax_{kind}.npy", np.asarray(logits, np.float32)[np.asarray(mask, bool)])
