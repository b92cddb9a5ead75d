"""What a run of stage one is told."""

from __future__ import annotations

from dataclasses import dataclass, field

from pipeline.teacher.targets.hidden_states import HiddenRule
from pipeline.teacher.targets.rules import TargetRule
from pipeline.teacher.text.corpus import DataConfig
from pipeline.teacher.text.masking import MaskRule
from pipeline.teacher.writing.workers import WorkerConfig


@dataclass(frozen=True, kw_only=True)
class CacheTeacherConfig:
    """One run of stage one."""

    teacher: str  # transformers directory, hub name, or .gguf file
    data: DataConfig
    output: str  # cache directory or fsspec URL
    targets: TargetRule = field(default_factory=TargetRule)
    objective: str | None = None  # causal or masked; default: what the teacher was trained for
    masking: MaskRule | None = None  # of a masked teacher; default: MaskRule()
    hidden: HiddenRule | None = None  # hidden states to store beside the targets, or in what numbers the targets
    all_positions: bool = False  # targets also where the loss mask is off
    batch_size: int = 8  # rows per forward pass; halved when out of memory
    device: str = "auto"
    dtype: str = "auto"  # float32 on a CPU, the checkpoint's own elsewhere
    revision: str | None = None  # of a hub model
    trust_remote_code: bool = False
    rows_per_shard: int | None = None  # default: some 262,144 tokens' worth
    encoding: str = "columns"  # or packed: smaller, read by this package only
    compression_level: int = 9  # zstd
    device_map: str | None = None  # spread the teacher over devices, CPU and disk: a strategy of accelerate, or a file
    tensor_parallel: bool = False  # split it over the processes of torchrun, which are one worker then
    overwrite: bool = False  # delete a cache that is already in `output`
    workers: WorkerConfig = field(default_factory=WorkerConfig)  # this process among others
