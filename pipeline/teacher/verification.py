"""A cache against its teacher: some rows computed again, and how far they are from what is stored.

Two runs of one teacher do not agree to the last bit either: another batch size is another order of summation. So the
rows are computed twice, each alone and several in a batch, and what the cache deviates by is shown beside what the
teacher deviates by from itself. A cache of other weights, another tokenizer's, of a shifted position or of damaged
memory is off by whole nats; one of another dtype or device by a little more than the noise.

Values in a cache are rounded to a codebook, states to their dtype. A deviation is what is left beyond that: 0 for a
value that lies anywhere between the numbers that are rounded to the stored one. For hidden targets, the nearest state
to the teacher's that is rounded to the stored one goes through the head of the cache, and its log-probabilities of all
tokens are compared with the teacher's own.

Shapes: n positions of a row, V vocabulary, E exact entries of all its positions, D width of a state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

import cache_format as cf
from cache_format.rows.types import entry_groups, group_counts
from pipeline.errors import ConfigError
from pipeline.models.head import open_head
from pipeline.models.head_export import HeadExport, export_head
from pipeline.models.loading import load_model, load_tokenizer, model_name, weights_fingerprint
from pipeline.models.objective import objective_for
from pipeline.models.teacher_head import TeacherHead
from pipeline.models.tokenizers import tokenizer_fingerprint
from pipeline.teacher.cache_config import WorkerConfig
from pipeline.teacher.engines.interface import RowRequest
from pipeline.teacher.engines.transformers_engine import CHUNK_POSITIONS, TransformersEngine
from pipeline.teacher.generation.answers import place_of
from pipeline.teacher.targets.rules import TargetRule
from pipeline.teacher.targets.selection import ChunkTargets
from pipeline.teacher.verify_config import TeacherCheckConfig
from pipeline.teacher.writing.workers import this_worker

NOISE_FACTOR, FLOOR = 16, 1e-4  # a deviation below FLOOR nats, or NOISE_FACTOR times the noise, is accepted
SAME_SHARE = 0.1  # accepted loss of positions with the same entries, compared with two runs of the teacher


@dataclass(frozen=True, kw_only=True)
class TeacherCheck:
    """What came out; deviations in nats, the largest over all positions."""

    rows: int
    positions: int
    entries: int  # exact ones, of which log-probabilities were compared; of hidden targets all V
    deviation: float  # of log-probabilities, residuals and entropies, beyond rounding
    deviation_at: str  # where: row, position and quantity
    noise: float  # of the same log-probabilities between two runs of the teacher
    same_entries: float  # share of positions for which the teacher, asked again, gives the very same token ids; of
    # hidden targets the same likeliest one
    same_entries_noise: float  # that share between two runs of the teacher
    same_weights: bool  # by fingerprint, which another dtype changes too

    @property
    def allowed(self) -> float:
        return max(NOISE_FACTOR * self.noise, FLOOR)

    @property
    def agrees(self) -> bool:
        return self.deviation <= self.allowed and self.same_entries >= self.same_entries_noise - SAME_SHARE


class _Asked(NamedTuple):
    """What the teacher says of one row."""

    logprobs: np.ndarray  # [E] float64, at the cached exact ids
    targets: ChunkTargets  # [n, ...]
    hidden: torch.Tensor  # [n, ·] what the head is applied to


def verify_against_teacher(
    config: TeacherCheckConfig,
    *,
    on_stage: Callable[[str], None] = lambda _: None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> TeacherCheck:
    """Runs the teacher over a few rows of its cache.

    Raises:
        MismatchError: the teacher's tokenizer is not the cache's. ConfigError: of this kind of targets nothing can be
        computed again. ModelError, CacheError: either cannot be read.
    """
    worker = this_worker(WorkerConfig(), tensor_parallel=config.tensor_parallel, device_map=config.device_map)
    cache = cf.open_cache(config.cache, hidden_layers=[]).with_states()
    stored_head = None if cache.metadata.head is None else TeacherHead(cache)
    rule = TargetRule.from_json(cache.metadata.targets)
    if not cache.metadata.rounded_once:
        raise ConfigError(
            f"{config.cache}: its values were rounded a second time by distill convert, which would look like another "
            "teacher. Check the cache that it was made from."
        )
    tokenizer = load_tokenizer(
        config.tokenizer or config.teacher, revision=config.revision, trust_remote_code=config.trust_remote_code
    )
    found, expected = tokenizer_fingerprint(tokenizer)["vocabulary"], cache.metadata.tokenizer.get("vocabulary")
    if found != expected:
        raise cf.MismatchError(
            f"{model_name(config.teacher)}: its vocabulary is not that of {config.cache} (fingerprint "
            f"{found[:8]}…, expected {str(expected)[:8]}…): it is not the teacher that wrote this cache. Give that one."
        )
    on_stage("loading the teacher")
    device = worker.device(config.device)
    objective = objective_for(cache.metadata.alignment)
    model = load_model(
        config.teacher,
        objective=objective,
        dtype=config.dtype,
        device=device,
        device_map=config.device_map,
        tensor_parallel=config.tensor_parallel,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
    )
    head = open_head(model, cache.metadata.vocab_size, masked=objective == "masked")
    chosen = np.unique(np.linspace(0, len(cache) - 1, min(config.rows, len(cache))).round().astype(int)).tolist()
    on_stage(f"computing {len(chosen)} of {len(cache):,} rows again, twice")
    rows = cache.rows(chosen)
    places = _places(cache)
    together = int(cache.metadata.capture.get("batch_size") or 8)
    export = None if stored_head is None else export_head(head)
    engine = TransformersEngine(head, device=device, batch_size=together)
    checks = []
    for start in range(0, len(rows), together):
        batch = rows[start : start + together]
        for row, other in zip(batch, _ask(engine, batch, rule, cache.metadata, places), strict=True):
            (alone,) = _ask(engine, [row], rule, cache.metadata, places)
            check = _check(row, alone, other, cache.metadata)
            if stored_head is not None and export is not None:
                check = _check_states(row, alone, other, export, stored_head, check)
            checks.append(check)
            on_progress(len(checks), len(rows))
    positions = sum(check.positions for check in checks)
    worst = max(checks, key=lambda check: check.deviation)
    return TeacherCheck(
        rows=len(checks),
        positions=positions,
        entries=sum(check.entries for check in checks),
        deviation=worst.deviation,
        deviation_at=worst.deviation_at,
        noise=max(check.noise for check in checks),
        same_entries=sum(check.same_entries for check in checks) / positions,
        same_entries_noise=sum(check.same_entries_noise for check in checks) / positions,
        same_weights=cache.metadata.teacher.get("weights_fingerprint") == weights_fingerprint(model),
    )


def _ask(
    engine: TransformersEngine,
    rows: Sequence[cf.CacheRow],
    rule: TargetRule,
    metadata: cf.CacheMetadata,
    places: np.ndarray,
) -> list[_Asked]:
    """One forward pass over these rows together."""
    stored = [_stored(row, metadata) for row in rows]
    requests = [
        RowRequest(index=row.row, row=row, place=int(places[row.row]), stored=mask)
        for row, mask in zip(rows, stored, strict=True)
    ]
    ids: list[torch.Tensor] = []  # the cached exact ones of each position
    for row, mask in zip(rows, stored, strict=True):
        counts = np.asarray(row.targets.exact_counts, np.int64)[mask]
        ids += torch.from_numpy(_exact(row, row.targets.ids).astype(np.int64)).split(counts.tolist())
    logprobs: list[torch.Tensor] = []

    def read(here: slice, logits: torch.Tensor) -> None:
        found = torch.log_softmax(logits.double().cpu() / rule.temperature, dim=1)
        logprobs.extend(each[cached] for each, cached in zip(found, ids[here], strict=True))

    running = engine.run_batch(requests, [rule], read)
    running.wait()
    assert running.inputs is not None
    stops = np.cumsum([mask.sum() for mask in stored]).tolist()
    asked = []
    for start, stop in zip([0, *stops[:-1]], stops, strict=True):
        here = slice(start, stop)
        targets = ChunkTargets(*(part[here] for part in running.targets[0]))
        asked.append(_Asked(torch.cat(logprobs[here]).numpy(), targets, running.inputs[here]))
    return asked


def _places(cache: cf.Cache) -> np.ndarray:
    """[rows] what the draws of each row are keyed by: its number, or whose answer it is."""
    places = np.array([(line["document"], line["answer"]) for line in cache.answers()], np.uint64).reshape(-1, 2)
    return place_of(*places.T) if len(places) else np.arange(len(cache))


class _RowCheck(NamedTuple):
    positions: int
    entries: int
    deviation: float
    deviation_at: str
    noise: float
    same_entries: int
    same_entries_noise: int


def _check(row: cf.CacheRow, asked: _Asked, again: _Asked, metadata: cf.CacheMetadata) -> _RowCheck:
    stored = _stored(row, metadata)
    position = np.flatnonzero(stored)
    of_entry = np.repeat(position, np.asarray(row.targets.exact_counts, np.int64)[stored])
    worst, worst_at = 0.0, "nowhere"
    for name, cached, found, where in (
        ("target_logprobs", _exact(row, row.targets.logprobs), asked.logprobs, of_entry),
        ("residual_logprob", row.targets.residual_logprob[stored], asked.targets.residual_logprob.numpy(), position),
        ("entropy", row.targets.entropy[stored], asked.targets.entropy.numpy(), position),
    ):
        low, high = metadata.codebooks[name].rounded_from(cached)
        beyond = np.maximum(_difference(low, found), _difference(found, high)).clip(min=0.0)
        if len(beyond) and not beyond.max() <= worst:  # NaN too
            worst, worst_at = float(beyond.max()), f"{name} of row {row.row}, position {where[beyond.argmax()]}"
    noise = np.abs(_difference(asked.logprobs, again.logprobs)).max(initial=0.0)
    entries = np.concatenate([[0], np.cumsum(row.targets.counts, dtype=np.int64)])
    first, second = (_ids(each.targets) for each in (asked, again))
    cached_ids = [np.sort(row.targets.ids[entries[t] : entries[t + 1]]) for t in position]
    return _RowCheck(
        positions=len(position),
        entries=len(of_entry),
        deviation=worst,
        deviation_at=worst_at,
        noise=float(noise),
        same_entries=sum(map(np.array_equal, cached_ids, first)),
        same_entries_noise=sum(map(np.array_equal, first, second)),
    )


@torch.inference_mode()
def _check_states(
    row: cf.CacheRow, asked: _Asked, again: _Asked, export: HeadExport, stored_head: TeacherHead, check: _RowCheck
) -> _RowCheck:
    """`check` of a row's entropies, with what its states say of every token."""
    hidden, layer = row.hidden, stored_head.spec.layer
    assert hidden is not None
    low, high = (torch.from_numpy(bound) for bound in _rounded_from(hidden, layer))
    stored, position = torch.from_numpy(hidden.values(layer)), np.flatnonzero(hidden.mask)
    worst, worst_at, noise, same, same_noise = check.deviation, check.deviation_at, check.noise, 0, 0
    for start in range(0, len(position), CHUNK_POSITIONS):
        here = slice(start, start + CHUNK_POSITIONS)
        (logits, inputs), (others, _) = export.logits(asked.hidden[here]), export.logits(again.hidden[here])
        nearest = torch.minimum(torch.maximum(inputs.double().cpu(), low[here].double()), high[here].double())
        found, other = (each.double().cpu().log_softmax(dim=1) for each in (logits, others))
        rebuilt = stored_head(nearest.float()).double().log_softmax(dim=1)
        off = (rebuilt - found).abs().amax(dim=1)
        if not off.max().item() <= worst:  # NaN too
            worst, worst_at = (
                off.max().item(),
                f"hidden_{layer} of row {row.row}, position {position[here][off.argmax()]}",
            )
        noise = max(noise, (found - other).abs().max().item())
        likeliest = found.argmax(dim=1)
        same += int((stored_head(stored[here]).argmax(dim=1) == likeliest).sum())
        same_noise += int((other.argmax(dim=1) == likeliest).sum())
    entries = len(position) * export.head.vocab_size
    return _RowCheck(len(position), entries, worst, worst_at, noise, same, same_noise)


