"""Stage one end to end on tiny teachers: the cache says what the teacher says, whatever happens on the way."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import cache_format as cf
from cache_samples import contents
from dense import check_row, document_logprobs
from pipeline.errors import ConfigError, ModelError
from pipeline.models.head import Head, open_head
from pipeline.models.isolation.shared_rows import check_packing
from pipeline.student.data.dataset import Batch, CacheDataset, LocalShuffle, collate
from pipeline.teacher import opening
from pipeline.teacher.cache_config import CacheTeacherConfig
from pipeline.teacher.capture import cache_teacher
from pipeline.teacher.engines import chunked_selection
from pipeline.teacher.progress import CaptureProgress, CaptureSummary
from pipeline.teacher.targets.rules import TargetRule
from pipeline.teacher.targets.selection import ChunkTargets
from pipeline.teacher.text.data_config import DataConfig
from pipeline.teacher.writing.worker_config import WorkerConfig
from tiny import english, tiny_llama

K, WINDOW, ROWS_PER_SHARD = 16, 48, 16


class Killed(Exception):
    pass


def settings(teacher: Path, data: Path, output: Path, **options: Any) -> CacheTeacherConfig:
    names = {"packing", "seq_len", "loss_on"}
    data_options: dict[str, Any] = {"sample_by": "line", "seq_len": WINDOW}
    options = {"targets": TargetRule(top_k=K), **options}
    data_options |= {name: options.pop(name) for name in names & set(options)}
    return CacheTeacherConfig(
        teacher=str(teacher),
        data=DataConfig(data=str(data), **data_options),
        output=str(output),
        **{"rows_per_shard": ROWS_PER_SHARD, "device": "cpu", **options},
    )


def load(teacher: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float64).eval()


def check_cache(path: Path, teacher: Path) -> int:
    """Every row against the teacher in fp64; returns the number of positions."""
    cache, model = cf.open_cache(path), load(teacher)
    for row in cache.iter_rows():
        check_row(row, document_logprobs(model, row, cache.metadata.vocab_size), cache.metadata)
    cf.verify_cache(path, deep=True)
    return cache.num_loss_tokens


def shards(path: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(path).items() if name.startswith("shards/")}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory, teacher_dir: Path, text_file: Path) -> Path:
    path = tmp_path_factory.mktemp("caches") / "packed"
    cache_teacher(settings(teacher_dir, text_file, path))
    return path


# ---- equal to the teacher


def test_packed(packed: Path, teacher_dir: Path) -> None:
    cache = cf.open_cache(packed)
    assert len(cache.manifest.shards) >= 3
    assert max(len(row.segment_lengths) for row in cache.iter_rows()) > 1
    assert check_cache(packed, teacher_dir) > 1500


def test_with_padding(packed: Path, teacher_dir: Path, text_file: Path, tmp_path: Path) -> None:
    """The same within rounding; a cache is continued in the other mode only if that is allowed."""
    path = tmp_path / "padded"
    cache_teacher(settings(teacher_dir, text_file, path, padding_free=False))
    assert check_cache(path, teacher_dir) > 1500
    of_path, of_packed = (cf.open_cache(each).metadata.capture for each in (path, packed))
    assert of_packed == {**of_path, "padding_free": True}

    for file in (path / "shards").glob("*-00001.*"):
        file.unlink()
    with pytest.raises(cf.MismatchError, match=r"capture\.padding_free .*only rounding"):
        cache_teacher(settings(teacher_dir, text_file, path))
    cache_teacher(settings(teacher_dir, text_file, path, workers=WorkerConfig(allow_rounding=True)))
    assert check_cache(path, teacher_dir) > 1500


@pytest.mark.parametrize("packing", [False, True])
def test_a_padded_vocabulary_is_cut_before_the_softmax(
    packing: bool, padded_teacher_dir: Path, text_file: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    cache_teacher(settings(padded_teacher_dir, text_file, tmp_path / "cache", packing=packing, batch_size=3))
    cache = cf.open_cache(tmp_path / "cache")
    assert cache.metadata.vocab_size == len(tokenizer) < load(padded_teacher_dir).lm_head.weight.shape[0]
    assert (max(len(row.segment_lengths) for row in cache.iter_rows()) > 1) == packing
    check_cache(tmp_path / "cache", padded_teacher_dir)


def test_all_tokens_as_entries(teacher_dir: Path, text_file: Path, tmp_path: Path) -> None:
    cache_teacher(settings(teacher_dir, text_file, tmp_path / "cache", targets=TargetRule(top_k=400)))
    cache = cf.open_cache(tmp_path / "cache")
    assert (cache[0].targets.residual_logprob[cache[0].loss_mask] == -np.inf).all()
    check_cache(tmp_path / "cache", teacher_dir)
    with pytest.raises(ConfigError, match="`top_k` 401"):
        cache_teacher(settings(teacher_dir, text_file, tmp_path / "other", targets=TargetRule(top_k=401)))


def test_only_counted_positions_or_all(teacher_dir: Path, chat_file: Path, tmp_path: Path) -> None:
    caches = {}
    for everything in (False, True):
        path = tmp_path / str(everything)
        cache_teacher(settings(teacher_dir, chat_file, path, all_positions=everything, loss_on="assistant"))
        check_cache(path, teacher_dir)
        caches[everything] = cf.open_cache(path)
    for few, all_of_them in zip(*(cache.iter_rows() for cache in caches.values()), strict=True):
        mask = few.loss_mask
        assert 0 < mask.sum() < len(mask) and np.array_equal(mask, all_of_them.loss_mask)
        assert (all_of_them.targets.counts == K).all()
        assert np.array_equal(all_of_them.targets.ids.reshape(-1, K)[mask].reshape(-1), few.targets.ids)
        assert np.array_equal(all_of_them.targets.residual_logprob[mask], few.targets.residual_logprob[mask])
        assert (few.targets.entropy[~mask] == 0).all()


def predictions(rows: list[cf.CacheRow]) -> dict[tuple[int, ...], dict[int, float]]:
    """Entries (id -> logprob) by all the tokens that the prediction is made from."""
    found = {}
    for row in rows:
        start = 0
        for length in row.segment_lengths.tolist():
            for t in np.flatnonzero(row.loss_mask[start : start + length]) + start:
                ids, logprobs = row.targets.at(int(t))
                found[tuple(row.input_ids[start : t + 1].tolist())] = dict(
                    zip(ids.tolist(), logprobs.tolist(), strict=True)
                )
            start += length
    return found


def test_neither_batch_size_nor_packing_changes_a_target(
    teacher_dir: Path, text_file: Path, tmp_path: Path, raw_rows: list[cf.CacheRow]
) -> None:
    results = []
    for i, options in enumerate(
        ({"batch_size": 8}, {"batch_size": 1}, {"packing": False}, {"packing": False, "batch_size": 5})
    ):
        raw_rows.clear()
        cache_teacher(settings(teacher_dir, text_file, tmp_path / str(i), **options))
        results.append(predictions(raw_rows))
    expected = results[0]
    assert len(expected) > 1500
    for found in results[1:]:
        assert found.keys() == expected.keys()
        for tokens, entries in expected.items():
            other = found[tokens]
            assert all(abs(entries[i] - other[i]) < 2e-5 for i in entries.keys() & other.keys())
            # At the end of the list rounding may decide which of two tokens is in it.
            for i in entries.keys() ^ other.keys():
                assert abs((entries | other)[i] - min(entries.values())) < 2e-5


def test_the_summary_and_the_progress_count_what_is_there(
    teacher_dir: Path, text_file: Path, tmp_path: Path, raw_rows: list[cf.CacheRow]
) -> None:
    seen: list[CaptureProgress] = []
    stages: list[str] = []
    summary = cache_teacher(
        settings(teacher_dir, text_file, tmp_path / "cache"), on_stage=stages.append, on_progress=seen.append
    )
    cache = cf.open_cache(tmp_path / "cache")
    assert isinstance(summary, CaptureSummary) and len(stages) == 3
    assert (summary.rows, summary.tokens, summary.loss_tokens) == (
        cache.num_rows,
        cache.num_tokens,
        cache.num_loss_tokens,
    )
    assert summary.bytes == sum(len(data) for name, data in shards(tmp_path / "cache").items() if ".arrow" in name)
    kept = [1 - np.exp(row.targets.residual_logprob[row.loss_mask].astype(np.float64)) for row in raw_rows]
    assert summary.exact_mass == pytest.approx(np.concatenate(kept).mean(), rel=1e-9)
    assert seen[-1].rows == seen[-1].total_rows == cache.num_rows
    assert seen[-1].tokens == seen[-1].total_tokens == cache.num_tokens
    assert [p.rows for p in seen] == sorted(p.rows for p in seen)
    assert summary.resumed_rows == 0


# ---- known failures of existing tools


def test_targets_one_position_late_are_detected(packed: Path, teacher_dir: Path) -> None:
    cache = cf.open_cache(packed)
    row, model = cache[0], load(teacher_dir)
    exact = document_logprobs(model, row, cache.metadata.vocab_size)
    check_row(row, exact, cache.metadata)
    with pytest.raises(AssertionError):
        check_row(row, np.roll(exact, 1, axis=0), cache.metadata)


def test_padding_left_in_the_softmax_is_detected(
    padded_teacher_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_logits, real_targets = Head.logits, chunked_selection.sparse_targets

    def all_rows(head: Head, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        return real_logits(head, hidden) if out is None else hidden @ head.weight.T

    def softmax_then_cut(logits: Tensor, rule: TargetRule, uniforms: None, scratch: Tensor) -> ChunkTargets:
        found = real_targets(logits[:, :400], rule, uniforms, scratch)
        lost = logits[:, :400].logsumexp(1) - logits.logsumexp(1)
        return found._replace(logprobs=found.logprobs + lost[:, None])

    monkeypatch.setattr(Head, "logits", all_rows)
    monkeypatch.setattr(chunked_selection, "sparse_targets", softmax_then_cut)
    cache_teacher(settings(padded_teacher_dir, text_file, tmp_path / "cache"))
    with pytest.raises(AssertionError, match="target_logprobs off by"):
        check_cache(tmp_path / "cache", padded_teacher_dir)


def test_packed_documents_that_see_one_another_are_refused_and_detected(
    teacher_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_a_mask(head: Head, input_ids: Tensor, position_ids: Tensor, **_: object) -> Tensor:
        mask = torch.ones_like(input_ids)
        return head.model.model(input_ids=input_ids, position_ids=position_ids, attention_mask=mask, use_cache=False)[0]

    monkeypatch.setattr(Head, "hidden_states", with_a_mask)
    model = AutoModelForCausalLM.from_pretrained(teacher_dir)
    with pytest.raises(ModelError, match="or attends to it"):
        check_packing(model, open_head(model, 400))
    with pytest.raises(ModelError, match="Use `packing=False`"):
        cache_teacher(settings(teacher_dir, text_file, tmp_path / "refused"))
    assert not (tmp_path / "refused").exists()
    # Without packing there is nothing to see, and the check is not made.
    cache_teacher(settings(teacher_dir, text_file, tmp_path / "alone", packing=False))
    check_cache(tmp_path / "alone", teacher_dir)

    monkeypatch.setattr(opening, "check_packing", lambda *_: None)
    cache_teacher(settings(teacher_dir, text_file, tmp_path / "leaking"))
    with pytest.raises(AssertionError):
        check_cache(tmp_path / "leaking", teacher_dir)


def shuffled_batches(cache: cf.Cache, seed: int) -> DataLoader[Batch]:
    sampler = LocalShuffle(cache.record_batches(), seed=seed, window=2)
    return DataLoader(CacheDataset(cache), batch_size=5, sampler=sampler, collate_fn=collate)


def check_batches(batches: list[Batch], model: PreTrainedModel, cache: cf.Cache) -> None:
    """In every batch, the targets are what the teacher says to the very tokens beside them."""
    bound = cache.metadata.codebooks["target_logprobs"].max_error + 1e-4
    head = open_head(model, cache.metadata.vocab_size)
    seen = 0
    for batch in batches:
        with torch.no_grad():
            hidden = head.hidden_states(batch["input_ids"], batch["position_ids"])
            exact = head.logits(hidden.flatten(0, 1)).double().log_softmax(1)
        targets = batch["targets"]
        here = targets.loss_mask
        error = (exact.gather(1, targets.ids) / 2).exp() - (targets.logprobs / 2).exp()
        assert error[here].abs().max() <= bound, "targets of other tokens"
        following = batch["input_ids"].flatten().roll(-1)
        assert torch.equal(targets.labels[here], following[here]), "labels of other tokens"
        seen += int(here.sum())
    assert seen == cache.num_loss_tokens


def test_shuffled_batches_carry_their_own_targets(packed: Path, teacher_dir: Path) -> None:
    cache, model = cf.open_cache(packed), load(teacher_dir)
    for seed in (0, 1):
        check_batches(list(shuffled_batches(cache, seed)), model, cache)


def test_targets_paired_by_step_number_are_detected(packed: Path, teacher_dir: Path) -> None:
    """The loader shuffles the tokens, and the targets are read in the order of the cache."""
    cache, model = cf.open_cache(packed), load(teacher_dir)
    in_order = DataLoader(CacheDataset(cache), batch_size=5, collate_fn=collate)
    paired = [
        {**tokens, "targets": ordered["targets"].with_labels(tokens["labels"].flatten())}
        for tokens, ordered in zip(shuffled_batches(cache, 0), in_order, strict=True)
        if tokens["labels"].shape == ordered["labels"].shape
    ]
    assert paired
    with pytest.raises(AssertionError, match="targets of other tokens"):
        check_batches(paired, model, cache)


# ---- the same bytes, however often it stops


def test_a_second_run_writes_the_same_bytes(packed: Path, teacher_dir: Path, text_file: Path, tmp_path: Path) -> None:
    cache_teacher(settings(teacher_dir, text_file, tmp_path / "cache"))
    assert contents(tmp_path / "cache") == contents(packed)


@pytest.mark.long
@pytest.mark.parametrize("after", [1, ROWS_PER_SHARD, ROWS_PER_SHARD + 1, 2 * ROWS_PER_SHARD + 9])
def test_a_run_that_was_killed_goes_on_to_the_same_bytes(
    after: int, packed: Path, teacher_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    def kill(progress: CaptureProgress) -> None:
        if progress.rows >= after:
            raise Killed

    config = settings(teacher_dir, text_file, tmp_path / "cache")
    with pytest.raises(Killed):
        cache_teacher(config, on_progress=kill)
    assert not (tmp_path / "cache" / "manifest.json").exists()
    with pytest.raises(cf.FormatError):
        cf.open_cache(tmp_path / "cache")

    computed = 0
    previous = after // ROWS_PER_SHARD * ROWS_PER_SHARD

    def count(progress: CaptureProgress) -> None:
        nonlocal computed
        computed = progress.rows

    summary = cache_teacher(config, on_progress=count)
    # A shard is complete only when its last row is written, which the background thread may not have come to.
    assert summary.resumed_rows in (previous, previous - ROWS_PER_SHARD)
    assert computed == summary.rows
    assert contents(tmp_path / "cache") == contents(packed)


def test_other_settings_do_not_continue_a_run(teacher_dir: Path, text_file: Path, tmp_path: Path) -> None:
    def kill(_: CaptureProgress) -> None:
        raise Killed

    config = settings(teacher_dir, text_file, tmp_path / "cache")
    with pytest.raises(Killed):
        cache_teacher(config, on_progress=kill)
    before = contents(tmp_path / "cache")
    with pytest.raises(cf.MismatchError, match=r"targets.k recorded 16, given 8"):
        cache_teacher(replace(config, targets=TargetRule(top_k=8)))
    assert contents(tmp_path / "cache") == before


# ---- what must stop it


def test_logits_that_are_not_numbers_stop_the_run_with_the_row(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """One token's embedding is NaN; it comes up in one document, behind the first shard."""
    lines = english(60, seed=5).splitlines()
    lines.insert(20, "All was quiet. ☃ And then it was not.")
    text = tmp_path / "text.txt"
    text.write_text("\n".join(lines), encoding="utf-8")
    ids = [tokenizer(line)["input_ids"] for line in lines]
    # The middle one of three bytes that are tokens each; not among the tokens that the probes happen to use.
    broken = tokenizer.convert_tokens_to_ids(ByteLevel().pre_tokenize_str("☃")[0][0][-2])
    assert [broken in line for line in ids] == [t == 20 for t in range(len(lines))]

    teacher = tiny_llama(tmp_path / "teacher", tokenizer, tie=False)
    model = AutoModelForCausalLM.from_pretrained(teacher)
    with torch.no_grad():
        model.model.embed_tokens.weight[broken] = torch.nan
    check_packing(model, open_head(model, len(tokenizer)))
    model.save_pretrained(teacher)
    config = settings(teacher, text, tmp_path / "cache", packing=False, seq_len=128)
    with pytest.raises(ModelError, match=r"^row 20, position \d+: the teacher's logits hold NaN"):
        cache_teacher(config)
    assert not (tmp_path / "cache" / "manifest.json").exists()
    assert list(shards(tmp_path / "cache")) == ["shards/shard-00000.arrow", "shards/shard-00000.json"]


