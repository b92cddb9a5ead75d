"""Training runs: gradient accumulation, logged metrics, checkpoints, resume, divergence.

Two processes are in test_distributed.py.
"""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    PreTrainedTokenizerFast,
)

import cache_format as cf
import pipeline.student.training.run_parts as run_parts
from pipeline.errors import ConfigError, DivergedError
from pipeline.evaluation.evaluate_config import EvaluateConfig
from pipeline.evaluation.held_out import evaluate
from pipeline.losses import DistillLoss, sparse_kl
from pipeline.models.head import open_head
from pipeline.student.data.dataset import CacheDataset, LocalShuffle, collate
from pipeline.student.training.forward import distillation_output, install_distillation_forward
from pipeline.student.training.trainer import DistillTrainer
from runs import SGD, build_cache, dense_evaluation, dense_logits, distance, log_history, train, weights
from tiny import conversations, english, write_jsonl


@pytest.fixture(scope="module")
def cache(teacher_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packed rows of conversations with loss tokens in the answers: 3 to 40 loss tokens per row."""
    folder = tmp_path_factory.mktemp("train")
    data = write_jsonl(folder / "chat.jsonl", conversations(24))
    return build_cache(folder / "cache", teacher_dir, data)


@pytest.fixture(scope="module")
def held_out(teacher_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("held-out")
    (folder / "text.txt").write_text(english(20, seed=5))
    return build_cache(folder / "cache", teacher_dir, folder / "text.txt")


@pytest.fixture(scope="module")
def gpt2_config(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A student with dropout, so that the random state matters."""
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2, n_positions=64)
    path = tmp_path_factory.mktemp("gpt2") / "config.json"
    config.to_json_file(path)
    return path


# -- one optimizer step -----------------------------------------------------------------------------------------------


@pytest.mark.long
def test_gradient_accumulation_does_not_change_weights(tmp_path: Path, cache: Path, student_dir: Path):
    counted = [int(row.loss_mask.sum()) for row in cf.open_cache(cache).iter_rows()]
    assert max(counted) > 3 * min(counted) and len(counted) % 8  # a mean of means would differ
    trained = {}
    for rows, steps in ((8, 1), (2, 4), (1, 8)):
        output = tmp_path / f"{rows}x{steps}"
        train(
            output,
            cache,
            student=student_dir,
            arguments={**SGD, "learning_rate": 0.5},
            batch_size=rows,
            gradient_accumulation_steps=steps,
            epochs=2,
        )
        trained[rows] = weights(output)
    assert distance(trained[8], weights(student_dir)) > 0.05
    assert distance(trained[8], trained[2]) < 2e-6
    assert distance(trained[8], trained[1]) < 2e-6


def test_labels_only_equals_plain_cross_entropy(tmp_path: Path, cache: Path, student_dir: Path):
    output = tmp_path / "student"
    train(
        output,
        cache,
        student=student_dir,
        kd_weight=0.0,
        arguments={**SGD, "learning_rate": 0.2},
        batch_size=8,
        seed=7,
    )
    # Reference: the model's own forward on one document at a time, shifted labels, a mean over the step.
    opened = cf.open_cache(cache)
    model = AutoModelForCausalLM.from_pretrained(student_dir, dtype=torch.float32)
    order = list(LocalShuffle(opened.record_batches(), seed=7))
    for start in range(0, len(order), 8):
        total, count = torch.zeros(()), 0
        for row in opened.rows(order[start : start + 8]):
            ends = np.cumsum(row.segment_lengths)
            for a, b in zip(ends - row.segment_lengths, ends, strict=True):
                ids = torch.from_numpy(row.input_ids[a:b].astype(np.int64))
                logits = model(input_ids=ids[None]).logits[0]
                counted = torch.from_numpy(row.loss_mask[a:b].copy())[:-1]
                total = total + F.cross_entropy(logits[:-1][counted], ids[1:][counted], reduction="sum")
                count += int(counted.sum())
        model.zero_grad()
        (total / count).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.2 * parameter.grad
    by_hand = model.state_dict()
    trained = weights(output)
    assert distance(trained, weights(student_dir)) > 0.02
    assert distance(trained, {name: by_hand[name] for name in trained}) < 2e-6


