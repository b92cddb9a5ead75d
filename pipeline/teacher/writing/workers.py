"""Several processes that write one cache: which of them this process is, and what it writes.

    alone                  the whole cache; any other writer is refused
    torchrun               one worker for each process, `cuda:LOCAL_RANK`; RANK and WORLD_SIZE tell which
    `num_workers` N        one worker for each call of the command, on any machine that can reach the output
    `shard_range` A:B      only these shards, for machines without a common output; then `finish_cache`

Workers coordinate only through claims in the output directory (`cache_format.write.shared_writer`), so the bytes of a
shard depend neither on the number of workers nor on which of them died.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

import cache_format as cf
from cache_format.cores import encoding_threads
from pipeline.errors import ConfigError
from pipeline.models.loading import resolve_device
from pipeline.teacher.writing.tensor_parallel import Follower, Leader
from pipeline.teacher.writing.worker_config import WorkerConfig

if TYPE_CHECKING:
    from pipeline.teacher.cache_config import CacheTeacherConfig


@dataclass(frozen=True)
class Worker:
    """One of the processes that write a cache."""

    share: cf.Share | None  # None: alone
    local_rank: int | None  # under torchrun: which device of this machine
    config: WorkerConfig = field(default_factory=WorkerConfig)
    rank: int | None = None  # if a teacher is split over processes: this one's; the first one writes

    @property
    def alone(self) -> bool:
        return self.share is None

    @property
    def follows(self) -> bool:
        """Whether this process only computes, and another one writes."""
        return bool(self.rank)

    def device(self, name: str, model: object) -> torch.device:
        """The device by name; under torchrun, `auto` and `cuda` are one CUDA device for each process of a machine.

        Args:
            model: that will run there; `auto` leaves a loaded one where it is.
        """
        device = resolve_device(name, model)
        if self.local_rank is None or device.type != "cuda" or device.index is not None:
            return device
        if self.local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"process {self.local_rank} of this machine finds {torch.cuda.device_count()} CUDA devices, expected"
                " one for each process. Start fewer processes, or use `device=cpu`."
            )
        torch.cuda.set_device(self.local_rank)
        return torch.device("cuda", self.local_rank)

    def open_writer(
        self,
        output: str,
        metadata: cf.CacheMetadata,
        tokenizer_files: Mapping[str, bytes],
        on_wait: Callable[[str], None],
        device: torch.device,
        *,
        head: bytes | None = None,
    ) -> Any:
        """A `CacheWriter`; a `Leader` or `Follower` if the teacher is split. Raises: CacheError, MismatchError."""
        if self.rank is not None:
            if self.follows:
                return Follower(device)
            alone = replace(self, rank=None)
            return Leader(alone.open_writer(output, metadata, tokenizer_files, on_wait, device, head=head), device)
        options: dict[str, Any] = {
            "tokenizer_files": tokenizer_files,
            "head": head,
            "allow_rounding": self.config.allow_rounding,
            "stale_after_s": self.config.stale_after,
            "encoding_threads": encoding_threads(),
        }
        if self.share is not None:
            return cf.SharedCacheWriter(output, metadata, share=self.share, on_wait=on_wait, **options)
        return cf.CacheWriter(output, metadata, resume=True, allow_finished=True, **options)


def this_worker(config: WorkerConfig, *, tensor_parallel: bool = False, device_map: str | None = None) -> Worker:
    """Which of several workers this process is, from the options or from the environment that torchrun sets.

    Args:
        tensor_parallel: the processes of torchrun are one worker together.
        device_map: one process uses all devices.

    Raises: ConfigError.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    torchrun = "LOCAL_RANK" in os.environ and "WORLD_SIZE" in os.environ
    local_rank = int(os.environ["LOCAL_RANK"]) if torchrun else None
    if device_map is not None and tensor_parallel:
        raise ConfigError("`device_map` and `tensor_parallel` are two ways to spread one teacher: give one of them.")
    if device_map is not None and world > 1:
        raise ConfigError(
            f"`device_map`: found {world} processes of torchrun, each of which would spread its teacher over all "
            "devices. Start one for each group of devices, with CUDA_VISIBLE_DEVICES, `num_workers` and `worker_index`."
        )
    rank = int(os.environ.get("RANK", "0")) if tensor_parallel else None
    try:
        first, stop = (0, None) if config.shard_range is None else cf.parse_shard_range(config.shard_range)
        if config.num_workers is not None and config.worker_index is not None:
            count, index = config.num_workers, config.worker_index
            if world > 1 and not tensor_parallel:
                count, index = count * world, index * world + int(os.environ["RANK"])
            share = cf.Share(index=index, count=count, first=first, stop=stop)
        elif torchrun and world > 1 and not tensor_parallel:
            share = cf.Share(index=int(os.environ["RANK"]), count=world, first=first, stop=stop)
        elif config.shard_range is not None:
            share = cf.Share(first=first, stop=stop)
        else:
            return Worker(None, local_rank, config, rank)
    except ValueError as error:
        raise ConfigError(f"`num_workers`, `worker_index`, `shard_range`: {error}. Correct them.") from error
    return Worker(share, local_rank, config, rank)


def check_output(config: CacheTeacherConfig, worker: Worker) -> None:
    """Checks, before anything is loaded, that a run may write to its output.

    The output must be empty or a cache that no other process has for itself, and a finished cache must have the same
    settings, as far as they are known this early.

    Raises: CacheError, ConfigError.
    """
    if config.overwrite and not worker.alone:
        raise ConfigError(
            "`overwrite`: each of several processes would delete what the others write. Delete the cache first, then "
            "start them without `overwrite`."
        )
    manifest = None if config.overwrite else cf.finished_manifest(config.output)
    cf.check_writable(
        config.output,
        replace=config.overwrite or manifest is not None,
        shared=not worker.alone,
        stale_after_s=worker.config.stale_after,
    )
    if manifest is None:
        return
    # Left out are settings that the text or the teacher decides later: None, and `loss_on`. The writer compares them.
    data = {name: value for name, value in config.data.to_json().items() if name != "loss_on" and value is not None}
    given = {
        "targets": config.targets.to_json(),
        "corpus": data,
        "encoding": config.encoding,
    }
    recorded = manifest.metadata.to_json()
    found = [d for part in given for d in cf.differences(_like(recorded[part], given[part]), given[part], part)]
    if found:
        raise cf.finished_already(config.output, manifest, found)


def _like(recorded: Any, given: Any) -> Any:
    """The recorded values of the settings in `given`."""
    return {name: recorded.get(name) for name in given} if isinstance(given, dict) else recorded
