"""`Adapter`: one trained adapter, as arrays."""

import dataclasses
import functools
import hashlib
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from road_core._config import RoadConfig
from road_core._errors import AdapterError, listed
from road_core._reference import check_group_size, output_size, own_axis, subspace_mask

Array = NDArray[np.generic]

# NumPy has no bfloat16. This two-byte record carries its bits: `array.view(ml_dtypes.bfloat16)` in JAX,
# `torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)` in PyTorch.
bfloat16 = np.dtype([("bfloat16", "<u2")])


def is_bfloat16(dtype: np.dtype) -> bool:
    """True for this module's record and for ``ml_dtypes.bfloat16``, without importing the latter."""
    # Most arrays are float32, and forming a dtype's name is slow.
    return dtype.itemsize == 2 and (dtype == bfloat16 or dtype.name == "bfloat16")


@functools.cache
def dtype_name(dtype: np.dtype) -> str:
    """Returns a dtype's name, such as ``"float32"``; ``"bfloat16"`` for both types that `is_bfloat16` accepts."""
    return "bfloat16" if is_bfloat16(dtype) else dtype.name


def to_float32(array: Array) -> NDArray[np.float32]:
    """Widens bfloat16 or float16 exactly to float32; float32 is returned as it is, float64 is rounded."""
    if is_bfloat16(array.dtype):
        bits = np.ascontiguousarray(array).view(np.uint16).astype(np.uint32)
        return (bits << 16).view(np.float32)
    return array.astype(np.float32, copy=False)


