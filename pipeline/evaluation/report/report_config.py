"""Options of `distill report` and `distill.report`. Standard library only (see `pipeline.options`)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from pipeline.models.loading_options import DEVICE, DTYPE, REVISION, TRUST_REMOTE_CODE, Dtype
from pipeline.options import check_ranges, option
from pipeline.student.cache_paths import CACHE_DIR, CACHE_DIR_GB

IO, STUDENT, READING, HARDWARE = "Input and output", "Students", "Reading the cache", "Hardware"


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """One report."""

    source: tuple[str, ...] = option(help="Cache directory or URL, and directories of training runs.", group=IO)
    # Directories, hub names or .gguf files; or (Python only) loaded models.
    student: tuple[Any, ...] = option(
        (), help="Student to compare with the teacher; repeat for several.", group=IO, common=True
    )
    output: str = option("report.html", help="HTML file to write; an existing one is replaced.", group=IO, common=True)
    max_rows: int | None = option(
        256, help="Read only the first N rows of the cache.", group=IO, minimum=1, common=True
    )
    by: str | None = option(
        None,
        help="Compare the values of this column of the data, such as domains; the cache must keep it.",
        group=IO,
        metavar="COLUMN",
    )
    passages: int = option(
        24,
        help="Number of passages whose text is shown; the numbers are about all rows that were read.",
        group=IO,
        minimum=1,
        common=True,
    )
    revision: str | None = REVISION(group=STUDENT)
    trust_remote_code: bool = TRUST_REMOTE_CODE(group=STUDENT)
    cache_dir: str | None = CACHE_DIR(group=READING)
    cache_dir_gb: float = CACHE_DIR_GB(group=READING)
    batch_size: int = option(8, help="Rows per forward pass.", group=HARDWARE, minimum=1, common=True)
    device: str = DEVICE(group=HARDWARE)
    dtype: Dtype = DTYPE(group=HARDWARE)

    def __post_init__(self) -> None:
        for name in ("source", "student"):  # in Python a single one needs no tuple
            value = getattr(self, name)
            several = value if isinstance(value, tuple | list) else (value,)
            plain = tuple(os.fspath(each) if isinstance(each, os.PathLike) else each for each in several)
            object.__setattr__(self, name, plain)
        check_ranges(self)
