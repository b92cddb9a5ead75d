"""The runs of an arm, with those of its two references."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.quality.runs import Run
from benchmarks.quality.tracks import Arm


@dataclass(frozen=True)
class Line:
    """The runs of an arm by seed. Methods return a value per seed, comparisons only for seeds of both references."""

    arm: Arm
    runs: Mapping[int, Run]
    references: tuple[Mapping[int, Run], Mapping[int, Run]]  # labels, full

    def values(self, domain: str, metric: str) -> list[float]:
        return [run["held_out"][domain][metric] for run in self.runs.values()]

    def shares(self, domain: str, metric: str) -> list[float]:
        """Share of the gain from labels to the full distribution that the arm keeps: 0 is labels, 1 is full."""
        found = []
        for seed, x, labels, full in self._triples(domain, metric):
            if labels == full:
                raise ValueError(f"labels and full arms of seed {seed} are equal")
            found.append((labels - x) / (labels - full))
        return found

    def differences(self, domain: str, metric: str) -> list[float]:
        """Value of the arm − value of the full distribution."""
        return [x - full for _, x, _, full in self._triples(domain, metric)]

    def gradient(self, point: str, loss: str, value: str) -> list[float]:
        found = [run["gradients"].get(point, {}).get(loss) for run in self.runs.values()]
        return [comparison[value] for comparison in found if comparison]

    @property
    def cache(self) -> Mapping[str, float] | None:
        return next((run["cache"] for run in self.runs.values()), None)

    def _triples(self, domain: str, metric: str) -> list[tuple[int, float, float, float]]:
        labels, full = self.references
        both = [seed for seed in self.runs if seed in labels and seed in full]
        return [
            (seed, *(runs[seed]["held_out"][domain][metric] for runs in (self.runs, labels, full))) for seed in both
        ]