def from_float32(array: NDArray[np.float32], dtype: np.dtype) -> Array:
    """Rounds to a floating dtype, to nearest with ties to even; bfloat16 by its bits. Overflow gives infinity."""
    if not is_bfloat16(dtype):
        with np.errstate(over="ignore"):
            return array.astype(dtype, copy=False)
    bits = np.ascontiguousarray(array).view(np.uint32)
    # Rounding could carry a NaN into its sign bit, so a NaN keeps its upper half and is made quiet.
    rounded = np.where(np.isnan(array), (bits >> 16) | 0x40, (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16)
    return rounded.astype(np.uint16).view(dtype).reshape(array.shape)


@dataclasses.dataclass(frozen=True)
class Adapter:
    """One adapter: its config, θ and α of each module, and the modules that were trained whole.

    It checks itself when it is built, so an instance always holds finite arrays with matching shapes.

    Attributes:
        config: how θ and α are read.
        modules: ``{module path: (theta, alpha)}``. In PyTorch both are 1-D of `parameter_size`; in Flax those of a
            stacked layer also have its stack axes. Any floating dtype.
        modules_to_save: ``{tensor path: tensor}``, e.g. ``"lm_head.weight"`` (Flax: ``"lm_head.kernel"``).
            Floating-point, integer or bool.
        metadata: other text in the file's metadata; not part of the function.
        base_weights: ``{tensor path: tensor}`` of the base's embeddings and head, which PEFT saves too if one of them
            is targeted or the vocabulary was resized. They belong to the base, not to the adapter.

    Raises:
        AdapterError: there are no modules, or a tensor has a wrong shape or dtype or isn't finite (the error gives its
            path).
    """

    config: RoadConfig
    modules: Mapping[str, tuple[Array, Array]]
    modules_to_save: Mapping[str, Array] = dataclasses.field(default_factory=dict)
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)
    base_weights: Mapping[str, Array] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.modules:
            raise AdapterError("adapter: expected at least one module with road_theta and road_alpha, found none")
        for path, (theta, alpha) in self.modules.items():
            for name, array in (("road_theta", theta), ("road_alpha", alpha)):
                _check_tensor(f"{path}.{name}", array)
            if theta.ndim == 0 or theta.shape != alpha.shape:
                raise AdapterError(
                    f"{path}: expected road_theta and road_alpha of one shape, "
                    f"found {list(theta.shape)} and {list(alpha.shape)}"
                )
            # Which axis of a stacked layer is the output's isn't known here, so it is enough if one of them fits.
            outs = [output_size(self.config.variant, size) for size in theta.shape]
            if not any(out and out % self.config.group_size == 0 for out in outs):
                check_group_size(outs[-1] or 1, self.config.group_size, path)
        for path, array in self.modules_to_save.items():
            # Integers are allowed: BatchNorm counts its batches, and some modules keep positions or masks.
            if array.dtype.kind not in "iub":
                _check_tensor(path, array)
        for path, array in self.base_weights.items():
            _check_tensor(path, array)

    def tensors(self) -> dict[str, Array]:
        """Returns all tensors by their keys in a file, without any prefix."""
        tensors: dict[str, Array] = {}
        for path, (theta, alpha) in self.modules.items():
            tensors[f"{path}.road_theta"], tensors[f"{path}.road_alpha"] = theta, alpha
        return {**tensors, **self.modules_to_save, **{self._key(path): a for path, a in self.base_weights.items()}}

    def _key(self, path: str) -> str:
        """Returns a base weight's key: for a module that an adapter wraps, PEFT stores it one level below."""
        module, _, leaf = path.rpartition(".")
        if module in self.modules:
            return f"{module}.base_layer.{leaf}"
        return f"{module}.original_module.{leaf}" if path in self.modules_to_save else path

    def check_no_base_weights(self, what: str) -> None:
        """Refuses an adapter that contains weights of the base.

        Raises:
            AdapterError: it does.
        """
        if self.base_weights:
            raise AdapterError(
                f"{what}: expected an adapter without weights of its base, found {listed(list(self.base_weights), 3)}; "
                "where they are the base's own, PEFT leaves them out with save_embedding_layers=False"
            )

    def own_axis(self, path: str, axis: int = -1) -> int:
        """Returns the axis of a module's θ and α that runs over a layer's own parameters; others are stacks'.

        Args:
            path: the module.
            axis: the axis that is meant where there are several; may be negative.

        Raises:
            AdapterError: there is no such axis, or its size isn't that of a layer's parameters.
        """
        variant, group_size = self.config.variant, self.config.group_size
        return own_axis(self.modules[path][0].shape, axis, variant=variant, group_size=group_size, where=path)

    def cleared(self, axis: int = -1) -> "Adapter":
        """Returns the same function with θ = 0 and α = 1 outside of the config's subspace.

        Args:
            axis: the axis of θ and α that runs over a layer's own parameters; the others are stacks'.

        Raises:
            AdapterError: the group size doesn't divide a layer's outputs, or the subspace contains no block of it.
        """
        if self.config.subspace is None:
            return self
        modules = {}
        for path, arrays in self.modules.items():
            variant, group_size = self.config.variant, self.config.group_size
            own = self.own_axis(path, axis)
            mask = subspace_mask(
                output_size(variant, arrays[0].shape[own]),
                variant=variant,
                group_size=group_size,
                subspace=self.config.subspace,
                where=path,
            )
            theta, alpha = (array.copy() for array in arrays)
            np.moveaxis(theta, own, -1)[..., ~mask] = np.zeros((), theta.dtype)
            one = np.array((0x3F80,), bfloat16) if alpha.dtype == bfloat16 else 1
            np.moveaxis(alpha, own, -1)[..., ~mask] = one
            modules[path] = theta, alpha
        return dataclasses.replace(self, modules=modules)

    def digest(self) -> str:
        """Returns a SHA-256 over what decides the function: variant, group size, subspace, tensors' names and bytes."""
        where = "" if self.config.subspace is None else " {} {}".format(*self.config.subspace)
        sha = hashlib.sha256(f"{self.config.variant} {self.config.group_size}{where}".encode())
        for key, array in sorted(self.tensors().items()):
            sha.update(f"\n{key} {dtype_name(array.dtype)} {list(array.shape)} ".encode())
            sha.update(np.ascontiguousarray(array).tobytes())
        return sha.hexdigest()


def _check_tensor(path: str, array: Array) -> None:
    if not (is_bfloat16(array.dtype) or array.dtype.kind == "f"):
        raise AdapterError(f"{path}: expected floating-point values, found {array.dtype.name}")
    finite = np.isfinite(to_float32(array) if is_bfloat16(array.dtype) else array)
    if not finite.all():
        raise AdapterError(f"{path}: expected finite values, found {int((~finite).sum())} that are NaN or infinite")
