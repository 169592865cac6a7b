"""Mapped and padded model -> the tensors of its GGUF file: order of rows, fused parts and types as llama.cpp reads."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, LlamaFileType
from torch import Tensor

from secateur.errors import ExportError
from secateur.export.mapping import EMBEDDING, HEAD, KEYS, KINDS, QUERIES, LazyTensor, MappedModel
from secateur.export.options import GGUF_TYPES
from secateur.models.llama_cpp_architectures import Architecture, ModelType

# Type -> how numbers are stored, and what the file says of itself.
TYPES: dict[str, tuple[GGMLQuantizationType, LlamaFileType]] = {
    name: (GGMLQuantizationType[name.upper()], LlamaFileType[f"{'ALL' if name == 'f32' else 'MOSTLY'}_{name.upper()}"])
    for name in GGUF_TYPES
}
ROUTER = ".ffn_gate_inp."  # chooses experts, so it stays exact
F16_MAX = float(np.finfo(np.float16).max)


def file_tensors(mapped: MappedModel, architecture: Architecture, model_type: ModelType) -> dict[str, LazyTensor]:
    """The tensors of the file by name, in its order: rotary pairs side by side, norms whole, parts fused."""
    tensors = {name: _with_offset(name, tensor, model_type) for name, tensor in mapped.outside.items()}
    if architecture.output == "required" and HEAD not in tensors:
        tensors[HEAD] = tensors[EMBEDDING]
    for index, (layer, size) in enumerate(zip(mapped.layers, mapped.sizes, strict=True)):
        ready = {name: _with_offset(name, tensor, model_type) for name, tensor in layer.items()}
        if architecture.rotary == "pairs" and model_type.rotary == "halves":
            for part, heads in ((QUERIES, size.heads), (KEYS, size.kv_heads)):
                for name in (f"{part}.{kind}" for kind in KINDS):
                    if name in ready:
                        ready[name] = _paired(ready[name], heads)
        for name, parts in architecture.joins.items():
            for kind in KINDS:
                if all(f"{part}.{kind}" in ready for part in parts):
                    ready[f"{name}.{kind}"] = _concatenated([ready.pop(f"{part}.{kind}") for part in parts])
        tensors |= {f"blk.{index}.{name}": tensor for name, tensor in ready.items()}
    return tensors


def _with_offset(name: str, tensor: LazyTensor, model_type: ModelType) -> LazyTensor:
    if not model_type.norm_offset or not name.endswith("_norm.weight"):
        return tensor
    return lambda fetch: tensor(fetch).float() + model_type.norm_offset


def _paired(tensor: LazyTensor, heads: int) -> LazyTensor:
    """Rows i and i + n/2 of every head, which are rotated together, one after the other."""
    return lambda fetch: tensor(fetch).unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _concatenated(tensors: list[LazyTensor]) -> LazyTensor:
    return lambda fetch: torch.cat([tensor(fetch) for tensor in tensors])


def block_size(type_name: str) -> int:
    """How many numbers of a row one block of a type holds."""
    return gguf.GGML_QUANT_SIZES[TYPES[type_name][0]][0]


def stored_types(shapes: dict[str, tuple[int, ...]], type_name: str) -> dict[str, str]:
    """The type of each tensor: vectors and routers are float32, rows that do not divide into blocks float16.

    >>> stored_types({"output_norm.weight": (96,), "a.weight": (3, 64), "b.weight": (3, 48)}, "q8_0")
    {'output_norm.weight': 'f32', 'a.weight': 'q8_0', 'b.weight': 'f16'}
    """

    def stored(name: str, shape: tuple[int, ...]) -> str:
        if len(shape) < 2 or ROUTER in name:
            return "f32"
        return type_name if shape[-1] % block_size(type_name) == 0 else "f16"

    return {name: stored(name, shape) for name, shape in shapes.items()}


def encode(name: str, values: Tensor, type_name: str) -> np.ndarray[Any, Any]:
    """The bytes of a tensor. Raises `ExportError` for numbers that the type cannot hold."""
    numbers = values.to(torch.float32).contiguous().numpy()
    largest = float(np.abs(numbers).max(initial=0.0))
    if not np.isfinite(largest):
        raise ExportError(f"{name} holds NaN or Inf; nothing can be computed with such a model")
    if type_name == "f16" and largest > F16_MAX:
        raise ExportError(f"{name} holds {largest:.3g}, more than f16 can; write --gguf bf16 (gguf='bf16')")
    return gguf.quants.quantize(numbers, TYPES[type_name][0])
