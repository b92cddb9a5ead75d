"""One architecture through both stages, as a published model of its kind: what works, what is refused, what is wrong.

    outcome = try_architecture("llama4", folder, documents, tokenizer)
    outcome["packed"]        "yes", "refused: …" (an error that a user can act on), "wrong: …" or "fails: …"

Targets are compared with those of each document alone. Lengths of documents are on both sides of every limit that the
tiny configurations have: window 8, original positions 32, positions 64.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import cache_format as cf
from cache_format.cache_errors import DistillError
from pipeline.models.loading import config_fingerprint, load_model
from pipeline.teacher.cache_config import CacheTeacherConfig
from pipeline.teacher.capture import cache_teacher
from pipeline.teacher.targets.rules import TargetRule
from pipeline.teacher.text.data_config import DataConfig
from runs import train
from tiny import english, write_jsonl
from tiny_architectures import tiny_config

LENGTHS = (3, 7, 8, 9, 12, 16, 17, 24, 31, 32, 33, 40, 60)
TOP_K = 16
ALLOWED = 1e-4  # of √p: fp32 rounding through a few layers; another position or window changes it by 0.01 and more


def documents_of(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """A text for each of LENGTHS, with EOS."""
    texts = english(200, seed=11).splitlines()
    found = []
    for length, text in zip(LENGTHS, texts, strict=False):
        text = f"{text} {' '.join(texts[20:24])}"
        found.append(next(t for n in range(len(text)) if len(tokenizer(t := text[:n])["input_ids"]) == length - 1))
    return found


def try_architecture(
    name: str, folder: Path, documents: Sequence[str], tokenizer: PreTrainedTokenizerFast
) -> dict[str, str]:
    """See the module. A model that transformers cannot build here has an entry `built` instead of the others."""
    try:
        model = build_teacher(name, folder / "teacher", tokenizer)
    except Exception as error:  # of transformers: another package is missing, or its class does not accept this size
        return {"built": f"no: {type(error).__name__}: {_first_line(error)}"}
    outcome = {"class": type(model).__name__}
    data = write_jsonl(folder / "text.jsonl", [{"text": text} for text in documents])
    caches = {}
    for how, packing in (("packed", True), ("unpacked", False)):
        caches[how] = folder / how
        outcome[how] = _tried(lambda p=packing, c=caches[how]: _check_targets(folder / "teacher", data, c, p))
    usable = next((how for how in caches if outcome[how] == "yes"), None)
    for what, layers in (("one layer", 1), ("student", None)):
        if usable is None:
            outcome[what] = "no cache"
        elif outcome.get("one layer") == "yes":
            outcome[what] = "yes"  # that was a student too
        else:
            cache = caches[usable]
            outcome[what] = _tried(lambda k=layers, c=cache: _check_student(folder / "teacher", c, folder / "s", k))
    return {name: found.replace(f"{folder}/", "") for name, found in outcome.items()}


def build_teacher(name: str, path: Path, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    config = tiny_config(name)
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model(input_ids=torch.arange(3, 15)[None], use_cache=False)
    # The row of the padding token is initialised with zeros, at which a Gemma 3n has no gradient.
    with torch.no_grad():
        model.get_input_embeddings().weight[0] = model.get_input_embeddings().weight[3]
    model.save_pretrained(path)
    # As published: of a model that also sees images, the configuration of all its parts.
    config.architectures = [type(model).__name__]
    config.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return model


def _tried(check: Callable[[], None]) -> str:
    try:
        check()
    except DistillError as error:
        return f"refused: {error}"
    except AssertionError as error:
        return f"wrong: {_first_line(error)}"
    except Exception as error:
        return f"fails: {type(error).__name__}: {_first_line(error)}"
    return "yes"


def _check_targets(teacher: Path, data: Path, output: Path, packing: bool) -> None:
    rows: list[cf.CacheRow] = []
    write = cf.CacheWriter.write

    def recording(writer: cf.CacheWriter, batch: list[cf.CacheRow]) -> None:
        rows.extend(batch)  # before anything is quantised
        write(writer, batch)

    with mock.patch.object(cf.CacheWriter, "write", recording):
        cache_teacher(
            CacheTeacherConfig(
                teacher=str(teacher),
                data=DataConfig(data=str(data), seq_len=60, packing=packing),
                output=str(output),
                targets=TargetRule(top_k=TOP_K),
                batch_size=len(LENGTHS),  # documents of all lengths share a batch
                device="cpu",
            )
        )
    assert packing == any(len(row.segment_lengths) > 1 for row in rows), "rows are not packed as asked for"
    vocab_size = cf.open_cache(output).metadata.vocab_size
    worst, where = deviation_from_alone(load_model(str(teacher)), rows, vocab_size)
    assert worst <= ALLOWED, f"√p differs from that of the document alone by {worst:.2g} ({where})"


@torch.no_grad()
def deviation_from_alone(model: PreTrainedModel, rows: Sequence[cf.CacheRow], vocab_size: int) -> tuple[float, str]:
    """The largest difference of √p from what `model` says of each document by itself, and where it is."""
    documents = []
    for index, row in enumerate(rows):
        ends = np.cumsum(row.segment_lengths)
        documents += [(stop - start, index, start, stop) for start, stop in zip([0, *ends], ends, strict=False)]
    worst, where = 0.0, ""
    for length, index, start, stop in sorted(documents):  # shortest first: some models keep what a long one needed
        row = rows[index]
        ids = torch.from_numpy(np.asarray(row.input_ids[start:stop], np.int64))[None]
        logprobs = model(input_ids=ids, use_cache=False).logits[0, :, :vocab_size].log_softmax(-1).numpy()
        for t in range(start, stop):
            if row.loss_mask[t]:
                tokens, stored = row.targets.at(t)
                off = float(np.abs(np.exp(stored / 2) - np.exp(logprobs[t - start, tokens] / 2)).max())
                if not off <= worst:
                    worst, where = off, f"document of {length} tokens, position {t - start}"
    return worst, where


def _check_student(teacher: Path, cache: Path, output: Path, layers: int | None) -> None:
    shutil.rmtree(output, ignore_errors=True)
    train(output, cache, student=teacher, student_layers=layers, max_steps=2, batch_size=4, learning_rate=1e-3)
    trained, again = load_model(str(output)), load_model(str(output))
    assert config_fingerprint(trained.config) == config_fingerprint(again.config)
    with torch.no_grad():
        logits = trained(input_ids=torch.arange(3, 15)[None], use_cache=False).logits
    assert logits.isfinite().all(), "logits of the trained student are not finite"


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")[:300]
