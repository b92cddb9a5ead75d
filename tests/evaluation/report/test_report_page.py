"""The report: its numbers against `evaluate` and the reader, and what it does with odd caches and wrong names."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import cache_format as cf
import distill
from cache_samples import sample_metadata, sample_row
from foreign_files import NESTED, import_rows, made_up_rows, nested, write_parquet
from pipeline.errors import ConfigError
from pipeline.evaluation.report.bins import level
from pipeline.evaluation.report.page import KL_NOTES
from pipeline.evaluation.report.passages import token_texts
from pipeline.evaluation.report.teacher_positions import TOP
from pipeline.inspection import cache_statistics
from pipeline.losses import KlEstimateKind
from pipeline.models.tokenizers import load_cache_tokenizer
from pipeline.teacher.targets.rules import TargetRule
from report_pages import Page, read_page
from runs import build_cache, command, train
from tiny import tiny_llama, tiny_tokenizer, write_jsonl

RULES = {
    "threshold": TargetRule(),
    "top-k": TargetRule(top_k=16),
    "tempered": TargetRule(top_k=16, temperature=2.0),
    "samples": TargetRule(kind="threshold", samples=2),
    "random": TargetRule(kind="random", draws=8),
    "hidden": TargetRule(kind="hidden"),
}


@pytest.fixture(scope="module")
def folder(teacher_dir: Path, student_dir: Path, chat_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of each kind; `run`: a student with its held-out evaluations."""
    folder = tmp_path_factory.mktemp("reports")
    for name, rule in RULES.items():
        build_cache(folder / name, teacher_dir, chat_file, targets=rule)
    options = {"eval_cache": str(folder / "hidden"), "eval_steps": 1, "logging_steps": 1, "learning_rate": 1e-2}
    train(folder / "run", folder / "threshold", student=student_dir, max_steps=3, **options)
    return folder


def report(tmp_path: Path, *source: Path, **options: Any) -> tuple[Page, Any]:
    summary = distill.report(source, tmp_path / "report.html", device="cpu", **options)
    page = read_page(tmp_path / "report.html")
    assert summary.bytes == (tmp_path / "report.html").stat().st_size
    return page, summary


def write_rows(path: Path, rows: int, *, loss_tokens: bool = True, **metadata: Any) -> None:
    """A cache of random rows, with the tokenizer of the students here."""
    folder = path.with_name(f"{path.name}-tokenizer")
    tiny_tokenizer().save_pretrained(folder)
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    about = sample_metadata(rows, vocab_size=400, **metadata)
    with cf.CacheWriter(path, about, tokenizer_files=files) as writer:
        made = [sample_row(row, vocab=400) for row in range(rows)]
        writer.write([row if loss_tokens else replace(row, loss_mask=np.zeros_like(row.loss_mask)) for row in made])


# -- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("kind", RULES)
def test_numbers_are_those_of_evaluate(kind: str, folder: Path, student_dir: Path, teacher_dir: Path, tmp_path: Path):
    page, summary = report(tmp_path, folder / kind, student=[student_dir, teacher_dir], batch_size=3)
    _, *rows = page.tables["results"]
    for directory, row in zip((student_dir, teacher_dir), rows, strict=True):
        expected = distill.evaluate(folder / kind, directory, device="cpu")
        found = summary.students[str(directory)]
        assert found.tokens == expected.tokens and found.kl_estimate_kind == expected.kl_estimate_kind
        assert found.kl == pytest.approx(expected.kl, rel=1e-4, abs=1e-5)
        assert (found.ce, found.agreement) == pytest.approx((expected.ce, expected.agreement), rel=1e-5)
        assert row[1:] == [
            f"{found.kl:.4f}",
            f"{found.ce:.4f}",
            f"{found.perplexity:,.2f}",
            f"{found.agreement:.1%}",
            f"{found.tokens:,}",
        ]


