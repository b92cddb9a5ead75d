"""Hidden states and the vocabulary head as two steps, for any language model of transformers, causal or masked.

A forward pass of `…ForCausalLM` ends in logits [B, T, V]: at V = 128k and 8k positions that is 4 GB in fp32, and the
largest tensor of either stage. Both stages instead take the last hidden states [B, T, D] of its body (decoder, or
encoder of a masked model) and run the head on a chunk of positions at a time.

Two ways to run a head:

    linear    logits = hidden @ weight.T + bias, when the model does nothing else. The fused loss needs this form.
    own       the model's own `forward` with its body replaced by the given states: whatever the architecture does to
              its logits (soft-capping, scaling, the transform of a BERT) is done by its own code.

`open_head` does not guess from class names: it tries both against the model's own logits on a few positions, small
logits and large, and takes the linear one if it agrees, the other if not, and refuses to go on if neither does.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from pipeline.errors import ModelError
from pipeline.models.placement import compute_device, is_here

PROBE_TOKENS = 12
LOUD_LOGIT = 100.0


@dataclass(frozen=True, kw_only=True)
class Head:
    """The vocabulary head of `model`, cut to the tokenizer's real vocabulary.

    Attributes:
        linear: whether `weight` and `bias` are all there is to it.
        vocab_size: V; rows of the embedding matrix beyond it are padding.
        masked: whether the model sees both sides of a token.
    """

    model: PreTrainedModel
    linear: bool
    vocab_size: int
    masked: bool = False

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

    def hidden_states(self, input_ids: Tensor, position_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """[B, T], [B, T] → [B, T, D]: what the head is applied to.

        Packed documents are kept apart by position ids that restart at 0, from which transformers builds a
        block-diagonal mask; that holds only without an attention mask and without a key-value cache. A masked model
        has one document per row, numbers positions as it was trained to, and must not see the padding.

        Args:
            attention_mask: [B, T] int64, 1 but for padding; for masked models, default: nothing is padding.
        """
        return _body(self.model)(**_inputs(self.masked, input_ids, position_ids, attention_mask))[0].to(self.device)

    def states(
        self, layers: Sequence[int], input_ids: Tensor, position_ids: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """`hidden_states`, and those of some layers [B, T, D]: 0 the embeddings' output, i that of layer i.

        The last layer's are what the head is applied to, with the norm that follows it in most architectures.
        """
        inputs = _inputs(self.masked, input_ids, position_ids, attention_mask)
        output = _body(self.model)(**inputs, output_hidden_states=True)
        return output[0], {layer: output.hidden_states[layer] for layer in layers}

    def layers(self) -> tuple[int, int]:
        """L, the number of the last layer, and D, the width of all their states.

        Raises: ModelError if the model does not give its layers' states as `states` takes them to be.
        """
        device = self.device
        ids = torch.arange(PROBE_TOKENS, device=device)[None] % self.vocab_size
        inputs = _inputs(self.masked, ids, torch.arange(PROBE_TOKENS, device=device)[None], None)
        with evaluating(self.model), torch.no_grad():
            output = _body(self.model)(**inputs, output_hidden_states=True)
        found = getattr(output, "hidden_states", None) or ()
        widths = {tuple(each.shape) for each in found}
        if len(found) < 2 or len(widths) > 1 or not torch.equal(found[-1], output[0]):
            raise ModelError(
                f"{type(self.model).__name__} does not give the hidden states of its layers as other models do "
                f"({len(found)} of shapes {sorted(widths)}): features cannot be distilled from or into it."
            )
        return len(found) - 1, found[-1].shape[-1]

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
        """`logits` by the model's own forward, its body replaced by `hidden`."""
        with _body_returning(self.model, hidden[None]):
            dummy = torch.zeros((1, len(hidden)), dtype=torch.long, device=hidden.device)
            # The class's forward: on a student in training the instance's is the loss, which calls this.
            output = type(self.model).forward(self.model, input_ids=dummy, use_cache=False)
            return output.logits[0, :, : self.vocab_size]


