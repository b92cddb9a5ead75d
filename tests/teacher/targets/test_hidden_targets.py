"""`--targets hidden` at capture: what is rebuilt of states and head is the teacher's own log-softmax."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from test_heads import LINEAR, OWN, V, build
from test_placement import LAYERS
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel, PreTrainedTokenizerFast

import cache_format as cf
from cli import main
from dense import document_logprobs
from full_runs import build_full, full_settings
from pipeline.errors import ConfigError, ModelError
from pipeline.models import head_export as export_module
from pipeline.models.head import open_head
from pipeline.models.head_export import HeadExport, export_head
from pipeline.models.teacher_head import TeacherHead
from pipeline.teacher.capture import cache_teacher
from pipeline.teacher.engines.forward_pass import ForwardPass
from pipeline.teacher.plan import plan_cache
from pipeline.teacher.progress import CaptureProgress
from pipeline.teacher.targets.hidden_rule import HiddenRule
from pipeline.teacher.targets.hidden_states import predicted_bytes, quantised
from pipeline.teacher.targets.rules import TargetRule
from pipeline.teacher.verification import verify_against_teacher
from pipeline.teacher.verification.distances import state_bounds
from pipeline.teacher.verify_config import TeacherCheckConfig
from tiny import tiny_llama, tiny_tokenizer

VOCAB = 400
NAMES = ("llama", "phi, bias", "gemma2, soft-capping", "cohere, logit_scale", "granite, logits_scaling")


def named(path: Path, name: str, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A tiny teacher of an architecture, whose embedding has rows that belong to no token."""
    given = {**LINEAR, **OWN}[name]
    config = type(given)(**{**given.to_dict(), "vocab_size": VOCAB + 8})
    build(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def rebuilt(cache: cf.Cache, row: cf.CacheRow) -> tuple[np.ndarray, np.ndarray]:
    """[P, V] by numpy, and by what training uses."""
    head = cache.head()
    assert head is not None and row.hidden is not None
    states = row.hidden.values(head.spec.layer)
    by_torch = TeacherHead(cache)(torch.from_numpy(states)).log_softmax(dim=1)
    return head.logprobs(states), by_torch.numpy()


def errors(path: Path, model: PreTrainedModel, rows: int = 4) -> float:
    """The largest error of any rebuilt log-probability, by either way; against each document alone, in fp64."""
    cache, worst = cf.open_cache(path), 0.0
    for row in cache.rows(np.linspace(0, len(cache) - 1, rows).astype(int).tolist()):
        exact = document_logprobs(model, row, VOCAB)[row.hidden.mask]
        for found in rebuilt(cache, row):
            assert found.shape == exact.shape and found.dtype == np.float32
            worst = max(worst, float(np.abs(found - exact).max(initial=0.0)))
        p = np.exp(exact)
        entropy = np.sqrt(row.targets.entropy[row.hidden.mask])
        assert (
            np.abs(entropy - np.sqrt(-(p * exact).sum(1))).max() <= cache.metadata.codebooks["entropy"].max_error + 1e-3
        )
    return worst


# ---- what is rebuilt


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_distributions_are_the_teachers_own(
    name: str, tokenizer: PreTrainedTokenizerFast, text_file: Path, tmp_path: Path
) -> None:
    teacher = named(tmp_path / "teacher", name, tokenizer)
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float64).eval()
    exact = build_full(teacher, text_file, tmp_path / "float32", dtype="float32")
    assert errors(exact, model) < 1e-4 * (1 + 4 * ("gemma" in name))  # of logits of some hundred, by fp32 arithmetic
    metadata = cf.open_cache(exact).metadata
    assert metadata.head is not None and metadata.hidden is not None
    assert (metadata.head.softcap is not None) == ("gemma" in name)
    assert (metadata.head.logit_scale != 1.0) == (name.partition(",")[0] in ("cohere", "granite"))
    assert metadata.head.bias == ("phi" in name) and metadata.head.layer == metadata.hidden.teacher_layers == 2
    halves = build_full(teacher, text_file, tmp_path / "float16")
    assert errors(halves, model, rows=2) < 0.3
    cf.verify_cache(halves, deep=True)
    found = verify_against_teacher(TeacherCheckConfig(cache=str(halves), teacher=str(teacher), rows=2, device="cpu"))
    assert found.agrees and found.same_weights and found.same_entries == 1.0
    assert found.entries == found.positions * VOCAB and found.deviation.found < 1e-4


