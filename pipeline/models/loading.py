"""Loading language models and tokenizers: a transformers directory, a hub name, an adapter, or a `.gguf` file.

Remote code stays off unless asked for. A GGUF file is dequantised by transformers into a plain model.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import weakref
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from pipeline.errors import ConfigError, ModelError
from pipeline.models.adapters import base_of, with_adapter
from pipeline.models.objective import NAMES, Objective, auto_class
from pipeline.models.placement import begin_tensor_parallel, check_split, named_tensors, parse_device_map, place_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FINGERPRINT_VALUES = 1024
UNSAID = {"architectures", "dtype", "torch_dtype", "transformers_version"}  # of a configuration, by its fingerprint

# What transformers raises for files that are missing, damaged or of another kind.
UNREADABLE = (OSError, ValueError, ImportError, KeyError, TypeError, SafetensorError, StrictDataclassError)


def load_tokenizer(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to a model.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    source, options = _source(name)
    try:
        return AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code, **options)
    except UNREADABLE as error:
        raise ModelError(
            f"{name}: its tokenizer cannot be loaded: {reason(error)}. Check the path, and the tokenizer's files there."
        ) from error


def load_config(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedConfig | None:
    """The configuration of a model, of an adapter that of its base.

    None for a .gguf file, which is known only once it is loaded.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    if (base := base_of(name)) is not None:
        return load_config(base, trust_remote_code=trust_remote_code)
    source, options = _source(name)
    if options:
        return None
    try:
        return AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
    except UNREADABLE as error:
        raise ModelError(
            f"{name}: its configuration cannot be read: {reason(error)}. Check its config.json, or the name."
        ) from error


def load_model(
    name: str,
    *,
    objective: Objective = "causal",
    dtype: str = "auto",
    device: torch.device | str = "cpu",
    revision: str | None = None,
    trust_remote_code: bool = False,
    device_map: str | None = None,
    tensor_parallel: bool = False,
) -> PreTrainedModel:
    """A language model on `device`, in evaluation mode; an adapter is merged into its base model.

    Args:
        objective: what it was trained to predict, which decides the class that it is loaded as.
        dtype: "auto" is float32 on a CPU (faster there and exact) and the checkpoint's own dtype elsewhere.
        device_map: spread over several devices, CPU and disk instead: a strategy of accelerate, or a JSON file.
        tensor_parallel: split over the processes of torchrun instead.

    Raises:
        ModelError: it cannot be found, read, or is not a language model of this kind.
    """
    if (base := base_of(name)) is not None:
        if device_map is not None or tensor_parallel:
            raise ConfigError(
                f"{name}: an adapter, which is merged into its base model on one device. Merge and save it first, or "
                "leave out --device-map and --tensor-parallel."
            )
        options = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
        try:
            model = load_model(base, objective=objective, **options)
        except ModelError as error:
            raise ModelError(f"{name}: an adapter to {base}, which cannot be loaded: {error}") from error
        return with_adapter(model, name).eval()
    source, options = _source(name)
    device = torch.device(device)
    folder = None
    if tensor_parallel:
        check_split(name, load_config(name, revision=revision, trust_remote_code=trust_remote_code))
        options["distributed_config"] = begin_tensor_parallel(device)
    elif device_map is not None:
        # For what has to be converted before it can be left on disk; a safetensors checkpoint is read where it lies.
        folder = tempfile.TemporaryDirectory(prefix="distill-offload-")
        options |= {"device_map": parse_device_map(device_map), "offload_folder": folder.name}
    try:
        model, found = auto_class(objective).from_pretrained(
            source,
            dtype=resolve_dtype(dtype, device),
            revision=revision,
            trust_remote_code=trust_remote_code,
            ignore_mismatched_sizes=True,  # to be named below
            output_loading_info=True,
            **options,
        )
    except UNREADABLE as error:
        raise ModelError(
            f"{name}: cannot be loaded as a {NAMES[objective]}: {reason(error)}. Check that it is one and complete."
        ) from error
    # transformers fills these with random numbers and goes on.
    if random := sorted(found["missing_keys"]) + sorted(str(key[0]) for key in found["mismatched_keys"]):
        raise ModelError(
            f"{name}: {len(random)} of its weights are missing or of another shape than config.json says, such as "
            f"{random[0]}: expected all. Check that it is a {NAMES[objective]} and complete."
        )
    if "gguf_file" in options:
        # The tensors are plain by now; these leftovers make `save_pretrained` refuse them.
        model.hf_quantizer = None
        for config in (model.config, model.generation_config):
            if hasattr(config, "quantization_config"):
                del config.quantization_config
    if folder is not None:
        _check_tied(model, device_map)
        weakref.finalize(model, folder.cleanup)  # it is there as long as the model
    return (model if tensor_parallel or device_map is not None else model.to(device)).eval()


