"""Options of the comparison with a teacher in `distill verify` and `distill.verify`. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

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
    device: str = option("auto", help="auto (CUDA, MPS, CPU), cpu, cuda, cuda:1 or mps.", group=TEACHER, common=True)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", help="auto: the dtype that the cache was computed in.", group=TEACHER, common=True
    )
    revision: str | None = option(None, help="Branch, tag or commit of a hub model.", group=TEACHER)
    trust_remote_code: bool = option(False, help="Run code that comes with a hub model.", group=TEACHER)
    device_map: str | None = option(
        None,
        help="Spread the teacher across all devices, CPU and disk: auto (accelerate), or a JSON file of modules.",
        group=TEACHER,
        metavar="auto|FILE",
    )
    tensor_parallel: bool = option(
        False, flag="tp", help="Split the teacher across torchrun processes (transformers).", group=TEACHER
    )

    def __post_init__(self) -> None:
        check_ranges(self)
