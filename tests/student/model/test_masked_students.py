"""Students of masked teachers: training, fewer layers, random initialisation, adapters, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModelForMaskedLM, RobertaConfig

import cache_format as cf
from dense import document_logprobs
from masked_runs import load
from pipeline.errors import ConfigError
from pipeline.evaluation.evaluate_config import EvaluateConfig
from pipeline.evaluation.held_out import evaluate
from pipeline.student.data.dataset import LocalShuffle
from pipeline.student.model.layer_selection import keep_layers
from pipeline.student.train_config import TrainStudentConfig
from pipeline.student.training.train import train_student
from pipeline.teacher.cache_config import CacheTeacherConfig
from pipeline.teacher.capture import cache_teacher
from pipeline.teacher.targets.rules import TargetRule
from pipeline.teacher.text.data_config import DataConfig
from runs import SGD, build_cache, distance, log_history, train, weights
from tiny import english
from tiny_masked import KINDS, VOCAB, masked_config, tiny_masked


@pytest.fixture(scope="module")
def trained(masked_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A smaller BERT, trained for 12 steps on the cache of the larger one."""
    folder = tmp_path_factory.mktemp("masked-student")
    student = tiny_masked(folder / "student", "bert", layers=1, hidden=16, seed=9)
    options = {"eval_cache": str(masked_dir / "bert-cache"), "eval_steps": 6, "max_steps": 12, "learning_rate": 1e-2}
    train(folder / "trained", masked_dir / "bert-cache", student=student, seed=1, **options)
    return folder / "trained"


def test_student_learns_and_evaluation_equals_its_own_logits(trained: Path, masked_dir: Path) -> None:
    evaluations = [entry for entry in log_history(trained) if "eval_kl" in entry]
    assert evaluations[-1]["eval_kl"] < evaluations[0]["eval_kl"]
    cache, model = cf.open_cache(masked_dir / "bert-cache"), load(trained)
    ce, agrees = [], []
    for row in cache.iter_rows():
        logprobs = document_logprobs(model, row, VOCAB)
        for t in np.flatnonzero(row.loss_mask):
            ids, values = row.targets.at(int(t))
            ce.append(-logprobs[t, row.labels[t]])
            likeliest = ids[values == values.max()]
            agrees.append((logprobs[t].argmax() in likeliest) / len(likeliest))
    found = evaluate(EvaluateConfig(cache=str(cache.path), student=str(trained), device="cpu", batch_size=5))
    assert found.ce == pytest.approx(np.mean(ce), rel=1e-5)
    assert found.agreement == pytest.approx(np.mean(agrees), abs=1e-9)
    assert found.tokens == cache.num_loss_tokens
    assert evaluations[-1]["eval_ce"] == pytest.approx(found.ce, rel=1e-5)


def test_caches_of_masked_teachers_can_be_mixed(masked_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(english(20, seed=6))
    data = DataConfig(data=str(tmp_path / "text.txt"), seq_len=32, sample_by="line")
    rule = TargetRule(top_k=16)
    cache_teacher(
        CacheTeacherConfig(
            teacher=str(masked_dir / "bert"), data=data, output=str(tmp_path / "b"), targets=rule, device="cpu"
        )
    )
    student = tiny_masked(tmp_path / "student", "bert", layers=1, hidden=16, seed=9)
    options = {"student": str(student), "epochs": 3, "learning_rate": 1e-2, "logging_steps": 1}
    cache = (f"{masked_dir / 'bert-cache'}:1", f"{tmp_path / 'b'}:1")
    config = TrainStudentConfig(cache=cache, output=str(tmp_path / "trained"), device="cpu", **options)
    a, b = train_student(config).mixture
    assert a["loss_tokens"] == pytest.approx(b["loss_tokens"], rel=0.1) and b["passes"] > 2 * a["passes"]
    losses = [entry["loss"] for entry in log_history(tmp_path / "trained") if "loss" in entry]
    assert losses[-1] < losses[0]


def test_labels_only_equals_masked_language_model_training(masked_dir: Path, tmp_path: Path) -> None:
    """With SGD, against a plain loop over cross-entropy."""
    path = tiny_masked(tmp_path / "student", "roberta", layers=1, hidden=16, seed=9, hidden_dropout_prob=0.0)
    config = json.loads((path / "config.json").read_text()) | {"attention_probs_dropout_prob": 0.0}
    (path / "config.json").write_text(json.dumps(config))
    cache = cf.open_cache(masked_dir / "roberta-cache")
    options = {"kd_weight": 0.0, "learning_rate": 0.1, "max_steps": 2, "batch_size": 8, "seed": 7}
    train(tmp_path / "trained", masked_dir / "roberta-cache", student=path, arguments=SGD, **options)
    model = AutoModelForMaskedLM.from_pretrained(path, dtype=torch.float32)
    order = list(LocalShuffle(cache.record_batches(), seed=7))
    for start in (0, 8):
        total, count = torch.zeros(()), 0
        for row in cache.rows(order[start : start + 8]):
            logits = model(input_ids=torch.from_numpy(row.input_ids.astype(np.int64))[None]).logits[0]
            total = total + F.cross_entropy(logits, torch.from_numpy(row.labels.astype(np.int64)), reduction="sum")
            count += int((row.labels != -100).sum())
        model.zero_grad()
        (total / count).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
    by_hand = model.state_dict()
    found = weights(tmp_path / "trained")
    assert distance(found, weights(path)) > 0.02
    assert distance(found, {name: by_hand[name] for name in found}) < 5e-6


@pytest.mark.parametrize("kind", KINDS)
def test_fewer_layers_compute_the_kept_layers(kind: str, tmp_path: Path) -> None:
    model = load(tiny_masked(tmp_path / kind, kind, layers=4)).float()
    smaller = keep_layers(model, 2)
    assert type(smaller) is type(model) and smaller.config.num_hidden_layers == 2
    ids = torch.arange(5, 20)[None]
    with torch.no_grad():
        layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 4)
        for index in (1, 2):  # 0 and 3 are kept
            layers[index].register_forward_hook(lambda m, inputs, output: _like(output, inputs[0]))
        torch.testing.assert_close(smaller(input_ids=ids).logits, model(input_ids=ids).logits)


