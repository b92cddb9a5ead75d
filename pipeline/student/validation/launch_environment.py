"""Settings that `accelerate launch` passes in environment variables, past the options of a run and its record."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pipeline.errors import ConfigError

OFF = ("", "no", "false", "0")
# By the variable: the training argument that says the same, if there is one, and what to do instead.
SWITCHES: dict[str, tuple[str | None, str]] = {
    "ACCELERATE_USE_FSDP": (
        "fsdp",
        'Write {"fsdp": true, "fsdp_config": {"transformer_layer_cls_to_wrap": ["…"]}} in `training_args`',
    ),
    "ACCELERATE_USE_DEEPSPEED": ("deepspeed", 'Write {"deepspeed": "zero2.json"} in `training_args`'),
    "ACCELERATE_USE_MEGATRON_LM": (None, "Use fsdp in `training_args`"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": (None, "Use fsdp in `training_args`"),
    "ACCELERATE_DYNAMO_BACKEND": (None, "Use `compile`"),
}
PRECISION = "ACCELERATE_MIXED_PRECISION"


def check_environment(values: Mapping[str, Any]) -> None:
    """Raises ConfigError if accelerate would use something that the training arguments of the run do not say.

    Args:
        values: the training arguments, by name.
    """
    for name, (argument, instead) in SWITCHES.items():
        found = os.environ.get(name, "")
        if found.lower() not in OFF and not (argument and values.get(argument)):
            raise _refused(name, found, "which the options of this run do not say", instead)
    found = os.environ.get(PRECISION, "").lower()
    if found in OFF or (found == "bf16" and values.get("bf16")):
        return
    if found == "bf16":
        raise _refused(PRECISION, found, "but this run has no `bf16`", "Give `bf16=True`")
    why = "but gradients would underflow" if found == "fp16" else "which is not supported"
    raise _refused(PRECISION, found, why, "Use `bf16`")


@contextmanager
def environment_restored() -> Iterator[None]:
    """Undoes, after the block, what accelerate sets for FSDP and DeepSpeed: the next run in this process may use
    neither."""
    before = _variables()
    try:
        yield
    finally:
        for name in _variables().keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def _variables() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith(("ACCELERATE_", "FSDP_"))}


def _refused(name: str, found: str, why: str, instead: str) -> ConfigError:
    return ConfigError(
        f"{name}={found}: found in the environment, where accelerate launch puts it, {why}. {instead}, and start the "
        "run with torchrun (docs/scaling.md)."
    )
