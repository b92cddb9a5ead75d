"""Runs with hidden-state distillation: the scale of loss and gradients, saved projections, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import cache_format as cf
from pipeline.errors import ConfigError
from pipeline.losses import DistillLoss
from pipeline.losses.feature_losses import FEATURE_LOSSES
from pipeline.models.head import open_head
from pipeline.student.data.dataset import CacheDataset, collate
from pipeline.student.model.hidden_state_matching import HiddenStateLoss, HiddenStateMatching
from pipeline.student.training.forward import distillation_output, install_distillation_forward
from pipeline.teacher.cache_config import CacheTeacherConfig
from pipeline.teacher.capture import cache_teacher
from pipeline.teacher.targets.hidden_rule import HiddenRule
from pipeline.teacher.targets.rules import TargetRule
from pipeline.teacher.text.data_config import DataConfig
from runs import SGD, Stop, build_cache, distance, log_history, train, weights
from tiny import tiny_llama


def build(output: Path, teacher: Path, data: Path, rule: HiddenRule) -> Path:
    text = DataConfig(data=str(data), seq_len=48, sample_by="line")
    config = CacheTeacherConfig(teacher=str(teacher), data=text, output=str(output), hidden=rule, device="cpu")
    cache_teacher(config)
    return output


@pytest.fixture(scope="module")
def caches(teacher_dir: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hidden-states")
    build(folder / "all", teacher_dir, text_file, HiddenRule(layers="0,1,2"))
    build(folder / "int8", teacher_dir, text_file, HiddenRule(layers="all", dtype="int8", every=2))
    return folder


@pytest.mark.parametrize("kind", FEATURE_LOSSES)
@pytest.mark.parametrize("name, bound", [("all", 2.0**-22), ("int8", 1e-3)])
def test_student_equal_to_its_teacher_has_zero_loss(
    name: str, bound: float, kind: str, caches: Path, teacher_dir: Path
) -> None:
    """Up to the rounding of the stored states: 2^-11 of each value, or 1/254 of the largest for int8."""
    model = AutoModelForCausalLM.from_pretrained(teacher_dir, dtype=torch.float32).eval()
    cache = cf.open_cache(caches / name)
    head = open_head(model, 400)
    asked = HiddenStateLoss.for_cache(cache, loss=kind, weight=1.0, layer_map="uniform")
    features = HiddenStateMatching.for_student(asked, head, 0)
    assert not list(features.parameters()) and features.pairs[-1] == (2, 2)
    with torch.no_grad():
        output = distillation_output(head, collate(cache[:6]), DistillLoss(), matching=features)
        assert 0 <= output.features / output.count < bound * (3 if kind == "mse" else 1)
        shifted = {**collate(cache[:6])}
        shifted["hidden_1"] = shifted["hidden_1"].roll(1, 0)
        assert distillation_output(head, shifted, DistillLoss(), matching=features).features / output.count > 0.05


def test_loss_and_gradients_equal_dense_autograd(caches: Path, student_dir: Path) -> None:
    """Against the model's own hidden states, document by document, in fp64."""
    model = AutoModelForCausalLM.from_pretrained(student_dir, dtype=torch.float64).eval()
    cache = cf.open_cache(caches / "all")
    head = open_head(model, 400)
    rows, pairs = [cache[i] for i in (0, 3, 7)], ((0, 1), (1, 2))
    features = HiddenStateMatching("normalized-mse", 0.3, pairs, (16, 32), seed=1).double()
    total, count = torch.zeros((), dtype=torch.float64), sum(int(row.loss_mask.sum()) for row in rows)
    for row in rows:
        ends = np.cumsum(row.segment_lengths)
        states: dict[int, list[Tensor]] = {0: [], 1: []}
        for a, b in zip(ends - row.segment_lengths, ends, strict=True):
            ids = torch.from_numpy(row.input_ids[a:b].astype(np.int64))[None]
            for layer, each in enumerate(model(input_ids=ids, output_hidden_states=True).hidden_states):
                states[layer].append(each[0])
        for student, teacher in pairs:
            mine = torch.cat(states[student])[torch.tensor(row.hidden.mask)] @ features.maps[f"{student}-{teacher}"].T
            theirs = torch.from_numpy(row.hidden.values(teacher).copy()).double()
            total = total + ((mine - theirs) ** 2).sum(1).div((theirs**2).sum(1)).sum() / 2
    (0.3 * total / count).backward()
    parameters = {**dict(model.named_parameters()), **{f"maps.{n}": p for n, p in features.maps.items()}}
    expected = {n: p.grad.clone() for n, p in parameters.items() if p.grad is not None}
    assert {"maps.0-1", "maps.1-2"} <= expected.keys()
    for parameter in parameters.values():
        parameter.grad = None

    without = distillation_output(head, collate(rows), DistillLoss(), scale=1 / count)
    features.attach(model)
    install_distillation_forward(model, head, DistillLoss(), features)
    output = model(scale=1 / count, **collate(rows))
    assert output.features.item() == pytest.approx(total.item(), rel=1e-6)
    assert output.loss.item() == pytest.approx(without.loss.item() + 0.3 * total.item() / count, rel=1e-9)
    (output.loss - without.loss).backward()
    for name, gradient in expected.items():
        difference = (parameters[name].grad - gradient).abs().max()
        assert difference < 1e-6 * gradient.abs().max(), (name, difference, gradient.abs().max())


