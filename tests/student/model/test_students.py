"""Creating students, and mismatches that are refused before any weights are loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import pipeline.student.model.initialization as students
from pipeline.errors import ConfigError, DistillError, ModelError
from pipeline.student.model.initialization import load_student
from pipeline.student.model.layer_selection import kept_layers
from runs import build_cache, train, weights
from tiny import tiny_llama, tiny_tokenizer


@pytest.fixture(scope="module")
def cache(teacher_dir: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_cache(tmp_path_factory.mktemp("students") / "cache", teacher_dir, text_file)


@pytest.fixture(scope="module")
def deep_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("deep") / "model", tokenizer, layers=6, seed=4)


def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=torch.arange(30)[None], use_cache=False).logits


# -- fewer layers -----------------------------------------------------------------------------------------------------


def test_kept_layers_are_evenly_spaced_with_both_ends():
    assert kept_layers(6, 3) == [0, 2, 5]
    assert kept_layers(30, 6) == [0, 6, 12, 17, 23, 29]
    assert kept_layers(6, 2) == [0, 5] and kept_layers(6, 1) == [0]
    for total in range(1, 40):
        for keep in range(1, total + 1):
            kept = kept_layers(total, keep)
            assert len(set(kept)) == keep and kept == sorted(kept)
            assert kept[0] == 0 and (keep == 1 or kept[-1] == total - 1)
            gaps = [b - a for a, b in zip(kept, kept[1:], strict=False)]
            assert not gaps or max(gaps) - min(gaps) <= 1


def test_fewer_layers_keep_weights_and_compute_the_kept_layers(deep_dir: Path):
    whole = load_file(deep_dir / "model.safetensors")
    student = load_student(str(deep_dir), layers=3, vocab_size=400, seed=0)
    assert student.config.num_hidden_layers == len(student.model.layers) == 3
    state = student.state_dict()
    for new, old in enumerate((0, 2, 5)):
        names = [name for name in whole if name.startswith(f"model.layers.{old}.")]
        assert len(names) == 9
        for name in names:
            assert torch.equal(state[name.replace(f"layers.{old}.", f"layers.{new}.", 1)], whole[name])
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        assert torch.equal(state[name], whole[name])
    assert student.lm_head.weight is student.model.embed_tokens.weight  # still tied

    # Logits equal those of the whole model with the other layers removed.
    teacher = AutoModelForCausalLM.from_pretrained(deep_dir, dtype=torch.float32)
    teacher.model.layers = torch.nn.ModuleList([teacher.model.layers[i] for i in (0, 2, 5)])
    teacher.config.num_hidden_layers = 3
    assert torch.equal(logits(student), logits(teacher))


@pytest.mark.parametrize("tie", [True, False])
def test_keeping_all_layers_gives_the_same_model(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, tie: bool):
    path = tiny_llama(tmp_path / "model", tokenizer, layers=3, tie=tie)
    student = load_student(str(path), layers=3, vocab_size=400, seed=0)
    assert torch.equal(logits(student), logits(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)))


def test_fewer_layers_of_gpt2(tmp_path: Path):
    config = GPT2Config(vocab_size=400, n_embd=16, n_layer=4, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    student = load_student(str(tmp_path), layers=2, vocab_size=400, seed=0)
    assert student.config.n_layer == 2
    for new, old in enumerate((0, 3)):
        for name, tensor in whole.transformer.h[old].state_dict().items():
            assert torch.equal(student.transformer.h[new].state_dict()[name], tensor), name
    assert torch.equal(student.transformer.wpe.weight, whole.transformer.wpe.weight)
    whole.transformer.h = torch.nn.ModuleList([whole.transformer.h[0], whole.transformer.h[3]])
    assert torch.equal(logits(student), logits(whole))


def test_fewer_layers_keep_their_attention_types(tmp_path: Path):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = Gemma2Config(vocab_size=400, num_hidden_layers=5, head_dim=8, sliding_window=4, **sizes)
    Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    student = load_student(str(tmp_path), layers=2, vocab_size=400, seed=0)
    assert student.config.layer_types == [config.layer_types[0], config.layer_types[4]]


@pytest.mark.parametrize("layers", [0, 7])
def test_impossible_numbers_of_layers_are_refused(deep_dir: Path, layers: int):
    with pytest.raises(ConfigError, match=f"`student_layers` {layers}: the model has 6 layers"):
        load_student(str(deep_dir), layers=layers, vocab_size=400, seed=0)


# -- random weights ---------------------------------------------------------------------------------------------------


def test_random_weights_depend_on_the_seed_only(tmp_path: Path, student_dir: Path):
    config = student_dir / "config.json"
    first, again, other = (load_student(None, config_file=str(config), vocab_size=400, seed=s) for s in (1, 1, 2))
    assert torch.equal(logits(first), logits(again))
    assert not torch.equal(logits(first), logits(other))
    loaded = AutoModelForCausalLM.from_pretrained(student_dir)
    assert type(first) is type(loaded) and not torch.equal(logits(first), logits(loaded))
    given_as_folder = load_student(None, config_file=str(student_dir), vocab_size=400, seed=1)
    assert torch.equal(logits(first), logits(given_as_folder))


def test_configuration_without_vocab_size_gets_that_of_the_cache(tmp_path: Path, student_dir: Path):
    config = json.loads((student_dir / "config.json").read_text())
    del config["vocab_size"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    student = load_student(None, config_file=str(tmp_path / "config.json"), vocab_size=400, seed=0)
    assert student.get_output_embeddings().weight.shape[0] == 400


def test_student_with_random_weights_gets_the_tokenizer_of_the_cache(tmp_path: Path, cache: Path, student_dir: Path):
    train(tmp_path / "student", cache, student_config=str(student_dir / "config.json"), max_steps=1)
    saved = AutoTokenizer.from_pretrained(tmp_path / "student")
    assert saved.get_vocab() == AutoTokenizer.from_pretrained(student_dir).get_vocab()


@pytest.mark.parametrize(
    "text, expected",
    [
        (None, "no such file"),
        ("{", "not JSON"),
        ("[]", "found a list"),
        ('{"vocab_size": 400}', "no model_type"),
        ('{"model_type": "unheard-of"}', "no causal or masked language model"),
        ('{"model_type": "t5", "vocab_size": 400}', "no causal or masked language model"),
        ('{"model_type": "llama", "vocab_size": 400, "hidden_size": "wide"}', "no causal or masked language model"),
        (
            '{"model_type": "llama", "vocab_size": 400, "hidden_size": 30, "num_attention_heads": 4}',
            "causal or masked language",
        ),
    ],
)
def test_unusable_configurations_are_refused(tmp_path: Path, text: str | None, expected: str):
    file = tmp_path / "given.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=expected) as caught:
        load_student(None, config_file=str(file), vocab_size=400, seed=0)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("both", [True, False])
def test_exactly_one_of_student_and_configuration_is_required(student_dir: Path, both: bool):
    given = str(student_dir) if both else None
    file = str(student_dir / "config.json") if both else None
    with pytest.raises(ConfigError, match="both `student` and" if both else "neither `student` nor"):
        load_student(given, config_file=file, vocab_size=400, seed=0)


# -- student and cache ------------------------------------------------------------------------------------------------


@pytest.fixture()
def _no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_model(*_: object, **__: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(students, "load_model", load_model)
    monkeypatch.setattr(students, "_from_config", load_model)


def copy_of(student: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(student, tmp_path / "copy"))


@pytest.mark.usefixtures("_no_weights")
class TestRefusedBeforeAnyWeightsAreLoaded:
    def refused(self, tmp_path: Path, cache: Path, *expected: str, **options: object) -> None:
        with pytest.raises(DistillError) as caught:
            train(tmp_path / "output", cache, **options)
        message = str(caught.value)
        assert "\n" not in message
        for words in expected:
            assert words in message
        assert not (tmp_path / "output").exists()

    def test_other_vocabulary(self, tmp_path: Path, cache: Path):
        path = tiny_llama(tmp_path / "other", tiny_tokenizer(seed=1), hidden=16)
        self.refused(tmp_path, cache, "tokenizer is not the teacher's", "ids differ", student=path)

    def test_smaller_vocabulary(self, tmp_path: Path, cache: Path):
        path = tiny_llama(tmp_path / "other", tiny_tokenizer(390), hidden=16)
        self.refused(tmp_path, cache, "found 390 tokens, expected 400", student=path)

    def test_permuted_ids(self, tmp_path: Path, cache: Path, student_dir: Path):
        path = copy_of(student_dir, tmp_path)
        data = json.loads((path / "tokenizer.json").read_text())
        vocab = data["model"]["vocab"]
        vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
        (path / "tokenizer.json").write_text(json.dumps(data))
        self.refused(tmp_path, cache, "2 ids differ", "'b' instead of 'a'", student=path)

    def test_fewer_output_rows(self, tmp_path: Path, cache: Path, student_dir: Path):
        path = copy_of(student_dir, tmp_path)
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, "vocab_size": 399}))
        self.refused(tmp_path, cache, str(path), "predicts 399 tokens", "over 400", student=path)
        for file in path.glob("tokenizer*"):
            file.unlink()
        self.refused(tmp_path, cache, "predicts 399 tokens", "over 400", student=path)
        configured = str(path / "config.json")
        self.refused(tmp_path, cache, configured, "predicts 399 tokens", student_config=configured)

    def test_shorter_context(self, tmp_path: Path, cache: Path, student_dir: Path):
        path = copy_of(student_dir, tmp_path)
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 47}))
        self.refused(tmp_path, cache, str(path), "at most 47 positions", "48", "`seq_len` 47", student=path)
        configured = str(path / "config.json")
        self.refused(tmp_path, cache, configured, "at most 47 positions", student_config=configured)

    def test_held_out_cache_of_another_vocabulary(
        self, tmp_path: Path, cache: Path, text_file: Path, student_dir: Path
    ):
        other = tiny_llama(tmp_path / "other", tiny_tokenizer(seed=1), hidden=16)
        held_out = build_cache(tmp_path / "held-out", other, text_file)
        options = {"student": student_dir, "eval_cache": str(held_out)}
        self.refused(tmp_path, cache, str(held_out), "vocabulary", **options)

    def test_no_model_there(self, tmp_path: Path, cache: Path):
        self.refused(tmp_path, cache, "nowhere", "no such directory", student=tmp_path / "nowhere")


def test_held_out_cache_of_another_teacher_gives_a_warning(
    tmp_path: Path, cache: Path, text_file: Path, student_dir: Path, deep_dir: Path
):
    held_out = build_cache(tmp_path / "held-out", deep_dir, text_file)
    seen: list[str] = []
    options = {"eval_cache": str(held_out), "max_steps": 1, "on_warning": seen.append}
    summary = train(tmp_path / "student", cache, student=student_dir, **options)
    assert summary.warnings == seen and len(seen) == 1
    assert seen[0].startswith(f"{held_out} ") and "a different teacher" in seen[0]


def test_padding_rows_of_the_head_are_not_trained(tmp_path: Path, cache: Path, tokenizer: PreTrainedTokenizerFast):
    path = tiny_llama(tmp_path / "padded", tokenizer, hidden=16, tie=False, pad_vocab=12, seed=2)
    train(tmp_path / "student", cache, student=path, max_steps=2, learning_rate=1e-2)
    before, after = weights(path)["lm_head.weight"], weights(tmp_path / "student")["lm_head.weight"]
    assert torch.equal(before[400:], after[400:])
    assert not torch.equal(before[:400], after[:400])


def test_other_chat_template_and_special_tokens_give_warnings(tmp_path: Path, cache: Path, student_dir: Path):
    path = copy_of(student_dir, tmp_path)
    (path / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    config = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": "<|im_end|>"}))
    seen: list[str] = []
    summary = train(tmp_path / "student", cache, student=path, max_steps=1, on_warning=seen.append)
    assert summary.warnings == seen
    assert any("chat template" in warning for warning in seen)
    assert any("eos_token is '<|im_end|>'" in warning for warning in seen)
    saved = AutoTokenizer.from_pretrained(tmp_path / "student")
    assert saved.eos_token == "<|im_end|>"  # the student keeps its own


def test_student_without_tokenizer_gets_that_of_the_cache(
    tmp_path: Path, cache: Path, student_dir: Path, tokenizer: PreTrainedTokenizerFast
):
    path = copy_of(student_dir, tmp_path)
    for file in [*path.glob("tokenizer*"), path / "chat_template.jinja"]:
        file.unlink()
    train(tmp_path / "student", cache, student=path, max_steps=1)
    assert AutoTokenizer.from_pretrained(tmp_path / "student").get_vocab() == tokenizer.get_vocab()


def test_architecture_without_a_list_of_layers_is_refused(tmp_path: Path):
    config = GPT2Config(vocab_size=400, n_embd=16, n_layer=4, n_head=2, n_positions=64)
    model = GPT2LMHeadModel(config)
    model.transformer.h = torch.nn.Sequential(*model.transformer.h)
    with pytest.raises(ModelError, match="no list of 4 layers"):
        students.keep_layers(model, 2)
