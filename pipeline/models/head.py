"""Hidden states and the vocabulary head as two steps, for any language model of transformers, causal or masked.

A forward pass of `…ForCausalLM` ends in logits [B, T, V]: at V = 128k and 8k positions 4 GB in fp32, the largest tensor
of either stage. Both stages take the last hidden states [B, T, D] of the body instead (decoder, or encoder of a masked
model) and run the head on a chunk of positions at a time, in one of two ways:

    linear    logits = hidden @ weight.T + bias, if the model does nothing else; the fused loss needs this form
    own       the model's own `forward` with its body replaced by the given states, so that soft-capping, scaling or
              the transform of a BERT are computed by the model's own code

`open_head` tests both against the model's own logits instead of deciding by class name. `head_export` writes a head to
a cache, `teacher_head` computes with one that was read from a cache.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from pipeline.errors import ModelError
from pipeline.models.body import body_returning, find_body
from pipeline.models.devices.buffers import empty_rows
from pipeline.models.devices.placement import compute_device, is_here
from pipeline.models.devices.precision import full_float32
from pipeline.models.isolation.document_attention import Documents
from pipeline.models.isolation.length_limits import (
    LimitedRotary,
    by_document,
    limited_rotaries,
    separated,
)

PROBE_TOKENS = 12
LOUD_LOGIT = 100.0


@dataclass(frozen=True, kw_only=True)
class Head:
    """The vocabulary head of `model`, cut to the tokenizer's real vocabulary.

    Attributes:
        linear: the head is `weight` and `bias` and nothing else.
        vocab_size: V; rows of the output matrix beyond it are padding.
        masked: the model is a masked language model, which attends to both sides of a token.
        padding_free: the model runs on the documents alone if it is told where they are (`isolation.padding_free`).
    """

    model: PreTrainedModel
    linear: bool
    vocab_size: int
    masked: bool = False
    padding_free: bool = False

    @cached_property
    def body_name(self) -> str:
        """The name of the module that the head's input comes from."""
        return find_body(self.model)

    @property
    def body(self) -> nn.Module:
        """Looked up by its name: what trains the model may have wrapped it since."""
        return self.model.get_submodule(self.body_name)

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
        """Where the logits are computed."""
        return compute_device(self.model.get_output_embeddings())

    @property
    def sums_in_fp32(self) -> bool:
        """Whether the device can give the fp32 sums of a 16-bit product as they are, without rounding them first.

        torch has this product for CUDA alone, since 2.8 (`aten::mm.dtype`; ROCm refuses it).
        """
        weight = self.weight
        known = "dtype_out" in torch.ops.aten.mm.overloads() and torch.version.hip is None
        return self.linear and known and weight.is_cuda and weight.dtype in (torch.bfloat16, torch.float16)

    @property
    def logits_dtype(self) -> torch.dtype:
        """The dtype of `logits` without gradients, if the head is linear."""
        return torch.float32 if self.sums_in_fp32 else self.weight.dtype

    @functools.cached_property
    def rotaries(self) -> tuple[LimitedRotary, ...]:
        """Rotary embeddings that depend on the length of a document."""
        return limited_rotaries(self.body)

    @property
    def reads_padding_mask(self) -> bool:
        """Whether `hidden_states` has to know where a row's padding is."""
        return self.masked or bool(self.rotaries)

    def separates(self, shorter: int, longer: int) -> bool:
        """Whether the states of a token differ between documents of `shorter` and of `longer` tokens."""
        return separated(self.rotaries, shorter, longer)

    def hidden_states(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        documents: Documents | None = None,
    ) -> Tensor:
        """[B, T], [B, T] → [B, T, D]: the states that the head is applied to.

        Packed documents are kept apart by position ids that restart at 0: transformers builds a block-diagonal mask
        from them, but only without an attention mask and without a key-value cache. A masked model has one document
        per row, counts positions itself, and must not attend to padding. The states of a document do not depend on
        what shares its batch, also where the model switches at a length (`isolation/length_limits.py`).

        Args:
            attention_mask: [B, T] int64, 0 at padding and 1 elsewhere; used only if `reads_padding_mask`. Default:
                all 1.
            documents: of this batch; used only if `padding_free`, and then the states of padding are 0.
        """
        return self._run(input_ids, position_ids, attention_mask, documents)[0].to(self.device)

    def states(
        self,
        layers: Sequence[int],
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        documents: Documents | None = None,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """`hidden_states`, and the states [B, T, D] of some layers: 0 is the embeddings' output, i that of layer i.

        The last layer's states are those that the head is applied to, after the final norm that most models have.
        """
        last, states = self._run(input_ids, position_ids, attention_mask, documents, layers)
        return last.to(self.device), dict(zip(layers, states, strict=True))

    def _run(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None,
        documents: Documents | None,
        layers: Sequence[int] = (),
    ) -> tuple[Tensor, list[Tensor]]:
        """The last states that the model's body returns, and those of some layers."""
        options: dict[str, Any] = {"output_hidden_states": True} if layers else {}
        if self.padding_free and documents is not None:
            options |= documents.arguments(input_ids.device)
            flat = documents.flat(input_ids), documents.flat(position_ids)
            with by_document(self.rotaries, flat[1]):
                output = self.body(**_inputs(False, *flat, None), **options)
            last, *states = (
                documents.padded(each, input_ids.shape)
                for each in (output[0], *(output.hidden_states[layer] for layer in layers))
            )
            return last, states
        inputs = _inputs(self.masked, input_ids, position_ids, attention_mask)
        if self.masked:  # the positions that the model counts itself
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        with by_document(self.rotaries, position_ids, attention_mask):
            output = self.body(**inputs, **options)
        return output[0], [output.hidden_states[layer] for layer in layers]

    def layers(self) -> tuple[int, int]:
        """The number of layers L, which is the number of the last one, and the width D of their states.

        Raises:
            ModelError: the model does not return the states of its layers in the form that `states` expects.
        """
        device = self.device
        ids = torch.arange(PROBE_TOKENS, device=device)[None] % self.vocab_size
        inputs = _inputs(self.masked, ids, torch.arange(PROBE_TOKENS, device=device)[None], None)
        with probing(self.model):
            output = self.body(**inputs, output_hidden_states=True)
        found: tuple[Tensor, ...] = getattr(output, "hidden_states", None) or ()
        widths = {tuple(each.shape) for each in found}
        if len(found) < 2 or len(widths) > 1 or not torch.equal(found[-1], output[0]):
            raise ModelError(
                f"{type(self.model).__name__}: found {len(found)} hidden states of shapes {sorted(widths)}, expected "
                "one of the same shape for each layer, the last being the head's input. Hidden states of this model "
                "can be neither stored nor matched."
            )
        return len(found) - 1, found[-1].shape[-1]

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """[n, D] → [n, V], in the dtype that the model computes them in; without gradients in `logits_dtype`.

        Args:
            out: buffer [≥n, V] of `logits_dtype` to write into; used only by a linear head, and without gradients.
        """
        if not self.linear:
            return self.own_logits(hidden)
        weight = self.weight[: self.vocab_size]
        bias = None if self.bias is None else self.bias[: self.vocab_size]
        hidden = hidden.to(weight.dtype)
        if self.sums_in_fp32 and not torch.is_grad_enabled():
            out = empty_rows(len(hidden), self.vocab_size, torch.float32, hidden.device) if out is None else out
            out = torch.mm(hidden, weight.T, out_dtype=torch.float32, out=out[: len(hidden)])
            return out if bias is None else out.add_(bias)
        if out is not None:
            out = torch.mm(hidden, weight.T, out=out[: len(hidden)])
            return out if bias is None else out.add_(bias)
        return nn.functional.linear(hidden, weight, bias)

    def own_logits(self, hidden: Tensor) -> Tensor:
        """`logits` from the model's own forward pass, with its body replaced by `hidden`."""
        with body_returning(self.model, self.body_name, hidden[None]):
            dummy = torch.zeros((1, len(hidden)), dtype=torch.long, device=hidden.device)
            # The forward of the class: that of a student in training is replaced by the loss, which calls this method.
            output = type(self.model).forward(self.model, input_ids=dummy, use_cache=False)
            return output.logits[0, :, : self.vocab_size]


def open_head(model: PreTrainedModel, vocab_size: int, *, masked: bool = False) -> Head:
    """The head of `model`, run in the first of the two ways that reproduces the model's own logits.

    Args:
        masked: the model is a masked language model.

    Raises:
        ModelError: neither way reproduces them, they are not finite, the model has no output row for some token, or it
            cannot be run on text alone.
    """
    name = type(model).__name__
    output = model.get_output_embeddings()
    if output is None:
        raise ModelError(f"{name} has no output embeddings: expected a language-modelling head. Use another model.")
    if output.weight.shape[0] < vocab_size:
        raise ModelError(
            f"{name} predicts {output.weight.shape[0]:,} tokens, the vocabulary has {vocab_size:,}. Use a model and a "
            "tokenizer (or cache) that belong together."
        )
    own = Head(model=model, linear=False, vocab_size=vocab_size, masked=masked)
    with _supported(name):
        body = own.body
    if masked and "attention_mask" not in inspect.signature(body.forward).parameters:
        raise ModelError(f"{name} takes no attention mask, so it would attend to padding. Use another model.")
    device = compute_device(output)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab_size, (1, PROBE_TOKENS), generator=generator).to(device)
    positions = torch.arange(PROBE_TOKENS, device=device)[None]
    with probing(model):
        # Small and large logits: soft-capping does not change the small ones of a randomly initialised student.
        inputs = _inputs(masked, ids, positions, None)
        with _supported(name):
            quiet = _logits_of_amplified_states(own, inputs, 1.0)[:, :vocab_size]
        if not quiet.isfinite().all():
            raise ModelError(
                f"{name}: its logits contain NaN or infinity: the weights are damaged, or too large for "
                f"{str(quiet.dtype).removeprefix('torch.')}. Use another `dtype` or checkpoint."
            )
        factor = LOUD_LOGIT / max(quiet.abs().max().item(), 1e-3)
        loud = _logits_of_amplified_states(own, inputs, factor)[:, :vocab_size]
        worst = {}
        hidden = own.hidden_states(ids, positions)[0]
        # The output matrix of an ELECTRA takes states of another width than its body returns.
        may_be_linear = isinstance(output, nn.Linear) and output.weight.shape[1] == hidden.shape[-1]
        for linear in (True, False) if may_be_linear and is_here(output.weight) else (False,):
            head = Head(model=model, linear=linear, vocab_size=vocab_size, masked=masked)
            with _supported(name):
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