def test_an_occupied_output_is_refused_before_anything_is_loaded(
    teacher_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(opening, "load_model", never)
    monkeypatch.setattr(opening, "load_tokenizer", never)
    output = tmp_path / "output"
    output.mkdir()
    (output / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(cf.CacheError, match=r"thesis\.tex"):
            cache_teacher(settings(teacher_dir, text_file, output, overwrite=overwrite))
    assert contents(output) == {"thesis.tex": b"years of work"}


def test_a_finished_cache_is_refused_or_overwritten(
    teacher_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(teacher_dir, text_file, tmp_path / "cache")
    cache_teacher(config)
    before = contents(tmp_path / "cache")
    with monkeypatch.context() as patch, pytest.raises(cf.CacheError, match="finished"):
        patch.setattr(opening, "load_model", lambda *_, **__: pytest.fail("loaded"))
        cache_teacher(replace(config, targets=TargetRule(top_k=8)))
    assert contents(tmp_path / "cache") == before
    for broken in ({"teacher": str(tmp_path / "no-model")}, {"data": DataConfig(data=str(tmp_path / "no.txt"))}):
        with pytest.raises(cf.DistillError, match="no such"):
            cache_teacher(replace(config, overwrite=True, **broken))
        assert contents(tmp_path / "cache") == before  # deleted only once everything has been read
    cache_teacher(replace(config, targets=TargetRule(top_k=8), overwrite=True))
    cache = cf.open_cache(tmp_path / "cache")
    assert cache.metadata.targets["k"] == 8
    assert json.loads((tmp_path / "cache/distill_config.json").read_text())["config"]["top_k"] == 8
    check_cache(tmp_path / "cache", teacher_dir)
    assert not [name for name in contents(tmp_path / "cache") if name.startswith("manifest.partial")]


def test_windows_longer_than_the_teacher_can_read_are_refused(
    teacher_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="`seq_len` 2049: .* was trained on at most 2048"):
        cache_teacher(settings(teacher_dir, text_file, tmp_path / "cache", seq_len=2049))
    assert not (tmp_path / "cache").exists()
