"""LoRA and DoRA adapters by way of peft (an extra): put on a student, saved alone or merged, and found again.

    W' = W + (alpha / rank)·B·A                      LoRA, Hu et al., 2021, https://arxiv.org/abs/2106.09685
    W' = m·(W + (alpha / rank)·B·A) / ‖…‖ by row     DoRA, Liu et al., 2024, https://arxiv.org/abs/2402.09353

peft puts its layers in the place of a model's linear ones, so hidden states are the adapted model's without our doing.
A head with an adapter is no linear layer any more: `open_head` then takes the model's own way to its logits, the
general path, a chunk at a time. That is three products of D·V per position (logits, logits again in the backward pass,
dHidden), as many as a fused head that trains W takes, and W + BA is never built. (DoRA needs the lengths of its rows:
peft builds it to find them, once per chunk.)

An adapter directory holds adapter_config.json, which names its base model, in the place of config.json; `load_model`
merges the one into the other.
"""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pipeline.errors import ConfigError, ModelError
from pipeline.models.objective import objective_of

if TYPE_CHECKING:
    from peft import PeftModel

CONFIG_FILE = "adapter_config.json"


@dataclass(frozen=True, kw_only=True)
class Lora:
    """What is adapted, and how much."""

    rank: int
    alpha: float  # W' = W + alpha/rank·BA
    dropout: float = 0.0  # of what enters A
    targets: Sequence[str] = ()  # ends of the names of linear layers; default: all but the head
    dora: bool = False
    head: bool = False  # the vocabulary head too
    merged: bool = False  # into a plain model in the end: no adapter is left alone


def attach(model: PreTrainedModel, lora: Lora, *, base: str, seed: int) -> PeftModel:
    """Puts adapters on `model`, in its place; everything else in it is frozen. A is random from `seed`, B is zero.

    Args:
        base: what adapter_config.json shall name as the model that the adapter belongs to.

    Raises:
        ConfigError: targets that the model does not have, numbers that make no adapter, or one that could not be used
            alone.
    """
    require_peft("--lora-rank")
    from peft import LoraConfig, get_peft_model

    linear = _linear_layers(model)
    head = next((name for name, module in model.named_modules() if module is model.get_output_embeddings()), None)
    ends = sorted({name.rpartition(".")[2] for name in linear if name != head})
    for target in lora.targets:
        if not any(name == target or name.endswith(f".{target}") for name in linear if name != head):
            raise ConfigError(
                f"--lora-targets {','.join(lora.targets)}: the model has no linear layer {target}, expected "
                f"{', '.join(ends)}, or auto for all of them"
                + (". The head has an option of its own, --lora-head." if target == head else ".")
            )
    targets = list(lora.targets) or ends
    # An end of a name may be the head's too: take that out, or put it in, by its full name.
    exclude = None if lora.head or head is None or head.rpartition(".")[2] not in targets else [head]
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=[*targets, head] if lora.head and head is not None else targets,
        exclude_modules=exclude,
        use_dora=lora.dora,
        task_type="CAUSAL_LM" if objective_of(model.config) == "causal" else None,
    )
    # peft says the first of a tied head, which `merged` unties, the second of its own use of transformers.
    warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Conv1D, whose orientation it finds out
        adapted = get_peft_model(model, config)
    if lora.dora:
        _keep_zero_rows(adapted, lora, head)
    adapted.peft_config["default"].base_model_name_or_path = base
    # Otherwise peft saves the whole [V, D] head beside its adapter.
    adapted.save_pretrained = functools.partial(adapted.save_pretrained, save_embedding_layers=False)
    return adapted


def _keep_zero_rows(adapted: PeftModel, lora: Lora, head: str | None) -> None:
    """A row of zeros, such as that of a padding token, stays one; peft would divide it by its length, 0 by 0.

    Its length is taken to be the smallest number there is: 0 divided by that is 0, in the loss, in every gradient and
    when it is merged. Other rows are longer, and as they were.

    Raises: ConfigError if the adapter is to be saved alone: whoever else loads it would divide by 0.
    """
    for name, module in adapted.get_base_model().named_modules():
        for layer in getattr(module, "lora_magnitude_vector", {}).values():
            zeros, rows = int((layer.weight == 0).sum()), layer.weight.numel()
            if not zeros:
                continue
            if not lora.merged:
                less = "--lora-head" if name == head else "--dora"
                raise ConfigError(
                    f"--dora: {zeros} of the {rows:,} rows of {name} {'is' if zeros == 1 else 'are'} zero, as that of "
                    "a padding token often is: without a direction, so an adapter alone would give NaN wherever it is "
                    f"loaded. Add --merge-adapter, or leave out {less}."
                )
            layer.get_weight_norm = functools.partial(_at_least_tiny, layer.get_weight_norm)


def _at_least_tiny(lengths: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
    found = lengths(*args, **kwargs)
    return found.clamp(min=torch.finfo(found.dtype).tiny)


def merged(adapted: PeftModel) -> PreTrainedModel:
    """The plain model that computes what the adapted one does, made of the latter.

    Where head and embeddings are one matrix and the head has an adapter, they are untied: the embeddings have none.
    """
    model = adapted.get_base_model()
    output, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if hasattr(output, "base_layer") and output.base_layer.weight is embeddings.weight:
        # Its bias too: a BERT has it under two names, and all ties are given up together.
        for name, parameter in list(output.base_layer.named_parameters()):
            setattr(output.base_layer, name, nn.Parameter(parameter.detach().clone()))
        model.config.tie_word_embeddings = False
    adapted.__dict__.pop("save_pretrained", None)
    model = adapted.merge_and_unload()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model


def base_of(name: str) -> str | None:
    """The model that an adapter directory belongs to; None for anything else.

    Raises: ModelError if it is one that cannot be read.
    """
    file = Path(name).expanduser() / CONFIG_FILE
    if not file.is_file():
        return None
    try:
        base = json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{file}: not an adapter's configuration ({error}). Check the directory.") from error
    if not isinstance(base, str):
        raise ModelError(f"{file}: names no base model, so the adapter belongs to nothing. Check the directory.")
    return base


def with_adapter(model: PreTrainedModel, directory: str) -> PreTrainedModel:
    """`model` with the adapter in a directory merged into it.

    Raises: ModelError if the adapter does not fit.
    """
    require_peft(directory)
    from peft import PeftModel
    from safetensors import SafetensorError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted = PeftModel.from_pretrained(model, str(Path(directory).expanduser()))
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{directory}: its adapter cannot be put on {base_of(directory)}: {first.rstrip('.')}. Check that the base "
            "model is the one it was trained on."
        ) from error
    return merged(adapted)


def require_peft(what: str) -> None:
    """Raises ModelError with what to install if peft is not there."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ModelError(f"{what}: adapters need the peft package: pip install 'distill[peft]'") from error


def _linear_layers(model: PreTrainedModel) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
