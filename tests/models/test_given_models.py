"""Models and tokenizers that are given as objects, and names and paths that are checked before torch is imported."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from huggingface_hub import constants
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from pipeline import hub
from pipeline.errors import ConfigError, DataError, ModelError
from pipeline.models.head import open_head
from pipeline.models.loading import (
    load_config,
    load_model,
    load_tokenizer,
    model_name,
    resolve_device,
    teacher_fingerprints,
)
from pipeline.models.paths import adapter_base, check_model_path, locate_model
from pipeline.teacher.text.reading.data_paths import local_paths

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


@pytest.fixture
def model(teacher_dir: Path) -> PreTrainedModel:
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(teacher_dir, dtype=torch.float32)
    return loaded


# ---- objects


@pytest.mark.parametrize("device", [None, "auto"])
def test_a_given_model_is_used_as_it_is(model: PreTrainedModel, device: str | None) -> None:
    model = model.to(torch.bfloat16).train()
    weight = model.get_output_embeddings().weight
    assert load_model(model, device=device) is model
    assert model.get_output_embeddings().weight is weight
    assert weight.dtype == torch.bfloat16 and weight.device == CPU
    assert not model.training
    assert open_head(model, 400).linear


def test_a_given_model_is_converted_only_by_those_who_may(model: PreTrainedModel) -> None:
    weight = model.get_output_embeddings().weight
    assert load_model(model, dtype="float32", device="cpu") is model
    assert model.get_output_embeddings().weight is weight and weight.dtype == torch.float32
    with pytest.raises(ConfigError, match="`dtype` bfloat16: .* is loaded already, in float32, .* Leave it out"):
        load_model(model, dtype="bfloat16")
    assert weight.dtype == torch.float32
    assert load_model(model, dtype="bfloat16", convert=True) is model
    assert {tensor.dtype for tensor in model.parameters()} == {torch.bfloat16}


def test_a_device_that_is_asked_for_is_gone_to(model: PreTrainedModel) -> None:
    """The meta device is one that is not the CPU, on any machine."""
    assert load_model(model, device=torch.device("meta")) is model
    assert {tensor.device.type for tensor in model.parameters()} == {"meta"}


def test_a_given_model_is_the_same_teacher_as_its_directory(model: PreTrainedModel, teacher_dir: Path) -> None:
    assert teacher_fingerprints(load_model(model)) == teacher_fingerprints(load_model(str(teacher_dir)))
    assert load_config(model) is model.config


def test_auto_is_the_device_of_a_given_model(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device("auto") == torch.device("cuda")
    assert resolve_device("auto", "name") == torch.device("cuda")
    assert resolve_device("auto", model) == CPU


def test_options_that_only_serve_loading_are_refused(model: PreTrainedModel) -> None:
    with pytest.raises(ConfigError, match="`device_map` auto: .* is loaded already"):
        load_model(model, device_map="auto")
    with pytest.raises(ConfigError, match="`tensor_parallel`: .* is loaded already"):
        load_model(model, tensor_parallel=True)
    with pytest.raises(ConfigError, match="`dtype` float64"):
        load_model(model, dtype="float64")
    with pytest.raises(ConfigError, match="`device` abacus"):
        load_model(model, device="abacus")


def test_a_spread_model_stays_where_it_is(teacher_dir: Path, tmp_path: Path) -> None:
    layers = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu"}
    (tmp_path / "map.json").write_text(
        json.dumps({**layers, "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"})
    )
    spread = load_model(str(teacher_dir), device_map=str(tmp_path / "map.json"))
    for device in (None, "auto", "cpu", resolve_device("auto", spread)):
        assert load_model(spread, device=device) is spread
    assert any(tensor.is_meta for tensor in spread.parameters())
    with pytest.raises(ConfigError, match="`device` meta: .* is spread over several devices"):
        load_model(spread, device=torch.device("meta"))


def test_a_model_without_a_vocabulary_head_is_refused(teacher_dir: Path) -> None:
    body = AutoModel.from_pretrained(teacher_dir)
    with pytest.raises(ModelError, match="LlamaModel, which has no vocabulary head.*Load it with AutoModelForCausalLM"):
        load_model(body)


def test_names_of_models(model: PreTrainedModel, teacher_dir: Path) -> None:
    assert model_name("owner/name") == "owner/name"
    assert model_name(Path("some/folder")) == "some/folder"
    assert model_name(model) == str(teacher_dir)
    fresh = LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    assert model_name(fresh) == "LlamaForCausalLM"


def test_what_is_neither_a_name_nor_a_model_is_refused(model: PreTrainedModel) -> None:
    for load in (load_model, load_config, load_tokenizer, model_name):
        with pytest.raises(ConfigError, match="found a int, expected the name or path of a model"):
            load(3)  # type: ignore[operator]


def test_a_model_with_an_adapter_is_to_be_merged_first(model: PreTrainedModel) -> None:
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match=r"found a PeftModel, .*merge_and_unload\(\)"):
        load_model(adapted)


def test_tokenizers(model: PreTrainedModel, teacher_dir: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    assert load_tokenizer(tokenizer) is tokenizer
    assert load_tokenizer(teacher_dir).get_vocab() == AutoTokenizer.from_pretrained(teacher_dir).get_vocab()
    with pytest.raises(ConfigError, match="`tokenizer`: found none"):  # even if its directory has one
        load_tokenizer(model)


def test_paths_are_names(teacher_dir: Path) -> None:
    assert teacher_fingerprints(load_model(teacher_dir)) == teacher_fingerprints(load_model(str(teacher_dir)))


# ---- names and paths


def test_where_a_model_lies(teacher_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert locate_model("name") == ("name", None)
    assert locate_model("owner/name") == ("owner/name", None)
    assert locate_model(str(teacher_dir)) == (str(teacher_dir), None)
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(teacher_dir, tmp_path / "teacher")
    assert locate_model("~/teacher") == (str(tmp_path / "teacher"), None)
    (tmp_path / "model.gguf").touch()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert locate_model(str(tmp_path / "model.gguf")) == (str(tmp_path), "model.gguf")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"needs the gguf package: pip install 'distill\[gguf\]'"):
        locate_model(str(tmp_path / "model.gguf"))


@pytest.mark.parametrize(
    "name", ["./nowhere", "/nowhere", "~/nowhere", "some/deep/folder", "owner/name/", "nowhere.gguf"]
)
def test_a_wrong_path_is_never_a_hub_name(name: str) -> None:
    with pytest.raises(ModelError, match=f"{name}: no such (file|directory). Check the path."):
        check_model_path(name)


def test_a_missing_directory_beside_others_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `models/student` where there is `models`; the same for data."""
    monkeypatch.chdir(tmp_path)
    assert locate_model("models/student") == ("models/student", None) and local_paths("data/set") == []
    (tmp_path / "models").mkdir()
    (tmp_path / "data").mkdir()
    with pytest.raises(
        ModelError, match=r"models/student: no such directory\. Check the path, or start in a folder without"
    ):
        locate_model("models/student")
    with pytest.raises(
        DataError, match=r"data/set: no such file or directory\. Check the path, or start in a folder without"
    ):
        local_paths("data/set")
    assert locate_model("model") == ("model", None)


