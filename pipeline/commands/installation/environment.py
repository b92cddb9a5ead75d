"""What `distill env` reports: versions, devices and places of this machine, without names of users or hosts.

A library that does not load is a finding, not an error: the report is wanted most where something is broken.
"""

from __future__ import annotations

import getpass
import importlib.util
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

REQUIRED = (
    *("distill", "torch", "transformers", "accelerate", "datasets", "tokenizers", "huggingface-hub"),
    *("safetensors", "pyarrow", "numpy", "zstandard", "fsspec", "click", "rich"),
)
OPTIONAL = (
    *("vllm", "peft", "lm-eval", "gguf", "numba", "s3fs", "httpx2", "triton", "flash-attn", "kernels", "bitsandbytes"),
    *("tensorboard", "trackio", "wandb", "mlflow"),
)

# Instructions that decide how fast a CPU multiplies, and in which dtypes: as `torch.cpu.get_capabilities` names them.
CPU_FEATURES = (
    *("avx2", "avx512_f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "amx_int8", "amx_fp16"),
    *("neon", "bf16", "i8mm", "sve", "sve2"),
)

# Settings that change results or speed; their values are not secrets.
VARIABLES = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "HF_HUB_OFFLINE", "PYTORCH_ALLOC_CONF")


def describe_environment() -> dict[str, Any]:
    """Everything that `distill env` shows, as JSON can hold it."""
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": {name: _version(name) for name in REQUIRED},
        "optional_packages": {name: found for name in OPTIONAL if (found := _version(name)) is not None},
        "cpu": {"name": _cpu_name(), "cores": os.cpu_count(), "memory_bytes": _memory()},
        **_try(_of_torch),
        "cuda_driver": _cuda_driver(),
        "places": {name: anonymous(path) for name, path in _try(_places).items()},
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def anonymous(text: str) -> str:
    """A path or a message without the home directory and the name of the user."""
    text = text.replace(str(Path.home()), "~") if len(Path.home().parts) > 1 else text
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container's user without an entry
        return text
    return os.sep.join("USER" if part == user else part for part in text.split(os.sep))


def _try(find: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What was found, or why a library does not load."""
    try:
        return find()
    except Exception as error:  # broken installations raise anything
        lines = str(error).strip().splitlines() or [""]
        return {"error": anonymous(f"{type(error).__name__}: {lines[0]}")}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _of_torch() -> dict[str, Any]:
    """Devices, the CPU's instructions, and attention kernels."""
    import torch

    from pipeline.models.devices.cpu_dtype import multiplies_bfloat16

    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return {
        "cpu_features": [name for name in CPU_FEATURES if known.get(name)] if known else None,
        "cpu_multiplies_bfloat16": multiplies_bfloat16(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "rocm": torch.version.hip,
        "devices": _devices(),
        "attention": _attention_backends(),
    }


def _devices() -> list[dict[str, Any]]:
    """Accelerators that torch can use."""
    import torch

    if torch.cuda.is_available():
        return [
            {
                "name": found.name,
                "memory_bytes": found.total_memory,
                "compute_capability": f"{found.major}.{found.minor}",
            }
            for found in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        ]
    if torch.backends.mps.is_available():
        return [{"name": "Apple MPS", "memory_bytes": torch.mps.recommended_max_memory(), "compute_capability": None}]
    return []


def _attention_backends() -> list[str]:
    """Attention that can run here: transformers' implementations, and torch's kernel for documents laid end to end."""
    import torch
    from transformers import utils

    found = ["eager", "sdpa"]
    if utils.is_torch_flex_attn_available():
        found.append("flex_attention")
    if importlib.util.find_spec("torch.nn.attention.varlen") is not None and torch.cuda.is_available():
        found.append("varlen")
    if utils.is_flash_attn_2_available():
        found.append("flash_attention_2")
    if utils.is_flash_attn_3_available():
        found.append("flash_attention_3")
    return found


def _places() -> dict[str, str]:
    """Where models, data sets and tokenised text are kept."""
    from datasets import config
    from huggingface_hub import constants

    return {
        "distill code": str(Path(__file__).resolve().parents[3]),
        "hub cache": str(constants.HF_HUB_CACHE),
        "datasets cache": str(config.HF_DATASETS_CACHE),
    }


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:  # not Linux
        pass
    return platform.processor() or platform.machine()


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def _cuda_driver() -> str | None:
    """The version of NVIDIA's driver; None without one."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.split("\n")[0].strip() or None
