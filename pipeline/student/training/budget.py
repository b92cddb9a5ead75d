"""The length of a run in optimizer steps, rows and tokens, computed as Trainer will count them.

`max_tokens` becomes a number of steps before the run begins. So schedules know the length, and it does not depend on
how a step is divided into processes and forward passes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from transformers import TrainingArguments

from pipeline.errors import ConfigError
from pipeline.student.train_config import TrainStudentConfig
from pipeline.student.training.training_arguments import read_training_args


@dataclass(frozen=True)
class Budget:
    """A run: `steps` steps of `rows_per_step` rows. The last step of an epoch has the remaining rows."""

    rows: int  # per epoch
    rows_per_step: int  # over all processes and accumulated batches
    steps: int  # in the run

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.rows / self.rows_per_step)

    def rows_after(self, steps: int) -> int:
        """Number of rows in the first `steps` steps."""
        epochs, rest = divmod(steps, self.steps_per_epoch)
        return epochs * self.rows + min(rest * self.rows_per_step, self.rows)

    @classmethod
    def for_run(cls, rows: int, arguments: TrainingArguments) -> Budget:
        """The budget of a run with `rows` rows per epoch."""
        budget = cls(rows, rows_per_step(arguments), arguments.max_steps)
        if arguments.max_steps > 0:
            return budget
        return cls(rows, budget.rows_per_step, math.ceil(budget.steps_per_epoch * arguments.num_train_epochs))


def rows_per_step(arguments: TrainingArguments) -> int:
    return arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size


def steps_for_tokens(tokens: int, rows: int, tokens_per_epoch: float, rows_per_step: int) -> int:
    """Number of steps that train on at least `tokens` tokens, if every row has the average length.

    Tokens are input tokens without padding, loss tokens or not: the unit of cost and of tokens/s.

    Args:
        rows: rows per epoch, with `tokens_per_epoch` tokens in total.
    """
    epochs, rest = divmod(tokens, tokens_per_epoch)
    rest_rows = rest * rows / tokens_per_epoch
    return int(epochs) * math.ceil(rows / rows_per_step) + math.ceil(rest_rows / rows_per_step)


def check_one_length(config: TrainStudentConfig) -> None:
    """Raises ConfigError if `max_tokens` is given together with another length of the run."""
    if config.max_tokens is None:
        return
    arguments = read_training_args(config.training_args)
    for name, argument, unset in (("max_steps", "max_steps", -1), ("epochs", "num_train_epochs", None)):
        if name in config.given:
            found = f"`{name}` {getattr(config, name)}"
        elif arguments.get(argument, unset) != unset:
            found = f"{argument} {arguments[argument]} in `training_args`"
        else:
            continue
        raise ConfigError(
            f"`max_tokens` {config.max_tokens}: found {found} too, and each of them sets the length of the run. Leave "
            "one out."
        )
