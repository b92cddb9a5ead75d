"""Preparation of a track, its missing runs, and one run.

Each track has a directory in the work directory. The file of a run is written when the run is finished, by renaming,
and holds a digest of everything that determines the run (text, teacher, student, settings, arm). A run with a different
digest counts as missing. So a process may be killed at any moment without losing finished runs.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_model, save_model

from benchmarks.files import write_json
from benchmarks.measure import machine
from benchmarks.quality.caches import build_caches, rows_of, sizes
from benchmarks.quality.corpora import Corpus, build_corpora
from benchmarks.quality.gradients import body_gradient, compare
from benchmarks.quality.metrics import Held, evaluate
from benchmarks.quality.objectives import (
    Objective,
    cache_objective,
    full_objective,
    labels_objective,
    order,
    shift_invariant_objective,
)
from benchmarks.quality.sources import Domain
from benchmarks.quality.states import States, run_teacher
from benchmarks.quality.teachers import bpe_tokenizer, describe, new_model, trained_teacher
from benchmarks.quality.tracks import FULL, LABELS, SEARCH_SEED, Arm, Track, planned
from benchmarks.quality.train import train
from benchmarks.teacher import open_teacher
from pipeline.models.head import Head, open_head
from pipeline.models.loading import weights_fingerprint
from pipeline.models.tokenizers import real_vocab_size, tokenizer_fingerprint

Run = dict[str, Any]

# A fixed list, so that a new field of rules does not make every finished run count as missing.
RULE_PARTS = ("kind", "top_k", "top_p", "max_entries", "tail_threshold", "draws", "samples", "seed", "temperature")


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A track with everything that its runs need."""

    track: Track
    directory: Path
    teacher: Head
    corpus: Corpus
    states: States
    held_out: Held
    caches: dict[str, Path]  # by arm
    digest: str


def track_directory(track: Track, work: Path) -> Path:
    return work / track.name


def prepare(track: Track, arms: Sequence[Arm], domains: Sequence[Domain], work: Path, teacher: Path | None) -> Prepared:
    """Teacher, text, states and caches of a track; creates what is missing.

    Args:
        teacher: transformers directory, for a track that does not train its own teacher.
    """
    directory = track_directory(track, work)
    if track.teacher is None:
        assert teacher is not None
        model, tokenizer = open_teacher(teacher)
        corpora, domain_sizes = build_corpora(track, domains, tokenizer, directory)
    else:
        assert track.vocab_size is not None
        tokenizer = bpe_tokenizer(track.vocab_size, domains, directory / "tokenizer")
        corpora, domain_sizes = build_corpora(track, domains, tokenizer, directory)
        model = trained_teacher(track, corpora[0], len(tokenizer), directory / "teacher")
    head = open_head(model, real_vocab_size(tokenizer, model.get_output_embeddings().weight.shape[0]))

    held_out, digests = [], []
    for corpus in reversed(corpora):  # the training corpus last
        digests.append(_digest([corpus.sha256, len(corpus.rows), weights_fingerprint(model)]))
        path = directory / "states" / f"{corpus.name}-{digests[-1]}"
        run_teacher(head, corpus, path)
        held_out.append((corpus, States(path, corpus)))
    corpus, states = held_out.pop()
    caches = build_caches(
        track,
        arms,
        corpus,
        states,
        head,
        tokenizer_fingerprint(tokenizer),
        directory / "caches" / digests[-1],
    )
    student = open_head(new_model(track.student, head.vocab_size, track.window, 0), head.vocab_size)
    settings = asdict(replace(track, arms=(), seeds=0, search_rates=(), search_share=0.0))
    prepared = Prepared(
        track=track,
        directory=directory,
        teacher=head,
        corpus=corpus,
        states=states,
        held_out=held_out,
        caches=caches,
        digest=_digest([digests, settings]),
    )
    facts = directory / "prepared.json"
    if not facts.exists() or json.loads(facts.read_text())["digest"] != prepared.digest:
        found = {
            "digest": prepared.digest,
            "teacher": describe(head),
            "student": describe(student),
            "domains": domain_sizes,
            "training_tokens": int(corpus.loss_tokens.sum()),
            "teacher_held_out": evaluate(None, head, held_out),
        }
        write_json(facts, found)
    return prepared


