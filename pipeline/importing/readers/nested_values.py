"""Arrays from nested lists, of pyarrow or of Python: [T], [P][K] with lists of any length, and flat [P·K]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.importing.readers.foreign_rows import BadRow, Floats, Ints


def integers(value: Any, name: str) -> Ints:
    """[n] from a list of whole numbers. Raises: BadRow."""
    array = _numbers(_list(value, name), name)
    if array.dtype.kind == "b":
        return array.astype(np.int64)
    if array.dtype.kind == "f":  # JSON and pandas turn integers with a gap into floats
        if not (np.isfinite(array).all() and (array == np.floor(array)).all()):
            raise BadRow(f"column {name!r}: numbers with a fraction, NaN or infinity, expected whole numbers")
    elif array.dtype.kind not in "iu":
        raise BadRow(f"column {name!r}: {array.dtype}, expected whole numbers")
    if array.dtype.kind == "u" and len(array) and array.max() > np.iinfo(np.int64).max:
        raise BadRow(f"column {name!r}: {array.max()} is too large")
    return array.astype(np.int64)


def numbers(value: Any, name: str) -> Floats:
    """[n] from a list of numbers; NaN and infinity pass. Raises: BadRow."""
    array = _numbers(_list(value, name), name)
    if array.dtype.kind not in "iuf":
        raise BadRow(f"column {name!r}: {array.dtype}, expected numbers")
    return array.astype(np.float64)


def lists(value: Any, name: str) -> tuple[Ints, Any]:
    """Lengths [P] of the inner lists and their joined items, from a list of lists; a null list has length 0.

    Raises: BadRow.
    """
    outer = _list(value, name)
    if isinstance(outer, pa.Array):
        if not _is_list(outer.type):
            raise BadRow(f"column {name!r}: a list of {outer.type}, expected a list of lists")
        return pc.fill_null(pc.list_value_length(outer), 0).to_numpy().astype(np.int64), outer.flatten()
    if bad := [item for item in outer if not (item is None or isinstance(item, list | tuple))]:
        raise BadRow(f"column {name!r}: found {bad[0]!r}, expected a list of lists")
    counts = np.array([0 if item is None else len(item) for item in outer], np.int64)
    return counts, [each for item in outer if item is not None for each in item]


def rectangle(value: Any, name: str) -> NDArray[np.uint8]:
    """[P, B] bytes from a list of equally long lists of bytes. Raises: BadRow."""
    counts, items = lists(value, name)
    array = _numbers(items, name)
    if len(counts) and (counts != counts[0]).any():
        bad = int((counts != counts[0]).argmax())
        raise BadRow(f"column {name!r}, position {bad}: {counts[bad]} bytes, expected {counts[0]} as at position 0")
    if array.dtype.kind not in "iu" or (len(array) and (array.min() < 0 or array.max() > 255)):
        raise BadRow(f"column {name!r}: expected bytes, 0 to 255")
    return array.astype(np.uint8).reshape(len(counts), -1)


def take_part(value: Any, part: int, name: str) -> tuple[Ints, Any]:
    """`lists` of item `part` of each position, from [P][parts][K]. Raises: BadRow."""
    sizes, inner = lists(value, name)
    if (sizes <= part).any():
        bad = int((sizes <= part).argmax())
        raise BadRow(f"column {name!r}, position {bad}: {sizes[bad]} lists, expected more than {part}")
    index = np.cumsum(sizes) - sizes + part
    chosen = inner.take(pa.array(index)) if isinstance(inner, pa.Array) else [inner[i] for i in index]
    return lists(chosen, name)


def plain(value: Any) -> Any:
    """A pyarrow scalar as plain Python objects."""
    return value.as_py() if isinstance(value, pa.Scalar) else value


def _list(value: Any, name: str) -> Any:
    """The items of a list: a pyarrow array, or a sequence of Python objects."""
    if isinstance(value, pa.Scalar):
        if not _is_list(value.type):
            raise BadRow(f"column {name!r}: {value.type}, expected a list")
        return value.values
    if isinstance(value, pa.Array | list | tuple | np.ndarray):
        return value
    raise BadRow(f"column {name!r}: {type(value).__name__}, expected a list")


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _numbers(items: Any, name: str) -> NDArray[Any]:
    if isinstance(items, pa.Array):
        if items.null_count:
            raise BadRow(f"column {name!r}: found null, expected a number")
        if _is_list(items.type):
            raise BadRow(f"column {name!r}: a list of lists, expected a list of numbers")
        return np.asarray(items.to_numpy(zero_copy_only=False))
    return _of_python(items, name)


def _of_python(items: Sequence[Any], name: str) -> NDArray[Any]:
    if len(items) == 0:
        return np.zeros(0, np.int64)
    try:
        array = np.asarray(items)
    except ValueError as error:
        raise BadRow(f"column {name!r}: lists of different lengths, expected numbers") from error
    if array.ndim != 1 or array.dtype == object:
        raise BadRow(f"column {name!r}: found {str(items)[:60]}, expected numbers")
    return array
