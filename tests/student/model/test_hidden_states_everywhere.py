"""Hidden-state distillation from a cache with states at all positions, not only at loss tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

import cache_format as cf
from pipeline.losses import DistillLoss
from pipeline.models.head import open_head
from pipeline.student.data.dataset import CacheDataset, collate, without_loss_tokens
from pipeline.student.model.hidden_state_matching import HiddenStateLoss, HiddenStateMatching
from pipeline.student.train_config import TrainStudentConfig
from pipeline.student.training.forward import distillation_output
from pipeline.student.training.train import train_student
from pipeline.teacher.cache_config import CacheTeacherConfig
from pipeline.teacher.capture import cache_teacher
from pipeline.teacher.targets.hidden_rule import HiddenRule
from pipeline.teacher.text.data_config import DataConfig
from runs import SGD, distance, log_history, train, weights
from tiny import tiny_llama


@pytest.fixture(scope="module")
def wide(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of the teacher's width."""
    return tiny_llama(tmp_path_factory.mktemp("wide") / "student", tokenizer, layers=1, hidden=32, seed=4)


@pytest.fixture(scope="module")
def everywhere(teacher_dir: Path, chat_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Caches of chats, with loss tokens in answers only. all: states at all positions; counted: at loss tokens."""
    folder = tmp_path_factory.mktemp("everywhere")
    for name in ("all", "counted"):
        text = DataConfig(data=str(chat_file), seq_len=96)
        given = {"data": text, "hidden": HiddenRule(layers="1,2"), "all_positions": name == "all", "device": "cpu"}
        cache_teacher(CacheTeacherConfig(teacher=str(teacher_dir), output=str(folder / name), **given))
    return folder


def test_loss_is_the_mean_over_all_positions_with_states(everywhere: Path, wide: Path, tmp_path: Path) -> None:
    """Against the model's own hidden states in fp64, document by document."""
    options = {"hidden_loss": "mse", "layer_map": "last", "max_steps": 2, "eval_steps": 2}
    found = {}
    for name in ("all", "counted"):
        cache = str(everywhere / name)
        found[name] = train(tmp_path / name, Path(cache), student=wide, eval_cache=cache, **options).eval["features"]
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float64).eval()
        losses = []
        for row in cf.open_cache(cache).iter_rows():
            ends = np.cumsum(row.segment_lengths)
            with torch.no_grad():
                ids = [torch.from_numpy(part.astype(np.int64))[None] for part in np.split(row.input_ids, ends[:-1])]
                mine = torch.cat([model.model(input_ids=each, use_cache=False)[0][0] for each in ids]).numpy()
            assert row.hidden.mask.all() == (name == "all") and row.hidden.mask.sum() > row.loss_mask.sum() * 0.99
            losses += ((mine[row.hidden.mask] - row.hidden.values(2)) ** 2).mean(axis=1).tolist()
        assert found[name] == pytest.approx(np.mean(losses), rel=1e-5)
    assert distance(weights(tmp_path / "all"), weights(tmp_path / "counted")) > 1e-5


def test_masked_student_equal_to_its_teacher_has_zero_loss(masked_dir: Path, tmp_path: Path) -> None:
    """Padded rows; states also at the tokens that are not masked."""
    text = DataConfig(data=str(masked_dir / "text.txt"), seq_len=32, sample_by="line")
    given = {"data": text, "hidden": HiddenRule(layers="1,2"), "all_positions": True, "device": "cpu"}
    teacher = masked_dir / "bert"
    cache_teacher(CacheTeacherConfig(teacher=str(teacher), output=str(tmp_path / "cache"), **given))
    cache = cf.open_cache(tmp_path / "cache")
    head = open_head(AutoModelForMaskedLM.from_pretrained(teacher, dtype=torch.float32).eval(), 400, masked=True)
    asked = HiddenStateLoss.for_cache(cache, loss="normalized-mse", weight=1.0, layer_map="1:1,2:2")
    features = HiddenStateMatching.for_student(asked, head, 0)
    rows = sorted((cache[i] for i in range(6)), key=lambda row: len(row.input_ids))
    assert len(rows[0].input_ids) < len(rows[-1].input_ids)
    with torch.no_grad():
        batch = collate(rows)
        assert len(batch["hidden_index"]) == sum(len(row.input_ids) for row in rows) > 3 * (batch["labels"] > 0).sum()
        assert distillation_output(head, batch, DistillLoss(), matching=features).features < 1e-4
        batch["hidden_2"] = batch["hidden_2"].roll(1, 0)
        assert distillation_output(head, batch, DistillLoss(), matching=features).features > 10


def test_gradient_accumulation_does_not_change_a_step(everywhere: Path, student_dir: Path, tmp_path: Path) -> None:
    options = {"hidden_loss": "mse", "hidden_weight": 2.0, "max_steps": 3, "learning_rate": 0.02, "seed": 5}
    options |= {"logging_steps": 1, "arguments": SGD, "student": student_dir}
    one, four = tmp_path / "one", tmp_path / "four"
    train(one, everywhere / "all", batch_size=8, **options)
    train(four, everywhere / "all", batch_size=2, gradient_accumulation_steps=4, **options)
    assert distance(weights(one), weights(four)) < 2e-6
    projections = [load_file(each / "projections.safetensors") for each in (one, four)]
    assert distance(*projections) < 2e-6
    logged = [[entry["features"] for entry in log_history(each) if "features" in entry] for each in (one, four)]
    assert logged[0] == pytest.approx(logged[1], rel=1e-5) and logged[0]


def test_filler_rows_do_not_enter_the_loss(everywhere: Path) -> None:
    dataset = CacheDataset(cf.open_cache(everywhere / "all"))
    batch = dataset.collate([dataset[0], dataset[len(dataset) + 1]])  # the second is row 1 as a filler
    features = HiddenStateMatching("mse", 1.0, ((1, 2),), (32, 32), everywhere=True, shares=(0.25, 0.5))
    states = {1: torch.randn(*batch["labels"].shape, 32)}
    found = features(states, batch)
    assert found[0] > 0 and found[1] == 0 and (features(states, without_loss_tokens(batch)) == 0).all()
    assert features.eval()(states, batch)[0] == pytest.approx(2 * found[0].item(), rel=1e-6)


def test_caches_with_states_at_different_positions_are_not_mixed(
    everywhere: Path, student_dir: Path, tmp_path: Path
) -> None:
    both = (str(everywhere / "all"), str(everywhere / "counted"))
    with pytest.raises(cf.CacheError, match="hidden positions all against counted"):
        config = TrainStudentConfig(
            cache=both, student=str(student_dir), output=str(tmp_path / "s"), hidden_loss="mse", device="cpu"
        )
        train_student(config)
    warned: list[str] = []
    options = {"hidden_loss": "mse", "max_steps": 1, "eval_cache": both[1], "on_warning": warned.append}
    assert "features" not in train(tmp_path / "s", everywhere / "all", student=student_dir, **options).eval
    assert any("`hidden_loss`" in each for each in warned)
