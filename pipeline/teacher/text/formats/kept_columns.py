"""Columns of the data whose values a cache keeps for each document, such as its domain, language or source.

    rows ─▶ tokenised documents with the values beside them ─▶ pieces of documents in rows ─▶ documents.arrow

A value is a string, a whole number or a boolean, and is kept as text. Windows of a long document, and all documents and
answers that a row of the data becomes, have the values of that row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np

import cache_format as cf
from cache_format.manifest.fields import MOST_KEPT_CHARACTERS, MOST_KEPT_VALUES, is_kept_text
from pipeline.errors import ConfigError, DataError

if TYPE_CHECKING:
    from pipeline.teacher.text.reading.sources import Source

_PREFIX = "kept "  # of the columns beside the tokens, whose own names could be the same


def check_kept(names: Sequence[str], source: Source, data: str) -> None:
    """Raises: DataError for a column that the data do not have; ConfigError for one that is named twice."""
    for name in names:
        if name not in source.reader.names:
            raise DataError(
                f"{data}: no column {name!r} to keep, found {', '.join(source.reader.names)}. Correct `keep_columns`."
            )
    if len(set(names)) < len(names):
        raise ConfigError(f"`keep_columns` {', '.join(names)}: expected each column once. Remove the others.")


def features_of(names: Sequence[str]) -> dict[str, Any]:
    """The columns beside the tokens."""
    return {_PREFIX + name: datasets.Value("string") for name in names}


def columns_of(rows: Sequence[Mapping[str, Any]], places: Sequence[str], names: Sequence[str]) -> dict[str, list[str]]:
    """The values of `features_of`.

    Args:
        rows: the row of the data that each document is from; places: where each of them is.

    Raises: DataError for a value that cannot be kept.
    """
    return {_PREFIX + name: texts for name, texts in kept_texts(rows, places, names).items()}


def kept_texts(rows: Sequence[Mapping[str, Any]], places: Sequence[str], names: Sequence[str]) -> dict[str, list[str]]:
    """The values of some rows by column, as text. Raises: DataError for a value that cannot be kept."""
    return {
        name: [_text(row.get(name), name, where) for row, where in zip(rows, places, strict=True)] for name in names
    }


@dataclass(frozen=True, eq=False)
class KeptValues:
    """Values of D documents.

    Attributes:
        values: by column, the distinct values.
        codes: by column, int [D], the place of each document's value among them.
    """

    values: Mapping[str, Sequence[str]]
    codes: Mapping[str, np.ndarray]

    @classmethod
    def read(cls, tokens: datasets.Dataset, names: Sequence[str], data: str) -> KeptValues:
        """From the columns beside the tokens. Raises: DataError for too many distinct values."""
        values, codes = {}, {}
        for name in names:
            encoded = tokens.data.column(_PREFIX + name).dictionary_encode().unify_dictionaries()
            values[name] = encoded.chunk(0).dictionary.to_pylist() if encoded.num_chunks else []
            codes[name] = np.concatenate([np.zeros(0, np.int64), *(each.indices.to_numpy() for each in encoded.chunks)])
            _check_number(values[name], name, data)
        return cls(values, codes)

    @classmethod
    def of(cls, texts: Mapping[str, Sequence[str]], data: str) -> KeptValues:
        """From the value of each document, by column. Raises: DataError for too many distinct values."""
        values, codes = {}, {}
        for name, of_documents in texts.items():
            places = {text: place for place, text in enumerate(dict.fromkeys(of_documents))}
            values[name] = list(places)
            codes[name] = np.array([places[text] for text in of_documents], np.int64)
            _check_number(values[name], name, data)
        return cls(values, codes)

    def file(self, document: np.ndarray, documents: np.ndarray) -> bytes:
        """Contents of documents.arrow.

        Args:
            document: int, of each segment of all rows, the document that it is a piece of.
            documents: int [rows], the number of segments.
        """
        return cf.documents_bytes(
            {
                name: cf.KeptColumn.of(self.values[name], codes[document.astype(np.int64)], documents)
                for name, codes in self.codes.items()
            }
        )


def describe_kept(names: Sequence[str], file: bytes | None) -> dict[str, Any]:
    """The entries of the manifest; none without kept columns."""
    return {} if file is None else {"keep_columns": list(names), "documents_file": cf.describe_documents(file)}


def _text(value: Any, name: str, where: str) -> str:
    expected = f"expected a string of 1 to {MOST_KEPT_CHARACTERS} printable characters, a whole number or a boolean"
    if isinstance(value, bool):
        return "true" if value else "false"
    text = str(value) if isinstance(value, int) else value
    if is_kept_text(text):
        return str(text)
    found = "null" if value is None else f"{str(value)[:MOST_KEPT_CHARACTERS]!r}"
    raise DataError(f"{where}: found {found} in the column {name!r}, {expected}. Correct it, or change `keep_columns`.")


def _check_number(values: Sequence[str], name: str, data: str) -> None:
    if len(values) > MOST_KEPT_VALUES:
        raise DataError(
            f"{data}: found {len(values):,} different values in the column {name!r}, expected at most "
            f"{MOST_KEPT_VALUES}, because results are shown for each of them. Keep a column with fewer values."
        )