@pytest.mark.parametrize("load", [load_model, load_config, load_tokenizer])
def test_a_hub_that_does_not_answer_is_asked_once(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fail(*args: Any, **options: Any) -> Any:
        asked.append(args)
        raise OSError("no route to host")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "get_session", lambda: SimpleNamespace(head=fail, request=fail, get=fail))
    hub._hub_answers.cache_clear()
    for _ in range(2):
        with pytest.raises(ModelError, match="owner/missing: neither a local directory nor a model that the hub can"):
            load("owner/missing")
    assert len(asked) == 1 and not constants.HF_HUB_OFFLINE
    hub._hub_answers.cache_clear()


@pytest.mark.parametrize("answers", [True, False])
def test_local_copies_alone_are_read_if_the_hub_does_not_answer(answers: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    modules = (constants, datasets.config)
    for module in modules:
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "_hub_answers", lambda: answers)
    with hub.copies_if_unreachable():
        assert [module.HF_HUB_OFFLINE for module in modules] == [not answers] * 2
    assert [module.HF_HUB_OFFLINE for module in modules] == [False] * 2


def test_a_directory_must_hold_a_model_or_an_adapter(tmp_path: Path, model: PreTrainedModel) -> None:
    with pytest.raises(ModelError, match="no config.json in it, expected a model directory"):
        check_model_path(tmp_path)
    file = tmp_path / "adapter_config.json"
    for contents, message in (("{", "not an adapter's configuration"), ("{}", "not an adapter")):
        file.write_text(contents)
        with pytest.raises(ModelError, match=message):
            check_model_path(str(tmp_path))
    file.write_text('{"base_model_name_or_path": null}')
    with pytest.raises(ModelError, match="names no base model"):
        check_model_path(str(tmp_path))
    file.write_text('{"base_model_name_or_path": "owner/base"}')
    check_model_path(str(tmp_path))
    assert adapter_base(str(tmp_path)) == "owner/base"
    assert adapter_base("owner/name") is None
    check_model_path(model)


def test_paths_are_checked_without_torch() -> None:
    """In an interpreter of its own: here torch is imported already."""
    code = (
        "import sys; from pipeline.models.paths import check_model_path; check_model_path('owner/name');"
        "from pipeline.teacher.text.reading.data_paths import local_paths; local_paths('owner/name');"
        "heavy = {'torch', 'transformers', 'datasets', 'huggingface_hub'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)
