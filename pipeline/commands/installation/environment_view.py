"""What `distill env` prints: one line for each fact."""

from __future__ import annotations

from typing import Any

from rich.console import RenderableType

from cache_format.wording import quantity
from pipeline.terminal.tables import pairs, size


def environment_view(found: dict[str, Any]) -> RenderableType:
    """The result of `describe_environment`."""
    cpu = found["cpu"]
    memory = "unknown memory" if cpu["memory_bytes"] is None else size(cpu["memory_bytes"])
    rows = [
        ("Python", found["python"]),
        ("system", found["system"]),
        *((name, version or "not installed") for name, version in found["packages"].items()),
        ("optional", ", ".join(f"{name} {version}" for name, version in found["optional_packages"].items()) or "none"),
        ("CPU", f"{cpu['name']}, {quantity(cpu['cores'], 'core')}, {memory}"),
    ]
    if "error" in found:
        rows.append(("torch", found["error"]))
    else:
        built = found["cuda"] and f"CUDA {found['cuda']}" or found["rocm"] and f"ROCm {found['rocm']}" or "CPU only"
        rows += [
            (
                "CPU features",
                f"{_features(found)} (torch uses {found['cpu_capability']}, {quantity(found['threads'], 'thread')})",
            ),
            ("dtype on the CPU", _cpu_dtype(found)),
            ("torch built for", built),
            *(("device", _device(each)) for each in found["devices"] or [None]),
            ("attention", ", ".join(found["attention"])),
        ]
    rows += [
        ("CUDA driver", found["cuda_driver"] or "none"),
        *found["places"].items(),
        *found["variables"].items(),
    ]
    return pairs("Environment", rows)


def _features(found: dict[str, Any]) -> str:
    if found["cpu_features"] is None:
        return "not listed by this version of torch"
    return ", ".join(found["cpu_features"]) or "no vector instructions beyond the CPU's baseline"


def _cpu_dtype(found: dict[str, Any]) -> str:
    """What the option means here if it is "auto"."""
    if found["cpu_multiplies_bfloat16"]:
        return "auto: float32, or bfloat16 where cache-teacher measures it to be faster"
    return "auto: float32, since the CPU has neither AMX nor AVX512-bf16"


def _device(device: dict[str, Any] | None) -> str:
    if device is None:
        return "CPU only"
    capability = device["compute_capability"]
    return f"{device['name']}, {size(device['memory_bytes'])}" + (
        "" if capability is None else f", compute capability {capability}"
    )
