"""Loading language models and tokenizers from a name, a path or an object, and the fingerprints of what was loaded.

    a transformers directory, a hub name, a .gguf file        loaded; GGUF weights are dequantised by transformers
    the directory of an adapter                               loaded and merged into its base model
    a loaded model or tokenizer                               used as it is

Code that comes with a model runs only with `trust_remote_code`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import weakref
from collections.abc import Collection, Iterator
from typing import Any, TypeAlias

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from pipeline.errors import ConfigError, ModelError
from pipeline.hub import copies_if_unreachable
from pipeline.models.adapters import with_adapter
from pipeline.models.devices.placement import (
    begin_tensor_parallel,
    check_split,
    compute_device,
    computing_devices,
    named_tensors,
    parse_device_map,
    place_of,
)
from pipeline.models.head import evaluating
from pipeline.models.isolation.document_attention import forget_documents
from pipeline.models.objective import NAMES, Objective, auto_class
from pipeline.models.paths import TOKENIZER_FILES, adapter_source, locate_model

Model: TypeAlias = str | os.PathLike[str] | PreTrainedModel  # a name, a path, or a model that is loaded already

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FINGERPRINT_VALUES = 1024
# Attributes by which transformers turns on gradient checkpointing, of modules and of the whole model.
CHECKPOINTING, EMBEDDINGS_HOOK = "gradient_checkpointing", "_require_grads_hook"
# Parts of a configuration that do not change what a language model computes.
NOT_FINGERPRINTED = {"architectures", "dtype", "id2label", "label2id", "torch_dtype", "transformers_version"}

# What transformers raises for files that are missing, damaged or of another kind.
UNREADABLE = (OSError, ValueError, ImportError, KeyError, TypeError, SafetensorError, StrictDataclassError)


def model_name(model: Model) -> str:
    """The name to record and to show: of a loaded model where it came from, else its class.

    Raises:
        ConfigError: neither a name, nor a path, nor a model of transformers.
    """
    if isinstance(model, PreTrainedModel):
        return getattr(model.config, "_name_or_path", "") or type(model).__name__
    if isinstance(model, str | os.PathLike):
        return os.fspath(model)
    merge = " Merge the adapter first: model.merge_and_unload()." if hasattr(model, "merge_and_unload") else ""
    raise ConfigError(
        f"found a {type(model).__name__}, expected the name or path of a model, or a loaded transformers model.{merge}"
    )


def load_tokenizer(
    source: Model | PreTrainedTokenizerBase, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a named model; a tokenizer that is given as an object is returned.

    Raises:
        ConfigError: a loaded model, which has no tokenizer with it.
        ModelError: there is none, or it cannot be read.
    """
    if isinstance(source, PreTrainedTokenizerBase):
        return source
    name = model_name(source)
    if isinstance(source, PreTrainedModel):
        raise ConfigError(
            f"`tokenizer`: found none, expected one because {name} is given as a loaded model. Pass its tokenizer, "
            "for example AutoTokenizer.from_pretrained(NAME)."
        )
    place, gguf_file = locate_model(name, TOKENIZER_FILES)
    options = {"revision": revision, "trust_remote_code": trust_remote_code, **_gguf(gguf_file)}
    try:
        with _hub_or_copies(place):
            return AutoTokenizer.from_pretrained(place, **options)
    except UNREADABLE as error:
        _check_available(place, error)
        raise ModelError(
            f"{name}: its tokenizer cannot be loaded: {reason(error)}. Check the path, and the tokenizer's files there."
        ) from error


