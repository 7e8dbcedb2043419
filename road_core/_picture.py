"""A picture of an adapter. This is the only file here that needs matplotlib, which it imports when called."""

import os
import re

import numpy as np

from road_core._adapter import Adapter, to_float32
from road_core._reference import coefficients


def draw_rotations(adapter: Adapter, path: str | os.PathLike, *, most: int = 12, axis: int = -1) -> None:
    """Draws where an adapter sends each output's unit vector: ``(α cos θ, α sin θ)``, in one panel per kind of layer.

    The identity is the point (1, 0); pure rotations stay on the circle. The colour shows a layer's depth.

    Args:
        adapter: with PyTorch or Flax module paths.
        path: the PNG file.
        most: the greatest number of panels; the first ones by name are drawn.
        axis: the axis of θ and α that runs over a layer's own parameters; the others are stacks'.
    """
    from matplotlib.figure import Figure

    kinds = _by_kind(adapter, axis)
    names = sorted(kinds)[:most]
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(3.1 * columns + 0.9, 3.1 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    depth = max(layer for points in kinds.values() for layer, _, _ in points)
    reach = max(
        float(np.percentile(np.hypot(first - 1, second), 99.9)) for p in kinds.values() for _, first, second in p
    )
    reach = 1.15 * max(reach, 0.02)
    circle = np.linspace(-np.pi, np.pi, 721)
    shown = None
    for panel, name in zip(axes.flat, names, strict=False):
        panel.plot(np.cos(circle), np.sin(circle), color="0.75", linewidth=1, zorder=0)
        panel.axhline(0, color="0.9", linewidth=0.8, zorder=0)
        layers = np.concatenate([np.full(first.size, layer) for layer, first, _ in kinds[name]])
        first = np.concatenate([first.ravel() for _, first, _ in kinds[name]])
        second = np.concatenate([second.ravel() for _, _, second in kinds[name]])
        # In a random order, so that the last layers don't hide the first.
        order = np.random.default_rng(0).permutation(first.size)
        shown = panel.scatter(
            first[order],
            second[order],
            c=layers[order],
            s=3,
            alpha=0.5,
            linewidths=0,
            cmap="viridis",
            vmin=0,
            vmax=max(depth, 1),
            rasterized=True,
        )
        angle = np.degrees(np.abs(np.arctan2(second, first)).mean())
        panel.set_title(f"{name}: mean turn {angle:.1f}°", fontsize=9)
        panel.set_aspect("equal")
        panel.set_xlim(1 - reach, 1 + reach)
        panel.set_ylim(-reach, reach)
    for panel in list(axes.flat)[len(names) :]:
        panel.set_visible(False)
    for panel in axes[-1]:
        panel.set_xlabel("α cos θ")
    for panel in axes[:, 0]:
        panel.set_ylabel("α sin θ")
    if shown is not None:
        figure.colorbar(shown, ax=axes, label="layer", shrink=0.8)
    figure.savefig(path, dpi=120)


def _by_kind(adapter: Adapter, axis: int) -> dict[str, list[tuple[int, np.ndarray, np.ndarray]]]:
    """Returns ``{kind of layer: [(depth, first, second)]}``; the first axis of a stack's is its depth."""
    kinds: dict[str, list[tuple[int, np.ndarray, np.ndarray]]] = {}
    for module, (theta, alpha) in adapter.modules.items():
        config, own = adapter.config, adapter.own_axis(module, axis)
        first, second = coefficients(
            np.moveaxis(to_float32(theta), own, -1),
            np.moveaxis(to_float32(alpha), own, -1),
            variant=config.variant,
            group_size=config.group_size,
            subspace=config.subspace,
        )
        number = re.search(r"\d+", module)
        points = kinds.setdefault(module.rpartition(".")[2], [])
        if theta.ndim == 1:
            points.append((int(number[0]) if number else 0, first, second))
        else:
            points.extend((depth, first[depth], second[depth]) for depth in range(len(first)))
    return kinds
