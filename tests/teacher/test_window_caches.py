"""Caches of long documents whose tokenizer adds BOS: what is stored, continued and learned."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import cache_format as cf
from pipeline.student.data.cross_tokenizer import CrossTokenizerDataset
from pipeline.student.data.dataset import CacheDataset
from pipeline.teacher.cache_config import CacheTeacherConfig
from pipeline.teacher.capture import cache_teacher
from pipeline.teacher.generation.generate import generate_cache
from pipeline.teacher.generation.generation_config import GenerationConfig
from pipeline.teacher.targets.rules import TargetRule
from pipeline.teacher.text import packing
from pipeline.teacher.text.data_config import DataConfig
from pipeline.teacher.text.windows import DocumentTokens
from pipeline.teacher.writing.worker_config import WorkerConfig
from runs import dense_logits, train
from tiny import english, tiny_llama, tiny_sentencepiece, tiny_tokenizer

TOKENIZER = tiny_tokenizer(add_bos=True)
LONG = english(14).replace("\n", " ")
OVERLAP = 4


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("bos") / "teacher", TOKENIZER, seed=4)


def settings(teacher: Path, output: Path, **options: Any) -> CacheTeacherConfig:
    data = {"data": [{"text": LONG}, {"text": "A short one."}], "seq_len": 24, "overlap": OVERLAP}
    data |= {name: options.pop(name) for name in ("data", "overlap") if name in options}
    own = {"targets": TargetRule(top_k=8), "batch_size": 4, "device": "cpu", "rows_per_shard": 8, **options}
    return CacheTeacherConfig(teacher=str(teacher), data=DataConfig(**data), output=str(output), **own)


@pytest.fixture(scope="module")
def cached(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("windows") / "cache"
    cache_teacher(settings(teacher, path, all_positions=True))
    return path


def test_each_token_is_learned_once_from_a_window_that_begins_with_bos(cached: Path, teacher: Path) -> None:
    cache, model = cf.open_cache(cached), AutoModelForCausalLM.from_pretrained(teacher).eval()
    ids = [i for text in (LONG, "A short one.") for i in [*TOKENIZER(text)["input_ids"][1:], TOKENIZER.eos_token_id]]
    learned: Counter[int] = Counter()
    for row in cache.iter_rows():
        begins = np.cumsum(row.segment_lengths) - row.segment_lengths
        assert (row.input_ids[begins] == TOKENIZER.bos_token_id).all()
        learned.update(row.input_ids[1:][row.loss_mask[:-1]].tolist())
        # Targets of the stored tokens, BOS included.
        logprobs = torch.from_numpy(dense_logits(model, row, len(TOKENIZER))).log_softmax(1).numpy()
        for t in range(len(row.input_ids)):
            entries, values = row.targets.at(t)
            assert np.exp(values) == pytest.approx(np.exp(logprobs[t, entries.astype(int)]), abs=0.01)
    assert learned == Counter(ids) and cache.num_loss_tokens == len(ids)
    corpus = cache.manifest.metadata.corpus
    assert (corpus["window_prefix"], corpus["overlap"]) == ([TOKENIZER.bos_token_id], OVERLAP)


def test_several_workers_write_the_same_rows(cached: Path, teacher: Path, tmp_path: Path) -> None:
    for index in range(2):
        workers = WorkerConfig(num_workers=2, worker_index=index)
        cache_teacher(settings(teacher, tmp_path / "cache", all_positions=True, workers=workers))
    names = [path.name for path in sorted((cached / "shards").iterdir())]
    assert names and all(
        (tmp_path / "cache/shards" / name).read_bytes() == (cached / "shards" / name).read_bytes() for name in names
    )


@pytest.fixture
def earlier_release(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Later windows without special tokens, and no record of them, until undone."""
    monkeypatch.setattr(packing, "DocumentTokens", lambda tokens, prefix: DocumentTokens(tokens))
    return monkeypatch


