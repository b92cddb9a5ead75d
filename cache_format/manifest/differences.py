"""What differs between a recorded cache and what a run would write, which of it changes no more than rounding, and
which is another name for the same thing."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

# By key of the manifest. The same teacher over the same text, in another order of additions: logits agree to some 1e-5
# in float32, which now and then decides which of two nearly equal tokens is listed.
ROUNDING = {
    "capture.device": "another kind of device rounds differently",
    "capture.threads": "sums split over another number of threads round differently",
    "capture.batch_size": "another batch size rounds differently",
    "capture.chunk_positions": "another chunk size rounds differently",
    "capture.tensor_parallel": "sums split over devices round differently",
}
# Where something was found -> what it is: equal, the first is a spelling, as machines with different mounts have them.
FINGERPRINTS = ("weights_fingerprint", "config_fingerprint")  # of a teacher
OF_TEACHER, OF_TEXT = tuple(f"teacher.{name}" for name in FINGERPRINTS), ("corpus.token_stream_sha256",)
NAMES = {
    "teacher.name": OF_TEACHER,
    "teacher.revision": OF_TEACHER,
    "corpus.source": OF_TEXT,
    "corpus.files": OF_TEXT,
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
        """Why nothing but rounding (or compressed bytes) is different; None if more is."""
        return ROUNDING.get(self.key, LIBRARIES if self.key.startswith("libraries.") else None)

    def __str__(self) -> str:
        said = f"{self.key} recorded {_short(self.recorded)}, given {_short(self.given)}"
        return said if self.rounding is None else f"{said} (only rounding: {self.rounding})"


def differences(recorded: Any, given: Any, key: str = "") -> list[Difference]:
    """Between two JSON values, leaf by leaf, in order of the keys."""
    if isinstance(recorded, Mapping) and isinstance(given, Mapping):
        return [
            difference
            for name in sorted(set(recorded) | set(given))
            for difference in differences(recorded.get(name), given.get(name), f"{key}.{name}" if key else name)
        ]
    return [] if recorded == given else [Difference(key, recorded, given)]


def but_for_names(found: Iterable[Difference], recorded: Mapping[str, Any]) -> list[Difference]:
    """Without those that only say where the same thing was found (`NAMES`), by what is recorded of it."""
    found = list(found)
    others = {difference.key for difference in found}

    def is_recorded(fact: str) -> bool:
        group, _, name = fact.partition(".")
        return bool((recorded.get(group) or {}).get(name))

    def is_a_name(difference: Difference) -> bool:
        facts = NAMES.get(difference.key, ())
        return bool(facts) and all(is_recorded(fact) and fact not in others for fact in facts)

    def is_new(difference: Difference) -> bool:
        """A fingerprint that was not recorded yet when the cache was begun."""
        return difference.key in OF_TEACHER and difference.recorded is None

    return [difference for difference in found if not is_a_name(difference) and not is_new(difference)]


def listed(found: Iterable[Difference]) -> str:
    """All of them, those that matter most first."""
    return "; ".join(map(str, sorted(found, key=lambda difference: difference.rounding is not None)))


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