def _check_tied(model: PreTrainedModel, device_map: str | None) -> None:
    """What is one tensor cannot be kept in two places: the hooks would look for it in vain."""
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    if not getattr(model.config, "tie_word_embeddings", False) or None in ends:
        return
    places = [place_of(model, module) for module in ends]
    if places[0] != places[1]:
        raise ConfigError(
            f"--device-map {device_map}: embedding and head are one tensor in this model, found places {places[0]} and "
            f"{places[1]}. Give them the same."
        )


def resolve_device(name: str) -> torch.device:
    """`auto` is the first of CUDA, MPS, CPU that is there."""
    if name != "auto":
        try:
            device = torch.device(name)
        except RuntimeError as error:
            raise ConfigError(
                f"--device {name}: not a device torch knows. Use auto, cpu, cuda, cuda:1 or mps."
            ) from error
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ConfigError(f"--device {name}: torch sees no CUDA device here. Use --device auto or cpu.")
        return device
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def resolve_dtype(name: str, device: torch.device) -> torch.dtype | str:
    """A dtype by name; "auto" as in `load_model`."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    if name not in DTYPES:
        raise ConfigError(f"--dtype {name}: not one of auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def teacher_fingerprints(model: PreTrainedModel) -> dict[str, str]:
    """What tells one teacher from another wherever it lies: `weights_fingerprint` and `config_fingerprint`."""
    return {"weights_fingerprint": weights_fingerprint(model), "config_fingerprint": config_fingerprint(model)}


def config_fingerprint(model: PreTrainedModel) -> str:
    """sha256 of what a configuration says other than its kind's defaults: the same weights with another rope or window
    are another teacher. Not of where it was found, nor of what saved it, in what dtype."""
    text = json.dumps(_said(model.config.to_diff_dict()), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _said(config: Any) -> Any:
    if not isinstance(config, dict):
        return config
    return {k: _said(v) for k, v in config.items() if not k.startswith("_") and k not in UNSAID}


def weights_fingerprint(model: torch.nn.Module) -> str:
    """sha256 over every tensor's name, shape, dtype and 1,024 evenly spaced values.

    A sample, so that a 70B teacher takes seconds: it tells checkpoints apart, and does not protect against someone who
    edits single values.
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
    """The first line of an error message without its full stop: what fits into one line of ours."""
    if isinstance(error, StrictDataclassError) and error.__cause__ is not None:
        error = error.__cause__  # its own first line only names a validator
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__).rstrip(".")


def check_model_path(name: str) -> None:
    """Raises ModelError if `name` was clearly meant to be on this disk and is not a model there."""
    _source(name)


def _source(name: str) -> tuple[str, dict[str, Any]]:
    """What `from_pretrained` takes for a directory, a hub name or a .gguf file."""
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"{name}: no such file. Check the path.")
        try:
            import gguf  # noqa: F401
        except ImportError as error:
            raise ModelError(f"{name}: reading GGUF needs the gguf package: pip install 'distill[gguf]'") from error
        return str(path.parent), {"gguf_file": path.name}
    if path.exists():
        if not (path / "config.json").is_file() and base_of(name) is None:
            raise ModelError(
                f"{name}: no config.json in it, expected a model directory of transformers or a .gguf file. "
                "Check the path."
            )
        return str(path), {}
    # A hub name is `name` or `owner/name`; anything more path-like was meant to be on this disk.
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith("/"):
        raise ModelError(f"{name}: no such directory. Check the path.")
    return name, {}