@contextlib.contextmanager
def _supported(name: str) -> Iterator[None]:
    """Errors of a model that cannot be run like this as ModelError; out of memory is raised as it is."""
    try:
        yield
    except (torch.OutOfMemoryError, ModelError):
        raise
    except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ModelError(
            f"{name}: cannot be run on text alone, as body and vocabulary head ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}). This architecture is not supported; use another model."
        ) from error


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; the own mode of every module is restored after it."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        model.train(modes[0][1])  # modules that are new in it
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def probing(model: nn.Module) -> Iterator[None]:
    """Inside the block a model computes as a comparison within rounding needs it: in evaluation mode, without gradients
    and without TF32."""
    with evaluating(model), torch.no_grad(), full_float32():
        yield


def _inputs(masked: bool, input_ids: Tensor, position_ids: Tensor, attention_mask: Tensor | None) -> dict[str, Any]:
    """Arguments of a body's forward pass; see `Head.hidden_states`."""
    if not masked:
        return {"input_ids": input_ids, "position_ids": position_ids, "use_cache": False}
    # No position ids: those of RoBERTa start at its padding token's id + 1, and every model computes its own.
    everything = torch.ones_like(input_ids)
    return {"input_ids": input_ids, "attention_mask": everything if attention_mask is None else attention_mask}


