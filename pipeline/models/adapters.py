"""LoRA and DoRA adapters with peft (an extra): attach one to a student, save it alone or merged, load it again.

    W' = W + (alpha / rank)·B·A                      LoRA, Hu et al., 2021, https://arxiv.org/abs/2106.09685
    W' = m·(W + (alpha / rank)·B·A) / ‖…‖ by row     DoRA, Liu et al., 2024, https://arxiv.org/abs/2402.09353

peft replaces a model's linear layers, so its hidden states are those of the adapted model. A head with an adapter is
no longer one linear layer: `open_head` then runs the model's own head, a chunk of positions at a time. That costs three
products of D·V per position (logits, logits again in the backward pass, dHidden), the same as the fused head that
trains W, and W + B·A is never built. (DoRA needs the norms of its rows: peft builds W + B·A for them once per chunk.)

An adapter directory holds adapter_config.json, which names the base model, instead of config.json.
"""

from __future__ import annotations

import functools
import sys
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
from pipeline.models.paths import adapter_base

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Which layers get an adapter, and of which size."""

    rank: int
    alpha: float  # W' = W + alpha/rank·B·A
    dropout: float = 0.0  # on the input of A
    targets: Sequence[str] = ()  # last parts of the names of linear layers; default: all but the head
    dora: bool = False
    head: bool = False  # adapt the vocabulary head too
    merged: bool = False  # merge the adapter into a plain model at the end instead of saving it alone


def attach(model: PreTrainedModel, lora: Lora, *, base: str, revision: str | None = None, seed: int) -> PeftModel:
    """Attach adapters to `model` in place and freeze everything else. A is random from `seed`, B is zero.

    Args:
        base, revision: of the base model, to write to adapter_config.json. Without a name there is none to load, and
            `load_model` refuses the adapter.

    Raises:
        ConfigError: the model has no such layers, or DoRA meets rows of zeros and the adapter is to be saved alone.
        ModelError: peft is not installed.
    """
    require_peft("`lora_rank`")
    from peft import LoraConfig, get_peft_model

    linear = _linear_layers(model)
    head = next((name for name, module in model.named_modules() if module is model.get_output_embeddings()), None)
    ends = sorted({name.rpartition(".")[2] for name in linear if name != head})
    for target in lora.targets:
        if not any(name == target or name.endswith(f".{target}") for name in linear if name != head):
            raise ConfigError(
                f"`lora_targets` {','.join(lora.targets)}: the model has no linear layer {target}, expected "
                f"{', '.join(ends)}, or auto for all of them."
                + (" The head has an option of its own, `lora_head`." if target == head else "")
            )
    targets = list(lora.targets) or ends
    # The last part of a name may match the head as well: exclude or include the head by its full name.
    exclude = None if lora.head or head is None or head.rpartition(".")[2] not in targets else [head]
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=[*targets, head] if lora.head and head is not None else targets,
        exclude_modules=exclude,
        use_dora=lora.dora,
        task_type="CAUSAL_LM" if objective_of(model.config) == "causal" else None,
        revision=revision,
    )
    # The first is about a tied head, which `merged` unties; the second about peft's own use of transformers.
    warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about Conv1D, whose transposed weight peft detects
        adapted = get_peft_model(model, config)
    if lora.dora:
        _keep_zero_rows(adapted, lora, head)
    adapted.peft_config["default"].base_model_name_or_path = base
    # Otherwise peft saves the [V, D] head next to its adapter.
    adapted.save_pretrained = functools.partial(adapted.save_pretrained, save_embedding_layers=False)
    return adapted


def _keep_zero_rows(adapted: PeftModel, lora: Lora, head: str | None) -> None:
    """Keep rows of zeros, such as that of a padding token, at zero. peft would compute 0 / 0 for them.

    Their norm is replaced by the smallest positive number: 0 divided by it is 0 in the loss, in every gradient and in
    the merged weight. Other rows do not change.

    Raises:
        ConfigError: the adapter is to be saved alone, and would divide by 0 wherever it is loaded.
    """
    for name, module in adapted.get_base_model().named_modules():
        for layer in getattr(module, "lora_magnitude_vector", {}).values():
            zeros, rows = int((layer.weight == 0).sum()), layer.weight.numel()
            if not zeros:
                continue
            if not lora.merged:
                option = "`lora_head`" if name == head else "`dora`"
                raise ConfigError(
                    f"`dora`: {zeros} of the {rows:,} rows of {name} {'is' if zeros == 1 else 'are'} zero, as the row "
                    "of a padding token often is. A row of zeros has no direction, so an adapter that is saved alone "
                    f"would give NaN wherever it is loaded. Use `merge_adapter=True`, or leave out {option}."
                )
            layer.get_weight_norm = functools.partial(_positive_norms, layer.get_weight_norm)


def _positive_norms(norms: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
    found = norms(*args, **kwargs)
    return found.clamp(min=torch.finfo(found.dtype).tiny)


def merged(adapted: PeftModel) -> PreTrainedModel:
    """The plain model with the adapter merged into its weights; `adapted` cannot be used any more.

    A head that is tied to the embeddings and has an adapter is untied: the embeddings have no adapter.
    """
    model = adapted.get_base_model()
    output, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if hasattr(output, "base_layer") and output.base_layer.weight is embeddings.weight:
        # The bias too: a BERT holds it under two names, and all ties are removed together.
        for name, parameter in list(output.base_layer.named_parameters()):
            setattr(output.base_layer, name, nn.Parameter(parameter.detach().clone()))
        model.config.tie_word_embeddings = False
    adapted.__dict__.pop("save_pretrained", None)
    model = adapted.merge_and_unload()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model


def with_adapter(model: PreTrainedModel, directory: str) -> PreTrainedModel:
    """`model` with the adapter of a directory merged into it.

    Raises:
        ModelError: the adapter does not fit the model, or peft is not installed.
    """
    require_peft(directory)
    from peft import PeftModel
    from safetensors import SafetensorError

    place = str(Path(directory).expanduser())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted = PeftModel.from_pretrained(model, place)
            keys = adapted.load_adapter(place, "default")  # again, for its result, which the first call only warns of
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{directory}: its adapter cannot be put on {adapter_base(directory)}: {first.rstrip('.')}. Check that the "
            "base model is the one it was trained on."
        ) from error
    if unmatched := [key for key in (*keys.missing_keys, *keys.unexpected_keys) if ".lora_" in key]:
        raise ModelError(
            f"{directory}: its adapter does not fit {adapter_base(directory)}: {len(unmatched)} weights are in only "
            f"one of them, such as {unmatched[0]}. Check that the base model is the one it was trained on."
        )
    return merged(adapted)


def has_adapters(model: PreTrainedModel) -> bool:
    """Whether layers of a loaded model have adapters that are not merged."""
    if "peft" not in sys.modules:
        return False
    from peft.tuners.tuners_utils import BaseTunerLayer

    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


def require_peft(what: str) -> None:
    """Raise ModelError unless peft is installed. `what` needs it: an option in backticks, or a directory."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ModelError(f"{what}: adapters need the peft package: pip install 'distill[peft]'") from error


def _linear_layers(model: PreTrainedModel) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