# -- a head that is not linear ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gemma(tokenizer: PreTrainedTokenizerFast) -> Gemma2Config:
    return Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=16,
        max_position_embeddings=128,
        initializer_range=0.3,
        final_logit_softcapping=2.0,
    )


def test_gradients_of_a_soft_capped_head_equal_dense_autograd(cache: Path, gemma: Gemma2Config):
    model = Gemma2ForCausalLM(gemma)
    head = open_head(model, gemma.vocab_size)
    assert not head.linear
    recipe = DistillLoss(kd_weight=0.7, temperature=2.0)
    batch = collate(cf.open_cache(cache)[:6])

    # Position ids keep documents apart in the model's own forward too.
    logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    expected = sparse_kl(logits, batch["targets"], kd_weight=0.7, temperature=2.0)
    expected.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()

    install_distillation_forward(model, head, recipe)
    count = int((batch["labels"] != -100).sum())
    output = model(scale=1 / count, **batch)
    output.loss.backward()
    assert output.count == count
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, gradients[name], rtol=1e-4, atol=1e-7), name


def test_soft_capped_student_trains(tmp_path: Path, cache: Path, held_out: Path, gemma: Gemma2Config):
    gemma.to_json_file(tmp_path / "config.json")
    output = tmp_path / "student"
    options = {"student_config": str(tmp_path / "config.json"), "learning_rate": 1e-2, "kd_weight": 1.0}
    summary = train(output, cache, eval_cache=str(held_out), epochs=2, eval_steps=4, **options)
    evaluations = [entry["eval_kl"] for entry in log_history(output) if "eval_kl" in entry]
    assert summary.eval["kl"] == min(evaluations) < 0.95 * evaluations[0]
    model = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    expected = dense_evaluation(model, list(cf.open_cache(held_out).iter_rows()), gemma.vocab_size)
    assert summary.eval["kl"] == pytest.approx(expected["kl"], rel=1e-4)
    assert summary.eval["agreement"] == pytest.approx(expected["agreement"], abs=1e-9)


# -- metrics ----------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_logged_metrics_equal_those_of_full_logits(tmp_path: Path, cache: Path, held_out: Path, student_dir: Path):
    opened = cf.open_cache(cache)
    logs: list[dict[str, float]] = []
    summary = train(
        tmp_path / "student",
        cache,
        student=student_dir,
        eval_cache=str(held_out),
        batch_size=len(opened),  # the first step sees all rows, with the initial weights
        max_steps=2,
        logging_steps=1,
        eval_steps=1,
        learning_rate=1e-2,
        kd_weight=0.7,
        on_log=logs.append,
    )
    first, evaluated = logs[0], logs[1]
    assert first["step"] == evaluated["step"] == 1
    before = dense_evaluation(AutoModelForCausalLM.from_pretrained(student_dir), list(opened.iter_rows()), 400)
    for name, expected in before.items():
        assert first[name] == pytest.approx(expected, rel=1e-5), name
    assert first["loss"] == pytest.approx(0.3 * before["ce"] + 0.7 * before["kl"], rel=1e-5)
    assert first["tokens_per_s"] > 0

    rows = list(cf.open_cache(held_out).iter_rows())
    checkpoint = AutoModelForCausalLM.from_pretrained(tmp_path / "student/checkpoint-1", dtype=torch.float32)
    after = dense_evaluation(checkpoint, rows, 400)
    for name, expected in after.items():
        assert evaluated[f"eval_{name}"] == pytest.approx(expected, rel=1e-5), name
    assert evaluated["eval_loss"] == pytest.approx(0.3 * after["ce"] + 0.7 * after["kl"], rel=1e-5)
    assert evaluated["eval_perplexity"] == pytest.approx(np.exp(after["ce"]), rel=1e-5)

    assert summary.train_loss == pytest.approx(np.mean([log["loss"] for log in logs if "loss" in log]), rel=1e-5)
    assert summary.steps == 2 and summary.best_step == 2 and summary.warnings == []
    alone = evaluate(EvaluateConfig(cache=str(held_out), student=str(tmp_path / "student"), device="cpu"))
    for name in ("kl", "ce", "perplexity", "agreement"):
        assert summary.eval[name] == pytest.approx(getattr(alone, name), rel=1e-6)