def test_states_of_float32_lose_nothing_and_the_others_little(
    teacher_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(teacher_dir, dtype=torch.float64).eval()
    bounds = {"float32": 5e-5, "float16": 1e-2, "int8": 0.5}
    paths = {dtype: build_full(teacher_dir, text_file, tmp_path / dtype, dtype=dtype) for dtype in bounds}
    found = {dtype: errors(path, model) for dtype, path in paths.items()}
    assert all(found[dtype] < bound for dtype, bound in bounds.items()), found
    assert found["float32"] < found["float16"] / 10 < found["int8"] / 100
    # Without the teacher's own rounding on its way to the states, which is what is left of the first: to 1e-5.
    own = open_head(AutoModelForCausalLM.from_pretrained(teacher_dir, dtype=torch.float32).eval(), VOCAB)
    cache = cf.open_cache(paths["float32"])
    for row in cache.rows(range(0, len(cache), 5)):
        with torch.no_grad():
            logits = own.own_logits(torch.from_numpy(row.hidden.values(2)))
        exact = logits.double().log_softmax(dim=1).numpy()
        assert max(float(np.abs(each - exact).max()) for each in rebuilt(cache, row)) < 1e-5


@pytest.mark.long
@pytest.mark.parametrize("kind, width", [("bert", 32), ("modernbert", 32), ("electra", 16), ("distilbert", 32)])
def test_masked_models_whose_head_transforms_the_states_first(
    kind: str, width: int, masked_dir: Path, tmp_path: Path
) -> None:
    """What their matrix is multiplied with is stored under one layer more; of an ELECTRA it is narrower."""
    path = build_full(masked_dir / kind, masked_dir / "text.txt", tmp_path / "cache", dtype="float32")
    metadata = cf.open_cache(path).metadata
    assert metadata.hidden is not None and metadata.head is not None
    assert metadata.hidden.layers == (3,) and metadata.hidden.teacher_layers == 2 and metadata.head.layer == 3
    assert metadata.hidden.width == width and metadata.head.bias and metadata.alignment == "same"
    model = AutoModelForMaskedLM.from_pretrained(masked_dir / kind, dtype=torch.float64).eval()
    assert errors(path, model) < 1e-4
    cf.verify_cache(path, deep=True)
    found = verify_against_teacher(
        TeacherCheckConfig(cache=str(path), teacher=str(masked_dir / kind), rows=2, device="cpu")
    )
    assert found.agrees and found.deviation.found < 1e-4


def test_states_of_other_layers_may_stand_beside_them(
    teacher_dir: Path, text_file: Path, masked_dir: Path, tmp_path: Path
) -> None:
    path = build_full(teacher_dir, text_file, tmp_path / "cache", layers="1", dtype="float32")
    assert cf.open_cache(path).metadata.hidden.layers == (1, 2)
    model = AutoModelForCausalLM.from_pretrained(teacher_dir, dtype=torch.float64).eval()
    assert errors(path, model) < 5e-5
    bert = build_full(masked_dir / "bert", masked_dir / "text.txt", tmp_path / "bert", layers="last", dtype="float32")
    assert cf.open_cache(bert).metadata.hidden.layers == (2, 3)
    assert errors(bert, AutoModelForMaskedLM.from_pretrained(masked_dir / "bert", dtype=torch.float64).eval()) < 1e-4
    with pytest.raises(ConfigError, match="states have width 32, the input of its head has width 16"):
        build_full(masked_dir / "electra", masked_dir / "text.txt", tmp_path / "electra", layers="last")


def test_a_head_is_stored_in_the_narrowest_numbers_that_hold_it(tmp_path: Path) -> None:
    model = build(LINEAR["phi, bias"])
    with torch.no_grad():
        for each in model.get_output_embeddings().parameters():
            each.copy_(each.bfloat16().float())
    spec, contents = export_head(open_head(model, V)).file(2)
    assert spec.dtype == "bfloat16" and len(contents) == cf.head_file_bytes(V, 32, "bfloat16", bias=True) == spec.bytes
    head = cf.StoredHead.of(memoryview(contents), spec, V, 32, "x")  # type: ignore[arg-type]
    assert np.array_equal(head.rows(slice(None)), model.get_output_embeddings().weight[:V].detach().numpy())
    with torch.no_grad():
        model.get_output_embeddings().bias[3] += 1e-6
    assert export_head(open_head(model, V)).file(2)[0].dtype == "float32"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "name", ["llama-tied", "gemma2, soft-capping", "cohere, logit_scale", "granite, logits_scaling"]
)
def test_a_head_of_half_precision_is_written_down(name: str, dtype: torch.dtype) -> None:
    form = export_head(open_head(build({**LINEAR, **OWN}[name], dtype), V))
    assert not form.transforms and form.file(2)[0].dtype == str(dtype).removeprefix("torch.")


