"""The coefficients of a layer's adapters, in two tables."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class _Written(NamedTuple):
    """The θ and α from which a row was formed, and their versions at that time."""

    key: object
    sources: Sequence[Tensor]
    versions: list[int]


class Bank:
    """Coefficients ``first`` and ``cross`` (see `road_torch._kernels.default`), each float32 ``[capacity, out]``.

    Each adapter has one row, the same in every layer of a model, so that one index serves all layers. Row 0 is the
    identity, and so are the rows of adapters that this layer doesn't have. Tables grow by doubling, so that adding an
    adapter rarely copies the existing ones.
    """

    def __init__(self, out: int, device: torch.device) -> None:
        self._written: dict[int, _Written] = {}
        # Tensors made in inference mode couldn't be used in training later.
        with torch.inference_mode(False):
            self.first = _growing(torch.ones(2, out, dtype=torch.float32, device=device))
            self.cross = _growing(torch.zeros(2, out, dtype=torch.float32, device=device))

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out the record of written rows, because the versions of a copy's θ and α start again."""
        return {**self.__dict__, "_written": {}}

    def sources(self, row: int, key: object) -> Sequence[Tensor] | None:
        """Returns the tensors a row was formed from if it has the same key and they weren't written to; else None."""
        written = self._written.get(row)
        if written is None or written.key != key:
            return None
        return written.sources if [source._version for source in written.sources] == written.versions else None

    def update(
        self, row: int, sources: Sequence[Tensor], form: Callable[[], tuple[Tensor, Tensor]], key: object = None
    ) -> None:
        """Forms a row again if one of its θ or α was replaced or written to since the last time.

        The row of trained tensors is formed every time, because fused optimizers, collectives and FSDP write to them
        without a trace.
        """
        if any(source.is_meta for source in sources):
            # The row can't be formed until they have values.
            self._written.pop(row, None)
            return
        now = [source._version for source in sources]
        old, trained = self._written.pop(row, None), any(source.requires_grad for source in sources)
        if (
            trained
            or old is None
            or old.versions != now
            or any(source is not mine for source, mine in zip(sources, old.sources, strict=True))
        ):
            self.reserve(row)
            with torch.inference_mode(False), torch.no_grad():
                self.first[row], self.cross[row] = form()
        if not trained:
            self._written[row] = _Written(key, sources, now)

    def clear(self, row: int, key: object = None) -> None:
        """Resets a row to the identity, for an adapter that this layer doesn't have."""
        if row < len(self.first):
            with torch.inference_mode(False), torch.no_grad():
                self.first[row], self.cross[row] = 1.0, 0.0
        self._written[row] = _Written(key, (), [])

    def forget(self, row: int) -> None:
        """Releases a row's θ and α; its coefficients stay until another adapter gets the row."""
        self._written.pop(row, None)

    def expire(self) -> None:
        """Makes every row be formed again on its next use, because θ and α may have changed without a trace."""
        self._written.clear()

    def reserve(self, row: int, limit: int | None = None) -> None:
        """Grows the tables to hold this row: by doubling, but to no more rows than ``limit`` adapters need."""
        if row < len(self.first):
            return
        size = 1 << row.bit_length()
        if limit is not None:
            size = max(min(size, limit + 1), row + 1)
        with torch.inference_mode(False), torch.no_grad():
            first, cross = (table.new_empty(size, table.shape[1]) for table in (self.first, self.cross))
            old = len(self.first)
            first[:old], cross[:old] = self.first, self.cross
            first[old:], cross[old:] = 1.0, 0.0
            self.first, self.cross = _growing(first), _growing(cross)


def _growing(table: Tensor) -> Tensor:
    import torch._dynamo

    # Otherwise torch.compile would recompile for a table of another size.
    torch._dynamo.maybe_mark_dynamic(table, 0)
    return table
