"""Which entries a position of a cache gets: the user's choice, checked, and what follows from it.

    kind        exact entries (head rule)                  sampled entries (tail rule)
    top-k       the K most likely                          none
    top-p       the fewest whose mass reaches P            none
    threshold   p ≥ τ, and the K most likely               the others with probability p/τ, weight τ
    random      none                                       N draws with replacement, weight count/N
    hidden      none: the teacher's last hidden state and its head, from which training rebuilds all V of them

`threshold` and `random` are unbiased: what they leave to chance is right on average, so that variance is all they add
to a gradient, besides the rounding of exact entries in a cache (docs/measurements.md says how little). `random` is
random sampling knowledge distillation as published (Anshumann et al., ACL 2025). `threshold` spends its entries better:
nothing is drawn twice, what is likely is exact, and all sampled weights are the same number τ, which costs no bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from cache_format import EXACT_LEVELS, Codebook, sqrt_probability_codebook, weight_codebook
from pipeline.errors import ConfigError

MAX_DRAWS = 255  # as many weights as a codebook has values besides certainty
THRESHOLD_LEVELS = 76  # two or three exact entries cost .0003 nats of KL with so few

TargetKind = Literal["top-k", "top-p", "threshold", "random", "hidden"]
TARGET_KINDS: tuple[TargetKind, ...] = get_args(TargetKind)

# What a kind is made of, and what each part is if it is not given; other parts do not belong to it.
PARTS: dict[TargetKind, dict[str, float]] = {
    "top-k": {"top_k": 64},
    "top-p": {"top_p": 0.95, "max_entries": 128},
    "threshold": {"tail_threshold": 0.05, "top_k": 1, "samples": 1, "seed": 0},
    "random": {"draws": 50, "samples": 1, "seed": 0},
    "hidden": {},
}
# A part that names its kind, if no kind is given. The first one counts: `top_k` is the exact head of threshold as well.
IMPLIED: dict[str, TargetKind] = {
    "tail_threshold": "threshold",
    "top_k": "top-k",
    "top_p": "top-p",
    "draws": "random",
}
DEFAULT_KIND: TargetKind = "threshold"
FLAGS = {name: "--" + name.replace("_", "-") for parts in PARTS.values() for name in parts}


@dataclass(frozen=True, kw_only=True)
class TargetRule:
    """Which entries a position gets. Parts that are None get the default of the kind; it may have no others.

    Without a kind it is the one that a part implies, in the order of `IMPLIED`, and threshold if there is none:
    `TargetRule(top_k=64)` keeps the 64 most likely tokens and nothing else.
    """

    kind: TargetKind | None = None  # never None afterwards
    top_k: int | None = None  # exact entries, whatever their probability
    top_p: float | None = None  # probability mass of the exact entries
    max_entries: int | None = None  # at most so many for top_p
    tail_threshold: float | None = None  # τ
    draws: int | None = None  # N, of one sample
    samples: int | None = None  # M, of each position
    seed: int | None = None
    temperature: float = 1.0  # of the softmax whose probabilities these are

    def __post_init__(self) -> None:
        """Raises: ConfigError for a part that the kind does not have, or a value outside its range."""
        if self.kind is None:
            implied = (kind for part, kind in IMPLIED.items() if getattr(self, part) is not None)
            object.__setattr__(self, "kind", next(implied, DEFAULT_KIND))
        if self.kind not in TARGET_KINDS:
            raise ConfigError(f"--targets {self.kind}: expected one of {', '.join(TARGET_KINDS)}.")
        for name, flag in FLAGS.items():
            value = getattr(self, name)
            if value is None and name in PARTS[self.kind]:
                object.__setattr__(self, name, PARTS[self.kind][name])
            elif value is not None and name not in PARTS[self.kind]:
                kinds = ", ".join(kind for kind, parts in PARTS.items() if name in parts)
                raise ConfigError(
                    f"{flag} {value}: {self.kind} targets have none. Use --targets {kinds}, or leave it out."
                )
        for name, low, high in (
            ("top_k", 0 if self.kind == "threshold" else 1, 65535),
            ("max_entries", 1, 65535),
            ("draws", 1, MAX_DRAWS),
            ("samples", 1, 255),
            ("seed", 0, 2**64 - 1),
        ):
            if (value := getattr(self, name)) is not None and not low <= value <= high:
                raise ConfigError(f"{FLAGS[name]} {value}: expected {low} to {high}.")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"--top-p {self.top_p}: expected a probability mass above 0 and up to 1.")
        if self.tail_threshold is not None:
            if not 1e-3 <= self.tail_threshold <= 1.0:
                raise ConfigError(
                    f"--tail-threshold {self.tail_threshold}: expected 0.001 to 1; a position gets up to 1/τ entries."
                )
        if not 0.0 < self.temperature < math.inf:
            raise ConfigError(f"--temperature {self.temperature}: expected a positive number.")
        if self.kind == "hidden" and self.temperature != 1.0:
            raise ConfigError(
                f"--temperature {self.temperature}: hidden targets hold every temperature. Leave it out here, and give "
                "it to train-student."
            )
        if self.most_entries > 65535:
            raise ConfigError(
                f"--targets {self.kind}: up to {self.most_entries:,} entries per position, expected at most 65,535. "
                "Use fewer samples, or a larger threshold."
            )

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises: ConfigError if more exact entries are asked for than there are tokens."""
        for name in ("top_k", "max_entries"):
            if (value := getattr(self, name) or 0) > vocab_size:
                raise ConfigError(f"{FLAGS[name]} {value}: the vocabulary has {vocab_size:,} tokens. Use fewer.")

    def to_json(self) -> dict[str, Any]:
        """As in the manifest's `targets`: what the kind is made of, and the most entries of a position."""
        parts = {"k" if name == "top_k" else name: getattr(self, name) for name in PARTS[self.kind]}
        return {"kind": self.kind, "temperature": self.temperature, **parts, "max_entries": self.most_entries}

    @classmethod
    def from_json(cls, targets: Mapping[str, Any]) -> TargetRule:
        """From a manifest's `targets`. Raises: ConfigError for a kind, or a part of it, that is not one of these."""
        parts = PARTS.get(targets["kind"], {})
        given = {name: targets.get("k" if name == "top_k" else name) for name in parts}
        return cls(kind=targets["kind"], temperature=targets["temperature"], **given)

    def codebook(self) -> Codebook:
        """For `target_logprobs`: the weights of sampled entries exactly, those of exact ones to within its bound."""
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
        """Whether entries are drawn, so that the targets are an unbiased estimate instead of a truncation."""
        return self.kind in ("threshold", "random")

    @property
    def candidates(self) -> int:
        """C, tokens that are looked at for the head."""
        if self.tail_threshold is not None:
            return max(self.top_k or 0, math.floor(1 / self.tail_threshold) + 1)
        return self.top_k or self.max_entries or 1

    @property
    def points(self) -> int:
        """J, of one sample."""
        return math.ceil(1 / self.tail_threshold) if self.tail_threshold is not None else self.draws or 0

    @property
    def most_entries(self) -> int:
        """That a position can have: tokens above τ take the place of points, but for one that rounding adds."""
        head = self.max_entries or self.top_k or (1 if self.tail_threshold is not None else 0)
        return head + (self.samples or 0) * self.points

    @property
    def uniforms(self) -> int:
        """Random numbers that a position takes: one start for systematic sampling, or one for each draw."""
        if self.kind == "random":
            return (self.draws or 0) * (self.samples or 0)
        return 1 if self.kind == "threshold" else 0