def load_config(
    model: Model, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedConfig | None:
    """The configuration of a model; for an adapter, that of its base model.

    None for a .gguf file, whose configuration is known only once it is loaded.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    if isinstance(model, PreTrainedModel):
        return model.config
    name = model_name(model)
    base, its_revision = adapter_source(name)
    if base is not None:
        return load_config(base, revision=revision or its_revision, trust_remote_code=trust_remote_code)
    place, gguf_file = locate_model(name)
    if gguf_file is not None:
        return None
    try:
        with _hub_or_copies(place):
            return AutoConfig.from_pretrained(place, revision=revision, trust_remote_code=trust_remote_code)
    except UNREADABLE as error:
        _check_available(place, error)
        raise ModelError(
            f"{name}: its configuration cannot be read: {reason(error)}. Check its config.json, or the name."
        ) from error


def load_model(
    model: Model,
    *,
    objective: Objective = "causal",
    dtype: str = "auto",
    device: torch.device | str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    device_map: str | None = None,
    tensor_parallel: bool = False,
    convert: bool = False,
) -> PreTrainedModel:
    """A language model in evaluation mode; an adapter is merged into its base model.

    A model that is given as an object is returned itself. It is moved only for an explicit `device`. The caller
    restores its mode.

    Args:
        objective: what the model was trained to predict; decides the class that it is loaded as.
        dtype: "auto" keeps the dtype of an object; otherwise it is float32 on a CPU (faster there, and exact) and the
            checkpoint's dtype elsewhere.
        device: None is the CPU and "auto" the first accelerator there is; both leave an object where it is, and so
            does the device of its head.
        device_map: spread the model over devices, CPU and disk: a strategy of accelerate, or a JSON file.
        tensor_parallel: split every layer over the processes of torchrun.
        convert: whether an object is converted to another `dtype` in place, instead of being refused.

    Raises:
        ModelError: it cannot be found or read, or is not a language model of this kind.
        ConfigError: an option does not go with this model.
    """
    name = model_name(model)
    if isinstance(model, PreTrainedModel):
        if device_map is not None or tensor_parallel:
            option = "`tensor_parallel`" if tensor_parallel else f"`device_map` {device_map}"
            raise ConfigError(
                f"{option}: {name} is loaded already, expected a model to load. Leave the option out, or give the "
                "model's name or path."
            )
        if not convert and dtype != "auto":
            _check_dtype(model, name, dtype)
        return _prepared(model, name, objective, dtype, None if device == "auto" else device)
    device = resolve_device(device) if isinstance(device, str) else device or torch.device("cpu")
    base, its_revision = adapter_source(name)
    if base is not None:
        if device_map is not None or tensor_parallel:
            raise ConfigError(
                f"{name}: an adapter, which is merged into its base model on one device. Merge and save it first, or "
                "leave out `device_map` and `tensor_parallel`."
            )
        try:
            merged = load_model(
                base,
                objective=objective,
                dtype=dtype,
                device=device,
                revision=revision or its_revision,
                trust_remote_code=trust_remote_code,
            )
        except ModelError as error:
            raise ModelError(f"{name}: an adapter to {base}, which cannot be loaded: {error}") from error
        return with_adapter(merged, name).eval()
    place, gguf_file = locate_model(name)
    options: dict[str, Any] = _gguf(gguf_file)
    folder = None
    if tensor_parallel:
        check_split(name, load_config(name, revision=revision, trust_remote_code=trust_remote_code))
        options["distributed_config"] = begin_tensor_parallel(device)
    elif device_map is not None:
        # Only weights that have to be converted are written here; those of a safetensors file are read in place.
        folder = tempfile.TemporaryDirectory(prefix="distill-offload-")
        options |= {"device_map": parse_device_map(device_map), "offload_folder": folder.name}
    try:
        with _hub_or_copies(place):
            loaded, info = auto_class(objective).from_pretrained(
                place,
                dtype=resolve_dtype(dtype, device),
                revision=revision,
                trust_remote_code=trust_remote_code,
                ignore_mismatched_sizes=True,  # reported below, with the missing ones
                output_loading_info=True,
                **options,
            )
    except UNREADABLE as error:
        _check_available(place, error)
        raise ModelError(
            f"{name}: cannot be loaded as a {NAMES[objective]}: {reason(error)}. Check that it is one and complete."
        ) from error
    # transformers fills these with random numbers and goes on.
    if random := sorted(info["missing_keys"]) + sorted(str(key[0]) for key in info["mismatched_keys"]):
        raise ModelError(
            f"{name}: {len(random)} of its weights are missing or differ in shape from config.json, such as "
            f"{random[0]}: expected all. Check that it is a {NAMES[objective]} and complete."
        )
    if gguf_file is not None:
        # The weights are dequantised by now; these leftovers make `save_pretrained` refuse them.
        loaded.hf_quantizer = None
        for config in (loaded.config, loaded.generation_config):
            if hasattr(config, "quantization_config"):
                del config.quantization_config
    if folder is not None:
        _check_tied(loaded, device_map)
        weakref.finalize(loaded, folder.cleanup)  # the files are needed for as long as the model
    return (loaded if tensor_parallel or device_map is not None else loaded.to(device)).eval()


def _hub_or_copies(place: str) -> contextlib.AbstractContextManager[None]:
    """For a hub name, `copies_if_unreachable`."""
    return contextlib.nullcontext() if os.path.exists(place) else copies_if_unreachable()


def _check_available(place: str, error: BaseException) -> None:
    """Raises: ModelError for a name that is neither a local directory nor on the hub, as far as it can be reached."""
    if isinstance(error, OSError) and not os.path.exists(place):
        raise ModelError(
            f"{place}: neither a local directory nor a model that the hub can provide: {reason(error)}. Check the "
            "spelling and the network; a private model needs a login."
        ) from error


def _check_dtype(model: PreTrainedModel, name: str, dtype: str) -> None:
    """Raise ConfigError if a loaded model is in another dtype: converting it would change the weights of its owner for
    good, and converting them back would not restore them."""
    wanted = resolve_dtype(dtype, torch.device("cpu"))
    for tensor in model.parameters():
        if tensor.is_floating_point() and tensor.dtype != wanted:
            found = str(tensor.dtype).removeprefix("torch.")
            raise ConfigError(
                f"`dtype` {dtype}: {name} is loaded already, in {found}, and is used as it is. Leave it out, or load "
                f"the model with dtype=torch.{dtype}."
            )


def _prepared(
    model: PreTrainedModel, name: str, objective: Objective, dtype: str, device: torch.device | str | None
) -> PreTrainedModel:
    """A given model in evaluation mode, moved and converted where this is asked for."""
    output = model.get_output_embeddings()
    if output is None:
        raise ModelError(
            f"{name}: found a {type(model).__name__}, which has no vocabulary head, expected a {NAMES[objective]}. "
            f"Load it with {auto_class(objective).__name__}."
        )
    device, here = resolve_device(device) if isinstance(device, str) else device, compute_device(output)
    changes: dict[str, Any] = {}
    if dtype != "auto":
        changes["dtype"] = resolve_dtype(dtype, device or here)
        if all(tensor.dtype == changes["dtype"] for tensor in model.parameters()):
            del changes["dtype"]
    if device is not None and device != here:
        if not _is_spread(model):
            changes["device"] = device
        elif device not in computing_devices(model, device):
            raise ConfigError(f"`device` {device}: {name} is spread over several devices already. Leave it out.")
    try:
        return (model.to(**changes) if changes else model).eval()
    except (ValueError, NotImplementedError, RuntimeError) as error:  # a quantised model, or one without values
        asked = " and ".join(f"`{option}` {value}" for option, value in changes.items()).replace("torch.", "")
        raise ConfigError(f"{asked}: {name} cannot be converted: {reason(error)}. Leave it out.") from error


@contextlib.contextmanager
def lent(model: object) -> Iterator[None]:
    """A loaded model is its caller's: after the block it is as before, except for its weights and where they are.

    Restored are the mode of every module, attention, what is trainable, and gradient checkpointing.
    """
    if not isinstance(model, PreTrainedModel):
        yield
        return
    trainable = [(weight, weight.requires_grad) for weight in model.parameters()]
    recomputing = [(each, each.gradient_checkpointing) for each in model.modules() if hasattr(each, CHECKPOINTING)]
    hooked = getattr(model, EMBEDDINGS_HOOK, None)
    try:
        with evaluating(model):
            yield
    finally:
        forget_documents(model)
        for weight, before in trainable:
            weight.requires_grad_(before)
        for module, before in recomputing:
            module.gradient_checkpointing = before
        if hooked is None and getattr(model, EMBEDDINGS_HOOK, None) is not None:
            model.disable_input_require_grads()


def _is_spread(model: PreTrainedModel) -> bool:
    """Whether the parts of a model are on several devices, on disk, or in several processes."""
    places = set(getattr(model, "hf_device_map", {}).values())
    return len(places) > 1 or any(each.is_meta or isinstance(each, DTensor) for each in model.parameters())


def _gguf(gguf_file: str | None) -> dict[str, Any]:
    return {} if gguf_file is None else {"gguf_file": gguf_file}


def _check_tied(model: PreTrainedModel, device_map: str | None) -> None:
    """Raise ConfigError if a device map puts tied embeddings and head, one tensor, in two places."""
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    if not getattr(model.config, "tie_word_embeddings", False) or None in ends:
        return
    places = [place_of(model, module) for module in ends]
    if places[0] != places[1]:
        raise ConfigError(
            f"`device_map` {device_map}: embedding and head are one tensor in this model, found it on {places[0]} and "
            f"{places[1]}. Put both on the same device."
        )


def has_own_code(model: PreTrainedModel) -> bool:
    """Whether the code of a model comes with it instead of with transformers."""
    return not type(model).__module__.startswith("transformers.")


def resolve_device(name: str, model: object = None) -> torch.device:
    """A device by name. "auto" is the device of a loaded model, else the first of CUDA, MPS and CPU that is available.

    Raises:
        ConfigError: torch does not know the device, or it is not available.
    """
    if name != "auto":
        try:
            device = torch.device(name)
        except RuntimeError as error:
            raise ConfigError(
                f"`device` {name}: not a device that torch knows. Use auto, cpu, cuda, cuda:1 or mps."
            ) from error
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ConfigError(f"`device` {name}: torch sees no CUDA device here. Use `device=auto` or cpu.")
        return device
    if isinstance(model, PreTrainedModel) and model.get_output_embeddings() is not None:
        return compute_device(model.get_output_embeddings())
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def resolve_dtype(name: str, device: torch.device) -> torch.dtype | str:
    """A dtype by name. "auto" is float32 on a CPU; elsewhere transformers takes the checkpoint's dtype."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    if name not in DTYPES:
        raise ConfigError(f"`dtype` {name}: expected auto, {', '.join(DTYPES)}.")
    return DTYPES[name]


def teacher_fingerprints(model: PreTrainedModel) -> dict[str, str]:
    """`weights_fingerprint` and `config_fingerprint`: which model this is, wherever its files are."""
    return {"weights_fingerprint": weights_fingerprint(model), "config_fingerprint": config_fingerprint(model.config)}


def config_fingerprint(config: PreTrainedConfig, *, ignoring: Collection[str] = ()) -> str:
    """sha256 of the settings that differ from the defaults of the model's type.

    The same weights with other rotary embeddings or another attention window are another teacher. The path, the dtype
    and the version that saved the model are left out, and the settings `ignoring`.
    """
    text = json.dumps(_settings(config.to_diff_dict(), NOT_FINGERPRINTED.union(ignoring)), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _settings(config: Any, ignored: Collection[str]) -> Any:
    """With keys as in JSON: a configuration in memory may number layers or labels with integers."""
    if not isinstance(config, dict):
        return config
    named = {str(k): v for k, v in config.items()}
    return {k: _settings(v, ignored) for k, v in named.items() if not k.startswith("_") and k not in ignored}


def weights_fingerprint(model: torch.nn.Module) -> str:
    """sha256 of the name, shape, dtype and 1,024 evenly spaced values of every tensor.

    A sample takes seconds even for a 70B model. It tells checkpoints apart; it does not detect that somebody edited
    single values.
    """
    digest = hashlib.sha256()
    for name, tensor in named_tensors(model):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        flat = tensor.reshape(-1)
        count = min(flat.numel(), FINGERPRINT_VALUES)
        index = torch.arange(count) * (flat.numel() - 1) // max(1, count - 1)
        digest.update(flat[index.to(flat.device)].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def reason(error: BaseException) -> str:
    """The first line of an error message, without its full stop."""
    if isinstance(error, StrictDataclassError) and error.__cause__ is not None:
        error = error.__cause__  # its own first line only names a validator
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__).rstrip(".")
