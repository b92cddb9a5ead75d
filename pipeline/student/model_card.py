"""README.md of a student: where it comes from, how it was trained, how near to its teacher it is.

The metadata (base model, licence, model-index with the metrics) are what the Hugging Face hub reads. A README that
somebody has edited is never replaced: the last line of ours has a checksum of the text above it.
"""

from __future__ import annotations

import hashlib
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

import cache_format as cf
from pipeline.evaluation.evaluate_config import shown_number
from pipeline.evaluation.intervals import Metric
from pipeline.student.card_plots import plot_curve, plot_reliability

README = "README.md"
MARK = "<!-- Written by distill, never replaced once edited. sha256 of the lines above: {} -->"
MARKED = re.compile(r"(?P<text>.*)" + re.escape(MARK).replace(r"\{\}", "(?P<sha256>[0-9a-f]{64})") + r"\n?", re.DOTALL)

# Names in the model-index, and in the text.
METRICS = {
    "kl": "KL to the teacher (nats)",
    "ce": "Cross-entropy (nats)",
    "perplexity": "Perplexity",
    "agreement": "Agreement with the teacher",
    "top5_agreement": "Teacher's most likely token among the student's five",
    "ece": "Expected calibration error",
    "ece_teacher": "Calibration error to the teacher",
    "acceptance": "Acceptance as a draft model",
}

SIGNS = {"lower bound": "≥ ", "upper bound": "≤ ", "entries only": "cached entries only: "}
NOTES = {
    " ± ": " ±: 95 % confidence interval over rows.",
    "≥": " ≥: a lower bound, because the cache does not have the full distribution.",
    "–": " low–high: bounds, because the cache does not have the full distribution.",
}

TEXT = """
# {name}

{student} trained by knowledge distillation from {teacher}, with
cached teacher targets.

| | |
|---|---|
| student before training | {student} |
| teacher | {teacher} |
| data | {data} |
| steps | {steps:,} |

## Repeat the training

```python
import distill

distill.train_student(config="distill_config.json", output="NEW")
```

`distill_config.json` in this directory has every option. Versions: {versions}.
"""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What a card says of a run. `student`: None for random weights; `adapter`: saved without its base model."""

    output: Path
    student: str | None
    caches: tuple[cf.Cache, ...]
    steps: int
    adapter: bool = False


def is_replaceable(directory: Path) -> bool:
    """Whether there is no README, or an unchanged one of ours."""
    file = directory / README
    if not file.exists():
        return True
    found = MARKED.fullmatch(file.read_text(encoding="utf-8", errors="replace"))
    return found is not None and _sha256(found["text"]) == found["sha256"]


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Metrics on a held-out cache, by name; those without an entry in METRICS are left out. `rows` of `all_rows` in the
    cache were used, with `tokens` loss tokens; None if they were re-tokenised."""

    cache: str
    metrics: Mapping[str, Metric]
    tokens: int | None
    rows: int
    all_rows: int


def write_card(
    origin: Origin,
    held_out: HeldOut | None,
    evaluations: Sequence[Mapping[str, float]] = (),
) -> None:
    """Writes the README of a finished run, and beside it the plot that it shows.

    Args:
        evaluations: metrics on the held-out cache during training, with their step.
    """
    masked = origin.caches[0].metadata.alignment == "same"
    student = "a model with random weights" if origin.student is None else _shown(origin.student)
    teachers = sorted({_shown(str(cache.metadata.teacher["name"])) for cache in origin.caches})
    sources = sorted({str(cache.metadata.corpus.get("source", "not recorded")) for cache in origin.caches})
    data = ModelCardData(
        base_model=origin.student if origin.student and _on_hub(origin.student) else None,
        datasets=[source for source in sources if _on_hub(source)] or None,
        license=_licence(origin.student),
        library_name="peft" if origin.adapter else "transformers",
        pipeline_tag="fill-mask" if masked else "text-generation",
        tags=["knowledge-distillation", "distill"],
        model_name=origin.output.name,
        eval_results=_results(held_out, masked),
    )
    text = TEXT.format(
        name=origin.output.name,
        student=student,
        teacher=", ".join(teachers),
        data=", ".join(map(_shown, sources)),
        steps=origin.steps,
        versions=", ".join(_versions()),
    )
    curve = plot_curve(origin.output, evaluations)
    _save(origin.output, data, text + (f"\n## Training\n\n{curve}\n" if curve else "") + _table(held_out))


