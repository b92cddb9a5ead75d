"""Hidden states and the vocabulary head as two steps, for any causal language model of transformers.

A forward pass of `…ForCausalLM` ends in logits [B, T, V]: at V = 128k and 8k positions that is 4 GB in fp32, and the
largest tensor of either stage. Both stages instead take the decoder's last hidden states [B, T, D] and run the head on
a chunk of positions at a time.

Two ways to run a head:

    linear    logits = hidden @ weight.T + bias, when the model does nothing else. The fused loss needs this form.
    own       the model's own `forward` with its decoder replaced by the given states: whatever the architecture does to
              its logits (soft-capping, scaling, a transform before the decoder) is done by its own code.

`open_head` does not guess from class names: it tries both against the model's own logits on a few positions, small
logits and large, and takes the linear one if it agrees, the other if not, and refuses to go on if neither does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from pipeline.errors import ModelError
from pipeline.placement import compute_device, is_here

PROBE_TOKENS = 12
LOUD_LOGIT = 100.0


@dataclass(frozen=True, kw_only=True)
class Head:
    """The vocabulary head of `model`, cut to the tokenizer's real vocabulary.

    Attributes:
        linear: whether `weight` and `bias` are all there is to it.
        vocab_size: V; rows of the embedding matrix beyond it are padding.
    """

    model: PreTrainedModel
    linear: bool
    vocab_size: int

    @property
    def weight(self) -> Tensor:
        """[≥V, D]"""
        return self.model.get_output_embeddings().weight

    @property
    def bias(self) -> Tensor | None:
        """[≥V] or None"""
        return getattr(self.model.get_output_embeddings(), "bias", None)

    @property
    def device(self) -> torch.device:
        """Where logits are computed."""
        return compute_device(self.model.get_output_embeddings())

    def hidden_states(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """[B, T], [B, T] → [B, T, D]: what the head is applied to.

        Packed documents are kept apart by position ids that restart at 0, from which transformers builds a
        block-diagonal mask; that holds only without an attention mask and without a key-value cache.
        """
        decoder = _decoder(self.model)
        return decoder(input_ids=input_ids, position_ids=position_ids, use_cache=False)[0].to(self.device)

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """[n, D] → [n, V], in the dtype the model computes them in.

        `out`: [≥n, V] of that dtype to write into; used if the head is linear and no gradient is asked for.
        """
        if not self.linear:
            return self.own_logits(hidden)
        weight = self.weight[: self.vocab_size]
        if out is not None:
            out = torch.mm(hidden.to(weight.dtype), weight.T, out=out[: len(hidden)])
            return out if self.bias is None else out.add_(self.bias[: self.vocab_size])
        return nn.functional.linear(
            hidden.to(weight.dtype), weight, self.bias if self.bias is None else self.bias[: self.vocab_size]
        )

    def own_logits(self, hidden: Tensor) -> Tensor:
        """`logits` by the model's own forward, its decoder replaced by `hidden`."""
        with _decoder_returning(self.model, hidden[None]):
            dummy = torch.zeros((1, len(hidden)), dtype=torch.long, device=hidden.device)
            # The class's forward: on a student in training the instance's is the loss, which calls this.
            output = type(self.model).forward(self.model, input_ids=dummy, use_cache=False)
            return output.logits[0, :, : self.vocab_size]