def run_missing(prepared: Prepared, arms: Sequence[Arm], seeds: Sequence[int]) -> None:
    """Runs all arms and seeds that are not finished."""
    track = prepared.track
    search(prepared)
    learning_rate = chosen_rate(prepared.directory, track, prepared.digest)
    assert learning_rate is not None
    for arm, seed in planned(arms, seeds):
        file, digest = run_file(prepared.directory, arm, seed), run_digest(prepared.digest, learning_rate, arm)
        if _is_done(file, digest):
            continue
        _say(track, arm.title, seed, "starts")
        run = one_run(prepared, arm, seed, learning_rate)
        write_json(file, {**run, "digest": digest})
        in_domain = run["held_out"]["in-domain"]
        _say(track, arm.title, seed, f"{run['seconds']:,.0f} s, KL {in_domain['kl']:.4f}, CE {in_domain['ce']:.4f}")


def search(prepared: Prepared) -> None:
    """Runs the labels and full arms at several learning rates, with a separate seed and a share of the text."""
    track = prepared.track
    for rate in track.search_rates:
        for arm in (LABELS, FULL):
            file, digest = search_file(prepared.directory, track, prepared.digest, arm, rate)
            if _is_done(file, digest):
                continue
            began, head = time.monotonic(), student_head(prepared, SEARCH_SEED)
            _train(prepared, replace(arm, share=track.search_share), SEARCH_SEED, head, rate)
            found = evaluate(head, prepared.teacher, prepared.held_out)
            seconds = time.monotonic() - began
            write_json(
                file,
                {"arm": arm.title, "learning_rate": rate, "held_out": found, "seconds": seconds, "digest": digest},
            )
            _say(track, f"{arm.title} at {rate:g}", SEARCH_SEED, f"{seconds:,.0f} s, KL {found['in-domain']['kl']:.4f}")


def search_file(directory: Path, track: Track, digest: str, arm: Arm, rate: float) -> tuple[Path, str]:
    """File of a run of the search, and its digest."""
    file = directory / "search" / f"{arm.name}-{rate:g}.json"
    return file, _digest([run_digest(digest, rate, arm), track.search_share])


def chosen_rate(directory: Path, track: Track, digest: str) -> float | None:
    """The learning rate with the lowest sum of the held-out losses of labels and full; None before the search."""
    losses = dict.fromkeys(track.search_rates, 0.0)
    for rate in track.search_rates:
        for arm in (LABELS, FULL):
            file, expected = search_file(directory, track, digest, arm, rate)
            if not _is_done(file, expected):
                return None
            losses[rate] += json.loads(file.read_text())["held_out"]["in-domain"]["ce"]
    return min(losses, key=lambda rate: losses[rate])


def one_run(prepared: Prepared, arm: Arm, seed: int, learning_rate: float) -> Run:
    """Trains and measures one student."""
    track, began = prepared.track, time.monotonic()
    gradients = {}
    if arm.is_usual:
        gradients["start"] = _gradients(prepared, arm, student_head(prepared, seed))
    head = perturbed(student_head(prepared, seed), arm.perturbation)
    curve, steps, train_seconds = _train(prepared, arm, seed, head, learning_rate)
    held_out = evaluate(head, prepared.teacher, prepared.held_out)
    model_file = prepared.directory / "models" / f"{FULL.name}-seed{seed}.safetensors"
    if arm.name == FULL.name:
        model_file.parent.mkdir(exist_ok=True)
        partial = model_file.with_suffix(".partial")
        save_model(head.model, os.fspath(partial))
        partial.rename(model_file)
    if arm.is_usual:
        load_model(head.model, model_file)
        gradients["end"] = _gradients(prepared, arm, head)
    return {
        "track": track.number,
        "arm": arm.name,
        "title": arm.title,
        "seed": seed,
        "learning_rate": _rate(track, arm, learning_rate),
        "steps": steps,
        "tokens": steps * _step_rows(track, arm) * track.window,
        "train_seconds": train_seconds,
        "seconds": time.monotonic() - began,
        "train_loss": curve,
        "held_out": held_out,
        "gradients": gradients,
        "cache": sizes(prepared.caches[arm.name]) if arm.rule is not None else None,
        "machine": machine(),
    }


