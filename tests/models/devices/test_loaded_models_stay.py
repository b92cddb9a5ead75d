"""`device=auto` leaves a loaded model where it is, also on a machine with a GPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import distill
from pipeline.models.loading import load_model

LAYERS = ("embed_tokens", "layers.0", "layers.1", "norm", "rotary_emb")
OPTIONS: dict[str, Any] = {"seq_len": 32, "batch_size": 2, "targets": "top-k", "top_k": 4}
PROMPTS = [{"prompt": "The old captain"}, {"prompt": "Why?"}]


@pytest.fixture
def directory(teacher_dir: Path, tmp_path: Path) -> Path:
    options = {**OPTIONS, "device": "cpu"}
    distill.cache_teacher(teacher_dir, [{"text": "The miller and the river. " * 9}], tmp_path / "cache", **options)
    return tmp_path


@pytest.fixture(params=["on the CPU", "on CPU and disk"])
def model(request: pytest.FixtureRequest, teacher_dir: Path, tmp_path: Path) -> PreTrainedModel:
    if request.param == "on the CPU":
        loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(teacher_dir)
        return loaded
    places = {f"model.{name}": "disk" if name == "layers.0" else "cpu" for name in LAYERS}
    (tmp_path / "map.json").write_text(json.dumps({**places, "lm_head": "cpu"}))
    return load_model(str(teacher_dir), device_map=str(tmp_path / "map.json"))


def capture(model: PreTrainedModel, tokenizer: Any, folder: Path) -> None:
    distill.cache_teacher(model, [{"text": "A river."}], folder / "other", tokenizer=tokenizer, **OPTIONS)


def generate(model: PreTrainedModel, tokenizer: Any, folder: Path) -> None:
    for _ in range(2):  # the second time it compares with the finished cache
        distill.cache_teacher(
            model, PROMPTS, folder / "other", tokenizer=tokenizer, generate=True, gen_max_new_tokens=2, **OPTIONS
        )


def plan(model: PreTrainedModel, tokenizer: Any, folder: Path) -> None:
    distill.plan(model, [{"text": "A river. " * 20}], tokenizer=tokenizer, **OPTIONS)


def verify(model: PreTrainedModel, tokenizer: Any, folder: Path) -> None:
    distill.verify(folder / "cache", against_teacher=model, tokenizer=tokenizer)


def evaluate(model: PreTrainedModel, tokenizer: Any, folder: Path) -> None:
    distill.evaluate(folder / "cache", model, tokenizer=tokenizer)


@pytest.mark.parametrize("use", [capture, generate, plan, verify, evaluate], ids=lambda use: use.__name__)
def test_a_loaded_model_stays_where_it_is(
    use: Callable[..., None],
    model: PreTrainedModel,
    directory: Path,
    teacher_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    moves: list[Any] = []
    tokenizer = AutoTokenizer.from_pretrained(teacher_dir)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(type(model), "to", lambda model, *args, **options: moves.append((args, options)) or model)
    use(model, tokenizer, directory)
    assert not moves
