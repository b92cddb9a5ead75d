"""A loaded model belongs to its caller: a run changes its weights, and leaves everything else as it was."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import distill
from runs import build_cache, distance, train, weights


@pytest.fixture(scope="module")
def cache(teacher_dir: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_cache(tmp_path_factory.mktemp("lent") / "cache", teacher_dir, text_file)


@pytest.fixture()
def model(student_dir: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(student_dir, dtype=torch.float32)


def attributes(model: PreTrainedModel) -> dict[str, Any]:
    """What is not a weight."""
    embeddings = model.get_input_embeddings()
    return {
        "modes": {name: module.training for name, module in model.named_modules()},
        "trainable": {name: weight.requires_grad for name, weight in model.named_parameters()},
        "attention": model.config._attn_implementation,
        "config": model.config.to_dict(),
        "checkpointing": [getattr(module, "gradient_checkpointing", None) for module in model.modules()],
        "hooks": len(embeddings._forward_hooks) + len(model._forward_hooks),
        "names": sorted(name for name in vars(model) if name != "_require_grads_hooks"),
    }


RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "checkpointing": {"gradient_checkpointing": True},
    "padded": {"padding_free": False},
    "merged": {"lora_rank": 2, "merge_adapter": True},
    "frozen": {"freeze_embeddings": True},
    "bf16": {"bf16": True},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_leaves_a_student_as_it_was(
    name: str, tmp_path: Path, cache: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    if "lora_rank" in RUNS[name]:
        pytest.importorskip("peft")
    model.train()
    model.model.layers[0].eval()
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    before = attributes(model)
    train(tmp_path / "student", cache, student=model, tokenizer=tokenizer, max_steps=1, **RUNS[name])
    assert attributes(model) == before


@pytest.mark.parametrize("options", [{}, {"padding_free": False}])
def test_an_evaluation_leaves_a_student_as_it_was(
    options: dict[str, Any], cache: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    model.train()
    model.model.embed_tokens.eval()
    before = attributes(model)
    distill.evaluate(cache, model, tokenizer=tokenizer, device="cpu", max_rows=2, **options)
    assert attributes(model) == before


@contextmanager
def dtypes_of(model: PreTrainedModel):
    seen: list[torch.dtype] = []  # the last is that of a training step: before it, the model is tried in float32
    handle = model.model.layers[0].mlp.up_proj.register_forward_hook(lambda _, __, output: seen.append(output.dtype))
    yield seen
    handle.remove()


def autocast(call: Callable[..., Any]) -> Callable[..., Any]:
    return torch.autocast("cpu", torch.bfloat16)(call)


def test_every_run_on_a_student_has_its_own_precision(
    tmp_path: Path, cache: Path, student_dir: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Also after a run, and on a model whose forward pass the caller has changed, as accelerate does."""
    options: dict[str, Any] = {"student": model, "tokenizer": tokenizer, "max_steps": 1, "learning_rate": 0.0}
    for number, bf16 in enumerate((False, True, False, True)):
        with dtypes_of(model) as seen:
            train(tmp_path / f"{number}", cache, bf16=bf16, **options)
        assert seen[-1] == (torch.bfloat16 if bf16 else torch.float32), number
    own = model.forward = autocast(model.forward)  # type: ignore[method-assign]
    model._is_accelerate_prepared = True
    with dtypes_of(model) as seen:
        train(tmp_path / "own", cache, bf16=False, **options)
    assert seen[-1] == torch.float32 and model.forward is own and model._is_accelerate_prepared
    with dtypes_of(model) as seen:
        model(input_ids=torch.arange(8)[None])
    assert seen == [torch.bfloat16]
    assert distance(weights(tmp_path / "0"), weights(tmp_path / "own")) == 0.0
