"""The names of many photos in one Arrow array, which processes share; as Python strings they would take gigabytes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

import numpy as np
import pyarrow as arrow
import pyarrow.compute as compute

TEXT = arrow.large_string()
AT_ONCE = 2**16  # names that an iteration holds as Python strings


def joined_text(separator: str, *columns: arrow.Array | str) -> arrow.Array:
    """Return the strings of all columns joined, row by row."""
    as_text = [arrow.scalar(column, TEXT) if isinstance(column, str) else column.cast(TEXT) for column in columns]
    return compute.binary_join_element_wise(*as_text, arrow.scalar(separator, TEXT))


class Names(Sequence[str]):
    """An immutable sequence of names; a selection of rows shares the array.

    Args:
        names: strings, or an Arrow array of them.
        rows: int64 [n], the rows of the array in this sequence's order; None is all of them.
    """

    def __init__(self, names: Iterable[str] | arrow.Array, rows: np.ndarray | None = None) -> None:
        array: Any = names if isinstance(names, arrow.Array) else arrow.array(list(names), TEXT)
        self._array, self._rows = array, rows

    def __len__(self) -> int:
        return len(self._array) if self._rows is None else len(self._rows)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Names: ...
    def __getitem__(self, index: int | slice) -> str | Names:
        if isinstance(index, slice):
            if self._rows is None and index.step in (None, 1):
                first, last, _ = index.indices(len(self))
                return Names(self._array.slice(first, max(0, last - first)))
            return self.take(np.arange(len(self))[index])
        row = range(len(self))[index]
        found: str = self._array[row if self._rows is None else int(self._rows[row])].as_py()
        return found

    def __iter__(self) -> Iterator[str]:
        for first in range(0, len(self), AT_ONCE):
            yield from self[first : first + AT_ONCE].array().to_pylist()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    def __repr__(self) -> str:
        return f"Names({list(self[:3])}{' …' if len(self) > 3 else ''}, {len(self)} in all)"

    def __reduce__(self) -> tuple[Any, ...]:
        return Names, (self.array(),)

    def take(self, rows: np.ndarray) -> Names:
        """Return the names at `rows`, in that order."""
        return Names(self._array, rows if self._rows is None else self._rows[rows])

    def array(self) -> arrow.Array:
        """Return the names as an Arrow array."""
        return self._array if self._rows is None else self._array.take(arrow.array(self._rows))

    def below(self, folder: str) -> Names:
        """Return the names with ``folder/`` before each of them."""
        return Names(joined_text("/", folder, self.array()))

    @classmethod
    def joined(cls, parts: Sequence[Names]) -> Names:
        """Return the names of all parts, one part after the other."""
        return cls(arrow.concat_arrays([part.array() for part in parts]))
