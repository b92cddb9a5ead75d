"""Targets collected inside a vLLM worker, without vLLM: steps made by hand, however a scheduler may cut them."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.teacher.engines.vllm.vllm_collector import KEY, Collected, Span, StepTargets, Wanted
from pipeline.teacher.engines.vllm.vllm_worker import hook, hook_layers, stored_head, without_padding_rows
from pipeline.teacher.targets.rules import TargetRule
from pipeline.teacher.targets.selection import ChunkTargets, draws, sparse_targets

V, D = 120, 16
RULES = [TargetRule(top_k=5), TargetRule(kind="threshold", tail_threshold=0.1), TargetRule(kind="random", draws=9)]
LENGTHS = (7, 300, 1, 12)  # one longer than a chunk of the head
Step = list[tuple[str, int, int]]  # name, first position and number of tokens of each request


class Model(nn.Module):
    """States are a function of the token and its position, so that a test knows those of every request."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding = torch.randn((1000, D), generator=generator)
        self.weight = torch.randn((V + 8, D), generator=generator)

    def states(self, ids: np.ndarray, first: int = 0) -> Tensor:
        return self.embedding[torch.from_numpy(ids)] + torch.arange(first, first + len(ids))[:, None] * 0.01

    def compute_logits(self, states: Tensor) -> Tensor:
        return states @ self.weight.T


@pytest.fixture(scope="module")
def model() -> Model:
    return Model()


@pytest.fixture(scope="module")
def texts() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {f"request-{i}": rng.integers(0, 1000, length) for i, length in enumerate(LENGTHS)}


def collector_of(model: Model, rules: list[TargetRule] = RULES) -> StepTargets:
    collector = StepTargets(model.compute_logits, vocab_size=V)
    collector.set_rules(rules, timed=False)
    return collector


def wanted_of(name: str, length: int, *, every: int = 1) -> list[Any]:
    stored = np.arange(length) % every == 0
    return list(Wanted(name, place=int(name[-1]) + 5, start=3, stored=np.packbits(stored).tobytes()))


def spans_of(step: Step, texts: dict[str, np.ndarray], every: int = 1) -> Iterator[Span]:
    offset = 0
    for name, first, tokens in step:
        yield Span(wanted_of(name, len(texts[name]), every=every), offset, first, tokens, texts[name].tolist())
        offset += tokens


def hidden_of(step: Step, texts: dict[str, np.ndarray], model: Model) -> Tensor:
    return torch.cat([model.states(texts[name][first : first + tokens], first) for name, first, tokens in step])


def expected(name: str, ids: np.ndarray, rule: TargetRule, model: Model, every: int = 1) -> ChunkTargets:
    at = np.flatnonzero(np.arange(len(ids)) % every == 0)
    logits = model.compute_logits(model.states(ids))[at, :V]
    return sparse_targets(logits, rule, draws(rule, np.full(len(at), int(name[-1]) + 5), at + 3))