def test_best_checkpoint_is_saved_as_the_student(tmp_path: Path, cache: Path, held_out: Path, student_dir: Path):
    # The step is far too large, so that the loss rises again.
    output = tmp_path / "student"
    arguments = {**SGD, "learning_rate": 40.0, "max_grad_norm": 1.0}
    options = {"max_steps": 8, "eval_steps": 1, "kd_weight": 1.0}
    summary = train(output, cache, student=student_dir, eval_cache=str(held_out), arguments=arguments, **options)
    evaluations = {entry["step"]: entry for entry in log_history(output) if "eval_loss" in entry}
    assert sorted(evaluations) == list(range(1, 9))
    best = min(evaluations, key=lambda step: evaluations[step]["eval_loss"])
    assert summary.best_step == best < 8
    assert summary.eval["kl"] == evaluations[best]["eval_kl"]
    assert distance(weights(output), weights(output / f"checkpoint-{best}")) == 0.0
    assert distance(weights(output), weights(output / "checkpoint-8")) > 0.0


def test_saved_student_is_a_plain_transformers_model(
    tmp_path: Path, cache: Path, student_dir: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
):
    seen = []

    def load_student(*args: Any, **kwargs: Any):
        seen.append(load(*args, **kwargs))
        return seen[0]

    load = run_parts.load_student
    monkeypatch.setattr(run_parts, "load_student", load_student)
    output = tmp_path / "student"
    arguments = {"max_grad_norm": 0.5}
    train(output, cache, student=student_dir, max_steps=3, learning_rate=1e-2, kd_weight=0.5, arguments=arguments)

    (trained,) = seen
    assert "forward" not in vars(trained)
    loaded = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    assert type(loaded) is type(trained)
    ids = torch.arange(20)[None]
    logits = loaded(input_ids=ids).logits
    assert torch.equal(logits, trained.eval()(input_ids=ids).logits)
    assert not torch.equal(logits, AutoModelForCausalLM.from_pretrained(student_dir)(input_ids=ids).logits)
    with_generate = loaded.generate(ids[:, :4], max_new_tokens=3, do_sample=False)
    assert with_generate.shape[1] <= 7

    saved = AutoTokenizer.from_pretrained(output)
    assert saved.get_vocab() == tokenizer.get_vocab() and saved.chat_template == tokenizer.chat_template
    record = json.loads((output / "distill_config.json").read_text())
    assert record["config"]["kd_weight"] == 0.5 and record["config"]["max_steps"] == 3
    assert record["config"]["training_args"] == arguments
    assert record["cache"]["teacher"] == dict(cf.open_cache(cache).metadata.teacher)
    assert len(record["cache"]["shards_sha256"]) == len(cf.open_cache(cache).manifest.shards)


def test_bf16_and_gradient_checkpointing(
    tmp_path: Path, cache: Path, held_out: Path, student_dir: Path, recwarn: pytest.WarningsRecorder
):
    options = {"student": student_dir, "eval_cache": str(held_out), "max_steps": 4, "learning_rate": 1e-2}
    plain = train(tmp_path / "plain", cache, **options)
    half = train(tmp_path / "half", cache, bf16=True, gradient_checkpointing=True, **options)
    assert half.train_loss == pytest.approx(plain.train_loss, rel=1e-2)
    assert 0 < distance(weights(tmp_path / "plain"), weights(tmp_path / "half")) < 5e-2
    assert not [warning for warning in recwarn if "deprecated" in str(warning.message)]


