"""Hidden states at capture: the teacher's own, at the positions and in the numbers that were asked for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel

import cache_format as cf
from cli import main
from pipeline.errors import ConfigError, ModelError
from pipeline.models.head import Head, open_head
from pipeline.teacher.cache_config import CacheTeacherConfig
from pipeline.teacher.capture import cache_teacher
from pipeline.teacher.plan import plan_cache
from pipeline.teacher.progress import CaptureProgress
from pipeline.teacher.targets import hidden_states as hidden
from pipeline.teacher.targets.hidden_rule import HiddenRule
from pipeline.teacher.targets.hidden_states import chosen, predicted_bytes, quantised
from pipeline.teacher.targets.rules import TargetRule
from pipeline.teacher.text.data_config import DataConfig
from tiny import tiny_llama

LAYERS, WIDTH = 2, 32  # of the teachers


def settings(teacher: Path, data: Path, output: Path, **options: Any) -> CacheTeacherConfig:
    text = DataConfig(data=str(data), seq_len=40, sample_by="line")
    options = {"hidden": HiddenRule(layers="last"), "targets": TargetRule(top_k=8), "rows_per_shard": 16, **options}
    return CacheTeacherConfig(teacher=str(teacher), data=text, output=str(output), device="cpu", **options)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_where_no_position_is_chosen_every_layer_has_no_states(dtype: str) -> None:
    spec = cf.HiddenSpec(layers=(0, 2), teacher_layers=2, width=WIDTH, dtype=dtype)
    states, scales = hidden.nowhere(spec)
    (found,) = hidden.of_rows(states, scales, [np.zeros(5, bool)], [0])
    assert {layer: each.shape for layer, each in found.states.items()} == {0: (0, WIDTH), 2: (0, WIDTH)}
    assert all(each.dtype == dtype for each in found.states.values()) and len(scales) == (2 if dtype == "int8" else 0)


@torch.no_grad()
def own_states(model: PreTrainedModel, row: cf.CacheRow) -> list[np.ndarray]:
    """[T, D] of every layer, each document of the row alone."""
    documents = np.split(np.asarray(row.input_ids, np.int64), np.cumsum(row.segment_lengths)[:-1])
    outputs = [model(input_ids=torch.from_numpy(d)[None], output_hidden_states=True).hidden_states for d in documents]
    return [torch.cat([output[layer][0] for output in outputs]).numpy() for layer in range(LAYERS + 1)]


def check_states(cache: cf.Cache, model: PreTrainedModel) -> int:
    """Every stored state against the teacher's, within what its numbers can hold; returns how many there are."""
    spec, count = cache.metadata.hidden, 0
    assert spec is not None and (spec.teacher_layers, spec.width) == (LAYERS, WIDTH)
    for row in cache.iter_rows():
        assert row.hidden is not None and tuple(row.hidden.states) == spec.layers
        expected = own_states(model, row)
        for layer in spec.layers:
            found, exact = row.hidden.values(layer), expected[layer][row.hidden.mask]
            noise = 1e-4 * np.abs(exact).max(axis=1, initial=0.0)[:, None]  # of fp32 arithmetic in another batch
            if spec.dtype == "float16":
                bound = 2.0**-11 * np.abs(exact) + noise
            else:
                scales = row.hidden.scales[layer]
                assert np.allclose(scales, np.abs(exact).max(axis=1) / 127, rtol=1e-3)
                bound = scales[:, None] / 2 + noise
            assert (np.abs(found - exact) <= bound).all()
            count += found.size
    return count


