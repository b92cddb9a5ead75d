"""The longest text and the tokens that a student takes, read from its configuration before any weights are loaded."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedConfig, PreTrainedModel

from pipeline.models.loading import load_config
from pipeline.models.objective import most_positions
from pipeline.student.model.initialization import configuration


@dataclass(frozen=True)
class StudentLimits:
    """What a student takes; None if its configuration does not say, or for a .gguf file."""

    positions: int | None = None
    tokens: int | None = None  # ids from here on have no embedding


def student_limits(
    student: str | PreTrainedModel | None,
    trust_remote_code: bool = False,
    *,
    revision: str | None = None,
    config_file: str | None = None,
    vocab_size: int = 0,
) -> StudentLimits:
    """Limits of a named or loaded student, or of the configuration in `config_file`; there, `vocab_size` is used if the
    file has none."""
    if student is None:
        assert config_file is not None, "check_one_origin has made sure of one of both"
        config: PreTrainedConfig | None = configuration(config_file, vocab_size)
    else:
        config = load_config(student, revision=revision, trust_remote_code=trust_remote_code)
    return StudentLimits() if config is None else StudentLimits(most_positions(config), token_rows(config))


def token_rows(config: PreTrainedConfig) -> int | None:
    """Number of tokens that a student predicts, padding included; None if its configuration does not say."""
    rows: int | None = getattr(config.get_text_config(decoder=True), "vocab_size", None)
    return rows
