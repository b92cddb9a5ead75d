"""Options of the comparison with a teacher in `distill verify` and `distill.verify`. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.errors import ConfigError
from pipeline.models.loading_options import (
    DEVICE,
    DEVICE_MAP,
    DTYPE,
    REVISION,
    TENSOR_PARALLEL,
    TRUST_REMOTE_CODE,
    Dtype,
)
from pipeline.models.paths import TOKENIZER_FILES, check_model_path, is_url
from pipeline.options import check_ranges, option, part
from pipeline.teacher.engines.server.server_config import ServerConfig, check_address

TEACHER = "Comparison with the teacher"


@dataclass(frozen=True, kw_only=True)
class TeacherCheckConfig:
    """Which rows of which cache are computed again."""

    cache: str = option(help="Cache directory or URL.", group=TEACHER)
    # A directory, hub name, .gguf file or URL; or (Python only) a loaded model.
    teacher: Any = option(
        help="Compute some rows again with this teacher, and compare. May be the URL of a server.",
        group=TEACHER,
        name="against_teacher",
        metavar="TEACHER",
        common=True,
    )
    # A directory or hub name, or (Python only) a tokenizer.
    tokenizer: Any = option(
        None,
        help="Tokenizer of the teacher: directory or hub name. A teacher on a server needs it.",
        group=TEACHER,
        metavar="DIR",
        default_text="the teacher's own",
    )
    server: ServerConfig = part(ServerConfig, prefix=ServerConfig.PREFIX)
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
        check_address(self, "against_teacher")
        if self.server.kind == "openai":
            raise ConfigError("`server_kind` openai: a hosted API scores only its own answers. Give a directory.")

    @property
    def on_server(self) -> bool:
        """Whether the teacher is the URL of a server."""
        return is_url(self.teacher)

    def check_paths(self) -> None:
        """Check before hours of reading that teacher and tokenizer are there. Raises: ModelError."""
        if not self.on_server:
            check_model_path(self.teacher)
        check_model_path(self.tokenizer, TOKENIZER_FILES)
