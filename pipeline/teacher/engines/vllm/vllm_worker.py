"""The part of the vLLM engine that runs inside vLLM's workers: it hands the hidden states of every step to a collector.

vLLM computes the logits of the positions that it samples from, and of a prompt only when it is asked for prompt
log-probabilities, as lists of the top K. `TargetsExtension` (vLLM mixes it into its worker class) is called with the
hidden states of each step instead, whole prompts and parts of them alike; `vllm_collector` makes targets of them.

Private interfaces of vLLM are used in `hook` alone, one function for each of its two model runners.

Shapes: D hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pipeline.models.devices.precision import full_float32
from pipeline.models.head import deviation, tolerance
from pipeline.models.head_export import scaled_and_capped
from pipeline.models.loading import weights_fingerprint
from pipeline.teacher.engines.vllm.vllm_collector import KEY, Collected, Span, StepTargets
from pipeline.teacher.targets.rules import TargetRule


class TargetsExtension:
    """Mixed into vLLM's worker; every method is called on all ranks, `distill_take` answers on the one with logits."""

    model_runner: Any

    def distill_install(self, vocab_size: int) -> None:
        runner = self.model_runner
        without_padding_rows(runner.model, vocab_size)
        self._distill = StepTargets(runner.model.compute_logits, vocab_size=vocab_size)
        self._hooks: list[RemovableHandle] = []
        hook(runner, self._distill)

    def distill_states(self, layers: Sequence[int], last: int, dtype: str) -> None:
        """Args: layers: whose hidden states are stored; last: the number of the last one."""
        for each in self._hooks:
            each.remove()
        collector = self._distill
        collector.inner, collector.states_dtype = {}, dtype
        collector.last_layer = last if last in layers else None
        self._hooks = hook_layers(self.model_runner.model, collector, [each for each in layers if each != last], last)

    def distill_rules(self, rules: Sequence[dict[str, Any]], timed: bool) -> None:
        self._distill.set_rules([TargetRule.from_json(rule) for rule in rules], timed=timed)

    def distill_seconds(self) -> list[float]:
        """Seconds of selection since the last call, by rule."""
        seconds, self._distill.seconds = self._distill.seconds, [0.0] * len(self._distill.rules)
        return seconds

    def distill_take(self, names: Sequence[str]) -> list[Collected] | None:
        found = self._distill.take(names)
        return found if self._distill.gets_logits else None

    def distill_head(self, vocab_size: int) -> tuple[Tensor, Tensor | None, float, float | None]:
        """Weight [V, D] and bias [V] of the head on the CPU, the scale of its logits and its soft cap.

        Raises: RuntimeError if its logits are not given by these.
        """
        return stored_head(self.model_runner.model, vocab_size)

    def distill_weights(self) -> dict[str, Any]:
        """Class, dtype and a fingerprint of this rank's part of the weights."""
        model = self.model_runner.model
        dtype = str(self.model_runner.dtype).removeprefix("torch.")
        return {"architecture": type(model).__name__, "dtype": dtype, "weights": weights_fingerprint(model)}


def without_padding_rows(model: Any, vocab_size: int) -> None:
    """Gives rows of the output matrix that stand for no token a probability of 0, in all that vLLM computes of logits:
    what it samples, and its own log-probabilities."""
    compute = model.compute_logits

    def compute_logits(*arguments: Any, **named: Any) -> Tensor | None:
        logits: Tensor | None = compute(*arguments, **named)
        if logits is not None and logits.shape[-1] > vocab_size:
            logits[..., vocab_size:] = -torch.inf
        return logits

    model.compute_logits = compute_logits


def hook(runner: Any, collector: StepTargets) -> None:
    """Makes a model runner of vLLM hand the hidden states of every step to `collector`.

    Raises: RuntimeError if the runner has neither of the two known forms.
    """
    if hasattr(runner, "_get_prompt_logprobs_dict"):  # V1, on CPUs
        original = runner._get_prompt_logprobs_dict

        def get_prompt_logprobs_dict(hidden: Tensor, num_scheduled_tokens: dict[str, int]) -> dict[str, Any]:
            collector.add(hidden, _spans_v1(runner, num_scheduled_tokens))
            return original(hidden, num_scheduled_tokens)

        runner._get_prompt_logprobs_dict = get_prompt_logprobs_dict
        return
    worker = getattr(runner, "prompt_logprobs_worker", None)
    if not all(hasattr(worker, name) for name in ("add_request", "remove_request", "compute_prompt_token_id_logprobs")):
        raise RuntimeError(f"{type(runner).__name__}: found no step that computes prompt log-probabilities")
    _hook_v2(runner, worker, collector)