def test_a_head_that_does_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(OWN["gemma2, soft-capping"])
    head = open_head(model, V)
    model.config.final_logit_softcapping = 20.0  # what it does, and what is known of it, are the same number
    assert export_head(head).softcap == 20.0
    monkeypatch.setattr(export_module, "CAPPED", ())
    with pytest.raises(
        ModelError, match=r"`targets=hidden`: Gemma2ForCausalLM's .* more to them than scale and soft-cap"
    ):
        export_head(head)


# ---- bugs that must show


def state_before_the_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    def states(self: Any, inputs: Any, _: Any) -> Any:
        hidden, found = self.head.states([1, 2], *inputs)
        return hidden, {2: found[1]}

    monkeypatch.setattr(ForwardPass, "layer_states", states)


def one_position_late(monkeypatch: pytest.MonkeyPatch) -> None:
    def states(self: Any, inputs: Any, _: Any) -> Any:
        hidden = self.head.hidden_states(*inputs)
        return hidden, {2: hidden.roll(1, 1)}

    monkeypatch.setattr(ForwardPass, "layer_states", states)


def head_of_other_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    right = export_module._numbers

    def numbers(head: Any) -> Any:
        weight, *rest = right(head)
        return (weight.roll(1, 0), *rest)

    monkeypatch.setattr(HeadExport, "file", with_numbers(HeadExport.file, numbers, monkeypatch))


