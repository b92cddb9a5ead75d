"""A cache for a student with another tokenizer: rows, losses and runs, against dense float64 on character offsets.

What positions end together is in test_retokenise.py.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import cache_format as cf
from head_sums import fused_sums, general_sums
from pipeline.errors import ConfigError, DistillError
from pipeline.evaluation.evaluate_config import EvaluateConfig
from pipeline.evaluation.held_out import evaluate
from pipeline.losses import SparseTargetBatch
from pipeline.losses.uld import SortedTargets, uld
from pipeline.student.data.cross_tokenizer import CrossTokenizerDataset
from pipeline.student.data.dataset import CacheDataset, collate
from pipeline.student.data.document_pieces import documents_of
from pipeline.teacher.targets.rules import TargetRule
from runs import build_cache, distance, log_history, train, weights
from tiny import conversations, english, tiny_llama, tiny_sentencepiece, tiny_tokenizer, write_jsonl

TEACHER, STUDENT, PIECES = tiny_tokenizer(), tiny_tokenizer(330, seed=7), tiny_sentencepiece()


@pytest.fixture(scope="module")
def folder(teacher_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """cache: whole documents; chats: only answers count; students with tokenizers of two kinds."""
    folder = tmp_path_factory.mktemp("cross")
    (folder / "text.txt").write_text(english(60, seed=2))
    write_jsonl(folder / "chat.jsonl", conversations(16))
    build_cache(folder / "cache", teacher_dir, folder / "text.txt", seq_len=900)
    build_cache(folder / "chats", teacher_dir, folder / "chat.jsonl", seq_len=900)
    tiny_llama(folder / "student", STUDENT, layers=1, hidden=16, seed=3)
    tiny_llama(folder / "pieces", PIECES, layers=1, hidden=16, seed=3)
    return folder


def cross(cache: Path, student: PreTrainedTokenizerFast, method: str = "project") -> CrossTokenizerDataset:
    return CrossTokenizerDataset(cf.open_cache(cache), TEACHER, student, method)


@pytest.mark.parametrize("name", ["cache", "chats"])
def test_with_identical_tokenizers_nothing_changes(folder: Path, name: str):
    plain, converted = CacheDataset(cf.open_cache(folder / name)), cross(folder / name, TEACHER)
    rows = range(len(plain))
    expected, found = plain.collate([plain[i] for i in rows]), converted.collate([converted[i] for i in rows])
    counted = expected["labels"] != -100
    assert counted.any()
    ours, theirs = (batch.pop("targets").rectangular() for batch in (found, expected))
    assert found.pop("documents").lengths == expected.pop("documents").lengths
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key
    where = counted.flatten()
    for field in ("ids", "logprobs", "exact_counts", "residual_logprob", "entropy", "labels"):
        assert torch.equal(getattr(ours, field)[where], getattr(theirs, field)[where]), field
    found = converted.coverage
    assert (found.aligned, found.mass, found.lost) == (1.0, 1.0, {})
    assert found.student_tokens == found.teacher_tokens == cf.open_cache(folder / name).num_loss_tokens


@pytest.mark.long
def test_training_with_identical_tokenizers_is_plain_training_bit_by_bit(folder: Path, student_dir: Path):
    options = {"student": student_dir, "max_steps": 4, "learning_rate": 1e-2, "batch_size": 4}
    options |= {"eval_cache": str(folder / "chats"), "eval_steps": 2}
    plain = train(folder / "plain", folder / "cache", **options)
    seen: list[str] = []
    crossed = train(folder / "crossed", folder / "cache", cross_tokenizer="project", on_warning=seen.append, **options)
    assert distance(weights(folder / "plain"), weights(folder / "crossed")) == 0.0
    assert plain.eval == crossed.eval
    assert any("`cross_tokenizer` is not needed" in warning for warning in seen)
    config = EvaluateConfig(cache=str(folder / "chats"), student=str(folder / "plain"), device="cpu")
    crossed, same = evaluate(replace(config, cross_tokenizer="project")), evaluate(config)
    assert replace(crossed, metrics={}) == replace(same, compared=1.0, metrics={}) and same.compared is None
    assert crossed.metrics and all(same.metrics[name].value == each.value for name, each in crossed.metrics.items())


def reference(folder: Path, cache: str) -> list[dict[str, Any]]:
    """For every counted student position: dense float64 logits and, if characters end together, the teacher's row.

    By offsets of characters, which on ASCII are bytes; the whole student text is the document's, EOS is the last token.
    """
    model = AutoModelForCausalLM.from_pretrained(folder / "student", dtype=torch.float64)
    vocab, found = STUDENT.get_vocab(), []
    for row in cf.open_cache(folder / cache).iter_rows():
        ends = np.cumsum(row.segment_lengths)
        for a, b in zip(ends - row.segment_lengths, ends, strict=True):
            ids = [int(i) for i in row.input_ids[a:b]]
            assert ids[-1] == TEACHER.eos_token_id
            text = TEACHER.decode(ids[:-1])
            theirs = TEACHER(text, return_offsets_mapping=True)
            assert theirs["input_ids"] == ids[:-1]
            ours = STUDENT(text, return_offsets_mapping=True)
            if not text.isascii():
                continue
            at = {end: t for t, (_, end) in enumerate(theirs["offset_mapping"])}
            tokens = [*ours["input_ids"], STUDENT.eos_token_id]
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([tokens])).logits[0]
            for s, (_, end) in enumerate(ours["offset_mapping"]):
                position: dict[str, Any] = {"z": logits[s].numpy(), "label": tokens[s + 1], "entries": None}
                if end in at:
                    entries, logprobs = row.targets.at(int(a) + at[end])
                    names = TEACHER.convert_ids_to_tokens([int(i) for i in entries])
                    position["entries"] = [
                        (vocab.get(name), float(np.exp(np.float64(p)))) for name, p in zip(names, logprobs, strict=True)
                    ]
                    position["residual"] = float(np.exp(np.float64(row.targets.residual_logprob[int(a) + at[end]])))
                found.append(position)
    return found


def ascii_cache(folder: Path, teacher_dir: Path, **options: Any) -> Path:
    name = f"ascii-{options.get('top_k', 16)}"
    if not (folder / name).exists():
        text = "\n".join(line for line in english(60, seed=2).splitlines() if line.isascii())
        (folder / "ascii.txt").write_text(text + "\n")
        build_cache(folder / name, teacher_dir, folder / "ascii.txt", seq_len=900, **options)
    return folder / name


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max())
    return e / e.sum()


def test_projected_loss_is_that_of_dense_arithmetic(folder: Path, teacher_dir: Path):
    cache = ascii_cache(folder, teacher_dir)
    kl, ce, without = [], [], 0
    for position in reference(folder, cache.name):
        q = softmax(position["z"])
        ce.append(-np.log(q[position["label"]]))
        if position["entries"] is None:
            kl.append(0.0)
            without += 1
            continue
        known = [(i, p) for i, p in position["entries"] if i is not None]
        rest = position["residual"] + sum(p for i, p in position["entries"] if i is None)
        total = rest + sum(p for _, p in known)
        terms = [p / total * np.log(p / total / q[i]) for i, p in known]
        outside = 1.0 - sum(q[i] for i, _ in known)
        kl.append(sum(terms) + rest / total * np.log(rest / total / outside))
    assert 0.2 < without / len(kl) < 0.9
    result = evaluate(
        EvaluateConfig(cache=str(cache), student=str(folder / "student"), device="cpu", cross_tokenizer="project")
    )
    assert result.tokens == len(kl)
    with_entries = sum(any(i is not None for i, _ in each["entries"] or ()) for each in reference(folder, cache.name))
    assert result.compared == pytest.approx(with_entries / len(kl), abs=1e-12) and result.compared < 0.8
    assert result.kl == pytest.approx(np.mean(kl), rel=1e-4)
    assert result.ce == pytest.approx(np.mean(ce), rel=1e-5)


@pytest.mark.long
def test_uld_with_all_entries_is_the_published_distance(folder: Path, teacher_dir: Path):
    cache = ascii_cache(folder, teacher_dir, top_k=400)
    expected = []
    for position in reference(folder, cache.name):
        if position["entries"] is None:
            expected.append(0.0)
            continue
        p, q = sorted((p for _, p in position["entries"]), reverse=True), sorted(softmax(position["z"]), reverse=True)
        width = max(len(p), len(q))
        p, q = (np.pad(np.asarray(x), (0, width - len(x))) for x in (p, q))
        expected.append(np.abs(p - q).sum() + position["residual"])
    dataset = cross(cache, STUDENT, "uld")
    model = AutoModelForCausalLM.from_pretrained(folder / "student", dtype=torch.float64)
    batch = dataset.collate([dataset[i] for i in range(len(dataset))])
    hidden = model.model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)[0]
    output = general_sums(hidden, model.lm_head, batch["targets"], uld=True, chunk_size=7)
    assert int(output.count) == len(expected)
    assert float(output.loss.detach()) == pytest.approx(np.sum(expected), rel=1e-6)


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("entries, vocab", [(5, 11), (11, 11), (11, 6)])
def test_gradient_of_uld_is_that_of_sorting_everything(entries: int, vocab: int, linear: bool):
    torch.manual_seed(1)
    n, d = 9, 4
    p = torch.randn(n, 11, dtype=torch.float64).softmax(dim=1).sort(descending=True).values
    hidden = torch.randn(n, d, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(vocab, d, dtype=torch.float64, requires_grad=True)
    aligned = torch.tensor([True, False, True] * 3)
    labels = torch.randint(vocab, (n,))
    labels[4] = -100
    rest = (1.0 - p[:, :entries].sum(dim=1)).clamp(min=0)
    nothing = SparseTargetBatch(
        ids=torch.zeros(n, 1, dtype=torch.long),
        logprobs=torch.full((n, 1), -torch.inf, dtype=torch.float64),
        residual_logprob=torch.zeros(n, dtype=torch.float64),
        labels=labels,
    )
    ordered = SortedTargets(
        logprobs=p[:, :entries].log(), residual_logprob=rest.log(), aligned=aligned, entries=nothing
    )
    options = {"kd_weight": 0.6, "uld": True, "scale": 0.5, "chunk_size": 4}
    if linear:
        output = fused_sums(hidden, weight, None, ordered, **options)
    else:
        output = general_sums(hidden, lambda h: h @ weight.T, ordered, **options)
    output.loss.backward()
    found = hidden.grad.clone(), weight.grad.clone()
    hidden.grad = weight.grad = None

    z = hidden @ weight.T
    q = z.softmax(dim=1).sort(descending=True).values
    width = max(11, vocab)
    padded_p, padded_q = (torch.nn.functional.pad(x, (0, width - x.shape[1])) for x in (p, q))
    distance_of = (padded_p[:, :entries] - padded_q[:, :entries]).abs().sum(dim=1)
    distance_of = distance_of + (padded_p[:, entries:].sum(dim=1) - padded_q[:, entries:].sum(dim=1)).abs()
    counted = labels != -100
    ce = torch.nn.functional.cross_entropy(z[counted], labels[counted], reduction="sum")
    expected = 0.5 * (0.4 * ce + 0.6 * distance_of[counted & aligned].sum())
    expected.backward()
    assert float(output.loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-9)
    for ours, theirs in zip(found, (hidden.grad, weight.grad), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-7, atol=1e-12)
    assert float(output.kl) == pytest.approx(0.0, abs=1e-12) and int(output.count) == n - 1


def test_uld_of_equal_distributions_over_permuted_vocabularies_is_zero():
    torch.manual_seed(2)
    z = torch.randn(6, 20, dtype=torch.float64)
    p = z[:, torch.randperm(20)].softmax(dim=1).sort(descending=True).values
    for k in (3, 20):
        rest = (1.0 - p[:, :k].sum(dim=1)).clamp(min=1e-300)
        labels = torch.zeros(6, dtype=torch.long)
        nothing = SparseTargetBatch(
            ids=labels[:, None],
            logprobs=torch.full((6, 1), -torch.inf, dtype=torch.float64),
            residual_logprob=torch.zeros(6, dtype=torch.float64),
            labels=labels,
        )
        ordered = SortedTargets(
            logprobs=p[:, :k].log(), residual_logprob=rest.log(), aligned=labels == 0, entries=nothing
        )
        assert uld(z, ordered).abs().max() < 1e-12


@pytest.mark.long
def test_a_run_with_uld_reports_its_distance_and_the_kl(folder: Path):
    options = {"max_steps": 2, "logging_steps": 1, "eval_steps": 1, "kd_weight": 0.5, "dataloader_num_workers": 1}
    output = folder / "uld-run"
    summary = train(
        output,
        folder / "cache",
        student=folder / "student",
        cross_tokenizer="uld",
        eval_cache=str(folder / "chats"),
        **options,
    )
    assert summary.kl_estimate_kind == "lower bound"
    entries = [entry for entry in log_history(output) if "soft" in entry or "eval_soft" in entry]
    assert len(entries) == 4
    for entry in entries:
        loss, ce, soft = (entry.get(name, entry.get(f"eval_{name}")) for name in ("loss", "ce", "soft"))
        assert 0.0 < soft < 2.0 and loss == pytest.approx(0.5 * ce + 0.5 * soft, abs=2e-4)


@pytest.mark.long
@pytest.mark.parametrize("method", ["project", "uld"])
@pytest.mark.parametrize("student", ["student", "pieces"])
def test_student_with_another_tokenizer_learns(folder: Path, student: str, method: str):
    output = folder / f"{student}-{method}"
    stages: list[str] = []
    summary = train(
        output,
        folder / "cache",
        student=folder / student,
        cross_tokenizer=method,
        eval_cache=str(folder / "chats"),
        early_stopping=("ce:noise:50",),  # sums by row
        eval_steps=4,
        max_steps=12,
        kd_weight=0.5,
        learning_rate=1e-2,
        batch_size=4,
        on_stage=stages.append,
    )
    curve = [entry for entry in log_history(output) if "eval_ce" in entry]
    trained = "eval_soft" if method == "uld" else "eval_kl"
    assert curve[-1][trained] < curve[0][trained] and curve[-1]["eval_ce"] < curve[0]["eval_ce"]
    for entry in curve:
        assert entry["eval_loss"] == pytest.approx(0.5 * entry["eval_ce"] + 0.5 * entry[trained], rel=1e-4)
    assert any("of them end where one of the teacher's does" in stage for stage in stages)
    config = EvaluateConfig(cache=str(folder / "chats"), student=str(output), device="cpu", cross_tokenizer="project")
    assert evaluate(config).kl == pytest.approx(summary.eval["kl"], rel=1e-5)
    assert AutoTokenizer.from_pretrained(output).get_vocab() != TEACHER.get_vocab()


def test_only_what_follows_learned_text_is_counted(folder: Path):
    opened, dataset = cf.open_cache(folder / "chats"), cross(folder / "chats", STUDENT)
    for i, row in enumerate(opened.iter_rows()):
        converted = dataset[i]
        learned = [int(row.input_ids[t + 1]) for t in np.flatnonzero(row.loss_mask)]
        ours = [int(converted.input_ids[s + 1]) for s in np.flatnonzero(converted.loss_mask)]
        assert STUDENT.decode(ours) == TEACHER.decode(learned)
        assert converted.segment_lengths.sum() == len(converted.input_ids) == len(converted.targets.counts)


@pytest.mark.long
@pytest.mark.parametrize("student, begin", [(STUDENT, []), (PIECES, [PIECES.bos_token_id])], ids=["bytes", "pieces"])
@pytest.mark.parametrize("name", ["cache", "chats"])
def test_documents_longer_than_the_student_are_several(
    folder: Path, name: str, student: PreTrainedTokenizerFast, begin: list[int]
):
    """Nothing is left out but the predictions of first tokens, and targets are those of the whole document."""
    opened = cf.open_cache(folder / name)
    dataset = CrossTokenizerDataset(opened, TEACHER, student, max_length=10)
    whole = cross(folder / name, student)
    lost = counted = pieces = aligned_ends = 0
    for i in range(len(opened)):
        row, uncut = dataset[i], whole[i]
        assert max(row.segment_lengths) <= 10 and row.segment_lengths.sum() == len(row.input_ids)
        starts = np.cumsum(row.segment_lengths) - row.segment_lengths
        documents = set(np.cumsum(uncut.segment_lengths) - uncut.segment_lengths)
        s = 0  # in the whole row
        for start, length in zip(starts, row.segment_lengths, strict=True):
            first = int(start)
            if s not in documents:
                assert row.input_ids[first : first + len(begin)].tolist() == begin
                assert not row.loss_mask[first : first + len(begin)].any()
                first += len(begin)
                lost += int(uncut.loss_mask[s - 1])
                pieces += 1
                aligned_ends += int(uncut.aligned[s - 1] >= 0)
            for at in range(first, int(start) + int(length)):
                assert row.input_ids[at] == uncut.input_ids[s]
                inside = at + 1 < start + length
                assert row.loss_mask[at] == (uncut.loss_mask[s] and inside)
                assert row.aligned[at] == (uncut.aligned[s] if inside else -1)
                if inside:
                    for ours, theirs in zip(row.targets.at(at), uncut.targets.at(s), strict=True):
                        assert np.array_equal(ours, theirs)
                s += 1
        assert s == len(uncut.input_ids)
        counted += int(row.loss_mask.sum())
    assert pieces > 10 and aligned_ends > 0.6 * lost  # of those whose prediction counts
    found = dataset.coverage
    assert found.student_tokens == counted == whole.coverage.student_tokens - lost
    assert found.lost.keys() - whole.coverage.lost.keys() == {"piece"}
    collate([dataset[0]])


def test_what_is_not_learned_of_a_text_is_counted_by_reason(folder: Path):
    """A row by hand, in bytes: a character cut in two, a special token that only the teacher has, several pieces."""
    euro = TEACHER("€", add_special_tokens=False)["input_ids"]
    assert len(euro) > 1
    text = TEACHER("the captain counted", add_special_tokens=False)["input_ids"]
    im_end = TEACHER.convert_tokens_to_ids("<|im_end|>")
    ids = np.asarray([TEACHER.bos_token_id, *text, euro[0], im_end, TEACHER.eos_token_id])
    mask = np.ones(len(ids), bool)
    mask[-1] = False
    given = cf.open_cache(folder / "cache")[0]
    row = replace(given, input_ids=ids, loss_mask=mask, segment_lengths=np.asarray([len(ids)]))
    dataset = CrossTokenizerDataset(cf.open_cache(folder / "cache"), TEACHER, STUDENT)
    dataset.retokeniser.counterparts[im_end] = None
    (document,) = documents_of(row, dataset.retokeniser, 5)
    lost = document.lost(dataset.retokeniser.teacher.special)
    firsts = [piece.tokens[1] for piece in document.pieces[1:]]  # behind BOS
    assert len(firsts) >= 2 and document.pieces[-1].tokens[-1].id == STUDENT.eos_token_id != firsts[-1].id
    broken = len(dataset.retokeniser.teacher.bytes[euro[0]])
    assert lost == {"special": 1, "bytes": broken, "piece": sum(t.end - t.start for t in firsts), "part": 0}


@pytest.mark.long
def test_a_student_shorter_than_the_rows_is_told_its_own_targets(folder: Path):
    short = tiny_llama(folder / "short", STUDENT, layers=1, hidden=16, seed=3)
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 16}))
    dataset = CrossTokenizerDataset(cf.open_cache(folder / "cache"), TEACHER, STUDENT, max_length=16)
    ours = sum(int(dataset[i].loss_mask.sum()) for i in range(len(dataset)))
    theirs = dataset.cache.num_loss_tokens
    assert len(dataset) <= 32 and ours > theirs
    stages: list[str] = []
    options = {"cross_tokenizer": "project", "max_steps": 1, "on_stage": stages.append}
    train(folder / "of-short", folder / "cache", student=short, **options)
    said = f"{ours:,} loss tokens of the student ({theirs:,} of the teacher)"
    assert said in stages[0] and "first tokens of the pieces of long documents (at most 16" in stages[0]
    assert f"rows, {ours:,} loss tokens" in stages[-1]
    config = EvaluateConfig(cache=str(folder / "cache"), student=str(short), device="cpu", cross_tokenizer="project")
    seen: list[str] = []
    assert evaluate(config, on_stage=seen.append).tokens == ours and said in seen[0]


# -- what cannot be had -----------------------------------------------------------------------------------------------


def test_other_tokenizer_is_refused_with_the_way_out(folder: Path):
    with pytest.raises(DistillError, match="tokenizer is not the teacher's.*`cross_tokenizer=project`"):
        train(folder / "refused", folder / "cache", student=folder / "student")


@pytest.mark.parametrize(
    "method, options, expected",
    [
        ("project", {"tail": "label"}, "`tail` label needs the entries that have no counterpart. Use `tail=bucket` or"),
        ("uld", {"tail": "renormalise"}, "Use `tail=bucket`"),
        ("uld", {"divergence": "tvd"}, "found `divergence` tvd as well"),
        ("uld", {"temperature": 2.0}, "it compares probabilities at temperature 1"),
        ("uld", {"temperature_schedule": "linear:2:1"}, "it compares probabilities at temperature 1"),
        (
            "project",
            {"position_weighting": "teacher-entropy"},
            "teacher-entropy is unknown at positions",
        ),
        ("merge", {}, "`cross_tokenizer` merge: expected one of project, uld"),
    ],
)
def test_losses_that_retokenised_targets_cannot_serve(
    folder: Path, method: str, options: dict[str, Any], expected: str
):
    with pytest.raises(ConfigError, match=expected):
        train(folder / "refused", folder / "cache", student=folder / "student", cross_tokenizer=method, **options)


def test_students_and_caches_that_it_cannot_work_with(folder: Path, teacher_dir: Path):
    random = folder / "random"
    build_cache(random, teacher_dir, folder / "text.txt", targets=TargetRule(kind="random"))
    with pytest.raises(ConfigError, match="random targets, without exact entries"):
        train(folder / "refused", random, student=folder / "student", cross_tokenizer="project")
    with pytest.raises(ConfigError, match="has no tokenizer of its own"):
        configured = str(folder / "student/config.json")
        train(folder / "refused", folder / "cache", student_config=configured, cross_tokenizer="project")
    assert not (folder / "refused").exists()


def test_a_student_of_a_configuration_gets_rows_of_its_length(folder: Path, tmp_path: Path):
    config = {"model_type": "gpt2", "vocab_size": 330, "n_positions": 24, "n_embd": 16, "n_layer": 1, "n_head": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    stages: list[str] = []
    options = {"student_config": str(tmp_path / "config.json"), "tokenizer": str(folder / "student"), "max_steps": 2}
    train(tmp_path / "out", folder / "cache", cross_tokenizer="project", on_stage=stages.append, **options)
    assert "at most 24 positions each" in stages[0]
