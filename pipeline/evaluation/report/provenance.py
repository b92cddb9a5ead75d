"""How a cache and its students were made, from the manifest and the records of the runs; where the bytes are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import cache_format as cf
from cache_format.wording import quantity
from pipeline.evaluation.report.report_sources import Run
from pipeline.inspection import describe_targets
from pipeline.options import options_of
from pipeline.student.train_config import TrainStudentConfig

Pairs = list[tuple[str, str]]


def cache_facts(cache: cf.Cache) -> dict[str, Pairs]:
    """Groups of names and values from a manifest."""
    about = cache.metadata
    corpus = {name: value for name, value in about.corpus.items() if name not in ("files", "report")}
    report = about.corpus.get("report") or {}
    return {
        "Teacher": _pairs(about.teacher),
        "Targets": [("summary", describe_targets(about.targets)), *_pairs(about.targets)],
        "Text": [
            *_pairs(corpus),
            *(
                (f"file {file.get('name', '')}", f"{file.get('bytes', '?')} bytes, SHA-256 {file.get('sha256', '?')}")
                for file in about.corpus.get("files") or ()
                if isinstance(file, Mapping)
            ),
            *_pairs({name: value for name, value in report.items() if corpus.get(name) != value}),
        ],
        "Cache": [
            ("path", cache.path),
            ("rows", f"{cache.num_rows:,} in {quantity(len(cache.manifest.shards), 'shard')}"),
            ("tokens", f"{cache.num_tokens:,}, {cache.num_loss_tokens:,} of them loss tokens"),
            ("entries", f"{cache.manifest.num_entries:,}"),
            ("vocabulary", f"{about.vocab_size:,}"),
            ("alignment", about.alignment),
            ("encoding", about.encoding),
            ("bytes", f"{cache.manifest.stored_bytes:,}"),
        ],
        "Computed with": [*_pairs(about.capture), *_pairs(about.libraries)],
    }


def run_facts(run: Run) -> Pairs:
    """The options of a training run that are not at their default, and the targets that it learned from."""
    options = run.record.get("config")
    declared = options_of(TrainStudentConfig)
    given = {
        name: value
        for name, value in (options.items() if isinstance(options, Mapping) else ())
        if (name not in declared or value != declared[name].default)
    }
    last = max((each["step"] for each in run.history), default=0)
    planned = "" if run.max_steps is None else f" of {run.max_steps:,}"
    caches = run.record.get("cache")
    teachers = [
        each["teacher"] for each in (caches if isinstance(caches, list) else [caches]) if isinstance(each, Mapping)
    ]
    return [
        ("steps", f"{last:,.0f}{planned}"),
        *_pairs(given),
        *(("teacher", str(each.get("name"))) for each in teachers if isinstance(each, Mapping)),
    ]


def column_sizes(cache: cf.Cache) -> list[tuple[str, int]]:
    """Bytes on disk by column and what is beside the columns, largest first; together `stored_bytes`, as in `stats`."""
    columns = cache.column_bytes()
    beside = {"framing": cache.manifest.shard_bytes - sum(columns.values()), **cache.manifest.bytes_beside}
    sizes = {**columns, **{name: size for name, size in beside.items() if size}}
    return sorted(sizes.items(), key=lambda item: -item[1])


def _pairs(values: Mapping[str, Any], prefix: str = "") -> Pairs:
    """Names and values as text, nested ones under joined names; those without a value are left out."""
    found: Pairs = []
    for name, value in values.items():
        name = prefix + name.replace("_", " ")
        if isinstance(value, Mapping):
            found += _pairs(value, f"{name} ")
        elif isinstance(value, str):
            found.append((name, value))
        elif isinstance(value, list | tuple) and all(isinstance(item, str | int) for item in value):
            found += [(name, ", ".join(map(str, value)))] if value else []
        elif value is not None:
            found.append((name, json.dumps(value, ensure_ascii=False, default=str)))
    return found
