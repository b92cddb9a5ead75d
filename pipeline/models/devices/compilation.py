"""Layers compiled by `torch.compile`, which puts norms, rotary embeddings and activations into few kernels.

Layer by layer, not the body as a whole: layers of one kind share their code, so a deep model is compiled as fast as a
shallow one, and what happens between layers (masks, hidden states that are kept) is not traced. Lengths are symbols:
batches of other shapes are not compiled again. Attention of `Documents`, whose lengths are Python numbers, is left out
(`isolation.document_attention`), and so are calls with a key-value cache. Parameters keep their names; hooks of a layer
stay outside of what is compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Cache

from pipeline.errors import ConfigError
from pipeline.models.head import Head, deviation, probing, tolerance
from pipeline.models.isolation.document_attention import Documents
from pipeline.models.padding import model_inputs

BACKEND = "inductor"

RECOMPILATIONS = 64
"""Limit of torch for the code of one function, which all layers share: each kind of layer is compiled for training and
evaluation, with and without a mask, for one row and for several."""


class _Row(NamedTuple):
    input_ids: np.ndarray
    segment_lengths: np.ndarray


class CompiledLayers:
    """Compiles the layers of a model, in place; `close` undoes it. They are tried on a small batch.

    Raises:
        ConfigError: they cannot be compiled on this machine, or compute something else.
    """

    def __init__(self, head: Head) -> None:
        self._undo = ExitStack()
        name = type(head.model).__name__
        layers = _layers(head.body)
        if not layers or any("forward" in vars(layer) for layer in layers):
            raise ConfigError(
                f"`compile`: {name} has no list of layers, or they were changed for several devices. Leave it out."
            )
        try:
            with probing(head.model):
                expected = _states(head)
                self._compile(layers)
                found = _states(head)
        except torch.OutOfMemoryError:
            self.close()
            raise
        except Exception as error:  # compilers and drivers raise anything
            self.close()
            reason = " ".join(str(error).split())[:300]
            raise ConfigError(
                f"`compile`: {name} cannot be compiled on {head.device}: {type(error).__name__}: {reason}. On a CPU it "
                "takes a C++ compiler, on a GPU Triton. Install it, or leave `compile` out."
            ) from error
        if (ratio := deviation(found, expected) / tolerance(expected, roundings=16)) > 1.0:
            self.close()
            raise ConfigError(
                f"`compile`: compiled layers of {name} give states that differ from its own by {ratio:.2g} times what "
                "rounding explains. Leave it out."
            )

    def close(self) -> None:
        self._undo.close()

    def _compile(self, layers: list[nn.Module]) -> None:
        self._undo.callback(torch.compiler.reset)  # else the code of this model counts against the limit of the next
        self._undo.enter_context(torch._dynamo.config.patch(recompile_limit=RECOMPILATIONS))
        compiled = torch.compile(_forward, backend=BACKEND, dynamic=True)
        for layer in layers:
            layer.forward = partial(_dispatch, compiled, layer)  # type: ignore[method-assign]
            self._undo.callback(vars(layer).pop, "forward")


def _forward(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return type(layer).forward(layer, *args, **kwargs)  # by its class at the time of the call: FSDP makes another one


def _dispatch(compiled: Callable[..., Any], layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    cached = any(isinstance(each, Cache) for each in (*args, *kwargs.values()))
    return (_forward if cached else compiled)(layer, *args, **kwargs)


def _layers(body: nn.Module) -> list[nn.Module]:
    """The members of the outermost lists of modules."""
    if isinstance(body, nn.ModuleList):
        return list(body)
    return [layer for child in body.children() for layer in _layers(child)]


def _states(head: Head) -> Tensor:
    """[2, 10, D] of two rows of two documents, one of them padded."""
    generator = np.random.default_rng(4)
    rows = [_Row(generator.integers(head.vocab_size, size=sum(each)), np.array(each)) for each in ((9, 1), (6, 2))]
    inputs = [each.to(head.device) for each in model_inputs(rows, with_mask=head.reads_padding_mask)]
    documents = Documents.of_rows(rows).to(head.device) if head.padding_free else None
    return head.hidden_states(*inputs, documents=documents)