def _hook_v2(runner: Any, worker: Any, collector: StepTargets) -> None:
    wanted: dict[str, Any] = {}
    add, remove, compute = worker.add_request, worker.remove_request, worker.compute_prompt_token_id_logprobs

    def add_request(name: str, index: int, params: Any) -> None:
        if params.extra_args and KEY in params.extra_args:
            wanted[name] = params.extra_args[KEY]
        add(name, index, params)

    def remove_request(name: str) -> None:
        wanted.pop(name, None)
        remove(name)

    def spans(batch: Any, prompt_lens: np.ndarray) -> Iterator[Span]:
        for i, name in enumerate(batch.req_ids):
            if name not in wanted:
                continue
            index = batch.idx_mapping_np[i]
            length = int(prompt_lens[index])
            # Only labels need the tokens themselves, which are on the device.
            token_ids = (
                runner.req_states.all_token_ids.gpu[index, :length].tolist() if collector.timed else range(length)
            )
            offset, first = int(batch.query_start_loc_np[i]), int(batch.num_computed_tokens_np[i])
            yield Span(wanted[name], offset, first, int(batch.num_scheduled_tokens[i]), token_ids)

    def compute_prompt_token_id_logprobs(
        logits_fn: Any, hidden: Tensor, batch: Any, prompt_lens: np.ndarray
    ) -> dict[str, Tensor]:
        collector.add(hidden, spans(batch, prompt_lens))
        found: dict[str, Tensor] = compute(logits_fn, hidden, batch, prompt_lens)
        return found

    worker.add_request, worker.remove_request = add_request, remove_request
    worker.compute_prompt_token_id_logprobs = compute_prompt_token_id_logprobs


def hook_layers(model: nn.Module, collector: StepTargets, layers: Sequence[int], count: int) -> list[RemovableHandle]:
    """Makes the inputs of some layers, which are the states of those before them, the collector's `inner`.

    Raises: RuntimeError if the model has not one list of `count` layers.
    """
    if not layers:
        return []
    lists = [each for each in model.modules() if isinstance(each, nn.ModuleList) and len(each) == count]
    if len(lists) != 1:
        raise RuntimeError(f"{type(model).__name__}: found {len(lists)} lists of {count} layers, expected one")

    def keep(layer: int) -> Callable[..., None]:
        def pre_hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # positions, hidden states and, in most models, what is still to be added to them; later layers work in
            # place, hence the copy.
            states = [each for each in (*args, *kwargs.values()) if torch.is_tensor(each) and each.is_floating_point()]
            collector.inner[layer] = states[0].clone() if len(states) == 1 else states[0] + states[1]

        return pre_hook

    return [lists[0][layer].register_forward_pre_hook(keep(layer), with_kwargs=True) for layer in layers]


@full_float32()
@torch.inference_mode()
def stored_head(model: Any, vocab_size: int) -> tuple[Tensor, Tensor | None, float, float | None]:
    """See `TargetsExtension.distill_head`."""
    head, processor = getattr(model, "lm_head", None) or model.model.embed_tokens, model.logits_processor  # if tied
    weight = head.weight[:vocab_size]
    bias = getattr(head, "bias", None)
    bias = None if bias is None else bias[:vocab_size]
    scale, softcap = float(processor.scale), processor.soft_cap
    generator = torch.Generator().manual_seed(2)
    states = torch.randn((12, weight.shape[1]), generator=generator).to(weight)
    for factor in (1.0, 1e3):
        products = nn.functional.linear(
            (states * factor).float(), weight.float(), None if bias is None else bias.float()
        )
        found = model.compute_logits(states * factor)
        expected = scaled_and_capped(products, scale, softcap)
        if found is None or deviation(found[:, :vocab_size], expected) > tolerance(expected, roundings=8):
            raise RuntimeError(
                f"{type(model).__name__}: its logits are not a matrix times a hidden state, scaled and soft-capped"
            )
    return weight.cpu(), None if bias is None else bias.cpu(), scale, softcap


def _spans_v1(runner: Any, num_scheduled_tokens: dict[str, int]) -> Iterable[Span]:
    for name, tokens in num_scheduled_tokens.items():
        request = runner.requests[name]
        params = request.sampling_params
        wanted = None if params is None or not params.extra_args else params.extra_args.get(KEY)
        if wanted is None:
            continue
        offset = int(runner.query_start_loc.np[runner.input_batch.req_id_to_index[name]])
        yield Span(wanted, offset, request.num_computed_tokens, tokens, request.prompt_token_ids)
