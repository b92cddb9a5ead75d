"""What a person sees and a script reads: the numbers against the cache, and text that is shown as it is."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console, RenderableType
from transformers import PreTrainedTokenizerFast

import cache_format as cf
from cache_format.codecs.packed.block import LANES
from pipeline.inspection import cache_statistics, inspect_row
from pipeline.teacher.targets.rules import TargetRule
from pipeline.terminal.console import out
from pipeline.terminal.evaluation_view import evaluation_view
from pipeline.terminal.row_view import row_view
from pipeline.terminal.statistics_view import statistics_view
from pipeline.terminal.tables import bar, duration, size
from pipeline.terminal.training_views import curves_view
from runs import build_cache


@pytest.fixture(scope="module")
def cache(teacher_dir: Path, chat_file: Path, tmp_path_factory: pytest.TempPathFactory) -> cf.Cache:
    return cf.open_cache(build_cache(tmp_path_factory.mktemp("report") / "cache", teacher_dir, chat_file))


def shown(view: RenderableType, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width, markup=False, emoji=False, highlight=False, soft_wrap=True)
    console.print(view)
    return console.file.getvalue()


# -- small things -----------------------------------------------------------------------------------------------------


def test_bars_grow_by_eighths():
    assert bar(0.0, 4) == "    " and bar(1.0, 4) == "████" and bar(0.5, 4) == "██  "
    assert bar(1 / 32, 4) == "▏   " and bar(0.53125, 4) == "██▏ "
    assert bar(-1.0, 4) == bar(0.0, 4) and bar(7.0, 4) == bar(1.0, 4)
    assert all(len(bar(share, 5)) == 5 for share in np.linspace(0, 1, 101))


@pytest.mark.parametrize(
    "count, expected",
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (1_440_000, "1.4 MB"), (2e9, "2.0 GB"), (3.21e12, "3.21 TB")],
)
def test_sizes(count: float, expected: str):
    assert size(count) == expected


@pytest.mark.parametrize(
    "seconds, expected",
    [(0, "0:00"), (65, "1:05"), (59.7, "1:00"), (3725, "1:02:05"), (float("nan"), "—"), (float("inf"), "—")],
)
def test_durations(seconds: float, expected: str):
    assert duration(seconds) == expected


# -- a whole cache ----------------------------------------------------------------------------------------------------


def test_stats_are_those_of_the_rows(cache: cf.Cache):
    stats = cache_statistics(cache)
    rows = list(cache.iter_rows())
    kept = [np.exp(row.targets.at(t)[1].astype(float)).sum() for row in rows for t in np.flatnonzero(row.loss_mask)]
    entropy = np.concatenate([row.targets.entropy[row.loss_mask] for row in rows])
    assert stats["rows"] == len(rows) and stats["tokens"] == sum(len(row.input_ids) for row in rows)
    assert stats["loss_tokens"] == len(kept) == len(entropy)
    assert stats["entries"] == sum(row.targets.num_entries for row in rows)
    assert stats["exact_mass_mean"] == pytest.approx(np.mean(kept), abs=0.01)  # residual and entries are both rounded
    assert stats["exact_mass_p5"] == pytest.approx(np.quantile(kept, 0.05), abs=0.03)
    assert stats["entropy_mean_nats"] == pytest.approx(entropy.mean())
    edges, counts = stats["entropy_histogram"]["edges_nats"], stats["entropy_histogram"]["counts"]
    assert sum(counts) == len(entropy) and len(edges) == len(counts) + 1
    assert counts[4] == ((entropy >= edges[4]) & (entropy < edges[5])).sum()

    # Columns and framing are all there is in the files.
    shards = Path(cache.path).glob("shards/*.arrow")
    total = sum(shard.stat().st_size for shard in shards)
    assert stats["bytes"] == total and stats["bytes_per_token"] == total / stats["tokens"]
    columns = stats["column_bytes_per_token"]
    assert 0.2 * stats["bytes_per_token"] < sum(columns.values()) < stats["bytes_per_token"]
    assert set(stats["beside_bytes_per_token"]) == {"framing"} and stats["stream_bytes_per_token"] == {}
    assert sum([*columns.values(), *stats["beside_bytes_per_token"].values()]) == pytest.approx(
        stats["bytes_per_token"]
    )
    assert max(columns, key=columns.__getitem__) in ("target_ids", "target_logprobs")


def test_stats_for_people(cache: cf.Cache):
    stats = cache_statistics(cache)
    text = shown(statistics_view(stats))
    for words in ("top-k, K = 16", f"{stats['rows']:,} in 1 shard", f"{stats['bytes_per_token']:.1f} bytes per token"):
        assert words in text
    assert "1 shards" not in text
    assert all(name in text for name in stats["column_bytes_per_token"]) and "order-zero entropy" not in text
    assert cache.path in text.replace("\n", "")


PARTS = [
    (TargetRule(top_k=16), "columns", {"framing"}),
    (TargetRule(top_k=16), "packed", {"framing", "lexicon.arrow"}),
    (TargetRule(kind="threshold", tail_threshold=0.1, samples=2), "packed", {"framing", "lexicon.arrow"}),
    (TargetRule(kind="hidden"), "columns", {"framing", "head.safetensors"}),
]


@pytest.mark.long
@pytest.mark.parametrize("rule, encoding, beside", PARTS)
def test_the_lines_of_stats_add_up_to_the_size(
    rule: TargetRule, encoding: str, beside: set[str], teacher_dir: Path, chat_file: Path, tmp_path: Path
):
    path = build_cache(tmp_path / "cache", teacher_dir, chat_file, targets=rule, encoding=encoding)
    stats = cache_statistics(cf.open_cache(path))
    files = [file for file in path.rglob("*") if file.suffix in (".arrow", ".safetensors")]
    assert stats["bytes"] == sum(file.stat().st_size for file in files)
    parts = stats["beside_bytes_per_token"]
    assert set(parts) == beside and min(parts.values()) > 0
    assert sum([*stats["column_bytes_per_token"].values(), *parts.values()]) == pytest.approx(stats["bytes_per_token"])
    lines = [line.split() for line in shown(statistics_view(stats)).splitlines()]
    shown_sizes = {line[0]: float(line[1]) for line in lines if len(line) > 1 and line[0] in {*parts, "total"}}
    assert set(shown_sizes) == {*parts, "total"}
    assert shown_sizes["total"] == pytest.approx(stats["bytes_per_token"], abs=0.006)


@pytest.mark.long
def test_a_packed_column_is_its_streams_and_little_else(teacher_dir: Path, chat_file: Path, tmp_path: Path):
    rule = TargetRule(kind="threshold", tail_threshold=0.1)
    path = build_cache(tmp_path / "cache", teacher_dir, chat_file, targets=rule, encoding="packed")
    stats = cache_statistics(cf.open_cache(path))
    streams, floors = stats["stream_bytes_per_token"], stats["stream_entropy_bytes_per_token"]
    states = stats["column_bytes_per_token"]["packed"] - sum(streams.values())
    batches = len(cf.open_cache(path).record_batches())
    assert 0 < states * stats["tokens"] < batches * (4 * LANES + 100)
    assert set(streams) - set(floors) <= {"frequencies", "exact_ranks_low_bits", "sample_ranks_low_bits"}
    assert all(floor <= streams[name] + 1e-9 for name, floor in floors.items()) and floors["sample_ranks"] > 0.5
    text = shown(statistics_view(stats))
    assert all(f"  {name}" in text for name in streams) and "order-zero entropy of these targets as columns" in text


# -- one row ----------------------------------------------------------------------------------------------------------


def test_row_says_what_the_cache_says(cache: cf.Cache, tokenizer: PreTrainedTokenizerFast):
    index = next(i for i, row in enumerate(cache.iter_rows()) if len(row.segment_lengths) > 1)
    row = cache[index]
    found = inspect_row(cache, index, lambda i: tokenizer.decode([i]), candidates=3, start=0, positions=1000)
    assert found["row"] == index and found["tokens"] == len(found["positions"]) == len(row.input_ids)
    assert found["loss_tokens"] == sum(p["counted"] for p in found["positions"]) == row.loss_mask.sum()
    segments = np.repeat(np.arange(len(row.segment_lengths)), row.segment_lengths)
    for t, position in enumerate(found["positions"]):
        assert position["position"] == t and position["segment"] == segments[t]
        assert position["token"] == tokenizer.decode([row.input_ids[t]])
        ids, logprobs = row.targets.at(t)
        if not row.loss_mask[t]:
            assert position["next_id"] is None and position["candidates"] == []
            continue
        assert position["next_id"] == row.input_ids[t + 1]
        best = sorted(zip(-logprobs, ids, strict=True))[:3]
        assert [c["id"] for c in position["candidates"]] == [i for _, i in best]
        assert [c["prob"] for c in position["candidates"]] == pytest.approx([np.exp(-negative) for negative, _ in best])
        if position["next_id"] in ids:
            assert position["next_prob"] == pytest.approx(np.exp(logprobs[ids == position["next_id"]][0]))
            assert position["next_rank"] - 1 <= (logprobs >= np.log(position["next_prob"]) - 1e-6).sum()
        else:
            assert position["next_rank"] is position["next_prob"] is None
        assert position["exact_mass"] == pytest.approx(1 - np.exp(row.targets.residual_logprob[t]), abs=1e-6)


def test_part_of_a_row(cache: cf.Cache):
    found = inspect_row(cache, 0, str, candidates=2, start=5, positions=4)
    assert [p["position"] for p in found["positions"]] == [5, 6, 7, 8]
    assert inspect_row(cache, 0, str, candidates=2, start=10_000, positions=4)["positions"] == []


def test_row_for_people(cache: cf.Cache, tokenizer: PreTrainedTokenizerFast):
    index = next(i for i, row in enumerate(cache.iter_rows()) if len(row.segment_lengths) > 1)
    found = inspect_row(cache, index, lambda i: tokenizer.decode([i]), candidates=3, start=0, positions=1000)
    text = shown(row_view(found))
    assert text.startswith(f"row {index}: {found['tokens']:,} tokens, {found['loss_tokens']:,} of them loss tokens")
    assert text.count("── next document ──") == len(found["segment_lengths"]) - 1
    assert text.count("◀") == 1 + found["loss_tokens"]  # the legend, and each true next token
    outside = sum(p["counted"] and p["next_prob"] is None for p in found["positions"])
    assert text.count("tail") == outside > 0
    assert "\\n" in text  # control characters are spelt out


def test_tokens_are_shown_as_they_are(cache: cf.Cache):
    found = inspect_row(cache, 0, lambda i: "[red]:smile:\x1b[31m", candidates=1, start=0, positions=30)
    text = shown(row_view(found))
    assert "[red]:smile:" in text and "\x1b" not in text


# -- students side by side --------------------------------------------------------------------------------------------


def evaluated(kl: float = 0.25, error: float | None = 0.01, **more: Any) -> dict[str, Any]:
    """What the view reads of an evaluation."""
    numbers = {"kl": kl, "ce": 2.0, "perplexity": 7.389, "agreement": 0.5, "acceptance": 0.625, "acceptance_high": 0.75}
    metrics = {name: {"value": value, "error": error} for name, value in numbers.items()}
    return {"metrics": metrics, "tokens": 1234, **more}


def test_students_side_by_side():
    better = {"kl": {"value": -0.125, "error": 0.006, "better": "b", "relation": "full"}}
    students = {"students/[i]one[/i]": evaluated(), "two": evaluated(0.125)}
    text = shown(evaluation_view("Held out: a[b]", students, {"two": better}))
    assert "Held out: a[b]" in text and "student A: students/[i]one[/i]" in text
    for words in ("0.2500 ± 0.0100", "0.1250 ± 0.0100", "2.0000", "7.39", "50.0% ± 1.0", "62.5–75.0%", "1,234"):
        assert words in text
    assert "student B is better than student A by 0.1250 ± 0.0060 nats of KL" in text
    unsure = {"kl": {"value": -0.001, "error": 0.006, "better": "", "relation": "full"}}
    words = "no difference between student A and student B beyond the error: 0.0010 ± 0.0060"
    assert words in " ".join(shown(evaluation_view("", students, {"two": unsure})).split())
    bound = {"kl": {"value": -0.125, "error": 0.006, "better": "", "relation": "lower bound"}}
    text = " ".join(shown(evaluation_view("", students, {"two": bound})).split())
    assert "student B is below student A by 0.1250 ± 0.0060 nats of the lower bound on KL; this does not say" in text


def test_too_few_tokens_are_marked():
    text = shown(evaluation_view("Held out", {"one": evaluated(few=True)}))
    assert "*1,234" in text and "too few to rely on" in text
    assert "too few" not in shown(evaluation_view("Held out", {"one": evaluated(few=False)}))


@pytest.mark.parametrize(("nats", "words"), [(2.0, "7.39"), (27.8, "1.2e+12"), (701.0, "> 1e304")])
def test_a_large_perplexity_is_readable(nats: float, words: str):
    student = evaluated()
    student["metrics"]["ce"]["value"] = nats
    assert f"perplexity {words}" in " ".join(shown(evaluation_view("Held out", {"one": student})).split())


def test_many_students_fit_80_columns():
    tasks = {"capitals acc": {"value": 0.5, "error": 0.1}}
    view = evaluation_view("Held out", {str(i): evaluated(tasks=tasks) for i in range(6)}, {}, tasks)
    text = shown(view)
    assert max(map(len, text.splitlines())) <= 80
    assert "student F" in text and "teacher" in text and text.count("capitals acc") == 2 and "0.2500 ±" not in text


def test_students_of_several_tokenizers_are_not_passed_off_as_comparable():
    students = {"students/one": evaluated(compared=0.694), "students/two": evaluated(compared=1.0)}
    text = shown(evaluation_view("Held out", students))
    for words in ("compared", "69.4%", "100.0%", "Compare only students that share a tokenizer"):
        assert words in " ".join(text.split())
    assert "perplexity" not in text
    plain = shown(evaluation_view("Held out", {"one": evaluated(compared=None)}))
    assert "compared" not in plain and "7.39" in plain


def test_curves_mark_what_was_saved_and_where_it_stopped():
    curve = [{"step": 10 * i, "kl": 1 / i, "ce": 4.0 - 0.01 * i} for i in range(1, 101)]
    curve[56]["kl"] = float("nan")
    text = shown(curves_view(curve, best_step=570, stopped={"step": 1000, "reasons": []}))
    rows = {words[0]: words for words in map(str.split, text.splitlines()[2:])}
    assert len(rows) <= 24 + 3 and {"10", "570", "1,000"} <= rows.keys()
    assert rows["10"][1] == "1.0000" and rows["570"][1] == "nan" and "3.4300" in rows["570"]
    assert "saved" in rows["570"] and "stop" in rows["1,000"]
    assert sum("saved" in words for words in rows.values()) == sum("stop" in words for words in rows.values()) == 1
    assert "█" * 12 in text.splitlines()[2] and max(map(len, text.splitlines())) <= 80


def test_the_command_line_prints_without_markup(capsys: pytest.CaptureFixture[str]):
    out.print(evaluation_view("Held out: [/x]", {"[bold]:cat:": evaluated()}))
    printed = capsys.readouterr().out
    assert "Held out: [/x]" in printed and "[bold]:cat:" in printed
