"""Make a report: find what was named, read the cache, run the students, write the file."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

import cache_format as cf
from cache_format.storage.directory import inside
from cache_format.wording import quantity
from pipeline.errors import ConfigError
from pipeline.evaluation.groups import Grouping
from pipeline.evaluation.metrics import Evaluation
from pipeline.evaluation.report.figures import difference_figures, training_figures
from pipeline.evaluation.report.group_table import group_table
from pipeline.evaluation.report.page import Contents, render
from pipeline.evaluation.report.passages import choose, cut, details, token_texts
from pipeline.evaluation.report.provenance import cache_facts, column_sizes, run_facts
from pipeline.evaluation.report.report_config import ReportConfig
from pipeline.evaluation.report.report_sources import Sources, Student, find_sources
from pipeline.evaluation.report.student_positions import StudentPositions, student_positions
from pipeline.evaluation.report.teacher_positions import OnProgress, TeacherPositions, read_positions
from pipeline.evaluation.student_head import open_student
from pipeline.models.head import evaluating
from pipeline.models.loading import resolve_device
from pipeline.student.data.dataset import Batch, CacheDataset, to_device
from pipeline.student.validation.compatibility import check_student
from pipeline.student.validation.loss_checks import loss_for_cache


@dataclass(frozen=True, kw_only=True)
class ReportSummary:
    """A report that was written.

    Attributes:
        rows, tokens, loss_tokens: read from the cache.
        passages, passages_shown: of those rows; in the page.
        students: by name, as `evaluate` gives them for these rows; by label where names are equal.
    """

    output: str
    bytes: int
    cache: str
    rows: int
    tokens: int
    loss_tokens: int
    passages: int
    passages_shown: int
    students: dict[str, Evaluation]


def write_report(
    config: ReportConfig,
    *,
    on_stage: Callable[[str], None] = lambda _: None,
    on_progress: OnProgress = lambda done, total: None,
    on_warning: Callable[[str], None] = lambda _: None,
) -> ReportSummary:
    """Writes the file of `config.output`; nothing is written before everything is computed.

    Raises:
        ConfigError: what was named is neither a cache nor a run, or the file cannot be written or lies in the cache.
        MismatchError: a student's tokenizer is not the cache's.
        ModelError, CacheError: a student or the cache cannot be read.
    """
    sources = find_sources(config)
    _check_output(config.output, sources.cache)
    with _scratch_file(config.output) as scratch:
        return _write_report(config, sources, scratch, on_stage, on_progress, on_warning)


def _write_report(
    config: ReportConfig,
    sources: Sources,
    scratch: Path,
    on_stage: Callable[[str], None],
    on_progress: OnProgress,
    on_warning: Callable[[str], None],
) -> ReportSummary:
    copies = cf.ReadCache.of(config.cache_dir, config.cache_dir_gb)
    cache = cf.open_cache(sources.cache, hidden_layers=[], read_cache=copies).with_states()
    grouping = None if config.by is None else Grouping(cache, config.by)
    for student in sources.students:
        for warning in _check_student(cache, student, config):
            on_warning(warning)
    rows = min(len(cache), config.max_rows or len(cache))
    device = resolve_device(config.device)
    on_stage(f"reading {quantity(rows, 'row')} of {sources.cache}")
    text, teacher = read_positions(cache, rows, device, batch_size=config.batch_size, on_progress=on_progress)
    positions = {}
    for student in sources.students:
        on_stage(f"running {student.name} on {quantity(rows, 'row')}")
        positions[student.label] = _run_student(cache, student, teacher, rows, config, on_progress)
    on_stage("writing the report")
    passages = cut(text)
    kl = [each.kl for each in positions.values()]
    chosen = choose(passages, np.mean(kl, axis=0) if kl else teacher.entropy, config.passages)
    texts = functools.cache(token_texts(cache))
    shown = chosen.all
    page = render(
        Contents(
            title=f"{'Students of ' if positions else 'Targets of '}{cache.metadata.teacher.get('name')}",
            facts=_facts(cache, sources, rows, len(text.input_ids), len(teacher.labels), len(shown), len(passages)),
            students=sources.students,
            positions=positions,
            text=text,
            teacher=teacher,
            chosen=chosen,
            token_text=texts,
            details=details(shown, teacher, positions, texts),
            differences=difference_figures(teacher, positions, calibrates=_calibrates(cache)),
            by=None if grouping is None else group_table(grouping, text, teacher, positions),
            training=training_figures(sources.students),
            sizes=column_sizes(cache),
            tokens_in_cache=cache.num_tokens,
            cache_facts=cache_facts(cache),
            run_facts={each.label: run_facts(each.run) for each in sources.students if each.run is not None},
            version=importlib.metadata.version("distill"),
        )
    )
    scratch.write_bytes(page)
    scratch.replace(config.output)
    return ReportSummary(
        output=config.output,
        bytes=len(page),
        cache=sources.cache,
        rows=rows,
        tokens=len(text.input_ids),
        loss_tokens=len(teacher.labels),
        passages=len(passages),
        passages_shown=len(shown),
        students={_unique_name(each, sources): positions[each.label].evaluation for each in sources.students},
    )


def _unique_name(student: Student, sources: Sources) -> str:
    repeated = sum(each.name == student.name for each in sources.students) > 1
    return student.label if repeated else student.name


def _check_output(output: str, cache: str) -> None:
    folder = Path(output).parent
    if Path(output).is_dir():
        raise ConfigError(f"`output` {output}: found a directory, expected the name of an HTML file.")
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ConfigError(f"`output` {output}: {folder} is not a writable directory. Choose another one.")
    if inside(folder, cache):
        raise ConfigError(
            f"`output` {output}: it lies in the cache ({cache}), which no command would write to afterwards. "
            "Choose another directory."
        )


@contextmanager
def _scratch_file(output: str) -> Iterator[Path]:
    """An empty file next to the report, which becomes the report. A name that cannot be is found before the work."""
    scratch = Path(f"{output}.{secrets.token_hex(4)}.tmp")
    scratch.touch(exist_ok=False)
    try:
        yield scratch
    finally:
        scratch.unlink(missing_ok=True)


def _check_student(cache: cf.Cache, student: Student, config: ReportConfig) -> list[str]:
    _, warnings = check_student(
        [cache],
        student.model,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
        otherwise="A report compares token by token; `distill evaluate` can compare across tokenizers.",
    )
    return warnings


def _run_student(
    cache: cf.Cache,
    student: Student,
    teacher: TeacherPositions,
    rows: int,
    config: ReportConfig,
    on_progress: OnProgress,
) -> StudentPositions:
    head = open_student(cache, student.model, cache.metadata.vocab_size, config)
    dataset = CacheDataset(cache)
    loader = DataLoader(dataset, batch_size=config.batch_size, sampler=range(rows), collate_fn=dataset.collate)

    def batches(loader: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
        for i, batch in enumerate(loader):
            yield to_device(batch, device)
            on_progress(min(rows, (i + 1) * config.batch_size), rows)

    with evaluating(head.model):
        return student_positions(
            head, batches(loader, head.model.device), teacher, loss_for_cache(cache, kd_weight=1.0)
        )


def _calibrates(cache: cf.Cache) -> bool:
    """Whether the stored probabilities are the teacher's own at temperature 1."""
    return cache.metadata.targets["temperature"] == 1.0 and not cache.metadata.renormalised


def _facts(
    cache: cf.Cache, sources: Sources, rows: int, tokens: int, loss_tokens: int, shown: int, passages: int
) -> list[str]:
    some = "" if rows == len(cache) else f"{rows:,} of "
    read = f"{some}{quantity(len(cache), 'row')}, {quantity(tokens, 'token')}"
    facts = [
        f"cache {sources.cache}",
        f"{read}, {loss_tokens:,} of them loss tokens",
        f"{shown:,} of {quantity(passages, 'passage')} shown",
    ]
    if sources.trained_on:
        facts.append("text that a student was trained on, so its numbers are better than on other text")
    if (temperature := float(cache.metadata.targets["temperature"])) != 1.0:
        facts.append(f"distributions at temperature {temperature:g}")
    if cache.metadata.renormalised:
        facts.append("probabilities rescaled to sum to 1 over the listed tokens, tail mass unknown")
    if not cache.metadata.entropy_known:
        facts.append("teacher entropies are lower bounds, computed from lists of tokens")
    return facts
