"""The student of an evaluation or a report, opened for a cache."""

from __future__ import annotations

from typing import Any

import cache_format as cf
from pipeline.evaluation.evaluate_config import EvaluateConfig
from pipeline.evaluation.report.report_config import ReportConfig
from pipeline.models.head import Head, open_head
from pipeline.models.isolation.padding_free import without_padding
from pipeline.models.loading import load_model, resolve_device
from pipeline.models.objective import objective_for
from pipeline.student.validation.compatibility import check_isolation


def open_student(
    cache: cf.Cache,
    student: Any,
    vocab_size: int,
    config: EvaluateConfig | ReportConfig,
    *,
    padding_free: bool | None = None,
) -> Head:
    """The head of a student that sees no other documents than the teacher did.

    Args:
        vocab_size: tokens that the student predicts.
        padding_free: as in `without_padding`.

    Raises: ModelError, ConfigError.
    """
    objective = objective_for(cache.metadata.alignment)
    model = load_model(
        student,
        objective=objective,
        dtype=config.dtype,
        device=resolve_device(config.device, student),
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
    )
    head = open_head(model, vocab_size, masked=objective == "masked")
    longest = cache.metadata.corpus.get("window_length") or 0
    head = without_padding(head, longest, wanted=padding_free, device=model.device)
    check_isolation(cache, head, batch_size=config.batch_size)
    return head
