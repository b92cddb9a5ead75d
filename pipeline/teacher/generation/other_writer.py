"""Another model that writes the answers: whether it is the teacher after all, and what it is opened with."""

from __future__ import annotations

import os
from dataclasses import replace

from pipeline.errors import ConfigError
from pipeline.models.devices.placement import parse_device_map
from pipeline.teacher.cache_config import CacheTeacherConfig
from pipeline.teacher.engines.engine_config import EngineConfig
from pipeline.teacher.engines.server.server_config import ServerConfig
from pipeline.teacher.generation.generation_config import GenerationConfig
from pipeline.teacher.targets.rules import TargetRule


def check_writer(config: CacheTeacherConfig, generation: GenerationConfig) -> None:
    """Raises: ConfigError if the engine does not take what the writer is to be loaded with."""
    in_vllm = config.running.engine == "vllm"
    for name in ("writer_quantization", "writer_tensor_parallel_size"):
        if getattr(generation, name) is not None and not in_vllm:
            raise ConfigError(f"`{name}`: only with `engine=vllm`. Leave it out.")
    if generation.writer_device_map is not None:
        if in_vllm:
            raise ConfigError("`writer_device_map`: cannot be combined with `engine=vllm`. Leave it out.")
        parse_device_map(generation.writer_device_map, "writer_device_map")


def writer_config(config: CacheTeacherConfig, generation: GenerationConfig) -> CacheTeacherConfig:
    """The configuration that opens the writer: without options for the teacher's weights, and with the cheapest
    targets, which are not used."""
    running = EngineConfig()
    if not config.on_server:
        running = replace(
            config.running,
            quantization=generation.writer_quantization,
            tensor_parallel_size=generation.writer_tensor_parallel_size,
        )
    name, revision = generation.writer_source
    return replace(
        config,
        teacher=name,
        tokenizer=None,
        revision=revision,
        dtype=generation.writer_dtype or config.dtype,
        device_map=generation.writer_device_map,
        running=running,
        server=ServerConfig(),
        targets=TargetRule(kind="top-k", top_k=1),
    )


def is_teacher(generation: GenerationConfig, config: CacheTeacherConfig) -> bool:
    """Whether the writer is the teacher itself, so that one pass gives answers and targets."""
    writer, revision = generation.writer_source
    if writer is None or not isinstance(config.teacher, str | os.PathLike) or revision != config.revision:
        return False
    for given, own in (
        (generation.writer_dtype, config.dtype),
        (generation.writer_quantization, config.running.quantization),
    ):
        if given not in (None, own):
            return False
    teacher = os.fspath(config.teacher)
    return writer == teacher or (os.path.exists(writer) and os.path.realpath(writer) == os.path.realpath(teacher))