def open_head(model: PreTrainedModel, vocab_size: int, *, masked: bool = False) -> Head:
    """Finds the way to run the model's head that reproduces the model's own logits.

    Args:
        masked: whether the model is a masked language model.

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
    if masked and "attention_mask" not in inspect.signature(_body(model).forward).parameters:
        raise ModelError(f"{name} takes no attention mask, so it cannot tell text from padding. Use another model.")
    device = compute_device(output)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab_size, (1, PROBE_TOKENS), generator=generator).to(device)
    positions = torch.arange(PROBE_TOKENS, device=device)[None]
    with evaluating(model), torch.no_grad():
        # Twice, the second time with large logits: soft-capping leaves the small ones of a new student alone.
        inputs = _inputs(masked, ids, positions, None)
        quiet = _logits_of_amplified_states(model, inputs, 1.0)[:, :vocab_size]
        if not quiet.isfinite().all():
            raise ModelError(
                f"{name}: its logits hold NaN or infinity: its weights are damaged, or too large for "
                f"{str(quiet.dtype).removeprefix('torch.')}. Use another dtype or checkpoint."
            )
        factor = LOUD_LOGIT / max(quiet.abs().max().item(), 1e-3)
        loud = _logits_of_amplified_states(model, inputs, factor)[:, :vocab_size]
        worst = {}
        hidden = Head(model=model, linear=False, vocab_size=vocab_size, masked=masked).hidden_states(ids, positions)[0]
        # The decoder of an ELECTRA takes states of another width than its body gives.
        may_be_linear = isinstance(output, nn.Linear) and output.weight.shape[1] == hidden.shape[-1]
        for linear in (True, False) if may_be_linear and is_here(output.weight) else (False,):
            head = Head(model=model, linear=linear, vocab_size=vocab_size, masked=masked)
            ratios = [
                deviation(head.logits(hidden * by), expected) / tolerance(expected, roundings=4)
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
        off, allowed = deviation(found, than), tolerance(expected, roundings=roundings)
        if not off <= allowed:
            raise ModelError(
                f"{type(model).__name__}: a document packed behind another one changes by {off:.2g} "
                f"(allowed {allowed:.2g}), so they attend to one another. Use --no-packing."
            )


def check_padding(model: PreTrainedModel, head: Head) -> None:
    """Raises `ModelError` if a document's states in this masked model depend on what pads its row."""
    device = head.device
    generator = torch.Generator().manual_seed(1)
    document, padding = (torch.randint(head.vocab_size, (1, n), generator=generator).to(device) for n in (7, 5))
    rows = torch.cat([torch.cat([document, torch.zeros_like(padding)], dim=1), torch.cat([document, padding], dim=1)])
    positions = torch.arange(rows.shape[1], device=device)[None]
    there = (positions < document.shape[1]).long().expand(len(rows), -1)
    with evaluating(model), torch.no_grad():
        expected = head.hidden_states(document, positions[:, : document.shape[1]])[0]
        zeros, others = head.hidden_states(rows, positions.expand(len(rows), -1), there)[:, : document.shape[1]]
    for found, than, roundings in ((zeros, expected, 16), (zeros, others, 4)):
        off, allowed = deviation(found, than), tolerance(expected, roundings=roundings)
        if not off <= allowed:
            raise ModelError(
                f"{type(model).__name__}: a document changes by {off:.2g} (allowed {allowed:.2g}) when its row "
                "is padded, so it sees the padding: rows of different lengths cannot share a batch. Use another model."
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


def _body(model: PreTrainedModel) -> nn.Module:
    return getattr(model, model.base_model_prefix)


class _StatesOnly(BaseModelOutputWithPast):
    """A body's output of which only the states are there: what else an architecture may look for in it is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class _Returning(nn.Module):
    """In the place of `body`: gives `hidden`, and whatever else of the body a head refers to."""

    def __init__(self, hidden: Tensor, body: nn.Module) -> None:
        super().__init__()
        self.hidden = hidden
        object.__setattr__(self, "body", body)  # no submodule: it stays where it is

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.body, name)

    def forward(self, *_: object, **__: object) -> BaseModelOutputWithPast:
        return _StatesOnly(last_hidden_state=self.hidden)


@contextlib.contextmanager
def _body_returning(model: PreTrainedModel, hidden: Tensor) -> Iterator[None]:
    name = model.base_model_prefix
    body = model._modules[name]
    model._modules[name] = _Returning(hidden, body)
    try:
        yield
    finally:
        model._modules[name] = body


def _inputs(masked: bool, input_ids: Tensor, position_ids: Tensor, attention_mask: Tensor | None) -> dict[str, Any]:
    """What a model's forward takes; see `Head.hidden_states`."""
    if not masked:
        return {"input_ids": input_ids, "position_ids": position_ids, "use_cache": False}
    # No position ids: RoBERTa's begin at its padding token's id + 1, and every model knows its own.
    everything = torch.ones_like(input_ids)
    return {"input_ids": input_ids, "attention_mask": everything if attention_mask is None else attention_mask}


def _logits_of_amplified_states(model: PreTrainedModel, inputs: dict[str, Any], factor: float) -> Tensor:
    """The model's own logits [T, ≥V] for one sequence, the states between body and head multiplied by `factor`."""

    def amplify(_: nn.Module, __: object, output: BaseModelOutputWithPast) -> BaseModelOutputWithPast:
        output["last_hidden_state"] = output[0] * factor
        return output

    hook = _body(model).register_forward_hook(amplify)
    try:
        return model(**inputs).logits[0].to(inputs["input_ids"].device)
    finally:
        hook.remove()


def deviation(found: Tensor, expected: Tensor) -> float:
    """The largest difference."""
    return (found.float() - expected.float()).abs().max().item()


def tolerance(expected: Tensor, *, roundings: int) -> float:
    """So many roundings of the largest value in the dtype it was computed in; fp32 products need some slack."""
    return max(roundings * torch.finfo(expected.dtype).eps, 64e-6) * max(1.0, expected.abs().max().item())
