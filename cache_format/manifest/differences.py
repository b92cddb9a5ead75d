"""Differences between a recorded cache and what a run would write: which change only rounding, and which are only
other names for the same thing."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

# Key of the manifest -> reason. The same teacher over the same text adds in another order: float32 logits then agree to
# about 1e-5, which sometimes decides which of two nearly equal tokens becomes an entry.
ROUNDING = {
    "capture.device": "another kind of device rounds differently",
    "capture.threads": "sums split over another number of threads round differently",
    "capture.batch_size": "another batch size rounds differently",
    "capture.batch_tokens": "another batch size rounds differently",
    "capture.chunk_positions": "another chunk size rounds differently",
    "capture.logits": "logits of another precision round differently",
    "capture.selection": "sums over the vocabulary by other kernels round differently",
    "capture.server_version": "another version of the server rounds differently",
    "capture.compiled": "compiled layers round differently",
    "capture.padding_free": "attention without padding rounds differently",
    "capture.tensor_parallel": "sums split over devices round differently",
}
FINGERPRINTS = ("weights_fingerprint", "config_fingerprint")
"""Keys of the manifest that identify a teacher."""
TEACHER_FACTS, TEXT_FACTS = tuple(f"teacher.{name}" for name in FINGERPRINTS), ("corpus.token_stream_sha256",)
# Key of a name -> keys that identify the thing. Names differ between machines with different mounts.
NAMES = {
    "teacher.name": TEACHER_FACTS,
    "teacher.revision": TEACHER_FACTS,
    "corpus.source": TEXT_FACTS,
    "corpus.files": TEXT_FACTS,
    "corpus.generation.writer.name": TEXT_FACTS,
    "corpus.generation.writer.revision": TEXT_FACTS,
    "prompts.source": ("prompts.files",),  # with their checksums, or sizes and times
}
LIBRARIES = "another version may round or compress differently"


@dataclass(frozen=True)
class Difference:
    key: str  # with dots
    recorded: Any
    given: Any

    @property
    def rounding(self) -> str | None:
        """Reason if only rounding (or the compressed bytes) can differ; None otherwise."""
        return ROUNDING.get(self.key, LIBRARIES if self.key.startswith("libraries.") else None)

    def __str__(self) -> str:
        text = f"{self.key} recorded {_short(self.recorded)}, given {_short(self.given)}"
        return text if self.rounding is None else f"{text} (only rounding: {self.rounding})"


def differences(recorded: Any, given: Any, key: str = "") -> list[Difference]:
    """Differences between two JSON values, leaf by leaf, in order of the keys."""
    if isinstance(recorded, Mapping) and isinstance(given, Mapping):
        return [
            difference
            for name in sorted(set(recorded) | set(given))
            for difference in differences(recorded.get(name), given.get(name), f"{key}.{name}" if key else name)
        ]
    return [] if recorded == given else [Difference(key, recorded, given)]


def ignoring_names(found: Iterable[Difference], recorded: Mapping[str, Any]) -> list[Difference]:
    """The differences without names of the same thing (`NAMES`), such as the path of equal text.

    Args:
        recorded: the JSON that was recorded, which decides whether both sides have the facts that identify the thing.
    """
    found = list(found)
    changed = {difference.key for difference in found}

    def is_recorded(fact: str) -> bool:
        group, _, name = fact.partition(".")
        return bool((recorded.get(group) or {}).get(name))

    def is_name(difference: Difference) -> bool:
        facts = NAMES.get(difference.key, ())
        return bool(facts) and all(is_recorded(fact) and fact not in changed for fact in facts)

    def is_new(difference: Difference) -> bool:
        """A fingerprint that was not recorded when the cache was begun."""
        return difference.key in TEACHER_FACTS and difference.recorded is None

    return [difference for difference in found if not is_name(difference) and not is_new(difference)]


def listed(found: Iterable[Difference]) -> str:
    """The differences as text, rounding last."""
    return "; ".join(map(str, sorted(found, key=lambda difference: difference.rounding is not None)))


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