def with_numbers(file: Any, numbers: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    def wrong(self: HeadExport, layer: int) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(export_module, "_numbers", numbers)
            return file(self, layer)

    return wrong


@pytest.mark.parametrize(
    "bug", [state_before_the_norm, one_position_late, head_of_other_numbers], ids=lambda b: b.__name__
)
def test_what_is_wrong_shows_to_the_teacher_and_mostly_without(
    bug: Any, teacher_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        bug(patch)
        path = build_full(teacher_dir, text_file, tmp_path / "cache")
    cf.verify_cache(path)  # every checksum is right
    model = AutoModelForCausalLM.from_pretrained(teacher_dir, dtype=torch.float64).eval()
    assert errors(path, model) > 0.3
    found = verify_against_teacher(TeacherCheckConfig(cache=str(path), teacher=str(teacher_dir), rows=2, device="cpu"))
    assert not found.agrees and found.divergence.found > 0.3 and "hidden_2 of row" in found.deviation.at
    if bug is not head_of_other_numbers:  # tokens in another order have the same entropy
        with pytest.raises(cf.CorruptShardError, match="its state and the head have an entropy of"):
            cf.verify_cache(path, deep=True)


@pytest.mark.parametrize("dtype", ["float16", "int8", "float32"])
def test_a_state_lies_between_the_numbers_that_are_rounded_to_it(dtype: str) -> None:
    """At the powers of two as well, of either sign, where the distance between half floats changes."""
    powers = 2.0 ** torch.arange(-20.0, 15.0)
    near = torch.cat([powers * (1 + by) for by in (0.0, 2.0**-12, -(2.0**-13), 2.0**-11 - 2.0**-20)])
    states = torch.cat([near, -near, torch.zeros(4)]).reshape(-1, 4)
    kept, scales = quantised(states, dtype)
    of_layer = {} if scales is None else {7: scales.numpy()}
    bounds = state_bounds(cf.HiddenStates(np.ones(len(states), bool), {7: kept.numpy()}, of_layer), 7)
    low, high = bounds.low.numpy(), bounds.high.numpy()
    assert (low <= states.numpy()).all() and (states.numpy() <= high).all()
    if dtype == "float16":  # and not much more than that
        assert (high - low <= 1.01 * 2.0**-10 * np.abs(states.numpy()) + 1e-7).all()


def test_other_weights_are_told_apart(teacher_dir: Path, text_file: Path, tmp_path: Path) -> None:
    path = build_full(teacher_dir, text_file, tmp_path / "cache")
    other = tiny_llama(tmp_path / "other", tiny_tokenizer(), seed=5)
    result = CliRunner().invoke(main, ["verify", str(path), "--against-teacher", str(other), "--rows", "2"])
    assert result.exit_code == 1 and "does not match" in result.output and "log-probabilities" in result.output


# ---- sizes, resuming, refusals


@pytest.mark.long
def test_sizes_predicted_are_sizes_found(teacher_dir: Path, text_file: Path, tmp_path: Path) -> None:
    stages: list[str] = []
    config = full_settings(teacher_dir, text_file, tmp_path / "cache", rows_per_shard=None)
    cache_teacher(config, on_stage=stages.append)
    cache = cf.open_cache(tmp_path / "cache")
    head, file = cache.metadata.head, tmp_path / "cache/head.safetensors"
    assert head is not None and file.stat().st_size == head.bytes == cf.head_file_bytes(
        VOCAB, 32, "float32", bias=False
    )
    states = predicted_bytes(cache.metadata.hidden, cache.num_loss_tokens)
    assert states == cache.num_loss_tokens * 64
    assert f"{cache.num_loss_tokens:,} positions × 1 layer × 32 × float16 = {states / 1e6:,.1f} MB" in stages[-1]
    assert f"head of 400 × 32 × float32 = {head.bytes / 1e6:,.1f} MB" in stages[-1]
    assert 0.7 * states < cache.column_bytes()["hidden_2"] < 1.05 * states
    plan = plan_cache(config, sample_rows=10**6)
    assert plan.chosen.bytes["columns"] == pytest.approx(cache.manifest.stored_bytes, rel=0.12)
    assert "packed" not in plan.chosen.bytes and plan.chosen.exact_mass == 1.0 and plan.chosen.entries_per_token == 0
    bare = replace(config, targets=TargetRule(top_k=16), hidden=None)
    others = {rule.targets["k"]: rule.bytes for rule in plan.rules if rule.targets["kind"] == "top-k"}
    assert others[16]["packed"] == pytest.approx(plan_cache(bare, sample_rows=10**6).chosen.bytes["packed"], rel=0.05)


class Killed(Exception):
    pass


def test_a_run_that_was_killed_goes_on_to_the_same_bytes(teacher_dir: Path, text_file: Path, tmp_path: Path) -> None:
    config = full_settings(teacher_dir, text_file, tmp_path / "cache", dtype="int8")
    cache_teacher(replace(config, output=str(tmp_path / "whole")))

    def kill(progress: CaptureProgress) -> None:
        if progress.rows > 20:
            raise Killed

    with pytest.raises(Killed):
        cache_teacher(config, on_progress=kill)
    with pytest.raises(cf.MismatchError, match="targets"):
        cache_teacher(replace(config, targets=TargetRule(top_k=4), hidden=None))
    with pytest.raises(cf.MismatchError, match="targets.hidden.dtype"):
        cache_teacher(replace(config, hidden=HiddenRule(layers=None)))
    (tmp_path / "cache/head.safetensors").unlink()  # it is written again
    assert cache_teacher(config).resumed_rows > 0
    for file in (tmp_path / "whole").rglob("*"):
        if file.is_file():
            assert file.read_bytes() == (tmp_path / "cache" / file.relative_to(tmp_path / "whole")).read_bytes()
    (tmp_path / "cache/head.safetensors").write_bytes(b"nothing")
    assert cache_teacher(config).resumed_rows == len(cf.open_cache(tmp_path / "cache"))
    cf.verify_cache(tmp_path / "cache", deep=True)


def test_a_head_that_was_left_on_disk_is_the_same_head(
    padded_teacher_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    places = {name: "disk" if name in ("model.norm", "lm_head") else "cpu" for name in LAYERS}
    (tmp_path / "map.json").write_text(json.dumps(places))
    for name, device_map in (("plain", None), ("spread", str(tmp_path / "map.json"))):
        build_full(padded_teacher_dir, text_file, tmp_path / name, device_map=device_map)
    for file in ("head.safetensors", "shards/shard-00000.arrow"):
        assert (tmp_path / "plain" / file).read_bytes() == (tmp_path / "spread" / file).read_bytes()


def test_what_hidden_targets_cannot_be_combined_with(teacher_dir: Path, text_file: Path, tmp_path: Path) -> None:
    config = full_settings(teacher_dir, text_file, tmp_path / "cache")
    for changes, words in (
        ({"encoding": "packed"}, "`encoding` packed: hidden targets have no entries to pack"),
        ({"hidden": HiddenRule(every=2)}, "`hidden_every` 2: `targets=hidden` needs the state of every position"),
    ):
        for run in (cache_teacher, plan_cache):
            with pytest.raises(ConfigError, match=words):
                run(replace(config, **changes))
    with pytest.raises(ConfigError, match="hidden targets serve any temperature"):
        TargetRule(kind="hidden", temperature=2.0)
    with pytest.raises(ConfigError, match="`top_k` 5: hidden targets do not have this option"):
        TargetRule(kind="hidden", top_k=5)
    with pytest.raises(ConfigError, match="only with `hidden_states`"):
        cache_teacher(replace(config, targets=TargetRule()))
    words = ["cache-teacher", "--teacher", teacher_dir, "--data", text_file, "--output", tmp_path / "cache"]
    result = CliRunner().invoke(main, [*map(str, words), "--targets", "hidden", "--generate"])
    assert result.exit_code == 1 and "hidden states are stored for given text only" in result.output
    assert not (tmp_path / "cache").exists()


def test_every_command_says_what_there_is(teacher_dir: Path, text_file: Path, tmp_path: Path) -> None:
    def run(*words: object) -> str:
        result = CliRunner().invoke(main, [str(word) for word in words], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout

    data = ["--teacher", teacher_dir, "--data", text_file, "--seq-len", 40, "--device", "cpu", "--targets", "hidden"]
    assert "▶ hidden" in run("plan", *data, "--output", tmp_path / "cache", "--rows", 4)
    cached = run("cache-teacher", *data, "--output", tmp_path / "cache", "--hidden-dtype", "float32")
    assert "all: states and head give the full distribution" in cached
    view = run("stats", tmp_path / "cache")
    manifest = cf.open_cache(tmp_path / "cache").manifest
    without_head = (manifest.stored_bytes - manifest.head_bytes) / manifest.num_tokens
    for printed in (cached, view):
        assert f"51.3 kB for the head, and {without_head:.1f} bytes per token" in printed
    assert "hidden, D = 32, float32" in view and "none: states" in view
    stats = json.loads(run("stats", tmp_path / "cache", "--json"))
    assert (
        stats["exact_mass_mean"] is None and stats["head_bytes"] == (tmp_path / "cache/head.safetensors").stat().st_size
    )
    assert stats["entropy_mean_nats"] > 1
    shown = json.loads(run("inspect", tmp_path / "cache", "--row", 1, "--positions", 5, "--candidates", 3, "--json"))
    model = AutoModelForCausalLM.from_pretrained(teacher_dir, dtype=torch.float64).eval()
    exact = document_logprobs(model, cf.open_cache(tmp_path / "cache")[1], VOCAB)
    for position in shown["positions"]:
        if not position["counted"]:
            continue
        expected = np.exp(np.sort(exact[position["position"]])[::-1][:3])
        assert [each["prob"] for each in position["candidates"]] == pytest.approx(expected, rel=1e-4)
        assert position["exact_mass"] == pytest.approx(expected.sum(), rel=1e-4)
    assert "and every rule" in run("verify", tmp_path / "cache", "--deep")
    run("convert", tmp_path / "cache", tmp_path / "made", "--top-k", 8)
    assert "exact mass" in run("stats", tmp_path / "made")