def causal(path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize("layers", ["last", "all", "0,2"])
def test_states_are_the_teachers_own(
    layers: str, dtype: str, teacher_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    rule = HiddenRule(layers=layers, dtype=dtype)
    cache_teacher(settings(teacher_dir, text_file, tmp_path / "cache", hidden=rule))
    cache = cf.open_cache(tmp_path / "cache")
    assert cache.metadata.hidden.layers == {"last": (2,), "all": (1, 2), "0,2": (0, 2)}[layers]
    assert all(np.array_equal(row.hidden.mask, row.loss_mask) for row in cache.iter_rows())
    found = check_states(cache, causal(teacher_dir))
    assert found == cache.num_loss_tokens * len(cache.metadata.hidden.layers) * WIDTH
    cf.verify_cache(tmp_path / "cache", deep=True)


@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_states_of_masked_models(kind: str, masked_dir: Path, tmp_path: Path) -> None:
    config = settings(masked_dir / kind, masked_dir / "text.txt", tmp_path / "cache", hidden=HiddenRule(layers="all"))
    cache_teacher(config)
    model = AutoModelForMaskedLM.from_pretrained(masked_dir / kind, dtype=torch.float32).eval()
    assert check_states(cf.open_cache(tmp_path / "cache"), model) > 0


def test_states_one_position_or_layer_off_are_detected(
    teacher_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache_teacher(settings(teacher_dir, text_file, tmp_path / "cache", hidden=HiddenRule(layers="1,2")))
    cache, model = cf.open_cache(tmp_path / "cache"), causal(teacher_dir)
    right = own_states

    def late(model: PreTrainedModel, row: cf.CacheRow) -> list[np.ndarray]:
        return [np.roll(states, 1, axis=0) for states in right(model, row)]

    def of_the_layer_before(model: PreTrainedModel, row: cf.CacheRow) -> list[np.ndarray]:
        return right(model, row)[:1] + right(model, row)[:-1]

    check_states(cache, model)
    for wrong in (late, of_the_layer_before):
        monkeypatch.setitem(globals(), "own_states", wrong)
        with pytest.raises(AssertionError):
            check_states(cache, model)


@pytest.mark.long
@pytest.mark.parametrize("everywhere", [False, True])
def test_one_position_in_so_many(everywhere: bool, teacher_dir: Path, chat_file: Path, tmp_path: Path) -> None:
    """Another one in each row, so that all have their turn, whatever the batch size."""
    masks = []
    for batch_size in (8, 3):
        path = tmp_path / str(batch_size)
        options = {"hidden": HiddenRule(layers="last", every=4), "all_positions": everywhere, "batch_size": batch_size}
        cache_teacher(settings(teacher_dir, chat_file, path, **options))
        cache = cf.open_cache(path)
        check_states(cache, causal(teacher_dir))
        masks.append([row.hidden.mask.tolist() for row in cache.iter_rows()])
        for row in cache.iter_rows():
            stored = np.flatnonzero(np.ones_like(row.loss_mask) if everywhere else row.loss_mask)
            assert np.flatnonzero(row.hidden.mask).tolist() == stored[-row.row % 4 :: 4].tolist()
    assert masks[0] == masks[1]


def test_every_place_has_its_turn() -> None:
    found = np.array([chosen(np.ones(9, bool), row, 3) for row in range(30)])
    assert (found.sum(axis=0) == 10).all() and (found.sum(axis=1) == 3).all()
    assert not chosen(np.zeros(9, bool), 0, 3).any()


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e6])
def test_the_error_of_int8_is_half_a_scale(scale: float) -> None:
    states = scale * torch.randn(50, 20, generator=torch.Generator().manual_seed(0))
    states[3] = 0.0
    integers, scales = quantised(states, "int8")
    assert integers.dtype == torch.int8 and integers.min() >= -127 and scales[3] == 0
    error = (integers.float() * scales[:, None] - states).abs()
    assert (error <= scales[:, None] * 0.5001).all()
    assert (error.amax(dim=1) <= states.abs().amax(dim=1) / 254 * 1.001).all()
    assert (integers.abs().amax(dim=1)[scales > 0] == 127).all()  # the largest number is exact


@pytest.mark.long
def test_the_size_is_said_before_anything_is_computed(teacher_dir: Path, text_file: Path, tmp_path: Path) -> None:
    stages: list[str] = []
    rule = HiddenRule(layers="1,2", every=3)
    config = settings(teacher_dir, text_file, tmp_path / "cache", hidden=rule)
    cache_teacher(config, on_stage=stages.append)
    cache = cf.open_cache(tmp_path / "cache")
    expected = predicted_bytes(cache.metadata.hidden, cache.num_loss_tokens)
    positions = -(-cache.num_loss_tokens // 3)
    assert expected == positions * 2 * WIDTH * 2
    assert f"{positions:,} positions × 2 layers × 32 × float16 = {expected / 1e6:,.1f} MB" in stages[-1]
    states = sum(cache.column_bytes()[f"hidden_{layer}"] for layer in (1, 2))
    assert 0.5 * expected < states < 1.2 * expected
    with_states = plan_cache(config, sample_rows=32).chosen.bytes["columns"]
    without = plan_cache(replace(config, hidden=None), sample_rows=32).chosen.bytes["columns"]
    assert with_states - without == pytest.approx(expected, rel=0.02)


def test_record_batches_and_shards_hold_a_bounded_amount(
    teacher_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hidden, "RECORD_BATCH_BYTES", 25_000)
    monkeypatch.setattr(hidden, "SHARD_BYTES", 50_000)
    config = settings(teacher_dir, text_file, tmp_path / "cache", batch_size=2, rows_per_shard=None)
    cache_teacher(config)
    metadata = cf.open_cache(tmp_path / "cache").metadata
    assert 2 <= metadata.rows_per_record_batch < 32 and metadata.rows_per_record_batch * 36 * 64 < 30_000
    assert metadata.rows_per_shard <= 2 * metadata.rows_per_record_batch + 2
    check_states(cf.open_cache(tmp_path / "cache"), causal(teacher_dir))


class Killed(Exception):
    pass


def test_a_run_that_was_killed_goes_on_to_the_same_bytes(teacher_dir: Path, text_file: Path, tmp_path: Path) -> None:
    config = settings(
        teacher_dir, text_file, tmp_path / "cache", hidden=HiddenRule(layers="last", dtype="int8", every=2)
    )
    cache_teacher(replace(config, output=str(tmp_path / "whole")))

    def kill(progress: CaptureProgress) -> None:
        if progress.rows > 20:
            raise Killed

    with pytest.raises(Killed):
        cache_teacher(config, on_progress=kill)
    for other in (None, HiddenRule(layers="last", dtype="int8")):
        with pytest.raises(cf.MismatchError, match="targets.hidden"):
            cache_teacher(replace(config, hidden=other))
    assert cache_teacher(config).resumed_rows > 0
    for file in (tmp_path / "whole").rglob("*"):
        if file.is_file():
            assert file.read_bytes() == (tmp_path / "cache" / file.relative_to(tmp_path / "whole")).read_bytes()


def test_states_too_large_for_a_half_float_are_not_stored(
    teacher_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real models have a few states of tens of thousands in their middle layers."""
    states = Head.states

    def large(head: Head, layers: Any, *inputs: Any, **options: Any) -> Any:
        last, found = states(head, layers, *inputs, **options)
        return last, {layer: each * 1e5 for layer, each in found.items()}

    monkeypatch.setattr(Head, "states", large)
    with pytest.raises(ModelError, match=r"row \d+, position \d+: the hidden state of layer 1 .* `hidden_dtype` int8"):
        cache_teacher(settings(teacher_dir, text_file, tmp_path / "cache", hidden=HiddenRule(layers="1")))
    cache_teacher(settings(teacher_dir, text_file, tmp_path / "int8", hidden=HiddenRule(layers="1", dtype="int8")))


@pytest.mark.parametrize(
    "values, words",
    [
        ({"layers": "first"}, "`hidden_states` first: expected last, all, or layers"),
        ({"layers": "3,-1"}, "`hidden_states` 3,-1"),
        ({"layers": ""}, "`hidden_states`"),
        ({"dtype": "float64"}, "`hidden_dtype` float64"),
        ({"every": 0}, "`hidden_every` 0"),
    ],
)
def test_rules_that_mean_nothing(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        HiddenRule(**values)


def test_layers_that_a_teacher_does_not_have(teacher_dir: Path, text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"`hidden_states` 1,3: this teacher has layers 0 .* to 2"):
        cache_teacher(settings(teacher_dir, text_file, tmp_path / "cache", hidden=HiddenRule(layers="1,3")))
    assert not (tmp_path / "cache").exists()


def test_a_model_without_states_of_its_layers_is_refused(teacher_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = causal(teacher_dir)
    head = open_head(model, 400)
    assert head.layers() == (LAYERS, WIDTH)
    forward = model.model.forward

    def no_norm(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.hidden_states = (*output.hidden_states[:-1], output.hidden_states[-1] * 2)
        return output

    monkeypatch.setattr(model.model, "forward", no_norm)
    with pytest.raises(ModelError, match="expected one of the same shape for each layer"):
        head.layers()


def test_on_the_command_line(tmp_path: Path, text_file: Path, tokenizer: Any) -> None:
    teacher = tiny_llama(tmp_path / "teacher", tokenizer)
    words = ["cache-teacher", "--teacher", teacher, "--data", text_file, "--seq-len", 48, "--device", "cpu"]
    words += ["--output", tmp_path / "cache", "--hidden-states", "1,2", "--hidden-dtype", "int8", "--hidden-every", 2]
    result = CliRunner().invoke(main, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0 and "× 2 layers × 32 × int8 =" in result.stderr
    result = CliRunner().invoke(main, ["stats", str(tmp_path / "cache")], catch_exceptions=False)
    assert "hidden_1_scale" in result.stdout
    for words in (["--drop-hidden"], ["--encoding", "packed"]):
        output = tmp_path / words[0]
        result = CliRunner().invoke(main, ["convert", str(tmp_path / "cache"), str(output), *words])
        assert result.exit_code == 0, result.output
        assert (cf.open_cache(output)[0].hidden is None) == (words == ["--drop-hidden"])
    bad = ["cache-teacher", "--teacher", "t", "--data", "d", "--output", "o", "--hidden-every", "2"]
    result = CliRunner().invoke(main, bad)
    assert result.exit_code == 1 and "--hidden-every: only with --hidden-states" in result.stderr