# -- stop and resume --------------------------------------------------------------------------------------------------


class Stop:
    """Raises KeyboardInterrupt after each of the given steps."""

    def __init__(self, *steps: int) -> None:
        self.steps = list(steps)

    def __call__(self, step: int, total: int) -> None:
        if self.steps and step == self.steps[0]:
            del self.steps[0]
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    "workers", [(0, 0, 0, 0), pytest.param((2, 0, 1, 2), marks=pytest.mark.slow)]
)  # `dataloader_num_workers` of each run
def test_resume_is_exact(tmp_path: Path, cache: Path, held_out: Path, gpt2_config: Path, workers: tuple[int, ...]):
    options: dict[str, Any] = {
        "student_config": str(gpt2_config),
        "eval_cache": str(held_out),
        "batch_size": 4,
        "gradient_accumulation_steps": 2,
        "epochs": 2,
        "save_steps": 4,
        "eval_steps": 4,
        "logging_steps": 2,
        "learning_rate": 1e-2,
    }
    whole = train(tmp_path / "whole", cache, dataloader_num_workers=workers[0], **options)
    assert whole.steps == 16  # 8 per epoch

    # Continues from steps 4 and 12, inside epochs, and from step 8, between them.
    stop = Stop(6, 9, 14)
    for resume, reading in zip((False, True, True), workers, strict=False):
        with pytest.raises(KeyboardInterrupt):
            again = {"resume": resume, "dataloader_num_workers": reading, "on_step": stop}
            train(tmp_path / "parts", cache, **again, **options)
        assert not [each for each in threading.enumerate() if "-ahead" in each.name]
    assert stop.steps == []
    parts = train(tmp_path / "parts", cache, resume=True, dataloader_num_workers=workers[3], **options)

    assert distance(weights(tmp_path / "whole"), weights(tmp_path / "parts")) == 0.0
    assert parts.steps == whole.steps
    assert parts.eval == whole.eval and parts.best_step == whole.best_step
    timed = {"tokens_per_s", "train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss"}

    def numbers(output: Path) -> list[dict[str, float]]:
        return [{k: v for k, v in entry.items() if k not in timed} for entry in log_history(output)[:-1]]

    assert numbers(tmp_path / "whole") == numbers(tmp_path / "parts")


def test_resume_skips_an_incomplete_checkpoint(tmp_path: Path, cache: Path, student_dir: Path):
    options = {"student": student_dir, "max_steps": 7, "save_steps": 3, "learning_rate": 1e-2}
    train(tmp_path / "whole", cache, **options)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", cache, on_step=Stop(5), **options)
    for step, state in ((4, None), (5, '{"global_st')):  # weights are written first, the state last
        checkpoint = Path(shutil.copytree(student_dir, tmp_path / f"parts/checkpoint-{step}"))
        if state is not None:
            (checkpoint / "trainer_state.json").write_text(state)
    train(tmp_path / "parts", cache, resume=True, **options)
    assert distance(weights(tmp_path / "whole"), weights(tmp_path / "parts")) == 0.0


def test_resume_after_the_last_step_only_saves_the_student(tmp_path: Path, cache: Path, student_dir: Path):
    output = tmp_path / "student"
    options = {"student": student_dir, "max_steps": 3, "arguments": {**SGD, "learning_rate": 0.5}}
    train(output, cache, **options)
    expected = weights(output)
    for name in ("model.safetensors", "trainer_state.json"):
        (output / name).unlink()
    summary = train(output, cache, resume=True, **options)
    assert summary.steps == 3 and summary.train_loss is None
    assert distance(weights(output), expected) == 0.0
    with pytest.raises(ConfigError, match="finished run, nothing to resume"):
        train(output, cache, resume=True, **options)


