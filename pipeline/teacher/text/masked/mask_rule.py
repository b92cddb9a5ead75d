"""Options of masking, for masked language models; a part of `cache_config`. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pipeline.errors import ConfigError
from pipeline.options import MAX_SEED, check_ranges, option

MASKED = "Masked language models"


@dataclass(frozen=True, kw_only=True)
class MaskRule:
    """How rows are masked for a masked language model. The defaults are BERT's."""

    PREFIX: ClassVar = "mask_"

    probability: float = option(
        0.15, help="Probability that a token is selected for prediction.", group=MASKED, above=0, maximum=1
    )
    mask_replace_prob: float = option(
        0.8,
        name="mask_replace_prob",
        help="Share of the selected tokens that become the mask token.",
        group=MASKED,
        minimum=0,
        maximum=1,
    )
    random_replace_prob: float = option(
        0.1,
        name="random_replace_prob",
        help="Share of the selected tokens that become a random token.",
        group=MASKED,
        minimum=0,
        maximum=1,
    )
    seed: int = option(
        0, help="Seed for masking (combined with row and position).", group=MASKED, minimum=0, maximum=MAX_SEED
    )
    copies: int = option(1, help="Rows per window of text, each masked differently.", group=MASKED, minimum=1)

    def __post_init__(self) -> None:
        check_ranges(self, self.PREFIX)
        shares = (self.mask_replace_prob, self.random_replace_prob)
        if sum(shares) > 1.0 + 1e-9:
            raise ConfigError(
                f"`mask_replace_prob` {shares[0]} and `random_replace_prob` {shares[1]}: expected at most 1 together, "
                "since both are shares of the selected tokens."
            )
