"""Students given as loaded models: trained in place, with the weights and the record of a run from a path."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import cache_format as cf
from pipeline.errors import ConfigError, ModelError
from pipeline.student.model.initialization import load_student
from pipeline.student.validation.compatibility import check_student
from runs import Stop, build_cache, distance, train, weights
from tiny import tiny_llama, tiny_tokenizer


@pytest.fixture(scope="module")
def cache(teacher_dir: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_cache(tmp_path_factory.mktemp("given") / "cache", teacher_dir, text_file)


@pytest.fixture()
def model(student_dir: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(student_dir, dtype=torch.float32)


def state(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("training", [True, False])
def test_given_student_is_trained_in_place_like_its_path(
    tmp_path: Path, cache: Path, student_dir: Path, model: PreTrainedModel, training: bool
):
    options = {"max_steps": 3, "learning_rate": 1e-2}
    train(tmp_path / "path", cache, student=student_dir, **options)
    before = state(model)
    train(tmp_path / "given", cache, student=model.train(training), **options)
    saved = weights(tmp_path / "given")
    assert distance(saved, weights(tmp_path / "path")) == 0.0
    after = state(model)
    assert distance(saved, {name: after[name] for name in saved}) == 0.0 < distance(before, after)
    assert model.training is training and "forward" not in vars(model)
    config = json.loads((tmp_path / "given/distill_config.json").read_text())["config"]
    assert config["student"] == str(student_dir)
    assert AutoTokenizer.from_pretrained(tmp_path / "given").get_vocab() == tiny_tokenizer().get_vocab()


@pytest.mark.parametrize("use_cache", [True, False])
def test_settings_of_the_run_do_not_stay_with_the_student(
    tmp_path: Path, cache: Path, student_dir: Path, tokenizer: PreTrainedTokenizerFast, use_cache: bool
):
    before, after = tmp_path / "before", tmp_path / "after"
    model = AutoModelForCausalLM.from_pretrained(student_dir, dtype=torch.float32, attn_implementation="eager")
    model.config.use_cache = use_cache
    model.generation_config.update(do_sample=True, temperature=0.7, max_new_tokens=33)
    model.save_pretrained(before)
    options = {"max_steps": 2, "gradient_checkpointing": True, "bf16": True, "eval_cache": str(cache)}
    train(after, cache, student=model, tokenizer=tokenizer, **options)
    for name in ("config.json", "generation_config.json"):
        for saved in (after, after / "checkpoint-2"):
            assert json.loads((saved / name).read_text()) == json.loads((before / name).read_text())
    assert model.config.use_cache is use_cache and model.config._attn_implementation == "eager"
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def test_a_configuration_without_use_cache_does_not_get_it(
    tmp_path: Path, cache: Path, student_dir: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
):
    del model.config.use_cache  # as in a model with code of its own
    train(tmp_path / "student", cache, student=model, tokenizer=tokenizer, max_steps=1)
    assert "use_cache" not in vars(model.config)


def test_given_student_is_usable_after_an_interrupted_run_and_can_resume(
    tmp_path: Path, cache: Path, student_dir: Path, model: PreTrainedModel
):
    options = {"max_steps": 4, "save_steps": 2, "learning_rate": 1e-2}
    train(tmp_path / "whole", cache, student=student_dir, **options)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", cache, student=model, on_step=Stop(3), **options)
    assert model(input_ids=torch.arange(8)[None]).logits.shape == (1, 8, 400)
    train(tmp_path / "parts", cache, student=model, resume=True, **options)
    assert distance(weights(tmp_path / "whole"), weights(tmp_path / "parts")) == 0.0


@pytest.mark.long
@pytest.mark.parametrize(
    "options", [{"student_layers": 1}, {"student_width": 16}, {"student_random": True}, {"student_intermediate": 8}]
)
def test_student_made_from_a_given_model_leaves_it_alone(
    tmp_path: Path, cache: Path, teacher_dir: Path, options: dict[str, int | bool]
):
    in_16_bits = tmp_path / "bfloat16"
    AutoModelForCausalLM.from_pretrained(teacher_dir, dtype=torch.bfloat16).save_pretrained(in_16_bits)
    tiny_tokenizer().save_pretrained(in_16_bits)
    model = AutoModelForCausalLM.from_pretrained(in_16_bits)
    before, settings = state(model), model.config.to_dict()
    train(tmp_path / "path", cache, student=in_16_bits, max_steps=1, **options)
    train(tmp_path / "given", cache, student=model, max_steps=1, **options)
    assert distance(state(model), before) == 0.0 and model.config.to_dict() == settings
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert distance(weights(tmp_path / "given"), weights(tmp_path / "path")) == 0.0


def test_given_student_is_converted_to_float32(model: PreTrainedModel):
    loaded = load_student(model.bfloat16(), vocab_size=400, seed=0)
    assert loaded is model and {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_adapters_on_a_given_student(tmp_path: Path, cache: Path, student_dir: Path, model: PreTrainedModel):
    options = {"lora_rank": 2, "max_steps": 2, "learning_rate": 1e-2}
    train(tmp_path / "adapter", cache, student=model, **options)
    adapter = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(student_dir.resolve())
    nameless = LlamaForCausalLM(LlamaConfig(**_shape(model)))
    with pytest.raises(ConfigError, match="`lora_rank`: .*`merge_adapter=True`"):
        train(tmp_path / "nameless", cache, student=nameless, **options)
    train(tmp_path / "nameless", cache, student=nameless, merge_adapter=True, **options)
    assert not any("lora" in name for name in weights(tmp_path / "nameless"))


def _shape(model: PreTrainedModel) -> dict[str, int]:
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return {name: getattr(model.config, name) for name in names}


def test_given_student_without_tokenizer_gives_a_warning(cache: Path, model: PreTrainedModel):
    opened = cf.open_cache(cache)
    tokenizer, (warning,) = check_student([opened], model)
    assert "`tokenizer`" in warning and tokenizer.get_vocab() == tiny_tokenizer().get_vocab()
    own = tiny_tokenizer()
    assert check_student([opened], model, tokenizer=own) == (own, [])
    with pytest.raises(ConfigError, match="`cross_tokenizer`: .*`tokenizer`"):
        check_student([opened], model, cross_tokenizer="project")


def test_tokenizer_option_is_compared_with_the_cache(
    tmp_path: Path, cache: Path, student_dir: Path, model: PreTrainedModel
):
    opened, foreign = cf.open_cache(cache), tiny_tokenizer(seed=1)
    path = tiny_llama(tmp_path / "foreign", foreign, hidden=16)
    for student in (model, str(student_dir)):
        for tokenizer in (foreign, str(path)):
            with pytest.raises(cf.MismatchError, match=f"{student_dir}: .*ids differ.*`cross_tokenizer=project`"):
                check_student([opened], student, tokenizer=tokenizer)
    assert check_student([opened], model, tokenizer=foreign, cross_tokenizer="project") == (foreign, [])


def test_url_as_output_is_refused(tmp_path: Path, cache: Path, student_dir: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="`output` memory://students/a: found a URL, expected a local directory"):
        train("memory://students/a", cache, student=student_dir)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_the_held_out_cache_is_checked_for_documents_that_see_one_another(
    tmp_path: Path, cache: Path, teacher_dir: Path, text_file: Path, tokenizer: PreTrainedTokenizerFast
):
    """A Mamba carries its state from one document of a packed row into the next."""
    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, state_size=4, initializer_range=0.3
    )
    model = MambaForCausalLM(config)
    unpacked = build_cache(tmp_path / "unpacked", teacher_dir, text_file, packing=False)
    options = {"student": model, "tokenizer": tokenizer, "max_steps": 1}
    train(tmp_path / "unpacked-held-out", unpacked, eval_cache=str(unpacked), **options)
    with pytest.raises(ModelError, match=f"{cache} has packed rows.* packed after another"):
        train(tmp_path / "refused", unpacked, eval_cache=str(cache), **options)
    assert not (tmp_path / "refused").exists()


def test_embeddings_are_frozen_only_during_the_run(
    tmp_path: Path, cache: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
):
    embeddings = model.get_input_embeddings().weight
    before = embeddings.detach().clone()
    options = {"student": model, "tokenizer": tokenizer, "learning_rate": 1e-2}
    train(tmp_path / "frozen", cache, freeze_embeddings=True, max_steps=1, **options)
    assert torch.equal(embeddings, before) and embeddings.requires_grad
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "ended", cache, freeze_embeddings=True, max_steps=2, on_step=Stop(1), **options)
    assert torch.equal(embeddings, before) and embeddings.requires_grad
    train(tmp_path / "learning", cache, max_steps=2, **options)
    assert not torch.equal(embeddings, before)


@pytest.mark.parametrize("options", [{"lora_rank": 2}, {}, {"student_layers": 1}])
def test_a_model_with_adapters_of_an_earlier_run_is_refused(
    tmp_path: Path, cache: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, options: dict[str, int]
):
    pytest.importorskip("peft")
    given = {"student": model, "tokenizer": tokenizer, "max_steps": 1}
    train(tmp_path / "first", cache, lora_rank=2, **given)
    with pytest.raises(ConfigError, match="has adapters already.*Load it again"):
        train(tmp_path / "second", cache, **given, **options)
    assert not (tmp_path / "second").exists()
    train(tmp_path / "random", cache, student_random=True, **given)  # only its configuration is used


def test_a_model_with_merged_adapters_is_trained_again(
    tmp_path: Path, cache: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
):
    pytest.importorskip("peft")
    given = {"student": model, "tokenizer": tokenizer, "max_steps": 1, "lora_rank": 2}
    train(tmp_path / "first", cache, merge_adapter=True, **given)
    train(tmp_path / "second", cache, merge_adapter=True, **given)