@pytest.mark.long
@pytest.mark.parametrize("kind", RULES)
def test_teacher_behind_each_token_is_what_the_reader_gives(kind: str, folder: Path, tmp_path: Path):
    page, _ = report(tmp_path, folder / kind, passages=1000)
    cache = cf.open_cache(folder / kind)
    text, data, head = token_texts(cache), page.data, cache.head()
    seen = 0
    for passage in page.passages:
        row, document = map(int, re.findall(r"\d+", passage.title)[:2])
        offset, last = map(int, re.search(r"tokens (\d+)–(\d+)", passage.title).groups())
        tokens = cache[row]
        assert np.sum(tokens.segment_lengths[:document]) <= offset < np.sum(tokens.segment_lengths[: document + 1])
        targets = tokens.targets.merged()
        if head is not None:
            targets = cf.rebuilt_targets(tokens, head, cache.metadata.vocab_size, slice(None))
        n = passage.first
        t = offset - 1
        for shown, classes in passage.tokens:
            first = t = t + 1
            if classes is None:  # all tokens up to the next loss token
                while t < last and not tokens.loss_mask[t]:
                    t += 1
            assert shown == "".join(text(int(i)) for i in tokens.input_ids[first : t + 1]).replace("\n", "↵\n")
            assert (classes is None) == (first == 0 or not tokens.loss_mask[first - 1])
            if classes is None:
                continue
            ids, logprobs = targets.at(t - 1)
            exact = int(targets.exact_counts[t - 1])
            label, probs = int(tokens.input_ids[t]), np.exp(logprobs)
            assert data["texts"][data["label"][n]] == text(label)
            assert data["entropy"][n] == round(float(targets.entropy[t - 1]) * 1000)
            assert data["tail"][n] == pytest.approx(1e4 * np.exp(targets.residual_logprob[t - 1]), abs=1)
            by_text = {text(int(i)): float(p) for i, p in zip(ids[:exact], probs[:exact], strict=True)}
            label_prob = by_text.get(text(label))
            assert data["labelProbs"][n] == pytest.approx(-1 if label_prob is None else 1e4 * label_prob, abs=1)
            top = [data["texts"][i] if i >= 0 else None for i in data["top"][n * TOP : (n + 1) * TOP]]
            scaled = data["topProbs"][n * TOP : (n + 1) * TOP]
            ranked = sorted(by_text.values(), reverse=True)[:TOP]
            assert scaled[: len(ranked)] == pytest.approx([1e4 * p for p in ranked], abs=1)
            assert [by_text[name] for name in top[: len(ranked)]] == pytest.approx(ranked, abs=1e-6)
            sampled = sorted(probs[exact:], reverse=True)[: TOP - len(ranked)]
            weights = [-2 - value for value in scaled[len(ranked) : len(ranked) + len(sampled)]]
            assert weights == pytest.approx([1e4 * p for p in sampled], abs=1)
            assert all(name is None for name in top[len(ranked) + len(sampled) :])
            shade = level(targets.entropy[t - 1 : t])[0]
            assert (f"e{shade}" in classes.split()) == (shade > 0)
            n += 1
            seen += 1
        assert t == last
    assert seen == cache.num_loss_tokens


def test_student_behind_each_token_adds_up(folder: Path, student_dir: Path, tmp_path: Path):
    page, summary = report(tmp_path, folder / "hidden", student=student_dir, passages=1000)
    (student,) = page.data["students"]
    (found,) = summary.students.values()
    assert np.mean(student["kl"]) / 1000 == pytest.approx(found.kl, abs=1e-3)
    assert np.mean(student["ce"]) / 1000 == pytest.approx(found.ce, abs=1e-3)
    classes = [shown for passage in page.passages for _, shown in passage.tokens if shown is not None]
    assert np.mean(["d0" not in each.split() for each in classes]) == pytest.approx(found.agreement)
    # A true token has one probability, whether it is found by its name or among the candidates.
    label_probs, top = np.array(student["labelProbs"]), np.array(student["top"]).reshape(-1, 3)
    assert label_probs == pytest.approx(1e4 * np.exp(-np.array(student["ce"]) / 1000), abs=6)
    where, rank = np.nonzero(top == np.array(page.data["label"])[:, None])
    assert len(where) and (np.array(student["topProbs"]).reshape(-1, 3)[where, rank] == label_probs[where]).all()
    at_teacher = np.array(student["atTeacher"]).reshape(-1, TOP)
    where, rank = np.nonzero(np.array(page.data["top"]).reshape(-1, TOP) == np.array(page.data["label"])[:, None])
    assert len(where) and (at_teacher[where, rank] == label_probs[where]).all()


