"""LoRA and DoRA students: gradients against dense autograd; adapters saved alone or merged, and evaluated."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

import cache_format as cf
from pipeline.errors import ConfigError, ModelError
from pipeline.evaluation.evaluate_config import EvaluateConfig
from pipeline.evaluation.held_out import evaluate
from pipeline.evaluation.report.report_config import ReportConfig
from pipeline.evaluation.report.report_sources import find_sources
from pipeline.losses import DistillLoss, sparse_kl
from pipeline.models.adapters import Lora, attach, merged
from pipeline.models.head import open_head
from pipeline.models.loading import load_config, load_model
from pipeline.student.data.dataset import collate
from pipeline.student.training.forward import distillation_output, install_distillation_forward
from runs import Stop, build_cache, distance, train, weights
from tiny import tiny_llama


@pytest.fixture(scope="module")
def cache(teacher_dir: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_cache(tmp_path_factory.mktemp("lora") / "cache", teacher_dir, text_file)


@pytest.fixture(scope="module")
def untied_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("untied") / "m", tokenizer, layers=1, hidden=16, tie=False, seed=5)


def adapter(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "adapter_model.safetensors")


OPTIONS: dict[str, Any] = {"lora_rank": 4, "learning_rate": 1e-2, "max_steps": 4, "batch_size": 4}


# -- the arithmetic ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("head", [False, True])
def test_gradients_equal_dense_autograd_through_w_plus_ba(cache: Path, untied_dir: Path, head: bool, dora: bool):
    """In float64, against a plain model with weights W + BA and full logits."""
    model = AutoModelForCausalLM.from_pretrained(untied_dir, dtype=torch.float64)
    lora = Lora(rank=3, alpha=5.0, head=head, dora=dora, targets=("q_proj", "down_proj"))
    adapted = attach(model, lora, base="", seed=1).double()
    # A head with an adapter must not be fused. With B = 0, as here, comparing logits could not detect that.
    opened = open_head(model, 400)
    assert opened.linear is not head
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():  # with B = 0 the gradient of A would be 0
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    parameters = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(parameters) == (3 if dora else 2) * (3 if head else 2)
    assert any("lm_head" in name for name in parameters) == head

    batch, recipe = collate(cf.open_cache(cache)[:4]), DistillLoss(kd_weight=0.7, temperature=2.0)
    install_distillation_forward(adapted, opened, recipe)
    count = int((batch["labels"] != -100).sum())
    output = adapted(scale=1 / count, **batch)
    output.loss.backward()
    found = {name: p.grad.clone() for name, p in parameters.items()}

    # Reference: a plain model whose weights are functions of A, B and the magnitudes.
    plain = AutoModelForCausalLM.from_pretrained(untied_dir, dtype=torch.float64)
    leaves = {name: p.detach().clone().requires_grad_() for name, p in parameters.items()}
    effective = {}
    for name, weight in plain.named_parameters():
        stem = "base_model.model." + name.removesuffix(".weight")
        if f"{stem}.lora_A.default.weight" in leaves:
            a, b = (leaves[f"{stem}.lora_{x}.default.weight"] for x in "AB")
            weight = weight.detach() + 5.0 / 3 * (b @ a)
            if dora:
                length = weight.detach().norm(dim=1, keepdim=True)  # no gradient through it, as in the paper's §4.3
                weight = leaves[f"{stem}.lora_magnitude_vector.default.weight"][:, None] * weight / length
            effective[name] = weight
    logits = torch.func.functional_call(
        plain, effective, kwargs={"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
    ).logits
    expected = sparse_kl(logits, batch["targets"], kd_weight=0.7, temperature=2.0)
    expected.backward()
    assert float(output.loss) == pytest.approx(float(expected.detach()), rel=1e-6)
    for name, leaf in leaves.items():
        assert torch.allclose(found[name], leaf.grad, rtol=1e-4, atol=1e-8), name
        assert leaf.grad.abs().max() > 0, name


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("tie", [True, False])
def test_merging_keeps_logits_and_embeddings(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, tie: bool, dora: bool):
    """A tied head has a row of zeros, for the padding token."""
    path = tiny_llama(tmp_path / "m", tokenizer, hidden=16, tie=tie, seed=6)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    embeddings = model.get_input_embeddings().weight.detach().clone()
    zeros = (embeddings == 0).all(dim=1)
    assert zeros.any()
    lora = Lora(rank=2, alpha=3.0, head=True, dora=dora, merged=True)
    adapted = attach(model, lora, base="", seed=1).double().eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
            if "lora_B" in name and "lm_head" in name and dora and tie:
                parameter[zeros] = 0.0  # as training leaves it, see below
        ids = torch.arange(40)[None]
        before = adapted(input_ids=ids).logits
        plain = merged(adapted)
        assert before.isfinite().all() and torch.allclose(plain(input_ids=ids).logits, before, rtol=1e-9, atol=1e-9)
    assert torch.equal(plain.get_input_embeddings().weight, embeddings)
    assert not any("lora" in name for name in plain.state_dict())
    plain.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(loaded(input_ids=ids).logits, before, rtol=1e-9, atol=1e-9)


def test_zero_row_stays_zero_under_dora(tmp_path: Path, cache: Path, student_dir: Path):
    """The tied head has one, for the padding token. DoRA cannot learn its magnitude, as it has no direction."""
    options = {**OPTIONS, "student": student_dir, "dora": True, "lora_head": True, "eval_cache": str(cache)}
    trained = train(tmp_path / "s", cache, merge_adapter=True, **options)
    before, after = weights(student_dir)["model.embed_tokens.weight"], weights(tmp_path / "s")["lm_head.weight"]
    zeros = (before == 0).all(dim=1)
    assert int(zeros.sum()) == 1 and (after[zeros] == 0).all() and (after[~zeros] != before[~zeros]).any(dim=1).all()
    found = evaluate(EvaluateConfig(cache=str(cache), student=str(tmp_path / "s"), device="cpu"))
    assert found.kl == pytest.approx(trained.eval["kl"], rel=1e-5)
    with pytest.raises(ConfigError, match="1 of the 400 rows of lm_head .*merge.adapter"):
        train(tmp_path / "alone", cache, **options)


# -- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("more", [{}, {"dora": True}, {"lora_head": True, "lora_dropout": 0.1}], ids=str)
def test_adapter_and_merged_student_evaluate_equally(
    tmp_path: Path, cache: Path, student_dir: Path, more: dict[str, Any]
):
    options = {**OPTIONS, **more, "student": student_dir, "eval_cache": str(cache), "eval_steps": 2}
    alone = train(tmp_path / "adapter", cache, **options)
    whole = train(tmp_path / "merged", cache, merge_adapter=True, **options)
    assert not (tmp_path / "adapter/model.safetensors").exists()
    saved = adapter(tmp_path / "adapter")
    assert all("lora_" in name for name in saved)  # without a copy of the [V, D] head
    assert any("lm_head" in name for name in saved) == bool(more.get("lora_head"))
    assert not any("embed_tokens" in name for name in saved)

    evaluated = {}
    for name in ("adapter", "merged"):
        config = EvaluateConfig(cache=str(cache), student=str(tmp_path / name), device="cpu")
        evaluated[name] = evaluate(config)
        assert evaluated[name].kl == pytest.approx(alone.eval["kl"], rel=1e-5)
    untrained = evaluate(EvaluateConfig(cache=str(cache), student=str(student_dir), device="cpu"))
    assert whole.eval == alone.eval and alone.eval["kl"] < untrained.kl - 1e-3

    # Both load with peft and transformers alone.
    base = AutoModelForCausalLM.from_pretrained(student_dir, dtype=torch.float32)
    by_peft = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    ids = torch.arange(30)[None]
    with torch.no_grad():
        assert torch.allclose(by_peft(input_ids=ids).logits, plain(input_ids=ids).logits, atol=1e-5)
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["base_model_name_or_path"] == str(
        student_dir.resolve()
    )
    assert len(AutoTokenizer.from_pretrained(tmp_path / "adapter")) == 400
    before, after = weights(student_dir), weights(tmp_path / "merged")
    frozen = {"model.embed_tokens.weight", "model.norm.weight"}
    assert all(torch.equal(before[name], after[name]) for name in frozen)


@pytest.mark.long
def test_best_adapter_is_saved_and_resume_is_exact(tmp_path: Path, cache: Path, student_dir: Path):
    options = {**OPTIONS, "student": student_dir, "eval_cache": str(cache), "eval_steps": 1, "max_steps": 6}
    options |= {"learning_rate": 1.0, "lora_dropout": 0.2, "lora_head": True}  # too large, so that it gets worse
    whole = train(tmp_path / "whole", cache, **options)
    assert whole.best_step < 6
    best = adapter(tmp_path / "whole" / f"checkpoint-{whole.best_step}")
    assert distance(adapter(tmp_path / "whole"), best) == 0.0
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", cache, on_step=Stop(4), **options)
    parts = train(tmp_path / "parts", cache, resume=True, **options)
    assert parts.eval == whole.eval and parts.best_step == whole.best_step
    last = [adapter(tmp_path / name / "checkpoint-6") for name in ("whole", "parts")]
    assert distance(*last) == 0.0
    assert distance(adapter(tmp_path / "whole"), adapter(tmp_path / "parts")) == 0.0


def test_adapter_run_is_resumed_only_on_its_base_weights(
    tmp_path: Path, cache: Path, student_dir: Path, tokenizer: PreTrainedTokenizerFast
):
    other = tiny_llama(tmp_path / "other", tokenizer, layers=1, hidden=16, seed=4)
    moved = Path(shutil.copytree(student_dir, tmp_path / "moved"))
    options = {**OPTIONS, "save_steps": 1}
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "s", cache, student=student_dir, on_step=Stop(2), **options)
    before = (tmp_path / "s/distill_config.json").read_text()
    with pytest.raises(cf.MismatchError, match=f"`student` {other}: found weights .*, expected "):
        train(tmp_path / "s", cache, student=other, resume=True, **options)
    early = Path(shutil.copytree(tmp_path / "s", tmp_path / "early"))  # like a version that did not record the weights
    record = json.loads(before)
    assert len(record.pop("adapted_weights")) == 64
    (early / "distill_config.json").write_text(json.dumps(record))
    for output, student in ((tmp_path / "s", moved), (early, student_dir)):
        assert train(output, cache, student=student, resume=True, **options).steps == 4
    assert distance(adapter(tmp_path / "s"), adapter(early)) == 0.0


def test_adapter_on_a_pruned_student_must_be_merged(tmp_path: Path, cache: Path, teacher_dir: Path):
    options = {**OPTIONS, "student": teacher_dir, "student_layers": 1, "student_width": 16, "merge_adapter": True}
    train(tmp_path / "s", cache, gradient_checkpointing=True, **options)
    result = evaluate(EvaluateConfig(cache=str(cache), student=str(tmp_path / "s"), device="cpu"))
    assert result.tokens == cf.open_cache(cache).num_loss_tokens
    with pytest.raises(ConfigError, match="`lora_rank`: .*`merge_adapter=True`"):
        train(tmp_path / "t", cache, **{**options, "merge_adapter": False})


@pytest.mark.parametrize("created", [{"student_layers": 1}, {"student_random": True}, {"student_width": 16}])
def test_checkpoint_of_a_created_student_is_not_loaded_onto_another_model(
    tmp_path: Path, cache: Path, teacher_dir: Path, created: dict[str, Any]
):
    """It has only the adapter, which peft would put on the teacher without a word."""
    options = {
        **OPTIONS,
        **created,
        "student": teacher_dir,
        "merge_adapter": True,
        "eval_cache": str(cache),
        "eval_steps": 1,
    }
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "s", cache, on_step=Stop(3), **options)
    for refused in (
        lambda: evaluate(EvaluateConfig(cache=str(cache), student=str(tmp_path / "s/checkpoint-2"), device="cpu")),
        lambda: find_sources(ReportConfig(source=(str(tmp_path / "s"),))),
    ):
        with pytest.raises(ModelError, match="checkpoint-2/adapter_config.json: names no base model .*`resume=True`"):
            refused()
    finished = train(tmp_path / "s", cache, resume=True, **options)
    result = evaluate(EvaluateConfig(cache=str(cache), student=str(tmp_path / "s"), device="cpu"))
    assert result.kl == pytest.approx(finished.eval["kl"], abs=1e-5)


@pytest.mark.long
def test_adapter_directory_can_be_a_student(tmp_path: Path, cache: Path, student_dir: Path):
    train(tmp_path / "adapter", cache, student=student_dir, **OPTIONS)
    before = evaluate(EvaluateConfig(cache=str(cache), student=str(tmp_path / "adapter"), device="cpu"))
    train(tmp_path / "on", cache, student=tmp_path / "adapter", max_steps=2, learning_rate=1e-3)
    after = evaluate(EvaluateConfig(cache=str(cache), student=str(tmp_path / "on"), device="cpu"))
    assert after.kl < before.kl and (tmp_path / "on/model.safetensors").exists()


def test_an_adapter_is_put_on_the_revision_that_it_was_trained_on(
    tmp_path: Path, cache: Path, student_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    train(tmp_path / "adapter", cache, student=student_dir, revision="v2", **{**OPTIONS, "max_steps": 1})
    asked: list[str | None] = []
    for factory in (AutoConfig, AutoModelForCausalLM):
        original = factory.from_pretrained

        def record(*names: Any, original: Any = original, revision: str | None = None, **options: Any) -> Any:
            asked.append(revision)
            return original(*names, **options)

        monkeypatch.setattr(factory, "from_pretrained", record)
    for given, expected in ((None, "v2"), ("v3", "v3")):
        for load in (load_config, load_model):
            load(tmp_path / "adapter", revision=given)
            assert asked[0] == expected  # later calls are transformers' own
            asked.clear()


def test_default_targets_of_gpt2(tmp_path: Path):
    config = GPT2Config(vocab_size=400, n_embd=16, n_layer=2, n_head=2, n_positions=64)

    def adapted_names(lora: Lora) -> set[str]:
        adapted = attach(GPT2LMHeadModel(config), lora, base="", seed=0)
        return {
            name.partition(".lora_A")[0].rpartition(".")[2]
            for name, _ in adapted.named_parameters()
            if "lora_A" in name
        }

    assert adapted_names(Lora(rank=2, alpha=2)) == {"c_attn", "c_proj", "c_fc"}  # Conv1D, not Linear
    assert adapted_names(Lora(rank=2, alpha=2, head=True)) == {"c_attn", "c_proj", "c_fc", "lm_head"}
    assert adapted_names(Lora(rank=2, alpha=2, targets=("c_attn",), head=True)) == {"c_attn", "lm_head"}


def test_sums_with_an_adapted_head_equal_those_of_full_logits(cache: Path, student_dir: Path):
    model = AutoModelForCausalLM.from_pretrained(student_dir, dtype=torch.float32)
    adapted = attach(model, Lora(rank=4, alpha=8, head=True), base="", seed=3).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
        batch = collate(cf.open_cache(cache)[:3])
        logits = adapted(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        expected = sparse_kl(logits, batch["targets"], reduction="sum")
        found = distillation_output(open_head(model, 400), batch, DistillLoss(kd_weight=1.0))
    assert float(found.kl) == pytest.approx(float(expected), rel=1e-5)


# -- what goes wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"dora": True}, "dora.*lora.rank"),
        ({"lora_head": True}, "lora.head.*lora.rank"),
        ({"merge_adapter": True}, "merge.adapter.*lora.rank"),
        ({"lora_targets": "q_proj"}, "lora.targets.*lora.rank"),
        ({"lora_rank": 4, "lora_alpha": 0.0}, "lora.alpha.* 0.*positive"),
        ({"lora_rank": 4, "lora_dropout": 1.0}, "lora.dropout.* 1"),
        ({"lora_rank": 4, "freeze_embeddings": True}, "`freeze_embeddings`: found `lora_rank`"),
        ({"lora_rank": 4, "lora_targets": "q_proj,query"}, "no linear layer.* query, expected .*down_proj, gate_proj"),
        ({"lora_rank": 4, "lora_targets": "lm_head"}, "lm_head.*lora.head"),
    ],
)
def test_invalid_adapter_options_are_refused(
    tmp_path: Path, cache: Path, student_dir: Path, options: dict[str, Any], expected: str
):
    with pytest.raises(ConfigError, match=expected):
        train(tmp_path / "s", cache, student=student_dir, **options)
    assert not (tmp_path / "s").exists()


def test_missing_peft_error_says_what_to_install(
    tmp_path: Path, cache: Path, student_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModelError, match=r"`lora_rank`: .*pip install 'distill\[peft\]'"):
        train(tmp_path / "s", cache, student=student_dir, lora_rank=4)


def test_unusable_adapter_directories_are_refused(tmp_path: Path, cache: Path, student_dir: Path, teacher_dir: Path):
    base = Path(shutil.copytree(student_dir, tmp_path / "base"))
    train(tmp_path / "s", cache, student=base, **OPTIONS)
    config = EvaluateConfig(cache=str(cache), student=str(tmp_path / "s"), device="cpu")
    file = tmp_path / "s/adapter_config.json"
    good = json.loads(file.read_text())

    base.rename(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match=f"{base}: .*no such "):
        evaluate(config)
    file.write_text(json.dumps({**good, "base_model_name_or_path": str(teacher_dir)}))
    with pytest.raises(ModelError, match=f"adapter .*{teacher_dir}"):
        evaluate(config)
    file.write_text(json.dumps({**good, "base_model_name_or_path": None}))
    with pytest.raises(ModelError, match="adapter_config.json: .*base model"):
        evaluate(config)
    file.write_text("{")
    with pytest.raises(ModelError, match="adapter_config.json: .*configuration"):
        evaluate(config)


@pytest.mark.parametrize("layers", [1, 3])
def test_adapter_to_a_model_of_another_depth_is_refused(
    tmp_path: Path, cache: Path, tokenizer: PreTrainedTokenizerFast, layers: int
):
    base = tiny_llama(tmp_path / "base", tokenizer, layers=2, hidden=16)
    other = tiny_llama(tmp_path / "other", tokenizer, layers=layers, hidden=16)
    adapted = attach(AutoModelForCausalLM.from_pretrained(base), Lora(rank=2, alpha=2.0), base=str(other), seed=0)
    adapted.save_pretrained(tmp_path / "s")
    with pytest.raises(ModelError, match=f"does not fit {other}: 14 weights .*layers.{min(layers, 2)}"):
        load_model(str(tmp_path / "s"))
