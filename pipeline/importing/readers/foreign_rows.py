"""What a reader makes of one record of another tool: tokens, and a list of entries for each prediction.

Shapes: T tokens, P predictions (lists), E entries of all lists. Nothing is shifted, normalised or checked yet.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from pipeline.importing.readers.source_files import Record

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

Values = Literal["logprobs", "probabilities", "logits", "renormalised"]
"""logits: of the listed tokens only, without the normaliser, so that the tail mass is lost as with `renormalised`."""


class BadRow(Exception):
    """A record that cannot be right. The message says what was found and what was expected, without the place."""


class UnusableRow(Exception):
    """A record that is right and has nothing to learn from; the message is a reason to count, the same for all such."""


@dataclass(frozen=True, eq=False)
class ForeignRow:
    """One sequence.

    Attributes:
        shift: 0 if list p predicts token p + 1, 1 if it is about token p itself.
        log_normaliser: [P] log-sum-exp of all logits, for values that are logits.
        token_mask: [T] whether the prediction *of* this token is in the loss; None for all.
        position_mask: [T] whether the prediction made *from* this token is in the loss; None for all.
        documents: [T] 0 for padding, else the number of the document that the token belongs to; None for one document.
        unknown_entries: entries left out because their tokens could not be identified; their mass is in the tail.
    """

    input_ids: Ints
    counts: Ints
    ids: Ints
    values: Floats
    shift: int = 0
    log_normaliser: Floats | None = None
    token_mask: NDArray[np.bool_] | None = None
    position_mask: NDArray[np.bool_] | None = None
    documents: Ints | None = None
    unknown_entries: int = 0


class Reader(Protocol):
    """How one format is read; `values` says what the numbers of its entries are."""

    @property
    def values(self) -> Values: ...

    @property
    def renormalised(self) -> bool:
        """Whether values sum to 1 over the listed tokens, so that the teacher's tail mass is lost."""
        ...

    @property
    def total(self) -> int | None:
        """Number of records, if it is known in advance."""
        ...

    @property
    def description(self) -> Mapping[str, Any]:
        """What decided how records are read, to record in the manifest."""
        ...

    def records(self) -> Iterator[Record]:
        """All records, in order; can be called again. Raises: DataError."""
        ...

    def decode(self, record: Record) -> ForeignRow:
        """Raises: BadRow, UnusableRow."""
        ...