def test_bins_add_up_and_bytes_are_those_of_stats(folder: Path, student_dir: Path, tmp_path: Path):
    page, summary = report(tmp_path, folder / "hidden", student=student_dir)
    cells = page.tables["differences"]
    heads = [i for i, row in enumerate(cells) if row[0] in ("bin", "confidence")]
    tables = [cells[a:b] for a, b in zip(heads, [*heads[1:], None], strict=True)]
    assert [table[0][0] for table in tables] == ["bin", "bin", "confidence"]
    (found,) = summary.students.values()
    for table in tables[:2]:  # KL by entropy, by frequency
        counts = np.array([int(row[1].replace(",", "")) for row in table[1:]])
        means = np.array([0.0 if row[3] == "—" else float(row[3]) for row in table[1:]])
        assert counts.sum() == found.tokens
        assert (counts * means).sum() / counts.sum() == pytest.approx(found.kl, abs=1e-4)
    for column in (1, 4):  # teacher, student
        assert sum(int(row[column]) for row in tables[2][1:]) == found.tokens
    _, *sizes, total = page.tables["storage"]
    stats = cache_statistics(cf.open_cache(folder / "hidden", hidden_layers=[]))
    parts = {**stats["column_bytes_per_token"], **stats["beside_bytes_per_token"]}
    assert {row[0]: row[2] for row in sizes} == {name: f"{value:,.2f}" for name, value in parts.items() if value}
    assert int(total[1].replace(",", "")) == stats["bytes"]


def test_only_some_rows_and_passages(folder: Path, student_dir: Path, tmp_path: Path):
    page, summary = report(tmp_path, folder / "top-k", student=student_dir, max_rows=9, passages=4)
    expected = distill.evaluate(folder / "top-k", student_dir, device="cpu", max_rows=9)
    (found,) = summary.students.values()
    assert found.kl == pytest.approx(expected.kl, rel=1e-5) and found.tokens == expected.tokens == summary.loss_tokens
    assert summary.rows == 9 and summary.passages_shown == len(page.passages) == 4 < summary.passages
    kl = [float(re.search(r"KL student ([\d.]+)", passage.title)[1]) for passage in page.passages]
    assert kl[0] >= kl[1] >= kl[3] >= kl[2]  # two farthest, the nearest, one between them


# -- runs -------------------------------------------------------------------------------------------------------------


def test_a_run_is_its_student_on_its_held_out_cache(folder: Path, tmp_path: Path):
    page, summary = report(tmp_path, folder / "run")
    assert summary.cache == str(folder / "hidden") and list(summary.students) == [str(folder / "run")]
    state = json.loads((folder / "run/trainer_state.json").read_text())
    evaluations = [each for each in state["log_history"] if "eval_kl" in each]
    assert summary.students[str(folder / "run")].kl == pytest.approx(evaluations[-1]["eval_kl"], rel=1e-4)
    held_out = [row for row in page.tables["training"] if row[2] == "held out"]
    expected = [[f"{each['step']}", "run", "held out", f"{each['eval_kl']:.4g}"] for each in evaluations]
    assert held_out[: len(evaluations)] == expected
    assert ("learning rate", "0.01") in page.facts and ("steps", "3 of 3") in page.facts
    assert ("summary", "hidden, D = 32, float16") in page.facts


def test_an_unfinished_run_is_its_last_checkpoint(folder: Path, student_dir: Path, tmp_path: Path):
    def stop(step: int, total: int) -> None:
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        options = {"max_steps": 4, "save_steps": 1, "logging_steps": 1, "on_step": stop}
        train(tmp_path / "stopped", folder / "top-k", student=student_dir, **options)
    page, summary = report(tmp_path, tmp_path / "stopped")
    assert summary.cache == str(folder / "top-k")  # there is no held-out one, which the page says
    assert "trained on" in (tmp_path / "report.html").read_text()
    expected = distill.evaluate(folder / "top-k", tmp_path / "stopped/checkpoint-1", device="cpu")
    assert summary.students[str(tmp_path / "stopped")].kl == pytest.approx(expected.kl, rel=1e-4)
    assert ("steps", "1 of 4") in page.facts


