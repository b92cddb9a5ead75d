"""Masked language models through both stages: BERT, RoBERTa, DistilBERT, ModernBERT, ELECTRA generators."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoConfig, PreTrainedModel

import cache_format as cf
from cache_samples import shards
from cli import main
from dense import check_row, document_logprobs
from masked_runs import load, settings
from pipeline.errors import ConfigError, ModelError
from pipeline.losses import DistillLoss, sparse_kl
from pipeline.models.head import Head, open_head
from pipeline.models.isolation.shared_rows import check_padding
from pipeline.models.loading import load_tokenizer
from pipeline.models.objective import check_objective, most_positions, objective_of
from pipeline.student.data.dataset import CacheDataset, collate
from pipeline.student.training.forward import install_distillation_forward
from pipeline.teacher import opening
from pipeline.teacher.capture import cache_teacher
from pipeline.teacher.plan import plan_cache
from pipeline.teacher.progress import CaptureProgress
from pipeline.teacher.targets.rules import TargetRule
from pipeline.teacher.text.masked.mask_rule import MaskRule
from pipeline.teacher.verification import verify_against_teacher
from pipeline.teacher.verify_config import TeacherCheckConfig
from tiny_masked import KINDS, VOCAB, WINDOW, masked_config, tiny_masked

# ---- which models are masked


@pytest.mark.parametrize("kind", KINDS)
def test_the_objective_is_detected_and_another_one_is_refused(kind: str, masked_dir: Path, teacher_dir: Path) -> None:
    config = AutoConfig.from_pretrained(masked_dir / kind)
    assert objective_of(config) == "masked" == objective_of(masked_config(kind))  # with and without architectures
    assert check_objective("auto", config, kind) == check_objective("masked", config, kind) == "masked"
    with pytest.raises(ConfigError, match=r"`objective` causal: .* is a masked language model .*has seen the one"):
        check_objective("causal", config, str(masked_dir / kind))
    llama = AutoConfig.from_pretrained(teacher_dir)
    with pytest.raises(ConfigError, match=r"`objective` masked: .* is a causal language model \(LlamaForCausalLM\)"):
        check_objective("masked", llama, str(teacher_dir))


def test_a_bert_that_is_a_decoder_is_causal() -> None:
    config = masked_config("bert")
    config.architectures = ["BertLMHeadModel"]
    assert objective_of(config) == "causal"
    assert objective_of(masked_config("bert", is_decoder=True)) == "causal"
    assert objective_of(AutoConfig.for_model("bart")) == "causal"


def test_positions_of_a_roberta_start_after_its_padding_token(masked_dir: Path, tmp_path: Path) -> None:
    limits = {kind: most_positions(AutoConfig.from_pretrained(masked_dir / kind)) for kind in KINDS}
    assert limits == dict.fromkeys(KINDS, WINDOW)
    config = settings(masked_dir, "roberta", tmp_path / "cache")
    with pytest.raises(ConfigError, match=f"at most {WINDOW} positions"):
        cache_teacher(replace(config, data=replace(config.data, seq_len=WINDOW + 1)))
    longest = replace(config.data, seq_len=WINDOW, sample_by="document")
    cache_teacher(replace(config, data=longest))  # rows of all 64 tokens, which index position 65
    assert max(len(row.input_ids) for row in cf.open_cache(tmp_path / "cache").iter_rows()) == WINDOW
    check_cache(tmp_path / "cache", masked_dir / "roberta")


# ---- the cache against the teacher


def check_cache(path: Path, teacher: Path) -> int:
    """Compare every row with the teacher in fp64 on that row alone, without padding or attention mask."""
    cache, model = cf.open_cache(path), load(teacher)
    assert cache.metadata.alignment == "same" and cache.metadata.vocab_size == VOCAB
    for row in cache.iter_rows():
        check_row(row, document_logprobs(model, row, VOCAB), cache.metadata)
    cf.verify_cache(path)
    return cache.num_loss_tokens


@pytest.mark.parametrize("kind", KINDS)
def test_cached_targets_equal_the_models_own_log_softmax(kind: str, masked_dir: Path) -> None:
    assert check_cache(masked_dir / f"{kind}-cache", masked_dir / kind) > 100
    metadata = cf.open_cache(masked_dir / f"{kind}-cache").metadata
    assert metadata.capture["head"] == "own" and metadata.corpus["masking"]["probability"] == 0.15
    assert metadata.corpus["packing"] is False


@pytest.mark.parametrize("by", [-1, 1])
def test_targets_one_position_off_are_detected(by: int, masked_dir: Path) -> None:
    cache = cf.open_cache(masked_dir / "bert-cache")
    row = max(cache.iter_rows(), key=lambda row: len(row.input_ids))
    exact = document_logprobs(load(masked_dir / "bert"), row, VOCAB)
    check_row(row, exact, cache.metadata)
    with pytest.raises(AssertionError):
        check_row(row, np.roll(exact, by, axis=0), cache.metadata)


def test_a_shift_at_capture_is_detected(masked_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """States of t − 1 in place of t, as in a causal pipeline, introduced after the start-up probe."""
    states = Head.hidden_states

    def shift_from_here_on(model: PreTrainedModel, head: Head) -> None:
        monkeypatch.setattr(Head, "hidden_states", lambda head, *inputs, **_: states(head, *inputs).roll(1, 1))

    monkeypatch.setattr(opening, "check_padding", shift_from_here_on)
    cache_teacher(settings(masked_dir, "bert", tmp_path / "cache"))
    with pytest.raises(AssertionError, match="not a top-K|off by"):
        check_cache(tmp_path / "cache", masked_dir / "bert")


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_labels_are_the_original_tokens(kind: str, masked_dir: Path) -> None:
    cache = cf.open_cache(masked_dir / f"{kind}-cache")
    tokenizer = load_tokenizer(str(masked_dir / kind))
    found = []
    for row in cache.iter_rows():
        assert row.labels is not None and (row.labels[~row.loss_mask] == -100).all()
        assert np.array_equal(row.label_ids, row.labels)
        text = np.where(row.loss_mask, row.labels, row.input_ids)
        found += text[1:-1].tolist()
    documents = (masked_dir / "text.txt").read_text(encoding="utf-8").splitlines()
    assert found == [i for text in documents for i in tokenizer(text, add_special_tokens=False)["input_ids"]]


def masks(path: Path) -> list[tuple[int, ...]]:
    return [tuple(np.where(row.loss_mask, row.labels, -1)) + tuple(row.input_ids) for row in cf.open_cache(path)]


@pytest.mark.long
def test_neither_batch_size_nor_shards_change_the_pattern(masked_dir: Path, tmp_path: Path) -> None:
    for i, options in enumerate(({"batch_size": 1}, {"batch_size": 5, "rows_per_shard": 7})):
        cache_teacher(settings(masked_dir, "modernbert", tmp_path / str(i), **options))
        assert masks(tmp_path / str(i)) == masks(masked_dir / "modernbert-cache")
        check_cache(tmp_path / str(i), masked_dir / "modernbert")
    cache_teacher(settings(masked_dir, "modernbert", tmp_path / "other", masking=MaskRule(seed=1)))
    assert masks(tmp_path / "other") != masks(masked_dir / "modernbert-cache")


class Killed(Exception):
    pass


def test_a_killed_run_resumes_to_the_same_bytes(masked_dir: Path, tmp_path: Path) -> None:
    config = settings(masked_dir, "bert", tmp_path / "cache")

    def kill(progress: CaptureProgress) -> None:
        if progress.rows > 20:
            raise Killed

    with pytest.raises(Killed):
        cache_teacher(config, on_progress=kill)
    with pytest.raises(cf.MismatchError, match="corpus.masking.seed recorded 0, given 1"):
        cache_teacher(replace(config, masking=MaskRule(seed=1)))
    assert cache_teacher(config).resumed_rows > 0
    assert shards(tmp_path / "cache") == shards(masked_dir / "bert-cache")
    assert (tmp_path / "cache/manifest.json").read_bytes() == (masked_dir / "bert-cache/manifest.json").read_bytes()


def test_all_positions_copies_and_sampled_targets(masked_dir: Path, tmp_path: Path) -> None:
    rule = TargetRule(kind="threshold", tail_threshold=0.1, samples=2)
    cache_teacher(
        settings(masked_dir, "bert", tmp_path / "c", targets=rule, all_positions=True, masking=MaskRule(copies=2))
    )
    cache = cf.open_cache(tmp_path / "c")
    assert all((row.targets.counts > 0).all() for row in cache.iter_rows())
    half = len(cache) // 2
    assert np.array_equal(cache[0].input_ids.shape, cache[half].input_ids.shape)
    assert not np.array_equal(cache[0].loss_mask, cache[half].loss_mask)
    cf.verify_cache(tmp_path / "c")


def test_masks_for_a_causal_teacher_are_refused(teacher_dir: Path, masked_dir: Path, tmp_path: Path) -> None:
    config = replace(settings(masked_dir, "bert", tmp_path / "c"), teacher=str(teacher_dir))
    with pytest.raises(ConfigError, match="is a causal language model"):
        cache_teacher(replace(config, masking=MaskRule()))
    with pytest.raises(ConfigError, match=r"`objective` masked"):
        cache_teacher(replace(config, objective="masked"))
    assert not (tmp_path / "c").exists()


# ---- the head


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_general_path_gives_the_models_own_logits(kind: str, dtype: torch.dtype, masked_dir: Path) -> None:
    model = load(masked_dir / kind).to(dtype)
    head = open_head(model, VOCAB, masked=True)
    check_padding(model, head)
    assert not head.linear
    ids = torch.randint(5, VOCAB, (2, 9), generator=torch.Generator().manual_seed(7))
    ids[1, 6:] = model.config.pad_token_id
    there = (ids != model.config.pad_token_id).long()
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=there).logits[..., :VOCAB]
        hidden = head.hidden_states(ids, torch.zeros_like(ids), there)
        found = head.logits(hidden[there.bool()])
    tolerance = 8 * torch.finfo(dtype).eps * expected.abs().max().item()
    torch.testing.assert_close(found, expected[there.bool()], rtol=0.0, atol=tolerance)


def test_a_model_that_sees_its_padding_is_refused(masked_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(masked_dir / "bert")
    head = open_head(model, VOCAB, masked=True)
    states = Head.hidden_states
    monkeypatch.setattr(Head, "hidden_states", lambda head, ids, positions, *_, **__: states(head, ids, positions))
    with pytest.raises(ModelError, match="it sees the padding"):
        check_padding(model, head)


@pytest.mark.parametrize("kind", KINDS)
def test_the_students_loss_has_the_gradient_of_dense_autograd(kind: str, masked_dir: Path) -> None:
    """The reference is the model's own forward pass on each row alone, averaged over the masked tokens of all rows."""
    model = load(masked_dir / kind)
    head = open_head(model, VOCAB, masked=True)
    cache = cf.open_cache(masked_dir / f"{kind}-cache")
    rows = [cache[i] for i in (0, 3, 4, 9)]
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in rows:
        logits = model(input_ids=torch.from_numpy(row.input_ids.astype(np.int64))[None]).logits[0, :, :VOCAB]
        options = {"kd_weight": 0.7, "temperature": 2.0, "labels": torch.from_numpy(row.label_ids)}
        total = total + sparse_kl(logits, row.targets, reduction="sum", **options)
        count += int(row.loss_mask.sum())
    (total / count).backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()

    install_distillation_forward(model, head, DistillLoss(kd_weight=0.7, temperature=2.0))
    output = model(scale=1 / count, **collate(rows))
    output.loss.backward()
    assert output.count == count
    assert output.loss.item() == pytest.approx((total / count).item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-5, atol=1e-8, msg=name)


