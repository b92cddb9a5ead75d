"""Rows that are token ids already: scored exactly as they are.

    input_ids           the tokens of one document, special tokens included; nothing is added or removed
    labels              the token itself where it is in the loss, -100 elsewhere; not shifted, as in transformers
    loss_mask           1 for each token in the loss, else 0; `completion_mask` and `assistant_masks` are the same
    loss_spans          [start, stop) of the tokens in the loss, such as the assistant's turns: [[12, 40], [55, 71]]
    attention_mask      0 at padding on either side, which is left out

A token is in the loss if every one of these columns that the data have says so; without any, all tokens are. They
speak of the token itself; that its prediction is made one position earlier is applied when rows are made.

Shape: T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.errors import DataError
from pipeline.teacher.text.chat.messages import wrong_type
from pipeline.teacher.text.encoding import Tokens
from pipeline.teacher.text.formats.row_format import LABELS, PACKED_LENGTHS, PACKED_POSITIONS, PADDING, SPANS
from pipeline.teacher.text.formats.teacher_prompts import with_prompt

IGNORED = -100  # label of a token outside the loss
_LARGEST = 2**31 - 1


def read_token_ids(
    row: Mapping[str, Any], where: str, *, names: Sequence[str], all_in_loss: bool, teacher: str | None = None
) -> Tokens:
    """The tokens of a row, and which of them are in the loss.

    Args:
        names: the columns: that of the ids, then those that decide the loss.
        all_in_loss: leave the latter aside.
        teacher: column of the ids that the teacher reads before the first token in the loss.

    Raises:
        DataError: names the row, the column and the token.
    """
    column, *loss_columns = names
    ids = _integers(row, column, where)
    learned = np.ones(len(ids), bool)
    for name in () if all_in_loss else loss_columns:
        learned &= _learned(row, name, ids, where)
    kept = _without_padding(row, len(ids), where)
    _check_one_document(row, kept, where)
    tokens = Tokens(ids[kept], learned[kept])
    if teacher is None or row[teacher] is None:
        return tokens
    return with_prompt(tokens, _integers(row, teacher, where), f"{where}, column {teacher!r}")


def _integers(row: Mapping[str, Any], name: str, where: str) -> np.ndarray:
    """Token ids int32 [T]; none for null."""
    value = row[name]
    if value is None or len(value) == 0:
        return np.zeros(0, np.int32)
    found = np.asarray(value)
    if found.ndim != 1 or found.dtype.kind not in "iu":
        kind = f"values of type {type(value[0]).__name__}" if isinstance(value, list) else type(value).__name__
        raise DataError(f"{where}, column {name!r}: found {kind}, expected a list of token ids. Correct the row.")
    if (wrong := (found < 0) | (found > _LARGEST)).any():
        at = int(wrong.argmax())
        raise DataError(f"{where}, column {name!r}, token {at}: found id {found[at]}, expected 0 or more. Correct it.")
    return found.astype(np.int32)


def _learned(row: Mapping[str, Any], name: str, ids: np.ndarray, where: str) -> np.ndarray:
    """bool [T]: the tokens that this column has in the loss; all of them for null."""
    value, here = row[name], f"{where}, column {name!r}"
    if value is None:
        return np.ones(len(ids), bool)
    if name == SPANS:
        return _within(value, len(ids), here)
    found = _per_token(value, len(ids), here)
    if name != LABELS:
        return _flags(found, here)
    learned = found != IGNORED
    if (wrong := learned & (found != ids)).any():
        at = int(wrong.argmax())
        raise DataError(
            f"{here}, token {at}: found label {found[at]}, expected the token itself, {ids[at]}, or {IGNORED}, because "
            "labels are not shifted: label t is token t. Correct the labels."
        )
    return learned


def _per_token(value: Any, length: int, here: str) -> np.ndarray:
    """The values [T] of a column that has one for each token."""
    if not isinstance(value, list):
        raise DataError(f"{here}: {wrong_type(value, 'a list of numbers')}. Correct the row.")
    if len(value) != length:
        raise DataError(f"{here}: found {len(value):,} values, expected {length:,}, one for each token. Correct it.")
    found = np.asarray(value)
    if length and found.dtype.kind not in "iub":
        raise DataError(f"{here}: found values of type {type(value[0]).__name__}, expected whole numbers. Correct it.")
    return found


def _flags(found: np.ndarray, here: str) -> np.ndarray:
    if (wrong := (found != 0) & (found != 1)).any():
        at = int(wrong.argmax())
        raise DataError(f"{here}, token {at}: found {found[at]}, expected 0 or 1. Correct the row.")
    return found.astype(bool)


def _within(spans: Any, length: int, here: str) -> np.ndarray:
    """bool [T]: inside one of the spans."""
    if not isinstance(spans, list):
        raise DataError(f"{here}: {wrong_type(spans, 'a list of pairs [start, stop]')}. Correct the row.")
    found = np.zeros(length, bool)
    for span in spans:
        pair = list(span) if isinstance(span, Sequence) and len(span) == 2 else []
        if not all(isinstance(each, int) for each in pair) or not pair or not 0 <= pair[0] <= pair[1] <= length:
            raise DataError(
                f"{here}: found {span!r}, expected pairs [start, stop] with 0 ≤ start ≤ stop ≤ {length}, the number of "
                "tokens. Correct the row."
            )
        found[slice(*pair)] = True
    return found


def _without_padding(row: Mapping[str, Any], length: int, where: str) -> slice:
    """The tokens that are not padding."""
    if row.get(PADDING) is None:
        return slice(None)
    here = f"{where}, column {PADDING!r}"
    places = np.flatnonzero(_flags(_per_token(row[PADDING], length, here), here))
    if not len(places):
        return slice(0, 0)
    if places[-1] - places[0] + 1 != len(places):
        raise DataError(f"{here}: found 0 between ones, expected padding at the ends only. Correct the row.")
    return slice(int(places[0]), int(places[-1]) + 1)


def _check_one_document(row: Mapping[str, Any], kept: slice, where: str) -> None:
    """Raises: DataError for a row of several packed documents, which would attend to one another."""
    if row.get(PACKED_LENGTHS) is not None and len(row[PACKED_LENGTHS]) > 1:
        name, found = PACKED_LENGTHS, f"{len(row[PACKED_LENGTHS])} lengths"
    elif row.get(PACKED_POSITIONS) is not None and (np.diff(row[PACKED_POSITIONS][kept]) < 0).any():
        name, found = PACKED_POSITIONS, "positions that begin again"
    else:
        return
    raise DataError(
        f"{where}, column {name!r}: found {found}, so several documents share the row, expected one. Give each a row "
        "of its own; short ones are packed again here."
    )