def _like(output: Any, hidden: Tensor) -> Any:
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def test_students_with_fewer_layers_or_random_weights_train(masked_dir: Path, tmp_path: Path) -> None:
    options = {"max_steps": 2, "learning_rate": 1e-3}
    train(
        tmp_path / "one",
        masked_dir / "distilbert-cache",
        student=masked_dir / "distilbert",
        student_layers=1,
        **options,
    )
    assert AutoConfig.from_pretrained(tmp_path / "one").n_layers == 1
    masked_config("modernbert", hidden=16).to_json_file(tmp_path / "config.json")
    options["student_config"] = str(tmp_path / "config.json")
    train(tmp_path / "two", masked_dir / "modernbert-cache", **options)
    assert type(load(tmp_path / "two")).__name__ == "ModernBertForMaskedLM"


def test_students_with_another_objective_are_refused(
    masked_dir: Path, teacher_dir: Path, student_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"  # without a tokenizer, which would be refused first
    load(masked_dir / "bert").save_pretrained(bare)
    causal = build_cache(tmp_path / "causal", teacher_dir, text_file)
    with pytest.raises(cf.MismatchError, match=r"bare: found a masked .*, expected a causal "):
        train(tmp_path / "x", causal, student=bare)
    config = json.loads((student_dir / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(cf.MismatchError, match=r"config.json: found a causal .*, expected a masked "):
        train(tmp_path / "x", masked_dir / "bert-cache", student_config=str(tmp_path / "config.json"))
    short = RobertaConfig(vocab_size=VOCAB, max_position_embeddings=33, pad_token_id=1)
    short.to_json_file(tmp_path / "short.json")
    with pytest.raises(ConfigError, match="takes at most 31 positions, but the rows of .* have up to 32"):
        train(tmp_path / "x", masked_dir / "roberta-cache", student_config=str(tmp_path / "short.json"))
    assert not (tmp_path / "x").exists()


# -- with what other students can have --------------------------------------------------------------------------------


@pytest.mark.long
def test_adapter_and_merged_student_evaluate_equally(masked_dir: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"student": masked_dir / "bert", "lora_rank": 2, "max_steps": 3, "learning_rate": 1e-2}
    train(tmp_path / "adapter", masked_dir / "bert-cache", **options)
    train(tmp_path / "merged", masked_dir / "bert-cache", merge_adapter=True, **options)
    found = {}
    for name in ("adapter", "merged"):
        config = EvaluateConfig(cache=str(masked_dir / "bert-cache"), student=str(tmp_path / name), device="cpu")
        found[name] = evaluate(config)
    assert found["adapter"].kl == pytest.approx(found["merged"].kl, rel=1e-5)
    assert distance(weights(tmp_path / "merged"), weights(masked_dir / "bert")) > 1e-3


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_head_with_an_adapter_is_merged_completely(masked_dir: Path, tmp_path: Path, kind: str) -> None:
    """It is untied from the embeddings. In BERT and RoBERTa its bias is tied too."""
    cache = masked_dir / f"{kind}-cache"
    options = {"lora_rank": 2, "lora_head": True, "merge_adapter": True, "learning_rate": 1e-2}
    options |= {"eval_cache": str(cache), "eval_steps": 2, "max_steps": 2}
    adapted = train(tmp_path / "merged", cache, student=masked_dir / kind, **options)
    merged = evaluate(EvaluateConfig(cache=str(cache), student=str(tmp_path / "merged"), device="cpu"))
    assert merged.kl == pytest.approx(adapted.eval["kl"], rel=1e-4)
    _, found = AutoModelForMaskedLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"student_width": 16}, "is a bert, expected llama, mistral, qwen2, qwen3"),
        (
            {"tail": "realized"},
            "tail.{1,2}realized.*bert-cache .*masked",
        ),
        ({"cross_tokenizer": "project"}, "masked.*tokenizer"),
    ],
)
def test_options_for_causal_students_only_are_refused(
    masked_dir: Path, tmp_path: Path, options: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ConfigError, match=expected):
        train(tmp_path / "s", masked_dir / "bert-cache", student=masked_dir / "bert", **options)
    assert not (tmp_path / "s").exists()
