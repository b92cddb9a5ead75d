"""Which entries a position of a cache gets: the options of a target rule, their checks, and derived sizes.

    kind        exact entries                              sampled entries
    top-k       the K most likely                          none
    top-p       the fewest whose mass reaches P            none
    threshold   p ≥ τ, and the K most likely               the others with probability p/τ, weight τ
    random      none                                       N draws with replacement, weight count/N
    hidden      none: the teacher's last hidden state is stored with its head, and training computes all V probabilities

`threshold` and `random` are unbiased: their sampled weights are right on average, so they add variance to a gradient
but no bias, apart from the rounding of exact entries (docs/measurements.md has its size). `random` is random sampling
knowledge distillation as published (Anshumann et al., ACL 2025). `threshold` needs fewer entries: no token is drawn
twice, likely tokens are exact, and all sampled weights are the same number τ, which takes no bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from pipeline.errors import ConfigError
from pipeline.options import MAX_SEED, check_ranges, option

if TYPE_CHECKING:
    from cache_format import Codebook

MAX_DRAWS = 255  # a codebook has 256 values, one of them for weight 1
MAX_ENTRIES = 65535
THRESHOLD_LEVELS = 76  # enough for two or three exact entries: their rounding costs .0003 nats of KL
GROUP = "Targets"

TargetKind = Literal["top-k", "top-p", "threshold", "random", "hidden"]
TARGET_KINDS: tuple[TargetKind, ...] = get_args(TargetKind)

# The options of each kind with their defaults; other options are refused.
PARTS: dict[TargetKind, dict[str, float]] = {
    "top-k": {"top_k": 64},
    "top-p": {"top_p": 0.95, "max_entries": 128},
    "threshold": {"tail_threshold": 0.05, "top_k": 1, "samples": 1, "seed": 0},
    "random": {"draws": 50, "samples": 1, "seed": 0},
    "hidden": {},
}
# An option that implies its kind, if no kind is given. The first match counts: `top_k` is an option of threshold too.
IMPLIED: dict[str, TargetKind] = {
    "tail_threshold": "threshold",
    "top_k": "top-k",
    "top_p": "top-p",
    "draws": "random",
}
DEFAULT_KIND: TargetKind = "threshold"
OPTIONS = tuple(dict.fromkeys(name for parts in PARTS.values() for name in parts))


def _default(name: str) -> str:
    kinds = {kind: parts[name] for kind, parts in PARTS.items() if name in parts}
    if len(set(kinds.values())) == 1:
        return f"{next(iter(kinds.values())):g}"
    return ", ".join(f"{value:g} for {kind}" for kind, value in kinds.items())


@dataclass(frozen=True, kw_only=True)
class TargetRule:
    """Which entries a position gets. Options that are None get the default of the kind; other options are refused.

    Without a kind, an option implies it, in the order of `IMPLIED`; else it is threshold:
    `TargetRule(top_k=64)` stores the 64 most likely tokens and nothing else.
    """

    DEFAULT_TEXTS: ClassVar = {name: _default(name) for name in OPTIONS}

    kind: TargetKind | None = option(
        None,
        name="targets",
        help="What to store of each distribution. threshold: exact entries and an unbiased sample of the tail. top-k, "
        "top-p: the most likely tokens. random: tokens drawn with replacement. hidden: the last hidden state, which "
        "gives the full distribution.",
        group=GROUP,
        default_text="the kind implied by the options below, else threshold",
        common=True,
    )  # never None after construction
    top_k: int | None = option(
        None,
        help="Number of most likely tokens to store exactly.",
        group=GROUP,
        minimum=0,
        maximum=MAX_ENTRIES,
        common=True,
    )
    top_p: float | None = option(
        None,
        help="For top-p: probability mass that the exact entries must cover.",
        group=GROUP,
        above=0,
        maximum=1,
    )
    max_entries: int | None = option(
        None,
        help="For top-p: maximum number of entries per position.",
        group=GROUP,
        minimum=1,
        maximum=MAX_ENTRIES,
    )
    tail_threshold: float | None = option(
        None,
        help="For threshold: τ. Tokens with p ≥ τ are exact, others are sampled with probability p/τ.",
        group=GROUP,
        minimum=1e-3,
        maximum=1,
        common=True,
    )
    draws: int | None = option(
        None,
        help="For random: number of draws per position.",
        group=GROUP,
        minimum=1,
        maximum=MAX_DRAWS,
    )
    samples: int | None = option(
        None,
        help="Number of independent tail samples per position, for training with `resample`.",
        group=GROUP,
        minimum=1,
        maximum=255,
    )
    seed: int | None = option(
        None,
        help="Seed for tail sampling (combined with row and position).",
        group=GROUP,
        minimum=0,
        maximum=MAX_SEED,
    )
    temperature: float = option(1.0, help="Temperature of the teacher's softmax.", group=GROUP, above=0, below=math.inf)

    def __post_init__(self) -> None:
        """Raises: ConfigError for an option that the kind does not have, or a value outside its range."""
        if self.kind is None:
            implied = (kind for name, kind in IMPLIED.items() if getattr(self, name) is not None)
            object.__setattr__(self, "kind", next(implied, DEFAULT_KIND))
        if self.kind is None or self.kind not in TARGET_KINDS:
            raise ConfigError(f"`targets` {self.kind}: expected one of {', '.join(TARGET_KINDS)}.")
        for name in OPTIONS:
            value = getattr(self, name)
            if value is None and name in PARTS[self.kind]:
                object.__setattr__(self, name, PARTS[self.kind][name])
            elif value is not None and name not in PARTS[self.kind]:
                kinds = ", ".join(kind for kind, parts in PARTS.items() if name in parts)
                raise ConfigError(
                    f"`{name}` {value}: {self.kind} targets do not have this option. Use it with `targets` {kinds}, or "
                    "leave it out."
                )
        check_ranges(self)
        if self.kind == "top-k" and not self.top_k:
            raise ConfigError(f"`top_k` {self.top_k}: expected 1 to {MAX_ENTRIES}.")
        if self.kind == "hidden" and self.temperature != 1.0:
            raise ConfigError(
                f"`temperature` {self.temperature}: hidden targets serve any temperature. Leave it out here, and give "
                "it when you train."
            )
        if self.most_entries > MAX_ENTRIES:
            raise ConfigError(
                f"`targets` {self.kind}: up to {self.most_entries:,} entries per position, expected at most "
                f"{MAX_ENTRIES:,}. Use fewer samples, or a larger threshold."
            )

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises: ConfigError if more exact entries are asked for than there are tokens."""
        for name in ("top_k", "max_entries"):
            if (value := getattr(self, name) or 0) > vocab_size:
                raise ConfigError(f"`{name}` {value}: the vocabulary has {vocab_size:,} tokens. Use fewer.")

    def to_json(self) -> dict[str, Any]:
        """The manifest's `targets`: the kind, its options, and the maximum number of entries of a position."""
        assert self.kind is not None
        parts = {"k" if name == "top_k" else name: getattr(self, name) for name in PARTS[self.kind]}
        return {"kind": self.kind, "temperature": self.temperature, **parts, "max_entries": self.most_entries}

    @classmethod
    def from_json(cls, targets: Mapping[str, Any]) -> TargetRule:
        """From a manifest's `targets`. Raises: ConfigError for an unknown kind, or an option that it does not have."""
        parts = PARTS.get(targets["kind"], {})
        given = {name: targets.get("k" if name == "top_k" else name) for name in parts}
        return cls(kind=targets["kind"], temperature=targets["temperature"], **given)

    def codebooks(self, vocab_size: int) -> dict[str, Codebook]:
        """By column."""
        from cache_format import default_codebooks

        finer = {"entropy_levels": 256} if self.sampled and self.temperature != 1.0 else {}
        return {**default_codebooks(vocab_size, **finer), "target_logprobs": self.codebook()}

    def codebook(self) -> Codebook:
        """For `target_logprobs`: holds the weights of sampled entries exactly, and rounds those of exact entries."""
        import numpy as np

        from cache_format import EXACT_LEVELS, Codebook, sqrt_probability_codebook, weight_codebook

        samples = self.samples or 1
        if self.kind == "random":
            weights = np.arange(1, (self.draws or 0) + 1) / ((self.draws or 0) * samples)
            weights = weights if samples == 1 else np.append(weights, 1.0)  # certainty is in every codebook
            return Codebook("draws", "sqrt_probability", np.log(weights).astype(np.float32))
        if self.tail_threshold is not None:
            return weight_codebook(THRESHOLD_LEVELS, self.tail_threshold / samples)
        return sqrt_probability_codebook(EXACT_LEVELS)

    @property
    def sampled(self) -> bool:
        """Whether the tail is sampled: the targets are then an unbiased estimate instead of a truncation."""
        return self.kind in ("threshold", "random")

    @property
    def candidates(self) -> int:
        """C, number of most likely tokens from which the exact entries are chosen."""
        if self.tail_threshold is not None:
            return max(self.top_k or 0, math.floor(1 / self.tail_threshold) + 1)
        return self.top_k or self.max_entries or 1

    @property
    def points(self) -> int:
        """J, number of points that one sample draws."""
        return math.ceil(1 / self.tail_threshold) if self.tail_threshold is not None else self.draws or 0

    @property
    def most_entries(self) -> int:
        """Maximum number of entries of a position. Each token above τ replaces a point; rounding may add one."""
        exact = self.max_entries or self.top_k or (1 if self.tail_threshold is not None else 0)
        return exact + (self.samples or 0) * self.points

    @property
    def uniforms(self) -> int:
        """Number of random numbers per position: one start of systematic sampling, or one for each draw."""
        if self.kind == "random":
            return (self.draws or 0) * (self.samples or 0)
        return 1 if self.kind == "threshold" else 0
