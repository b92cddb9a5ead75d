"""What a function of `import distill` tells its caller while it runs: progress, log records and warnings."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

logger = logging.getLogger("distill")


class DistillWarning(UserWarning):
    """Something that a user should know, and that does not stop the run."""


@dataclass(frozen=True)
class Progress:
    """Where a run is. `on_progress` gets one at the start of every stage, and then as the stage advances.

    Attributes:
        stage: what is being done, in words.
        done, total: rows, answers or optimizer steps; both 0 at the start of a stage.
        values: facts about the run by name, such as tokens_per_s, or the loss at a logged step.
    """

    stage: str
    done: float = 0
    total: float = 0
    values: Mapping[str, Any] = field(default_factory=dict)


OnProgress = Callable[[Progress], None]


class Reporter:
    """Turns the callbacks of a run into log records, warnings and `Progress`."""

    def __init__(self, on_progress: OnProgress | None) -> None:
        self.on_progress, self.current = on_progress, ""
        self.values: dict[str, Any] = {}

    def stage(self, text: str) -> None:
        logger.info(text)
        self.current, self.values = text, {}
        self._send(0, 0)

    def warn(self, text: str) -> None:
        warnings.warn(text, DistillWarning, stacklevel=4)

    def step(self, done: float, total: float) -> None:
        self._send(done, total)

    def log(self, values: Mapping[str, Any]) -> None:
        """What a training run logs: kept, and part of every `Progress` from now on."""
        self.values |= values
        if "eval_kl" in values or "stopped" in values:
            logger.info(", ".join(f"{name} {value}" for name, value in values.items()))

    def state(self, done: float, total: float, state: Any) -> None:
        """A dataclass that says where a run stands."""
        self.values = dict(vars(state))
        self._send(done, total)

    def _send(self, done: float, total: float) -> None:
        if self.on_progress is not None:
            self.on_progress(Progress(self.current, done, total, dict(self.values)))


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """The caller's random generators go on after the block as if it had drawn nothing: a run sets their seeds."""
    import random

    import numpy as np
    import torch

    python, numpy, cpu, seed = random.getstate(), np.random.get_state(), torch.get_rng_state(), torch.initial_seed()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        elif torch.cuda.is_initialized():  # by the run; until then, it had the seed of the CPU
            torch.cuda.manual_seed_all(seed)


@contextlib.contextmanager
def quiet(*models: Any) -> Iterator[None]:
    """No progress bars of transformers inside the block; loaded models (`lent`) and random generators are as before
    afterwards."""
    from transformers.utils import logging as transformers_logging

    from pipeline.models.loading import lent

    enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(random_state_kept())
            for model in models:
                stack.enter_context(lent(model))
            yield
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()
