"""The body of a language model: the module that turns token ids into the states that the vocabulary head takes.

It is found by running the model, not by its name: `base_model_prefix` of an OPT names a module that its forward pass
skips, and that of a Llama 4 one that its text-only class does not have.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from pipeline.errors import ModelError
from pipeline.models.devices.placement import compute_device


class _Called(Exception):
    """Ends the forward pass at the first call of a module that may be the body."""


def find_body(model: PreTrainedModel) -> str:
    """The name of the first module that the model's forward pass calls and that contains its token embeddings.

    Nothing is computed: the forward pass ends with that call.

    Raises:
        ModelError: the model looks up its token embeddings itself.
    """
    embeddings = model.get_input_embeddings()
    containing = [
        (name, module)
        for name, module in model.named_modules()
        if module is not model and module is not embeddings and any(each is embeddings for each in module.modules())
    ]
    called: list[str] = []

    def end(name: str) -> NoReturn:
        called.append(name)
        raise _Called

    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: end(name), prepend=True) for name, module in containing
    ]
    try:
        with contextlib.suppress(_Called), torch.no_grad():
            ids = torch.zeros((1, 2), dtype=torch.long, device=compute_device(model.get_output_embeddings()))
            # The forward of the class: that of a student in training is replaced by the loss.
            type(model).forward(model, input_ids=ids)
    finally:
        for hook in hooks:
            hook.remove()
    if not called:
        raise ModelError(
            f"{type(model).__name__}: found no module that turns tokens into hidden states, expected one below the "
            "vocabulary head. This architecture is not supported; use another model."
        )
    return called[0]


class _StatesOnly(BaseModelOutputWithPast):
    """Output of a body that has hidden states only; every other attribute that a head may look up is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class _Returning(nn.Module):
    """Replaces `body`: returns `hidden`, and passes on every other attribute that a head may look up."""

    def __init__(self, hidden: Tensor, body: nn.Module) -> None:
        super().__init__()
        self.hidden = hidden
        object.__setattr__(self, "body", body)  # not registered as a submodule, so that it is neither moved nor saved

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.body, name)

    def forward(self, *_: object, **__: object) -> BaseModelOutputWithPast:
        return _StatesOnly(last_hidden_state=self.hidden)


@contextlib.contextmanager
def body_returning(model: PreTrainedModel, name: str, hidden: Tensor) -> Iterator[None]:
    """Replaces the body `name` inside the block by a module that returns `hidden`."""
    parent, _, leaf = name.rpartition(".")
    modules = model.get_submodule(parent)._modules
    body = modules[leaf]
    assert body is not None
    modules[leaf] = _Returning(hidden, body)
    try:
        yield
    finally:
        modules[leaf] = body
