"""What a reader makes of one record of another tool: tokens, and a list of entries for each prediction.

Shapes: T tokens, P predictions (lists), E entries of all lists. Nothing is shifted, normalised or checked yet.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

Values = Literal["logprobs", "probabilities", "logits", "renormalised"]
"""logits: of the listed tokens only, without the normaliser, so that the tail mass is lost as with `renormalised`."""


class BadRow(Exception):
    """An invalid record. The message says what was found and expected, without the place."""


class UnusableRow(Exception):
    """A valid record with nothing to learn. The message is the reason under which such records are counted."""


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