def _logits_of_amplified_states(head: Head, inputs: dict[str, Any], factor: float) -> Tensor:
    """The model's own logits [T, ≥V] for one sequence, with the head's input multiplied by `factor`."""

    def amplify(_: nn.Module, __: object, output: BaseModelOutputWithPast) -> BaseModelOutputWithPast:
        output["last_hidden_state"] = output[0] * factor
        return output

    hook = head.body.register_forward_hook(amplify)
    try:
        return head.model(**inputs).logits[0].to(inputs["input_ids"].device)
    finally:
        hook.remove()


def deviation(found: Tensor, expected: Tensor) -> float:
    """The largest absolute difference, in fp32."""
    return (found.float() - expected.float()).abs().max().item()


def deviation_of_most(found: Tensor, expected: Tensor) -> float:
    """The largest absolute difference; in 16 bits, the median over positions of the largest at each.

    A single token may amplify rounding errors a hundred times: in bfloat16, states of SmolLM2 with values up to 46
    differ by 12 at one position, and by 0.4 at the others, if the same text is in a row of another length. So this is
    for faults that change most positions.

    Args:
        found, expected: [..., D].
    """
    if torch.finfo(expected.dtype).bits > 16:
        return deviation(found, expected)
    return (found.float() - expected.float()).abs().amax(dim=-1).median().item()


def tolerance(expected: Tensor, *, roundings: int) -> float:
    """`roundings` rounding errors of the largest value in its dtype, and at least 64e-6, as fp32 products need."""
    return max(roundings * torch.finfo(expected.dtype).eps, 64e-6) * max(1.0, expected.abs().max().item())