def test_output_and_cache_may_move_before_resume(tmp_path: Path, cache: Path, student_dir: Path):
    options = {"student": student_dir, "max_steps": 4, "save_steps": 2, "learning_rate": 1e-2}
    train(tmp_path / "whole", cache, **options)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "before", cache, on_step=Stop(3), **options)
    (tmp_path / "before").rename(tmp_path / "after")
    shutil.copytree(cache, tmp_path / "cache")
    train(tmp_path / "after", tmp_path / "cache", resume=True, **options)
    assert distance(weights(tmp_path / "whole"), weights(tmp_path / "after")) == 0.0


# -- divergence -------------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize(("logged_every", "what"), [(1, "loss"), (100, "weights")])
def test_diverged_run_stops_and_keeps_the_last_good_checkpoint(
    tmp_path: Path,
    cache: Path,
    student_dir: Path,
    logged_every: int,
    what: str,
    monkeypatch: pytest.MonkeyPatch,
):
    """The loss is NaN at the third step; it is noticed in the log, or in the weights before a checkpoint."""
    compute = DistillTrainer.compute_loss

    def broken(trainer: DistillTrainer, *args: Any, **kwargs: Any) -> Any:
        loss = compute(trainer, *args, **kwargs)
        return loss if trainer.state.global_step < 2 else loss * torch.nan

    output = tmp_path / "student"
    options = {"student": student_dir, "max_steps": 6, "save_steps": 1, "learning_rate": 1e-3}
    with monkeypatch.context() as patch:
        patch.setattr(DistillTrainer, "compute_loss", broken)
        with pytest.raises(DivergedError, match=rf"step 3 of 6.* {what} .*checkpoint-2"):
            train(output, cache, logging_steps=logged_every, **options)
    assert {path.name for path in output.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}
    assert not (output / "model.safetensors").exists()
    train(output, cache, resume=True, logging_steps=logged_every, **options)
    train(tmp_path / "whole", cache, logging_steps=logged_every, **options)
    assert distance(weights(tmp_path / "whole"), weights(output)) == 0.0


def test_too_high_learning_rate_is_an_error(tmp_path: Path, cache: Path, student_dir: Path):
    options = {"student": student_dir, "max_steps": 6, "arguments": {**SGD, "learning_rate": 1e30}}
    with pytest.raises(DivergedError, match=r"no checkpoint.*learning.rate"):
        train(tmp_path / "student", cache, **options)


# -- rows -------------------------------------------------------------------------------------------------------------


def test_each_epoch_sees_each_row_once_in_a_new_order(
    tmp_path: Path, cache: Path, student_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    seen: list[int] = []
    getitem = CacheDataset.__getitem__
    monkeypatch.setattr(CacheDataset, "__getitem__", lambda self, index: seen.append(index) or getitem(self, index))
    train(tmp_path / "student", cache, student=student_dir, epochs=2)
    opened = cf.open_cache(cache)
    rows = len(opened)
    assert sorted(seen[:rows]) == sorted(seen[rows:]) == list(range(rows))
    sampler = LocalShuffle(opened.record_batches(), seed=0)
    assert seen[:rows] == list(sampler)
    sampler.set_epoch(1)
    assert seen[rows:] == list(sampler) != seen[:rows]


def test_documents_of_a_packed_row_are_kept_apart(cache: Path, student_dir: Path):
    model = AutoModelForCausalLM.from_pretrained(student_dir, dtype=torch.float32).eval()
    head = open_head(model, 400)
    rows = [row for row in cf.open_cache(cache).iter_rows() if len(row.segment_lengths) > 1][:4]
    batch = collate(rows)
    with torch.no_grad():
        hidden = head.hidden_states(batch["input_ids"], batch["position_ids"])
        sums = distillation_output(head, batch, DistillLoss(kd_weight=1.0))
    for row, states in zip(rows, hidden, strict=True):
        found = head.logits(states[: len(row.input_ids)]).detach().double().numpy()
        assert np.abs(found - dense_logits(model, row, 400)).max() < 1e-4
    expected = dense_evaluation(model, rows, 400)
    assert float(sums.kl / sums.count) == pytest.approx(expected["kl"], rel=1e-5)