def run(output: Path, caches: Path, student: Path, **options: Any) -> Path:
    """Eight rows per optimizer step with plain SGD, whose updates show the scale of the gradient."""
    given = {
        "hidden_loss": "mse",
        "hidden_weight": 2.0,
        "max_steps": 3,
        "learning_rate": 0.02,
        "seed": 5,
        "logging_steps": 1,
    }
    arguments = {**SGD, **options.pop("arguments", {})}
    train(output, caches / "all", student=student, arguments=arguments, **{**given, **options})
    return output


def weights_and_projections(output: Path) -> dict[str, Tensor]:
    projections = load_file(output / "projections.safetensors")
    return {**weights(output), **{f"projection {name}": each for name, each in projections.items()}}


def test_gradient_accumulation_does_not_change_the_scale(caches: Path, student_dir: Path, tmp_path: Path) -> None:
    one = run(tmp_path / "one", caches, student_dir, batch_size=8)
    four = run(tmp_path / "four", caches, student_dir, batch_size=2, gradient_accumulation_steps=4)
    other = run(tmp_path / "other", caches, student_dir, batch_size=8, hidden_weight=4.0)
    assert distance(weights_and_projections(one), weights_and_projections(four)) < 2e-6
    assert distance(weights_and_projections(one), weights_and_projections(other)) > 1e-3
    logged = [[entry["features"] for entry in log_history(each) if "features" in entry] for each in (one, four)]
    assert logged[0] == pytest.approx(logged[1], rel=1e-5) and logged[0]


def test_projections_are_saved_in_their_own_file(caches: Path, student_dir: Path, tmp_path: Path) -> None:
    options = {"save_steps": 2, "max_steps": 4, "eval_cache": str(caches / "all"), "eval_steps": 2}
    output = run(tmp_path / "student", caches, student_dir, layer_map="0:1,1:2", **options)
    projections = load_file(output / "projections.safetensors")
    assert {name: tuple(each.shape) for name, each in projections.items()} == {"0-1": (32, 16), "1-2": (32, 16)}
    for folder in (output, output / "checkpoint-2", output / "checkpoint-4"):
        assert (folder / "projections.safetensors").is_file()
        assert weights(folder).keys() == weights(student_dir).keys()
        _, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not found["missing_keys"] and not found["unexpected_keys"]
    entries = log_history(output)
    curve = [entry["features"] for entry in entries if "features" in entry]
    assert len(curve) == 4
    held_out = [entry for entry in entries if "eval_features" in entry]
    assert len(held_out) == 2 and held_out[1]["eval_features"] < held_out[0]["eval_features"]
    for entry in held_out:  # at α = .9, T = 1
        parts = 0.1 * entry["eval_ce"] + 0.9 * entry["eval_kl"] + 2.0 * entry["eval_features"]
        assert entry["eval_loss"] == pytest.approx(parts, rel=1e-5)


def test_resumed_run_restores_projections(caches: Path, student_dir: Path, tmp_path: Path) -> None:
    """Adam's state of the projections must be restored too."""
    options: dict[str, Any] = {"hidden_loss": "cosine", "max_steps": 6, "save_steps": 3, "learning_rate": 1e-2}
    train(tmp_path / "whole", caches / "int8", student=student_dir, **options)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", caches / "int8", student=student_dir, on_step=Stop(4), **options)
    with pytest.raises(cf.MismatchError, match="hidden_loss was 'cosine', is 'mse'"):
        train(
            tmp_path / "parts", caches / "int8", student=student_dir, resume=True, **{**options, "hidden_loss": "mse"}
        )
    train(tmp_path / "parts", caches / "int8", student=student_dir, resume=True, **options)
    assert distance(weights_and_projections(tmp_path / "whole"), weights_and_projections(tmp_path / "parts")) == 0.0