def test_students_of_equal_names_are_told_apart(folder: Path, student_dir: Path, tmp_path: Path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/student").symlink_to(student_dir)
    page, _ = report(tmp_path, folder / "top-k", student=[student_dir, tmp_path / "other/student"], max_rows=1)
    labels = [each["name"] for each in page.data["students"]]
    assert len(set(labels)) == 2 and labels[1] == "other/student"


def test_loaded_students_of_one_name(folder: Path, student_dir: Path, tmp_path: Path):
    """Each has numbers of its own and keeps its mode; without a tokenizer there is a warning."""
    models = [AutoModelForCausalLM.from_pretrained(student_dir) for _ in range(2)]
    with torch.no_grad():
        models[1].get_input_embeddings().weight.mul_(2.0)
    with pytest.warns(distill.DistillWarning, match="loaded model without `tokenizer`"):
        page, summary = report(tmp_path, folder / "top-k", student=[models[0].train(), models[1].eval()], max_rows=1)
    assert list(summary.students) == [each["name"] for each in page.data["students"]]
    assert len({each.kl for each in summary.students.values()}) == 2
    assert models[0].training and not models[1].training


# -- odd caches -------------------------------------------------------------------------------------------------------


def test_masked_models_are_shown_with_the_original_tokens(masked_dir: Path, tmp_path: Path):
    page, summary = report(tmp_path, masked_dir / "bert-cache", student=masked_dir / "bert", passages=1000)
    cache = cf.open_cache(masked_dir / "bert-cache")
    assert summary.loss_tokens == cache.num_loss_tokens
    assert 0 <= summary.students[str(masked_dir / "bert")].kl < 1e-2
    text, row = token_texts(cache), cache[0]
    (first,) = [each for each in page.passages if each.title.startswith("Row 0,")]
    expected = np.where(row.loss_mask, row.labels, row.input_ids)
    assert "".join(shown for shown, _ in first.tokens) == "".join(text(int(token)) for token in expected)
    pieces = load_cache_tokenizer(cache).convert_ids_to_tokens(expected)  # of WordPiece
    assert "".join(shown for shown, _ in first.tokens).split() == pieces
    predicted = [shown for shown, classes in first.tokens if classes is not None]
    assert predicted == [text(int(token)) for token in row.labels[row.loss_mask]]


@pytest.mark.parametrize("values", ["logprobs", "renormalised"])
def test_lists_of_another_program(values: str, student_dir: Path, tmp_path: Path):
    """Their entropies are lower bounds; the tail mass of renormalised ones is unknown."""
    source = write_parquet(tmp_path / "rows.parquet", nested(made_up_rows(4), 6))
    import_rows(source, tmp_path / "cache", tiny_tokenizer(), **{**NESTED, "values": values})
    renormalised = values == "renormalised"
    for options in ({}, {"student": student_dir}):
        page, summary = report(tmp_path, tmp_path / "cache", **options)
        text = (tmp_path / "report.html").read_text()
        assert "teacher entropy, at least (nats, mean" in text and "teacher entropies are lower bounds" in text
        assert ">teacher entropy<" not in text and page.data["entropyName"] == "teacher entropy, at least"
        assert (page.data["tail"] is None) == ("tail mass unknown" in text.partition("<script")[0]) == renormalised
        assert ("teacher: share right" in text) == (not renormalised)
    (found,) = summary.students.values()
    assert found.kl_estimate_kind == ("entries only" if renormalised else "lower bound")
    assert ("over the cached entries alone" in text) == renormalised


def test_every_relation_of_the_kl_has_a_note():
    assert KL_NOTES.keys() == set(get_args(KlEstimateKind))


def test_no_loss_token_and_a_single_row(student_dir: Path, tmp_path: Path):
    write_rows(tmp_path / "nothing", 2, loss_tokens=False)
    page, summary = report(tmp_path, tmp_path / "nothing", student=student_dir)
    assert summary.loss_tokens == 0 and page.passages == [] and page.tables["results"][1][1] == "nan"
    write_rows(tmp_path / "one", 1)
    page, summary = report(tmp_path, tmp_path / "one", student=student_dir)
    assert summary.rows == 1 and sum(len(passage.tokens) for passage in page.passages) <= 7
    assert summary.loss_tokens == sum(classes is not None for each in page.passages for _, classes in each.tokens)


def test_invisible_and_broken_characters_are_written_as_codes(teacher_dir: Path, tmp_path: Path):
    write_jsonl(tmp_path / "text.jsonl", [{"text": "a\x00b\u202ec\u200bd é€🙂 \r\n" * 3}])
    build_cache(tmp_path / "cache", teacher_dir, tmp_path / "text.jsonl")
    page, _ = report(tmp_path, tmp_path / "cache", passages=1000)
    shown = "".join(text for passage in page.passages for text, _ in passage.tokens)
    assert "\\x00" in shown and "\\xe2" in shown and "↵\n" in shown
    assert not re.search("[\x00-\x08\x0b-\x1f\u202e\u200b\ufffd]", shown)


# -- hostile text, one file -------------------------------------------------------------------------------------------

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> &amp; {{ 7 * 7 }} ' \" <!-- ]]>"


def test_everything_from_outside_is_escaped(teacher_dir: Path, student_dir: Path, tmp_path: Path):
    write_jsonl(tmp_path / "text.jsonl", [{"text": HOSTILE + " x" * 20}])
    build_cache(tmp_path / "cache", teacher_dir, tmp_path / "text.jsonl", seq_len=256)
    named = tmp_path / "<b onclick=alert(3)>"
    named.symlink_to(student_dir)
    page, _ = report(tmp_path, tmp_path / "cache", student=named, passages=1000)
    plain, _ = report(tmp_path, tmp_path / "cache", student=student_dir, passages=1000)
    assert HOSTILE in "".join(text for passage in page.passages for text, _ in passage.tokens)
    assert page.tags == plain.tags  # neither text nor name became an element
    assert page.data["students"][0]["name"] == "<b onclick=alert(3)>"


def test_hostile_metadata_and_records(student_dir: Path, tmp_path: Path):
    bad = {HOSTILE: HOSTILE}
    write_rows(
        tmp_path / "cache",
        2,
        teacher={"name": HOSTILE, "weights_fingerprint": "0", **bad},
        capture=bad,
        corpus={"rows": 2, "files": [bad, "x", 3], "report": bad},
    )
    run = Path(shutil.copytree(student_dir, tmp_path / "run"))
    history = [{"step": 1, "kl": 1.0, "ce": float("nan"), "loss": HOSTILE}, {"kl": 3}, {"step": 2, "eval_kl": -1e300}]
    (run / "trainer_state.json").write_text(json.dumps({"log_history": history, "max_steps": "no"}))
    (run / "distill_config.json").write_text(
        json.dumps({"config": {**bad, "lone": "\ud800"}, "cache": [1, {"teacher": HOSTILE}]})
    )
    page, _ = report(tmp_path, tmp_path / "cache", student=run)
    assert {"script", "img"} & set(page.tags) == {"script"} and page.tags.count("script") == 2
    assert any(HOSTILE in name and value == HOSTILE for name, value in page.facts)


def test_one_file_without_references(folder: Path, student_dir: Path, tmp_path: Path):
    page, _ = report(tmp_path, folder / "run")
    text = (tmp_path / "report.html").read_text()
    assert all(link.startswith("#") for link in page.links)
    assert not re.search(r"https?:|url\(|@import|fetch\(|XMLHttp|import\(", text)
    script = page.scripts["script"]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text and "default-src 'none'" in text
    before = (tmp_path / "report.html").read_bytes()
    report(tmp_path, folder / "run")
    assert (tmp_path / "report.html").read_bytes() == before  # nothing random, no date


# -- wrong names ------------------------------------------------------------------------------------------------------


def test_foreign_tokenizer_is_refused(folder: Path, tmp_path: Path):
    foreign = tiny_llama(tmp_path / "foreign", tiny_tokenizer(seed=1), hidden=16)
    with pytest.raises(cf.MismatchError, match="across tokenizers"):
        report(tmp_path, folder / "top-k", student=foreign)
    assert not (tmp_path / "report.html").exists()


def test_what_is_neither_cache_nor_run(folder: Path, student_dir: Path, tmp_path: Path):
    for sources, problem in (
        ([tmp_path / "nothing"], "no such directory"),
        ([tmp_path], "neither manifest.json"),
        ([student_dir], "give the model as `student`"),
        ([folder / "top-k", folder / "hidden"], "found 2 caches"),
    ):
        with pytest.raises(ConfigError, match=problem) as error:
            report(tmp_path, *sources)
        assert error.value.field == "source"
    for output in (tmp_path, tmp_path / "missing/report.html"):
        with pytest.raises(ConfigError) as error:
            distill.report(folder / "top-k", output, device="cpu")
        assert error.value.field == "output"


def test_a_run_whose_cache_has_moved(folder: Path, student_dir: Path, tmp_path: Path):
    build_cache_again = tmp_path / "cache"
    build_cache_again.symlink_to(folder / "top-k")
    train(tmp_path / "run", build_cache_again, student=student_dir, max_steps=1)
    build_cache_again.unlink()
    with pytest.raises(ConfigError, match="is not here. Name the cache"):
        report(tmp_path, tmp_path / "run")
    _, summary = report(tmp_path, tmp_path / "run", folder / "top-k")
    assert list(summary.students) == [str(tmp_path / "run")]


# -- the command ------------------------------------------------------------------------------------------------------


def test_command_says_what_it_wrote(folder: Path, student_dir: Path, tmp_path: Path):
    words = [folder / "top-k", "--student", student_dir, "--output", tmp_path / "r.html", "--device", "cpu"]
    shown = command("report", *words, "--passages", 3).stdout
    assert "r.html" in shown and "3 of" in shown and "agreement" in shown
    result = json.loads(command("report", *words, "--json").stdout)
    assert result["students"][str(student_dir)]["kl"] > 0 and result["bytes"] == (tmp_path / "r.html").stat().st_size
    failed = command("report", student_dir, status=1)
    assert "CACHE|RUN" in failed.stderr and "--student" in failed.stderr and "`" not in failed.stderr