def add_metrics(directory: Path, held_out: HeldOut, reliability: Sequence[tuple[float, float]] = ()) -> bool:
    """Replaces the metrics in a card of ours by those of an evaluation; False if there is none, or it was edited.

    Args:
        reliability: mean confidence and share of correct predictions, by bin of confidence; for a plot.
    """
    file = directory / README
    if not file.exists() or not is_replaceable(directory):
        return False
    card = ModelCard(MARKED.fullmatch(file.read_text(encoding="utf-8"))["text"])  # type: ignore[index]
    data: ModelCardData = card.data  # type: ignore[assignment]
    data.model_name = directory.resolve().name
    data.eval_results = _results(held_out, data.pipeline_tag == "fill-mask")
    table, plot = _table(held_out), plot_reliability(directory, reliability)
    _save(directory, data, card.text.split("\n## Held-out metrics\n")[0] + table + (f"\n{plot}\n" if plot else ""))
    return True


def _save(directory: Path, data: ModelCardData, text: str) -> None:
    whole = f"---\n{data.to_yaml()}\n---\n{text.rstrip()}\n\n"
    scratch = directory / f"{README}.tmp"
    scratch.write_text(whole + MARK.format(_sha256(whole)) + "\n", encoding="utf-8")
    scratch.replace(directory / README)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _results(held_out: HeldOut | None, masked: bool) -> list[EvalResult] | None:
    """For the hub, which has one number for a metric and no word for a bound: only values of the metric itself."""
    if held_out is None:
        return None
    metrics, cache = held_out.metrics, Path(held_out.cache).name
    return [
        EvalResult(
            task_type="fill-mask" if masked else "text-generation",
            dataset_type=cache,
            dataset_name=f"held-out cache {cache}",
            metric_type=name,
            metric_name=title,
            metric_value=metrics[name].value,
        )
        for name, title in METRICS.items()
        if name in metrics and metrics[name].relation in ("full", "estimate")
    ] or None


def _table(held_out: HeldOut | None) -> str:
    if held_out is None:
        return ""
    lines = [
        f"| {title} | {_cell(name, held_out.metrics)} |" for name, title in METRICS.items() if name in held_out.metrics
    ]
    if not lines:
        return ""
    tokens = "" if held_out.tokens is None else f"{held_out.tokens:,} loss tokens in "
    about = f"On {_shown(held_out.cache)}: {tokens}{held_out.rows:,} of {held_out.all_rows:,} rows."
    about += "".join(note for sign, note in NOTES.items() if any(sign in line for line in lines))
    return "\n".join(["\n## Held-out metrics\n", f"{about}\n", "| | |", "|---|---|", *lines, ""])


def _cell(name: str, metrics: Mapping[str, Metric]) -> str:
    metric, high = metrics[name], metrics.get(f"{name}_high")
    if high is not None:
        return f"{metric.value:.4f}–{high.value:.4f}"
    sign = SIGNS.get(metric.relation, "")
    number = shown_number if name == "perplexity" else "{:.4f}".format
    return f"{sign}{number(metric.value)}" + ("" if metric.error is None else f" ± {number(metric.error)}")


def _on_hub(name: str) -> bool:
    """Whether a name can be that of a repository; the hub refuses others in metadata."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name and not Path(name).exists()


def _shown(name: str) -> str:
    return f"[{name}](https://huggingface.co/{name})" if _on_hub(name) else f"`{name}`"


def _licence(student: str | None) -> str | None:
    """The licence in the README of the student before training, read without a network; None if unknown."""
    if student is None:
        return None
    file: Any = Path(student) / README
    if not file.is_file():
        file = try_to_load_from_cache(student, README) if _on_hub(student) else None
    if not isinstance(file, str | Path):
        return None
    try:
        found = ModelCard.load(file, ignore_metadata_errors=True).data.get("license")
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):  # anything: a person wrote it
        return None
    return found if isinstance(found, str) else None


def _versions() -> list[str]:
    found = [f"Python {platform.python_version()}"]
    for package in ("distill", "transformers", "torch"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:  # a checkout that is not installed
            continue
    return found