def test_best_checkpoint_is_saved_with_its_projections(caches: Path, student_dir: Path, tmp_path: Path) -> None:
    """Here the best is the one with the larger loss: the first."""
    options = {"eval_cache": str(caches / "all"), "eval_steps": 2, "max_steps": 4}
    output = run(tmp_path / "student", caches, student_dir, arguments={"greater_is_better": True}, **options)
    best, last = output / "checkpoint-2", output / "checkpoint-4"
    saved = weights_and_projections(output)
    assert distance(saved, weights_and_projections(best)) == 0.0 < distance(saved, weights_and_projections(last))


def test_student_of_the_teachers_width_has_no_projections(caches: Path, tokenizer: Any, tmp_path: Path) -> None:
    student = tiny_llama(tmp_path / "wide", tokenizer, layers=1, hidden=32, seed=4)
    options = {"eval_cache": str(caches / "all"), "eval_steps": 10, "max_steps": 20, "layer_map": "last"}
    train(tmp_path / "student", caches / "all", student=student, hidden_loss="cosine", learning_rate=1e-2, **options)
    assert not (tmp_path / "student/projections.safetensors").exists()
    held_out = [entry["eval_features"] for entry in log_history(tmp_path / "student") if "eval_features" in entry]
    assert held_out[1] < held_out[0]


def test_unusable_caches_are_refused_before_anything_is_written(
    caches: Path, student_dir: Path, teacher_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    bare = build_cache(tmp_path / "bare", teacher_dir, text_file)
    for cache, options, words in (
        (bare, {"hidden_loss": "mse"}, "`hidden_loss` mse: .*bare has no hidden states.*`hidden_states=last`"),
        (caches / "all", {"hidden_weight": 1.0}, "`hidden_weight` 1.0: found no `hidden_loss`"),
        (
            caches / "int8",
            {"hidden_loss": "mse", "layer_map": "1:0"},
            r"found teacher layer 0, the cache has states of layers 1, 2 \(of 2\)",
        ),
        (caches / "all", {"hidden_loss": "mse", "layer_map": ""}, "`layer_map` : found ''"),
        (caches / "all", {"hidden_loss": "mse", "layer_map": "2:1"}, "the student has layers 0"),
    ):
        with pytest.raises(ConfigError, match=words):
            train(tmp_path / "student", cache, student=student_dir, **options)
        assert not (tmp_path / "student").exists()
    sharded = {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}
    with pytest.raises(ConfigError, match="`hidden_loss` mse: .*cannot be sharded"):
        train(tmp_path / "student", caches / "all", student=student_dir, hidden_loss="mse", arguments=sharded)
    assert not (tmp_path / "student").exists()
    warned: list[str] = []
    options = {"hidden_loss": "mse", "max_steps": 1, "eval_cache": str(bare), "on_warning": warned.append}
    summary = train(tmp_path / "student", caches / "all", student=student_dir, **options)
    assert any("`hidden_loss`" in each for each in warned) and "features" not in summary.eval


def test_only_used_states_are_read(caches: Path, student_dir: Path, tmp_path: Path) -> None:
    seen: list[Any] = []
    read = CacheDataset.__getitem__

    def recording(dataset: CacheDataset, index: int) -> cf.CacheRow:
        seen.append(row := read(dataset, index))
        return row

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CacheDataset, "__getitem__", recording)
        train(tmp_path / "without", caches / "all", student=student_dir, max_steps=1)
        assert seen and all(row.hidden is None for row in seen)
        seen.clear()
        train(tmp_path / "with", caches / "all", student=student_dir, max_steps=1, hidden_loss="mse", layer_map="1:2")
        assert seen and all(tuple(row.hidden.states) == (2,) for row in seen)


def test_masked_students_and_sampled_targets(masked_dir: Path, tmp_path: Path) -> None:
    text = DataConfig(data=str(masked_dir / "text.txt"), seq_len=32, sample_by="line")
    config = CacheTeacherConfig(
        teacher=str(masked_dir / "bert"),
        data=text,
        output=str(tmp_path / "cache"),
        hidden=HiddenRule(layers="last"),
        targets=TargetRule(kind="threshold"),
        device="cpu",
    )
    cache_teacher(config)
    options = {"student_layers": 1, "hidden_loss": "cosine", "layer_map": "last", "max_steps": 10}
    train(
        tmp_path / "student",
        tmp_path / "cache",
        student=masked_dir / "bert",
        learning_rate=3e-3,
        eval_cache=str(tmp_path / "cache"),
        eval_steps=5,
        **options,
    )
    held_out = [entry["eval_features"] for entry in log_history(tmp_path / "student") if "eval_features" in entry]
    assert held_out[1] < held_out[0]
