"""Evaluation of a student on a cache that it was not trained on; `metrics.py` says what is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import cache_format as cf
from cache_format.wording import quantity
from pipeline.errors import ConfigError
from pipeline.evaluation.evaluate_config import EvaluateConfig
from pipeline.evaluation.groups import Grouping, groups_of, is_few
from pipeline.evaluation.intervals import COLUMN, Supported, Table, metrics_of, reliability
from pipeline.evaluation.measures import column_names, group_sums
from pipeline.evaluation.metrics import Evaluation
from pipeline.evaluation.student_head import open_student
from pipeline.evaluation.tasks import TaskScore, check_tasks, task_scores
from pipeline.losses import DistillLoss, TailPolicy
from pipeline.models.head import Head, evaluating
from pipeline.models.loading import load_model, load_tokenizer, resolve_device
from pipeline.models.tokenizers import load_cache_tokenizer
from pipeline.student.data.cross_tokenizer import for_foreign_student
from pipeline.student.data.dataset import Batch, CacheDataset, to_device
from pipeline.student.model.student_limits import student_limits
from pipeline.student.model_card import HeldOut, add_metrics
from pipeline.student.validation.compatibility import check_student
from pipeline.student.validation.cross_tokenizer_checks import check_cross_tokenizer
from pipeline.student.validation.loss_checks import loss_for_cache
from pipeline.student.validation.suitability import exact_entries


def evaluate(
    config: EvaluateConfig,
    *,
    on_stage: Callable[[str], None] = lambda _: None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    on_warning: Callable[[str], None] = lambda _: None,
) -> Evaluation:
    """Means over the loss tokens of a cache, and the scores of student and teacher on tasks.

    Raises:
        MismatchError: the student's tokenizer is not the cache's.
        ModelError, CacheError: student, teacher or cache cannot be read.
    """
    found = _evaluate_student(config, on_stage, on_progress, on_warning)
    if config.teacher is None:
        return found
    on_stage("loading the teacher")
    return replace(found, teacher_tasks=_teacher_scores(config, on_stage))


def _evaluate_student(
    config: EvaluateConfig,
    on_stage: Callable[[str], None],
    on_progress: Callable[[int, int], None],
    on_warning: Callable[[str], None],
) -> Evaluation:
    """Its model is no longer held when the teacher is loaded."""
    check_tasks(config.tasks)
    if config.card and not (isinstance(config.student, str) and Path(config.student).is_dir()):
        raise ConfigError("`card`: the student is not a local directory, so it has no README.md. Leave it out.")
    copies = cf.ReadCache.of(config.cache_dir, config.cache_dir_gb)
    cache = cf.open_cache(config.cache, hidden_layers=[], read_cache=copies).with_states()
    grouping = None if config.by is None else Grouping(cache, config.by)
    tokenizer, warnings = check_student(
        [cache],
        config.student,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
        cross_tokenizer=config.cross_tokenizer is not None,
        tokenizer=config.tokenizer,
        otherwise="Or compare only where tokens of both end at the same byte: `cross_tokenizer=project`.",
    )
    for warning in warnings:
        on_warning(warning)
    dataset, vocab_size, tail = _open_dataset(config, cache, tokenizer, on_stage)
    on_stage("loading the student")
    head = open_student(cache, config.student, vocab_size, config, padding_free=config.padding_free)
    model = head.model
    rows = min(len(cache), config.max_rows or len(cache))
    on_stage(f"evaluating on {quantity(rows, 'row')}")

    def collate(rows: Sequence[cf.CacheRow]) -> Batch:
        batch = dataset.collate(rows)
        return batch if grouping is None else {**batch, "groups": grouping.codes(rows, batch["labels"].shape[1])}

    loader = DataLoader(dataset, batch_size=config.batch_size, sampler=range(rows), collate_fn=collate)

    compared = 0

    def batches() -> Iterable[Batch]:
        nonlocal compared
        for i, batch in enumerate(loader):
            if config.cross_tokenizer:
                targets = batch["targets"]
                compared += int((targets.loss_mask & (targets.exact_counts > 0)).sum())
            yield to_device(batch, model.device)
            on_progress(min(rows, (i + 1) * config.batch_size), rows)

    loss = loss_for_cache(cache, kd_weight=1.0, tail=tail, exact_only=config.cross_tokenizer is not None)
    with evaluating(model):
        table, by_group, codes = _sums(head, batches(), loss, rows)
        if config.tasks:
            on_stage(f"scoring {', '.join(config.tasks)}")
        scores = task_scores(model, tokenizer, config.tasks, batch_size=config.batch_size)
    totals = table.sum(axis=0)
    supported = _supported(cache, loss, crossed=config.cross_tokenizer is not None)
    kl, ce, agreement, count = (float(totals[COLUMN[name]]) for name in ("kl", "ce", "agreement", "count"))
    found = replace(
        Evaluation.from_sums(kl, ce, agreement, count, loss.kl_estimate_kind),
        metrics=metrics_of(table, supported),
        tasks=scores,
        groups={} if grouping is None else groups_of(by_group, codes, grouping.values, supported),
        few=is_few(int(count), int(np.count_nonzero(table[:, COLUMN["count"]]))),
        rows=table,
        supported=supported,
    )
    if config.card:
        _update_card(config, found, table, len(cache), on_warning)
    return replace(found, compared=compared / max(1, found.tokens)) if config.cross_tokenizer else found


def _open_dataset(
    config: EvaluateConfig, cache: cf.Cache, tokenizer: PreTrainedTokenizerBase, on_stage: Callable[[str], None]
) -> tuple[CacheDataset, int, TailPolicy | None]:
    """The rows as the student reads them, the number of tokens that it predicts, and the tail policy if one is needed.

    Args: tokenizer: the student's.
    """
    if not config.cross_tokenizer:
        return CacheDataset(cache), cache.metadata.vocab_size, None
    tail = check_cross_tokenizer(cache)
    limits = student_limits(config.student, config.trust_remote_code, revision=config.revision)
    # KL and agreement are measured on the tokens that both have, whichever loss the student was trained with.
    dataset_of, vocab_size = for_foreign_student(tokenizer, "project", limits)
    dataset = dataset_of(cache)
    on_stage(f"re-tokenising the text: {dataset.describe()}")
    return dataset, vocab_size, tail


def _update_card(
    config: EvaluateConfig, found: Evaluation, table: Table, all_rows: int, on_warning: Callable[[str], None]
) -> None:
    """Writes the metrics into the student's README.md.

    Args: table: [rows, columns] sums of each row. all_rows: number of rows of the cache.
    """
    about = HeldOut(cache=config.cache, metrics=found.metrics, tokens=found.tokens, rows=len(table), all_rows=all_rows)
    points = reliability(table) if "ece" in found.metrics else []
    if not add_metrics(Path(config.student), about, points):
        on_warning(f"{config.student}: found no README.md that distill wrote and nobody edited, so nothing was written")


def _sums(head: Head, batches: Iterable[Batch], loss: DistillLoss, rows: int) -> tuple[Table, Table, np.ndarray]:
    """[rows, columns] sums of each row; [n, columns] those of each group in a row; int [n] which group that is."""
    table, first = np.zeros((rows, len(column_names()))), 0
    sums, codes = [np.zeros((0, table.shape[1]))], []
    for batch in batches:
        for row, code, here in group_sums(head, batch, loss):
            table[first + row] += here
            sums.append(here[None])
            codes.append(code)
        first += len(batch["labels"])
    return table, np.concatenate(sums), np.array(codes, np.int64)


def _teacher_scores(config: EvaluateConfig, on_stage: Callable[[str], None]) -> dict[str, TaskScore]:
    """Scores of the teacher on the tasks. One that is given as an object has the tokenizer of the cache."""
    teacher, trust = config.teacher, config.trust_remote_code
    tokenizer = (
        load_cache_tokenizer(cf.open_cache(config.cache, hidden_layers=[]))
        if isinstance(teacher, PreTrainedModel)
        else load_tokenizer(teacher, trust_remote_code=trust)
    )
    device = resolve_device(config.device, teacher)
    model = load_model(teacher, dtype=config.dtype, device=device, trust_remote_code=trust)
    on_stage(f"scoring the teacher on {', '.join(config.tasks)}")
    with evaluating(model):
        return task_scores(model, tokenizer, config.tasks, batch_size=config.batch_size)


def _supported(cache: cf.Cache, loss: DistillLoss, *, crossed: bool) -> Supported:
    """Converted to another tokenizer, positions without a teacher would count as disagreement: only KL and agreement
    are defined there. A masked model drafts nothing. Renormalised entries are the teacher's probabilities times an
    unknown factor, so they bound nothing."""
    about = cache.metadata
    probabilities = not crossed and not about.renormalised
    ranks = not crossed and exact_entries(cache)[0] > 0  # weights of a sample do not rank tokens
    return Supported(
        kl=loss.kl_estimate_kind,
        sampled=about.sampled,
        ranks=ranks,
        calibrates=probabilities and (loss.full or float(about.targets["temperature"]) == 1.0),
        perplexity=not crossed,
        accepts=not crossed and about.targets["kind"] != "random" and probabilities and about.alignment == "next",
    )