@pytest.mark.parametrize("finished", [True, False])
def test_cache_of_an_earlier_release_is_told_apart(
    teacher: Path, tmp_path: Path, earlier_release: pytest.MonkeyPatch, finished: bool
) -> None:
    def interrupt(progress: Any) -> None:
        if not finished and progress.rows > 8:
            raise KeyboardInterrupt

    config = settings(teacher, tmp_path / "cache", overlap=1)
    try:
        cache_teacher(config, on_progress=interrupt)
    except KeyboardInterrupt:
        assert not finished
    earlier_release.undo()
    with pytest.raises(cf.CacheError, match=r"corpus.window_prefix recorded null, given \[1\]"):
        cache_teacher(config)
    if finished:
        assert "window_prefix" not in cf.open_cache(tmp_path / "cache").metadata.corpus
        train(tmp_path / "student", tmp_path / "cache", student=teacher, max_steps=1)


def test_other_tokenizers_take_prefix_and_overlap_as_context(cached: Path) -> None:
    cache = cf.open_cache(cached)
    same = CrossTokenizerDataset(cache, TOKENIZER, TOKENIZER)
    plainly = CacheDataset(cache)
    for plain, converted in ((plainly[i], same[i]) for i in range(len(cache))):
        assert converted.input_ids.tolist() == plain.input_ids.tolist()
        assert converted.loss_mask.tolist() == plain.loss_mask.tolist()
    for student in (tiny_sentencepiece(), tiny_tokenizer(330, seed=7), tiny_tokenizer(330, seed=7, add_bos=True)):
        converted = CrossTokenizerDataset(cache, TOKENIZER, student)
        text = converted.retokeniser.student
        learned = 0
        for row in map(converted.__getitem__, range(len(converted))):
            begins = np.cumsum(row.segment_lengths) - row.segment_lengths
            starts_with_bos = student("a")["input_ids"][0] == student.bos_token_id
            assert (row.input_ids[begins] == student.bos_token_id).all() or not starts_with_bos
            tokens = row.input_ids[1:][row.loss_mask[:-1]].tolist()
            learned += sum(len(text.bytes[i]) for i in tokens if i not in text.special)
        # All but what lies across the beginning of a window's own tokens, and never anything twice.
        assert 0.85 * len(LONG.encode()) < learned <= len((LONG + "A short one.").encode())


def test_generated_answers_follow_one_bos(teacher: Path, tmp_path: Path) -> None:
    prompts = [{"prompt": text} for text in ("Who?", TOKENIZER.bos_token + "Who?")]
    generation = GenerationConfig(max_new_tokens=4, temperature=0.0)
    config = settings(teacher, tmp_path / "cache", data=prompts, overlap=1, generation=generation)
    summary = generate_cache(config)
    first, second = (row.input_ids.tolist() for row in cf.open_cache(tmp_path / "cache").iter_rows())
    assert first == second and first.count(TOKENIZER.bos_token_id) == 1
    assert summary.corpus_report["documents_with_special_tokens"] == 1


def test_summary_counts_what_was_changed(teacher: Path, tmp_path: Path) -> None:
    rows = [
        {"prompt": TOKENIZER.bos_token + "Who?", "completion": " Anna"},
        {"prompt": "Who? ", "completion": "the baker"},
        {"prompt": "Who?", "completion": ""},
    ]
    summary = cache_teacher(settings(teacher, tmp_path / "cache", data=rows, overlap=1))
    counted = {name: count for name, count in summary.corpus_report.items() if name.startswith("documents_with")}
    assert counted == {
        "documents_with_special_tokens": 1,
        "documents_with_split_tokens": 1,
        "documents_with_only_eos": 1,
    }
    # The manifest records what changed the rows; the last one does not.
    report = cf.open_cache(tmp_path / "cache").metadata.corpus["report"]
    assert report == {name: count for name, count in summary.corpus_report.items() if name != "documents_with_only_eos"}
