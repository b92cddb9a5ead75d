"""How one format is read: the base of the readers of this folder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.importing.exported_facts import ExportedFacts
from pipeline.importing.readers.foreign_rows import ForeignRow, Values
from pipeline.importing.readers.source_files import Record, count_records, records


@dataclass(frozen=True, kw_only=True)
class Reader(ABC):
    """Args:
    values: what the numbers of entries are.
    shift: of the rows, see `ForeignRow`.
    keep_columns: further columns of the records that are asked for.
    exported: what `distill export` recorded, if it wrote the files.
    """

    files: Sequence[Path]
    values: Values = "logprobs"
    shift: int = 0
    keep_columns: Sequence[str] = ()
    exported: ExportedFacts | None = None

    @property
    def renormalised(self) -> bool:
        """Whether values sum to 1 over the listed tokens, so that the teacher's tail mass is lost."""
        return self.values == "renormalised"

    @property
    def total(self) -> int | None:
        """Number of records, if it is known in advance."""
        return count_records(self.files)

    @property
    def description(self) -> Mapping[str, Any]:
        """What decided how records are read, to record in the manifest."""
        return {}

    def records(self) -> Iterator[Record]:
        """All records, in order; can be called again. Raises: DataError."""
        return records(self.files)

    @abstractmethod
    def decode(self, record: Record) -> ForeignRow:
        """Raises: BadRow, UnusableRow."""