def open_head(model: PreTrainedModel, vocab_size: int) -> Head:
    """Finds the way to run the model's head that reproduces the model's own logits.

    Raises:
        ModelError: neither way does, or the model has fewer output rows than the vocabulary has tokens.
    """
    name = type(model).__name__
    output = model.get_output_embeddings()
    if output is None:
        raise ModelError(f"{name} has no output embeddings: only models with a language-modelling head can be used")
    if output.weight.shape[0] < vocab_size:
        raise ModelError(
            f"{name} predicts {output.weight.shape[0]:,} tokens, the vocabulary has {vocab_size:,}: "
            "they do not belong together. Use a model and a cache of the same tokenizer."
        )
    device = compute_device(output)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab_size, (1, PROBE_TOKENS), generator=generator).to(device)
    positions = torch.arange(PROBE_TOKENS, device=device)[None]
    with evaluating(model), torch.no_grad():
        # Twice, the second time with large logits: soft-capping leaves the small ones of a new student alone.
        quiet = _logits_of_amplified_states(model, ids, positions, 1.0)[:, :vocab_size]
        if not quiet.isfinite().all():
            raise ModelError(
                f"{name}: its logits hold NaN or infinity: its weights are damaged, or too large for "
                f"{str(quiet.dtype).removeprefix('torch.')}. Use another dtype or checkpoint."
            )
        factor = LOUD_LOGIT / max(quiet.abs().max().item(), 1e-3)
        loud = _logits_of_amplified_states(model, ids, positions, factor)[:, :vocab_size]
        worst = {}
        for linear in (True, False) if isinstance(output, nn.Linear) and is_here(output.weight) else (False,):
            head = Head(model=model, linear=linear, vocab_size=vocab_size)
            hidden = head.hidden_states(ids, positions)[0]
            ratios = [
                _deviation(head.logits(hidden * by), expected) / _tolerance(expected, roundings=4)
                for by, expected in ((1.0, quiet), (factor, loud))
            ]
            worst["linear" if linear else "own"] = ratio = max(ratios)
            if ratio <= 1.0:
                return head
    raise ModelError(
        f"{name}: logits computed from its hidden states differ from its own by "
        + ", ".join(f"{ratio:.2g} ({way})" for way, ratio in worst.items())
        + " times what rounding explains. This architecture is not supported; please report it."
    )


def check_packing(model: PreTrainedModel, head: Head) -> None:
    """Raises `ModelError` if documents packed into one row can see one another in this model.

    The second document must be what it is alone, and the same whatever the first is; the latter to the last bits in any
    dtype, since nothing but the first document changes.
    """
    device = head.device
    generator = torch.Generator().manual_seed(1)
    first, other, second = (torch.randint(head.vocab_size, (1, n), generator=generator).to(device) for n in (7, 7, 5))
    alone = torch.arange(second.shape[1], device=device)[None]
    packed = torch.cat([torch.arange(first.shape[1], device=device)[None], alone], dim=1)
    rows = torch.cat([torch.cat([first, second], dim=1), torch.cat([other, second], dim=1)])
    with evaluating(model), torch.no_grad():
        expected = head.hidden_states(second, alone)[0]
        behind_first, behind_other = head.hidden_states(rows, packed.expand(2, -1))[:, first.shape[1] :]
    for found, than, roundings in ((behind_first, expected, 16), (behind_first, behind_other, 4)):
        deviation, allowed = _deviation(found, than), _tolerance(expected, roundings=roundings)
        if not deviation <= allowed:
            raise ModelError(
                f"{type(model).__name__}: a document packed behind another one changes by {deviation:.2g} "
                f"(allowed {allowed:.2g}), so they attend to one another. Use --no-packing."
            )


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block, the mode before it afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _decoder(model: PreTrainedModel) -> nn.Module:
    return getattr(model, model.base_model_prefix)


class _StatesOnly(BaseModelOutputWithPast):
    """A decoder's output of which only the states are there: what else an architecture may look for in it is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class _Returning(nn.Module):
    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, *_: object, **__: object) -> BaseModelOutputWithPast:
        return _StatesOnly(last_hidden_state=self.hidden)


@contextlib.contextmanager
def _decoder_returning(model: PreTrainedModel, hidden: Tensor) -> Iterator[None]:
    name = model.base_model_prefix
    decoder = model._modules[name]
    model._modules[name] = _Returning(hidden)
    try:
        yield
    finally:
        model._modules[name] = decoder


def _logits_of_amplified_states(model: PreTrainedModel, ids: Tensor, positions: Tensor, factor: float) -> Tensor:
    """The model's own logits [T, ≥V] for one sequence, the states between decoder and head multiplied by `factor`."""

    def amplify(_: nn.Module, __: object, output: BaseModelOutputWithPast) -> BaseModelOutputWithPast:
        output["last_hidden_state"] = output[0] * factor
        return output

    hook = _decoder(model).register_forward_hook(amplify)
    try:
        return model(input_ids=ids, position_ids=positions, use_cache=False).logits[0].to(ids.device)
    finally:
        hook.remove()


def _deviation(found: Tensor, expected: Tensor) -> float:
    return (found.float() - expected.float()).abs().max().item()


def _tolerance(expected: Tensor, *, roundings: int) -> float:
    """So many roundings of the largest value in the dtype it was computed in; fp32 products need some slack."""
    return max(roundings * torch.finfo(expected.dtype).eps, 64e-6) * max(1.0, expected.abs().max().item())