SCHEDULES: dict[str, list[Step]] = {
    "one step": [[("request-0", 0, 7), ("request-1", 0, 300), ("request-2", 0, 1), ("request-3", 0, 12)]],
    "chunked": [
        [("request-1", 0, 100), ("request-0", 0, 7)],
        [("request-1", 100, 150), ("request-3", 0, 5)],
        [("request-3", 5, 7), ("request-2", 0, 1), ("request-1", 250, 50)],
    ],
    "preempted and computed again": [
        [("request-1", 0, 200), ("request-0", 0, 7)],
        [("request-3", 0, 12), ("request-2", 0, 1)],
        [("request-1", 0, 120)],
        [("request-1", 120, 180)],
    ],
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("every", [1, 3])
def test_targets_do_not_depend_on_the_steps(
    schedule: str, every: int, model: Model, texts: dict[str, np.ndarray]
) -> None:
    collector = collector_of(model)
    for step in SCHEDULES[schedule]:
        collector.add(hidden_of(step, texts, model), spans_of(step, texts, every))
    found = dict(zip(texts, collector.take(list(texts)), strict=True))
    for name, ids in texts.items():
        for rule, targets in zip(RULES, found[name].targets, strict=True):
            for one, other in zip(targets, expected(name, ids, rule, model, every), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert collector._requests == {}  # nothing is kept


def test_a_request_that_wants_nothing_has_no_targets(model: Model, texts: dict[str, np.ndarray]) -> None:
    collector = collector_of(model)
    nothing = list(Wanted("request-0", 0, 0, np.packbits(np.zeros(7, bool)).tobytes()))
    ids = texts["request-0"]
    collector.add(model.states(ids), [Span(nothing, 0, 0, 7, ids.tolist())])
    (found,) = collector.take(["request-0"])
    assert [len(targets.entropy) for targets in found.targets] == [0, 0, 0]


def test_states_are_those_of_the_chosen_positions(model: Model, texts: dict[str, np.ndarray]) -> None:
    collector = collector_of(model, RULES[:1])
    collector.states_dtype, collector.last_layer = "float32", 2
    ids, chosen = texts["request-3"], np.arange(12) % 4 == 1
    wanted = list(Wanted("a", 0, 0, np.packbits(np.ones(12, bool)).tobytes(), np.packbits(chosen).tobytes()))
    for first, tokens in ((0, 6), (6, 6)):
        hidden = model.states(ids[first : first + tokens], first)
        collector.inner = {1: hidden * 2}
        collector.add(hidden, [Span(wanted, 0, first, tokens, ids.tolist())])
    (found,) = collector.take(["a"])
    whole = model.states(ids)[chosen]
    torch.testing.assert_close(found.states, {1: whole * 2, 2: whole})
    assert found.scales == {}


def test_states_of_an_earlier_step_are_not_used_again(model: Model, texts: dict[str, np.ndarray]) -> None:
    """As when vLLM has compiled the model, and the hooks of its layers do not run."""
    collector, ids = collector_of(model, RULES[:1]), texts["request-3"]
    bits = np.packbits(np.ones(12, bool)).tobytes()
    collector.inner = {1: model.states(ids)}
    for name in ("a", "b"):
        collector.add(model.states(ids), [Span(list(Wanted(name, 0, 0, bits, bits)), 0, 0, 12, ids.tolist())])
    first, second = collector.take(["a", "b"])
    assert list(first.states) == [1] and second.states == {}


def test_rows_of_padding_have_no_probability(model: Model, texts: dict[str, np.ndarray]) -> None:
    states = model.states(texts["request-0"])
    padded = SimpleNamespace(compute_logits=model.compute_logits)
    without_padding_rows(padded, V)
    logits = padded.compute_logits(states)
    assert torch.equal(logits[:, :V], model.compute_logits(states)[:, :V])
    assert float(logits.softmax(dim=1)[:, V:].max()) == 0.0 and logits.shape[1] == V + 8
    nowhere = SimpleNamespace(compute_logits=lambda states: None)  # a rank without logits
    without_padding_rows(nowhere, V)
    assert nowhere.compute_logits(states) is None


def test_labels_are_scored_if_asked_for(model: Model, texts: dict[str, np.ndarray]) -> None:
    collector = StepTargets(model.compute_logits, vocab_size=V)
    collector.set_rules(RULES[:1], timed=True)
    ids = texts["request-3"] % V
    wanted = list(Wanted("a", 0, 0, np.packbits(np.ones(12, bool)).tobytes()))
    collector.add(model.states(ids), [Span(wanted, 0, 0, 12, ids.tolist())])
    (found,) = collector.take(["a"])
    logprobs = model.compute_logits(model.states(ids))[:, :V].log_softmax(dim=1)
    torch.testing.assert_close(found.label_logprobs[:-1], logprobs[torch.arange(11), ids[1:]])
    assert collector.seconds[0] > 0


def test_a_rank_without_logits_keeps_nothing_and_says_so(model: Model, texts: dict[str, np.ndarray]) -> None:
    collector = StepTargets(lambda states: None, vocab_size=V)
    collector.set_rules(RULES, timed=False)
    step = SCHEDULES["one step"][0]
    collector.add(hidden_of(step, texts, model), spans_of(step, texts))
    assert not collector.gets_logits
    assert all(isinstance(each, Collected) for each in collector.take(list(texts)))


# -- the model runners of vLLM ----------------------------------------------------------------------------------------


def test_first_model_runner(model: Model, texts: dict[str, np.ndarray]) -> None:
    """The parts of it that the hook uses."""
    requests: dict[str, Any] = {
        name: SimpleNamespace(
            sampling_params=SimpleNamespace(extra_args={KEY: wanted_of(name, len(ids))}),
            num_computed_tokens=0,
            prompt_token_ids=ids.tolist(),
        )
        for name, ids in texts.items()
    }
    runner = SimpleNamespace(
        requests=requests | {"plain": SimpleNamespace(sampling_params=SimpleNamespace(extra_args=None))},
        query_start_loc=SimpleNamespace(np=np.zeros(5, np.int64)),
        input_batch=SimpleNamespace(req_id_to_index={}),
        _get_prompt_logprobs_dict=lambda hidden, scheduled: {"own": len(hidden)},
    )
    collector = collector_of(model)
    hook(runner, collector)
    for step in SCHEDULES["chunked"]:
        hidden, offset = hidden_of(step, texts, model), 0
        for i, (name, first, tokens) in enumerate(step):
            requests[name].num_computed_tokens = first
            runner.input_batch.req_id_to_index[name] = i
            runner.query_start_loc.np[i] = offset
            offset += tokens
        scheduled = {name: tokens for name, _, tokens in step} | {"plain": 1}
        assert runner._get_prompt_logprobs_dict(hidden, scheduled) == {"own": len(hidden)}
    for name, found in zip(texts, collector.take(list(texts)), strict=True):
        torch.testing.assert_close(found.targets[0].logprobs, expected(name, texts[name], RULES[0], model).logprobs)


def test_an_unknown_model_runner_is_refused(model: Model) -> None:
    with pytest.raises(RuntimeError, match="found no step"):
        hook(SimpleNamespace(), StepTargets(model.compute_logits, vocab_size=V))


@pytest.mark.vllm
@pytest.mark.parametrize("timed", [False, True])
def test_second_model_runner_with_its_own_worker(model: Model, texts: dict[str, np.ndarray], timed: bool) -> None:
    """vLLM's real PromptLogprobsWorker on batches made by hand; the runner itself needs a GPU."""
    from vllm import SamplingParams
    from vllm.v1.worker.gpu.sample.prompt_logprob import PromptLogprobsWorker

    worker = PromptLogprobsWorker(8, torch.device("cpu"))
    tokens = torch.zeros((8, 400), dtype=torch.int64)
    runner = SimpleNamespace(
        prompt_logprobs_worker=worker, req_states=SimpleNamespace(all_token_ids=SimpleNamespace(gpu=tokens))
    )
    collector = StepTargets(model.compute_logits, vocab_size=V)
    collector.set_rules(RULES, timed=timed)
    hook(runner, collector)
    index = {name: i + 2 for i, name in enumerate(texts)}
    prompt_lens = np.zeros(8, np.int32)
    for name, ids in texts.items():
        params = SamplingParams(max_tokens=1, extra_args={KEY: wanted_of(name, len(ids))})
        worker.add_request(name, index[name], params)
        prompt_lens[index[name]] = len(ids)
        tokens[index[name], : len(ids)] = torch.from_numpy(ids % V)
    for step in SCHEDULES["preempted and computed again"]:
        counts = np.array([each[2] for each in step])
        batch = SimpleNamespace(
            req_ids=[name for name, _, _ in step],
            idx_mapping_np=np.array([index[name] for name, _, _ in step]),
            query_start_loc_np=np.concatenate([[0], np.cumsum(counts)]),
            num_scheduled_tokens=counts,
            num_computed_tokens_np=np.array([first for _, first, _ in step]),
        )
        hidden = hidden_of(step, texts, model)
        assert worker.compute_prompt_token_id_logprobs(model.compute_logits, hidden, batch, prompt_lens) == {}
    for name, found in zip(texts, collector.take(list(texts)), strict=True):
        torch.testing.assert_close(found.targets[0].logprobs, expected(name, texts[name], RULES[0], model).logprobs)
        assert len(found.label_logprobs) == (len(texts[name]) if timed else 0)
        worker.remove_request(name)


# -- inside the model -------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    def forward(self, positions: Tensor, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        residual = hidden if residual is None else residual.add_(hidden)  # in place, as vLLM's fused kernels do
        return torch.full_like(hidden, 0.5), residual


def test_states_of_inner_layers_are_sums_at_their_time() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList([Layer(), Layer(), Layer()])
    collector = StepTargets(lambda states: states, vocab_size=V)
    handles = hook_layers(model, collector, [0, 1, 2], 3)
    hidden: Tensor = torch.ones((4, D))
    residual: Tensor | None = None
    for layer in model.layers:
        hidden, residual = layer(torch.arange(4), hidden, residual)
    assert {layer: float(states.mean()) for layer, states in collector.inner.items()} == {0: 1.0, 1: 1.5, 2: 2.0}
    assert len(handles) == 3
    with pytest.raises(RuntimeError, match="found 0 lists of 4 layers"):
        hook_layers(model, collector, [0], 4)


@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.25, None), (1.0, 8.0)])
def test_the_head_is_exported_as_a_matrix_with_scale_and_cap(scale: float, softcap: float | None) -> None:
    weight = torch.randn((V + 8, D), generator=torch.Generator().manual_seed(0))
    processor = SimpleNamespace(scale=scale, soft_cap=softcap)

    def compute_logits(states: Tensor) -> Tensor:
        logits = states @ weight.T * scale
        return logits if softcap is None else (logits / softcap).tanh() * softcap

    def model(logits: Any) -> Any:
        return SimpleNamespace(
            lm_head=SimpleNamespace(weight=weight), logits_processor=processor, compute_logits=logits
        )

    found, bias, found_scale, found_cap = stored_head(model(compute_logits), V)
    assert (found_scale, found_cap, bias) == (scale, softcap, None) and torch.equal(found, weight[:V])
    with pytest.raises(RuntimeError, match="not a matrix times a hidden state"):
        stored_head(model(lambda states: compute_logits(states) + 1), V)
