"""What an export records in the schema of its Parquet files, because columns of lists do not say it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

import cache_format as cf
from pipeline.errors import DataError


@dataclass(frozen=True)
class ExportedFacts:
    """
    Attributes:
        renormalised: whether the values sum to 1 over the list, so that the tail mass is unknown.
        max_error: of the square root of a probability, by the cache's codebook.
    """

    teacher: str
    temperature: float
    renormalised: bool = False
    max_error: float = 0.0

    @classmethod
    def of_cache(cls, metadata: cf.CacheMetadata) -> ExportedFacts:
        return cls(
            teacher=metadata.teacher["name"],
            temperature=metadata.targets["temperature"],
            renormalised=metadata.renormalised,
            max_error=metadata.codebooks["target_logprobs"].max_error,
        )

    @classmethod
    def of_files(cls, files: Sequence[Path]) -> ExportedFacts | None:
        """None for files that `export_cache` did not write. Raises: DataError if they differ or cannot be read."""
        found = [_of_file(path) for path in files]
        for path, facts in zip(files, found, strict=True):
            if facts != found[0]:
                raise DataError(
                    f"{path}: not of the same export as {files[0]}: teacher, temperature or rounding differ. "
                    "Import the files of each export by themselves."
                )
        return found[0]

    def to_schema(self) -> dict[str, str]:
        facts = {"teacher": self.teacher, "temperature": str(self.temperature), "max_error": str(self.max_error)}
        return facts | ({"renormalised": "true"} if self.renormalised else {})


def _of_file(path: Path) -> ExportedFacts | None:
    if not path.name.endswith(".parquet"):
        return None
    try:
        facts = {name.decode(): value.decode() for name, value in (pq.read_schema(path).metadata or {}).items()}
        if not {"teacher", "temperature"} <= set(facts):
            return None
        return ExportedFacts(
            teacher=facts["teacher"],
            temperature=float(facts["temperature"]),
            renormalised=facts.get("renormalised") == "true",
            max_error=float(facts.get("max_error", 0)),
        )
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path}: its schema cannot be read: {error}. Write or download it again.") from error