def finished(directory: Path, track: Track, arms: Sequence[Arm], seeds: Sequence[int]) -> Iterator[Run]:
    """The finished runs of these arms and seeds."""
    facts = directory / "prepared.json"
    if not facts.exists():
        return
    digest = json.loads(facts.read_text())["digest"]
    learning_rate = chosen_rate(directory, track, digest)
    if learning_rate is None:
        return
    for arm, seed in planned(arms, seeds):
        file = run_file(directory, arm, seed)
        if _is_done(file, run_digest(digest, learning_rate, arm)):
            yield json.loads(file.read_text())


def run_file(directory: Path, arm: Arm, seed: int) -> Path:
    return directory / "runs" / f"{arm.name}-seed{seed}.json"


def run_digest(prepared_digest: str, learning_rate: float, arm: Arm) -> str:
    parts = {name: getattr(arm.rule, name) for name in RULE_PARTS} if arm.rule else {}
    rule = {name: value for name, value in parts.items() if value is not None} or None
    # Only if set, so that arms without them keep their digest.
    later = [part for part in (arm.perturbation, arm.step_rows, 1 - arm.share) if part]
    return _digest([prepared_digest, learning_rate, arm.source, rule, arm.tail, arm.epochs, arm.resample, *later])


def student_head(prepared: Prepared, seed: int) -> Head:
    vocab_size = prepared.teacher.vocab_size
    return open_head(new_model(prepared.track.student, vocab_size, prepared.track.window, seed), vocab_size)


@torch.no_grad()
def perturbed(head: Head, share: float) -> Head:
    """The same head, with each weight changed by up to `share` of its value."""
    generator = torch.Generator().manual_seed(0)
    for weight in head.model.parameters():
        weight.mul_(1 + share * (2 * torch.rand(weight.shape, generator=generator) - 1))
    return head


def objective_of(prepared: Prepared, arm: Arm) -> Objective:
    if arm.source == "labels":
        return labels_objective(prepared.corpus)
    if arm.source == "full":
        return full_objective(prepared.corpus, prepared.states, prepared.teacher)
    return cache_objective(prepared.caches[arm.name], arm)


def _train(prepared: Prepared, arm: Arm, seed: int, head: Head, learning_rate: float) -> tuple[list[float], int, float]:
    """Training curve, number of steps, seconds."""
    track, began = prepared.track, time.monotonic()
    rows = rows_of(arm, len(prepared.corpus.rows))
    samples = arm.epochs if arm.resample else 1
    schedule = order(rows, track.record_batch_rows, seed, samples)
    step_rows = _step_rows(track, arm)
    curve = train(
        head,
        objective_of(prepared, arm),
        schedule,
        epochs=arm.epochs,
        batch_rows=step_rows,
        learning_rate=_rate(track, arm, learning_rate),
    )
    return curve, arm.epochs * -(-rows // step_rows), time.monotonic() - began


def _step_rows(track: Track, arm: Arm) -> int:
    return arm.step_rows or track.batch_rows


def _rate(track: Track, arm: Arm, learning_rate: float) -> float:
    return learning_rate * math.sqrt(_step_rows(track, arm) / track.batch_rows)


def _gradients(prepared: Prepared, arm: Arm, head: Head) -> dict[str, dict[str, float]]:
    """The arm's gradient compared with that of the full distribution, on rows spread over the corpus."""
    rows = np.linspace(0, len(prepared.corpus.rows) - 1, prepared.track.gradient_rows).round().astype(int).tolist()
    reference = body_gradient(head, objective_of(prepared, FULL), rows)
    found = {"loss": compare(body_gradient(head, objective_of(prepared, arm), rows), reference)}
    if arm.tail == "sampled":
        variant = shift_invariant_objective(prepared.caches[arm.name], arm)
        found["shift_invariant"] = compare(body_gradient(head, variant, rows), reference)
    return found


def _is_done(file: Path, digest: str) -> bool:
    return file.exists() and json.loads(file.read_text())["digest"] == digest


def _digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:12]


def _say(track: Track, what: str, seed: int, text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {track.name} {what}, seed {seed}: {text}", flush=True)
