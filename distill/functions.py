"""The functions of `import distill`: keyword arguments become the configuration of one run.

Every option of a command is a keyword argument with the same name; `help(distill.cache_teacher)` lists them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from distill.run_progress import OnProgress, Reporter, quiet
from pipeline.errors import ConfigError
from pipeline.evaluation.evaluate_config import EvaluateConfig
from pipeline.evaluation.report.report_config import ReportConfig
from pipeline.importing.import_config import ImportConfig
from pipeline.options import Option, build, options_of, read_config, unknown_option
from pipeline.student.train_config import TrainStudentConfig
from pipeline.teacher.cache_config import CacheTeacherConfig
from pipeline.teacher.verify_config import TeacherCheckConfig

if TYPE_CHECKING:
    import os

    import cache_format as cf
    from pipeline.evaluation.held_out import Evaluation
    from pipeline.evaluation.report.report import ReportSummary
    from pipeline.importing.export_cache import ExportSummary
    from pipeline.importing.import_cache import ImportSummary
    from pipeline.student.training.train import TrainSummary
    from pipeline.teacher.plan import Plan
    from pipeline.teacher.progress import CaptureSummary, GenerationSummary
    from pipeline.teacher.verification import TeacherCheck

F = TypeVar("F", bound=Callable[..., Any])


def _takes_options(config: type) -> Callable[[F], F]:
    """Gives a function that takes **options the signature and the help texts of a configuration."""

    def decorate(function: F) -> F:
        own = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]
        names = {p.name for p in own}
        declared = [each for each in options_of(config).values() if each.name not in names]
        generated = [_parameter(each) for each in declared]
        options = "\n".join(f"    {each.name}: {_help(each)}" for each in declared)
        function.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [*own, *generated], return_annotation=inspect.signature(function).return_annotation
        )
        function.__doc__ = f"{inspect.cleandoc(function.__doc__ or '')}\n\nOptions:\n{options}\n"
        return function

    return decorate


def _parameter(declared: Option) -> inspect.Parameter:
    default = inspect.Parameter.empty if declared.required else declared.default
    annotation = {tuple: "tuple[str, ...]"}.get(declared.type, getattr(declared.type, "__name__", "Any"))
    if declared.optional:
        annotation += " | None"
    return inspect.Parameter(declared.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _help(declared: Option) -> str:
    text = declared.metadata.help
    return text if declared.metadata.default_text is None else f"{text} Default: {declared.metadata.default_text}."


def _config(config: type, config_file: str | os.PathLike[str] | None, given: dict[str, Any], **otherwise: Any) -> Any:
    """A configuration from keyword arguments, which override the file, which overrides `otherwise`."""
    named = {name: value for name, value in given.items() if value is not None}
    values = {} if config_file is None else read_config(str(config_file), config, named)
    return build(config, {**otherwise, **values, **named})


@_takes_options(CacheTeacherConfig)
def cache_teacher(
    teacher: Any = None,
    data: Any = None,
    output: str | os.PathLike[str] | None = None,
    *,
    config: str | os.PathLike[str] | None = None,
    on_progress: OnProgress | None = None,
    **options: Any,
) -> CaptureSummary | GenerationSummary:
    """Run a teacher over a text and cache its targets, as `distill cache-teacher` does.

    Continues an unfinished run with the same settings, and does nothing to a finished one.

    Args:
        teacher: transformers directory, hub name or .gguf file; or a loaded transformers model or the URL of a server,
            with `tokenizer`.
        data: a path, glob or hub name; several paths; a `datasets.Dataset`; or an iterable of dicts.
        output: cache directory or fsspec URL.
        config: TOML or JSON file of options; keyword arguments override it.
        on_progress: called with a `Progress`.

    Returns: what was written; with `generate=True` a `GenerationSummary`.

    Raises:
        ConfigError, DataError, ModelError: the options, the text or the teacher cannot be used.
        CacheError: `output` holds something else; MismatchError: it holds a run with other settings.
    """
    run = _config(CacheTeacherConfig, config, {"teacher": teacher, "data": data, "output": output, **options})
    report = Reporter(on_progress)
    if run.generation is not None:
        from pipeline.teacher.generation.generate import generate_cache

        with quiet(teacher):
            return generate_cache(
                run,
                on_stage=report.stage,
                on_progress=lambda state: report.state(state.answers, state.total_answers, state),
                on_warning=report.warn,
            )
    from pipeline.teacher.capture import cache_teacher as capture

    with quiet(teacher):
        return capture(
            run,
            on_stage=report.stage,
            on_progress=lambda state: report.state(state.rows, state.total_rows, state),
            on_warning=report.warn,
        )


@_takes_options(CacheTeacherConfig)
def plan(
    teacher: Any = None,
    data: Any = None,
    output: str | os.PathLike[str] | None = None,
    *,
    rows: int | None = None,
    cost_per_hour: float | None = None,
    config: str | os.PathLike[str] | None = None,
    on_progress: OnProgress | None = None,
    **options: Any,
) -> Plan:
    """Predict size and time of a cache from a few rows, as `distill plan` does. Writes nothing to `output`.

    Args:
        teacher, data, output, config, on_progress: as in `cache_teacher`; `output` tells where the cache will be.
            Default: that of `config`, or the current directory.
        rows: number of rows to run, spread over the text. Default: about 32,768 tokens.
        cost_per_hour: price of this machine, in any currency.

    Raises: as `cache_teacher`.
    """
    from pipeline.teacher.plan import plan_cache

    given = {"teacher": teacher, "data": data, "output": output, **options}
    run = _config(CacheTeacherConfig, config, given, output=".")
    report = Reporter(on_progress)
    with quiet(teacher):
        return plan_cache(
            run,
            sample_rows=rows,
            cost_per_hour=cost_per_hour,
            on_stage=report.stage,
            on_progress=report.step,
            on_warning=report.warn,
        )


@_takes_options(TrainStudentConfig)
def train_student(
    cache: Any = None,
    student: Any = None,
    output: str | os.PathLike[str] | None = None,
    *,
    config: str | os.PathLike[str] | None = None,
    on_progress: OnProgress | None = None,
    **options: Any,
) -> TrainSummary:
    """Train a student on a cache and save it as a plain transformers directory, as `distill train-student` does.

    `resume=True` continues an interrupted run with the same settings.

    Args:
        cache: cache directory or URL; several to mix them, with weights as in "caches/a:0.7".
        student: transformers directory, hub name or .gguf file; or a loaded transformers model, which is trained in
            place, with `tokenizer` if it is not the teacher's.
        output: directory for checkpoints and the trained student.
        config: TOML or JSON file of options; keyword arguments override it.
        on_progress: called with a `Progress`; its values hold the latest logs (loss, kl, ce, eval_kl, …).

    Raises:
        CacheError: a cache cannot be read; MismatchError: student and cache do not belong together.
        ConfigError, ModelError: options or student cannot be used; nothing in `output` was touched.
        DivergedError: the loss or the weights became NaN or Inf. OSError: the disk is full.
    """
    from pipeline.student.training.train import train_student as train

    run = _config(TrainStudentConfig, config, {"cache": cache, "student": student, "output": output, **options})
    report = Reporter(on_progress)
    with quiet():
        return train(run, on_stage=report.stage, on_step=report.step, on_log=report.log, on_warning=report.warn)


@_takes_options(EvaluateConfig)
def evaluate(
    cache: str | os.PathLike[str] | None = None,
    student: Any = None,
    *,
    config: str | os.PathLike[str] | None = None,
    on_progress: OnProgress | None = None,
    **options: Any,
) -> Evaluation:
    """Compare a student with its teacher on a held-out cache, as `distill evaluate` does.

    Args:
        cache: held-out cache directory or URL.
        student: transformers directory, hub name or .gguf file; or a loaded transformers model.
        config: TOML or JSON file of options; keyword arguments override it.
        on_progress: called with a `Progress`.

    Returns: KL to the teacher and cross-entropy in nats per loss token, perplexity, and top-1 agreement; in `metrics`
        these, calibration and acceptance, with 95 % confidence intervals; in `tasks` and `teacher_tasks` the scores of
        student and `teacher` on tasks.

    Raises: MismatchError: the student's tokenizer is not the cache's. ModelError, CacheError: either cannot be read.
    """
    from pipeline.evaluation.held_out import evaluate as run_evaluation

    run = _config(EvaluateConfig, config, {"cache": cache, "student": student, **options})
    report = Reporter(on_progress)
    with quiet(run.student, run.teacher):
        return run_evaluation(run, on_stage=report.stage, on_progress=report.step, on_warning=report.warn)


@_takes_options(ImportConfig)
def import_cache(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    config: str | os.PathLike[str] | None = None,
    on_progress: OnProgress | None = None,
    **options: Any,
) -> ImportSummary:
    """Make a cache from log-probabilities that another tool or a server wrote, as `distill import` does.

    Args:
        source: file, directory or glob pattern.
        output: cache directory or fsspec URL.
        config: TOML or JSON file of options; keyword arguments override it.
        on_progress: called with a `Progress`.

    Returns: what was imported, left out and adjusted.

    Raises:
        DataError: the source cannot be read, or a row of it is invalid.
        ConfigError, ModelError: the options or the tokenizer cannot be used.
        CacheError, MismatchError: `output` holds something else.
    """
    from pipeline.importing.import_cache import import_cache as run_import

    run = _config(ImportConfig, config, {"source": source, "output": output, **options})
    report = Reporter(on_progress)
    with quiet():
        return run_import(run, on_stage=report.stage, on_step=report.step, on_warning=report.warn)


def export_cache(
    cache: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    format: str = "parquet",
    on_progress: OnProgress | None = None,
) -> ExportSummary:
    """Write a cache as Parquet files that other tools read, as `distill export` does.

    Args:
        cache: cache directory or URL, with exact entries only.
        output: directory to write; it must be empty or not exist.
        format: parquet or axolotl.
        on_progress: called with a `Progress`.

    Raises: CacheError: the cache cannot be read, or `output` is not empty. MismatchError: its targets are sampled or
        hidden. ConfigError: an unknown `format`; or `output` is a URL, or lies in the cache.
    """
    from pipeline.importing.export_cache import export_cache as run_export

    report = Reporter(on_progress)
    report.stage(f"exporting {cache}")
    return run_export(str(cache), str(output), format, on_step=report.step)


@_takes_options(ReportConfig)
def report(
    source: Any = None,
    output: str | os.PathLike[str] | None = None,
    *,
    student: Any = None,
    config: str | os.PathLike[str] | None = None,
    on_progress: OnProgress | None = None,
    **options: Any,
) -> ReportSummary:
    """Write an HTML page that shows where students and their teacher disagree, as `distill report` does.

    Args:
        source: cache directory or URL, or the directory of a training run, which knows its held-out cache; or a list of
            one cache and several runs.
        output: HTML file. Default: report.html.
        student: transformers directory, hub name, .gguf file or loaded transformers model; or several.
        config: TOML or JSON file of options; keyword arguments override it.
        on_progress: called with a `Progress`.

    Returns: what was written, and the numbers of each student as in `evaluate`, by its name; by its label in the page
        where names are equal.

    Raises: ConfigError: `source` or `output` cannot be used; otherwise as `evaluate`.
    """
    from pipeline.evaluation.report.report import write_report

    run = _config(ReportConfig, config, {"source": source, "output": output, "student": student, **options})
    report = Reporter(on_progress)
    with quiet(*run.student):
        return write_report(run, on_stage=report.stage, on_progress=report.step, on_warning=report.warn)


@dataclass(frozen=True)
class Verification:
    """Attributes: cache: what was checked. teacher: the comparison with a teacher, if one was named."""

    cache: cf.VerifySummary
    teacher: TeacherCheck | None

    @property
    def ok(self) -> bool:
        """Whether the cache is intact and, if a teacher was named, agrees with it."""
        return self.teacher is None or self.teacher.agrees


@_takes_options(TeacherCheckConfig)
def verify(
    cache: str | os.PathLike[str],
    *,
    deep: bool = False,
    against_teacher: Any = None,
    config: str | os.PathLike[str] | None = None,
    on_progress: OnProgress | None = None,
    **options: Any,
) -> Verification:
    """Check every byte of a cache, and optionally every value and some rows, as `distill verify` does.

    Args:
        cache: cache directory or URL.
        deep: also check every value: counts, ids, order, sums of probabilities, entropy.
        against_teacher: the teacher, as in `cache_teacher`, to compute some rows again.
        config: TOML or JSON file of the options of this comparison; keyword arguments override it.
        on_progress: called with a `Progress`.

    Raises:
        CacheError: the cache is damaged; the message names the file and the place. A teacher that disagrees is not an
        error: see `Verification.ok`.
        ConfigError, ModelError: the options or the teacher cannot be used; nothing was read.
    """
    import cache_format

    run = _comparison(config, {"cache": cache, "against_teacher": against_teacher, **options})
    report = Reporter(on_progress)
    report.stage(f"checking {cache}")
    summary = cache_format.verify_cache(str(cache), report.step, deep=deep)
    if run is None:
        return Verification(summary, None)
    from pipeline.teacher.verification import verify_against_teacher

    with quiet(run.teacher):
        return Verification(summary, verify_against_teacher(run, on_stage=report.stage, on_progress=report.step))


def _comparison(config_file: str | os.PathLike[str] | None, given: dict[str, Any]) -> TeacherCheckConfig | None:
    """The comparison with a teacher that `verify` was asked for, if any. Raises: ConfigError, ModelError."""
    if given["against_teacher"] is None and config_file is None:
        others = [name for name, value in given.items() if name != "cache" and value is not None]
        if not others:
            return None
        if others[0] not in (known := options_of(TeacherCheckConfig)):
            raise unknown_option(others[0], known)
        raise ConfigError(f"`{others[0]}`: only with `against_teacher`. Name the teacher.")
    run: TeacherCheckConfig = _config(TeacherCheckConfig, config_file, given)
    run.check_paths()
    return run
