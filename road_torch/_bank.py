"""The coefficients of the adapters of one layer, as two tables."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class _Written(NamedTuple):
    """What a row was formed of, and the versions that θ and α had."""

    key: object
    sources: Sequence[Tensor]
    versions: list[int]


class Bank:
    """Coefficients ``first`` and ``cross`` (see `road_torch._kernels.default`), each float32 ``[capacity, out]``.

    A row an adapter, the same in every layer of a model, so that one index gathers for all of them. Row 0, and that of
    an adapter which this layer doesn't have, is the identity. Tables grow by doubling: adding the n-th adapter doesn't
    copy the n - 1 before it.
    """

    def __init__(self, out: int, device: torch.device) -> None:
        self._written: dict[int, _Written] = {}
        # Tensors made in inference mode could not be used in training later.
        with torch.inference_mode(False):
            self.first = _growing(torch.ones(2, out, dtype=torch.float32, device=device))
            self.cross = _growing(torch.zeros(2, out, dtype=torch.float32, device=device))

    def __getstate__(self) -> dict[str, Any]:
        """A copy knows nothing of how its θ and α came about: their versions begin anew."""
        return {**self.__dict__, "_written": {}}

    def sources(self, row: int, key: object) -> Sequence[Tensor] | None:
        """Returns what a row was formed of, if that was under the same key and wasn't written to since; else None."""
        written = self._written.get(row)
        if written is None or written.key != key:
            return None
        return written.sources if [source._version for source in written.sources] == written.versions else None

    def update(
        self, row: int, sources: Sequence[Tensor], form: Callable[[], tuple[Tensor, Tensor]], key: object = None
    ) -> None:
        """Forms a row again if a θ or α that it is made of was replaced or written to since the last time.

        One that is trained is formed each time: fused optimizers, collectives and FSDP write it without a trace.
        """
        if any(source.is_meta for source in sources):
            # There is nothing to form it of until they have values.
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
        """Makes a row the identity, for an adapter that this layer doesn't have gets it."""
        if row < len(self.first):
            with torch.inference_mode(False), torch.no_grad():
                self.first[row], self.cross[row] = 1.0, 0.0
        self._written[row] = _Written(key, (), [])

    def forget(self, row: int) -> None:
        """Lets go of θ and α; the coefficients stay until another adapter gets the row."""
        self._written.pop(row, None)

    def expire(self) -> None:
        """Forms each row anew when it is next asked for: θ and α may change without a trace."""
        self._written.clear()

    def reserve(self, row: int, limit: int | None = None) -> None:
        """Grows the tables until they have this row: to twice the size, but not beyond a limit that suffices."""
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

    # Otherwise torch.compile would compile anew for a table of another size.
    torch._dynamo.maybe_mark_dynamic(table, 0)
    return table
