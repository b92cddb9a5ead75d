"""Options of the comparison with a teacher in `distill verify` and `distill.verify`. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.models.loading_options import (
    DEVICE,
    DEVICE_MAP,
    DTYPE,
    REVISION,
    TENSOR_PARALLEL,
    TRUST_REMOTE_CODE,
    Dtype,
)
from pipeline.options import check_ranges, option

TEACHER = "Comparison with the teacher"


@dataclass(frozen=True, kw_only=True)
class TeacherCheckConfig:
    """Which rows of which cache are computed again."""

    cache: str = option(help="Cache directory or URL.", group=TEACHER)
    # A directory, hub name or .gguf file; or (Python only) a loaded model.
    teacher: Any = option(
        help="Compute some rows again with this teacher, and compare.",
        group=TEACHER,
        name="against_teacher",
        metavar="TEACHER",
        common=True,
    )
    tokenizer: Any = option(None, help="Tokenizer of a teacher given as an object.", group=TEACHER, python_only=True)
    rows: int = option(
        8, help="Number of rows to compute, spread evenly over the cache.", group=TEACHER, minimum=1, common=True
    )
    # A path or hub name; or (Python only) several paths, a datasets.Dataset or rows.
    data: Any = option(
        None,
        help="Data of the cache, needed if the teacher read prompts of its own.",
        group=TEACHER,
        default_text="that named in the manifest",
    )
    device: str = DEVICE(group=TEACHER)
    dtype: Dtype = DTYPE(group=TEACHER, help="auto: the dtype that the cache was computed in.")
    revision: str | None = REVISION(group=TEACHER)
    trust_remote_code: bool = TRUST_REMOTE_CODE(group=TEACHER)
    device_map: str | None = DEVICE_MAP(group=TEACHER)
    tensor_parallel: bool = TENSOR_PARALLEL(group=TEACHER)

    def __post_init__(self) -> None:
        check_ranges(self)