# ---- batches


def check_alignment(rows: list[cf.CacheRow]) -> None:
    """Mask, label and target list of a batch at t are those of the token at t."""
    batch = collate(rows)
    targets, length = batch["targets"], batch["input_ids"].shape[1]
    for i, row in enumerate(rows):
        assert batch["attention_mask"][i].tolist() == [1] * len(row.input_ids) + [0] * (length - len(row.input_ids))
        for t in range(len(row.input_ids)):
            n = i * length + t
            assert bool(targets.loss_mask[n]) == bool(row.loss_mask[t])
            if row.loss_mask[t]:
                assert targets.labels[n] == row.labels[t], "label"
                assert sorted(targets.ids[n].tolist()) == sorted(row.targets.at(t)[0].tolist()), "target list"
    assert targets.loss_mask.sum() == sum(int(row.loss_mask.sum()) for row in rows)


def test_masks_labels_and_targets_share_their_index(masked_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = cf.open_cache(masked_dir / "bert-cache")[:5]
    check_alignment(rows)
    late = property(lambda row: np.where(row.loss_mask, np.roll(row.labels, -1), -100))
    monkeypatch.setattr(cf.CacheRow, "label_ids", late)
    with pytest.raises(AssertionError):
        check_alignment(rows)


# ---- the other commands


def run(*words: object) -> str:
    result = CliRunner().invoke(main, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_on_the_command_line(masked_dir: Path, tmp_path: Path) -> None:
    words = [
        "cache-teacher",
        "--teacher",
        masked_dir / "electra",
        "--data",
        masked_dir / "text.txt",
        "--sample-by",
        "line",
    ]
    words += ["--seq-len", 32, "--device", "cpu", "--output", tmp_path / "cache", "--objective", "masked"]
    words += ["--mask-probability", 0.3, "--mask-seed", 5, "--mask-copies", 2, "--encoding", "packed"]
    words += ["--top-k", 64]
    run(*words, "--mask-replace-prob", 0.5, "--random-replace-prob", 0.5)
    masking = dict(cf.open_cache(tmp_path / "cache").metadata.corpus["masking"])
    assert masking.pop("mask_token_id") == 4
    assert masking == {
        "probability": 0.3,
        "mask_replace_prob": 0.5,
        "random_replace_prob": 0.5,
        "seed": 5,
        "copies": 2,
    }
    run("convert", tmp_path / "cache", tmp_path / "columns", "--encoding", "columns", "--top-k", 8)
    for one, other in zip(cf.open_cache(tmp_path / "cache"), cf.open_cache(tmp_path / "columns"), strict=True):
        assert np.array_equal(one.labels, other.labels) and np.array_equal(one.input_ids, other.input_ids)
        assert other.targets.counts.max() == 8
    for name in ("cache", "columns"):
        assert "intact" in run("verify", tmp_path / name)
        stats = json.loads(run("stats", tmp_path / name, "--json"))
        assert 0 < stats["column_entropy_bytes_per_token"]["labels"] <= stats["column_bytes_per_token"]["labels"] * 2
        assert "labels" in run("stats", tmp_path / name)
    text = run("inspect", tmp_path / "columns", "--row", 3)
    assert "teacher expects here" in text and "◀ the true token" in text and "next" not in text
    row = cf.open_cache(tmp_path / "columns")[3]
    shown = json.loads(run("inspect", tmp_path / "columns", "--row", 3, "--json"))
    assert shown["alignment"] == "same"
    assert [p["label_id"] for p in shown["positions"]] == [None if i < 0 else i for i in row.labels.tolist()]
    assert "in its place" in (tmp_path / "cache/README.md").read_text()


@pytest.mark.long
def test_plan_and_verify_run_a_masked_teacher_as_capture_does(masked_dir: Path, tmp_path: Path) -> None:
    options = {"masking": MaskRule(probability=0.3), "rows_per_shard": 1000}
    plan = plan_cache(settings(masked_dir, "roberta", tmp_path / "cache", **options))
    cache_teacher(settings(masked_dir, "roberta", tmp_path / "cache", **options))
    cache = cf.open_cache(tmp_path / "cache")
    assert (plan.rows, plan.tokens, plan.loss_tokens) == (len(cache), cache.num_tokens, cache.num_loss_tokens)
    assert plan.chosen.bytes["columns"] == pytest.approx(cache.manifest.stored_bytes, rel=0.25)
    config = {"cache": str(tmp_path / "cache"), "device": "cpu"}
    check = verify_against_teacher(TeacherCheckConfig(teacher=str(masked_dir / "roberta"), **config))
    assert check.agrees and check.same_weights and check.same_entries == 1.0
    other = tiny_masked(tmp_path / "other", "roberta", seed=77)
    assert not verify_against_teacher(TeacherCheckConfig(teacher=str(other), **config)).agrees


def test_rows_that_fill_up_a_batch_keep_their_padding(masked_dir: Path) -> None:
    dataset = CacheDataset(cf.open_cache(masked_dir / "bert-cache"))
    batch = collate([dataset[0], dataset[len(dataset) + 1]])
    assert (batch["labels"][1] == -100).all() and batch["attention_mask"][1].sum() == len(dataset[1].input_ids)