def _rounded_from(hidden: cf.HiddenStates, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """[n, D] between which numbers each of the stored ones lay."""
    values = hidden.values(layer)
    if layer in hidden.scales:
        half = np.broadcast_to(hidden.scales[layer][:, None] * np.float32(0.5001), values.shape)
    else:
        # Of the magnitude: below a power of two numbers lie closer, and numpy looks upwards from a negative one.
        half = np.spacing(np.abs(hidden.states[layer])).astype(np.float32) * np.float32(0.5001)
    return values - half, values + half


def _stored(row: cf.CacheRow, metadata: cf.CacheMetadata) -> np.ndarray:
    """[T] bool: positions that have targets."""
    everywhere = metadata.targets.get("positions") == "all"
    return np.ones(len(row.loss_mask), bool) if everywhere else np.array(row.loss_mask, bool)


def _exact(row: cf.CacheRow, values: np.ndarray) -> np.ndarray:
    """The values of the exact entries, from the values of all entries."""
    return values[entry_groups(group_counts(row.targets)) == 0]


def _ids(targets: ChunkTargets) -> list[np.ndarray]:
    """The ids of each position in ascending order."""
    return [np.sort(ids[ids >= 0]) for ids in targets.ids.numpy()]


def _difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a - b, and 0 where both are the same infinity."""
    with np.errstate(invalid="ignore"):
        return np.where(a == b, 0.0, np.asarray(a, np.float64) - b)
