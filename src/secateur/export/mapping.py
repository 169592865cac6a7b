"""Model -> its weights under GGUF's names, layer by layer, as lazy tensors.

Every model is mapped to the same parts: queries, keys and values, gate and up are separate, however the model stores
them. A lazy tensor is a function that asks for weights by name. Shapes are found by running it on `meta`, and one
tensor at a time is in memory while a file is written.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import gguf
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from secateur.discovery.sublayers import skipped_in
from secateur.errors import ExportError
from secateur.models.llama_cpp_architectures import ModelType
from secateur.models.modeling_per_layer import padded_in

Fetch = Callable[[str], Tensor]  # the name of a parameter -> its values
LazyTensor = Callable[[Fetch], Tensor]
LazyTensors = Mapping[str, LazyTensor]

QUERIES, KEYS, VALUES, OUTPUT = "attn_q", "attn_k", "attn_v", "attn_output"
GATE, UP, DOWN = "ffn_gate", "ffn_up", "ffn_down"
EMBEDDING, HEAD = "token_embd.weight", "output.weight"
KINDS = ("weight", "bias")


@dataclass(frozen=True, slots=True)
class LayerSizes:
    """Sizes of one layer; zeros for an attention or an MLP that is skipped."""

    heads: int
    kv_heads: int
    mlp: int  # channels, of each expert where there are experts
    experts: int = 0


@dataclass(frozen=True)
class MappedModel:
    """A model's weights under GGUF's names."""

    outside: LazyTensors  # of no layer, by the file's name: "token_embd.weight"
    layers: tuple[LazyTensors, ...]  # of each layer, without its number: "attn_q.weight"
    sizes: tuple[LayerSizes, ...]
    head_dim: int
    hidden: int
    fetch: Fetch  # the model's weights

    @property
    def uniform(self) -> bool:
        """Whether all layers have the same sizes, and none skips its attention or MLP."""
        return len(set(self.sizes)) == 1 and 0 not in (self.sizes[0].heads, self.sizes[0].mlp)

    def shape(self, tensor: LazyTensor) -> tuple[int, ...]:
        """The shape of a lazy tensor, without computing it."""
        return tuple(tensor(lambda name: self.fetch(name).to("meta")).shape)

    def weights_of(self, tensor: LazyTensor) -> set[str]:
        """Names of the model's weights that a lazy tensor is computed from."""
        asked = set()

        def note(name: str) -> Tensor:
            asked.add(name)
            return self.fetch(name).to("meta")

        tensor(note)
        return asked


@dataclass(frozen=True, slots=True)
class _Fused:
    """One weight or bias of a layer that holds several parts: queries, keys and values, or gate and up."""

    parts: tuple[str, ...]
    kind: str  # of KINDS
    tensor: LazyTensor

    def split(self, size: LayerSizes, head_dim: int, *, by_head: bool) -> dict[str, LazyTensor]:
        """The parts; `by_head` weights hold queries, keys and values of one head, then of the next."""
        widths = [size.heads * head_dim, size.kv_heads * head_dim, size.kv_heads * head_dim]

        def part(at: int) -> LazyTensor:
            def cut(fetch: Fetch) -> Tensor:
                values = self.tensor(fetch)
                if QUERIES not in self.parts:
                    return values.chunk(len(self.parts), dim=-2 if self.kind == "weight" else -1)[at]
                if by_head:
                    heads: Tensor = values.unflatten(0, (size.heads, len(self.parts), head_dim))[:, at]
                    return heads.flatten(0, 1)
                rows: Tensor = values.split(widths)[at]
                return rows

            return cut

        return {f"{name}.{self.kind}": part(at) for at, name in enumerate(self.parts)}


def map_model(model: PreTrainedModel, model_type: ModelType) -> MappedModel:
    """Map a model's weights to GGUF's names, and read each layer's sizes off their shapes.

    Raises `ExportError` for a weight that GGUF has no name for, and for heads that differ in more than their number.
    """
    if padded := padded_in(model):
        raise ExportError(
            f"{next(iter(padded))} leaves out channels of heads, and llama.cpp expects values as wide as keys: plan "
            "the cut without the axis head_dim"
        )
    weights = dict(model.named_parameters())
    count = int(model.config.num_hidden_layers)
    outside: dict[str, LazyTensor] = {}
    layers: list[dict[str, LazyTensor]] = [{} for _ in range(count)]
    fused: list[list[_Fused]] = [[] for _ in range(count)]
    names = gguf.get_tensor_name_map(architecture_number(model_type.architectures[0]), count)
    head = getattr(model.get_output_embeddings(), "weight", None)
    for name, weight in weights.items():
        tensor = _lazy(model, name)
        if (place := _fused_place(name, model_type)) is not None:
            number, parts, kind = place
            fused[number].append(_Fused(parts, kind, tensor))
            continue
        called = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if called is None and weight is head:
            called = HEAD  # not in every architecture's map
        if called is None:
            raise ExportError(f"GGUF has no name for the weight {name} of a model of type {model_type.name}")
        if not called.endswith((".weight", ".bias")):
            called += ".weight"  # stacked experts: a parameter without a module of its own
        if match := re.fullmatch(r"blk\.(\d+)\.(.*)", called):
            layers[int(match[1])][match[2]] = tensor
        else:
            outside[called] = tensor
    mapped = MappedModel(outside, tuple(layers), (), _head_dim(model, weights), 0, lambda name: weights[name].detach())
    sizes = []
    for index, (layer, joined) in enumerate(zip(layers, fused, strict=True)):
        sizes.append(_sizes(mapped, layer, joined, index))
        for each in joined:
            layer.update(each.split(sizes[-1], mapped.head_dim, by_head=model_type.split_by_head))
        _check_values(mapped, layer, sizes[-1], index)
    _check_skipped(model, sizes)
    hidden = mapped.shape(outside[EMBEDDING])[-1]
    return MappedModel(outside, tuple(layers), tuple(sizes), mapped.head_dim, hidden, mapped.fetch)


def architecture_number(name: str) -> Any:
    """The member of gguf's enumeration of architectures with this name in files."""
    return next(number for number, known in gguf.MODEL_ARCH_NAMES.items() if known == name)


def _lazy(model: nn.Module, name: str) -> LazyTensor:
    path, _, last = name.rpartition(".")
    transposed = last == "weight" and isinstance(model.get_submodule(path), Conv1D)
    return lambda fetch: fetch(name).T if transposed else fetch(name)


def _fused_place(name: str, model_type: ModelType) -> tuple[int, tuple[str, ...], str] | None:
    """Layer, parts and kind of a weight that holds several parts; None for any other."""
    for end, parts in model_type.splits.items():
        if match := re.fullmatch(rf".*\.(\d+)\.{re.escape(end)}(?:\.(weight|bias))?", name):
            return int(match[1]), parts, match[2] or "weight"
    return None


def _head_dim(model: nn.Module, weights: Mapping[str, Tensor]) -> int:
    """The size of one head, as its module stores it."""
    paths = {name.rpartition(".")[0].rpartition(".")[0] for name in weights}
    attributes = [vars(model.get_submodule(path)) for path in paths]
    found = [each.get("head_dim", each.get("head_size")) for each in attributes]
    sizes = {size for size in found if isinstance(size, int)}
    if len(sizes) != 1:
        raise ExportError(
            f"a GGUF file gives the heads of all layers one size, and this model has "
            f"{sorted(sizes) or 'none to be found'}; plan the cut without the axis head_dim"
        )
    return sizes.pop()


def _sizes(mapped: MappedModel, layer: LazyTensors, fused: list[_Fused], index: int) -> LayerSizes:
    heads = kv_heads = mlp = experts = 0
    head_dim = mapped.head_dim
    if f"{OUTPUT}.weight" in layer:
        width = mapped.shape(layer[f"{OUTPUT}.weight"])[-1]
        joined = next((each.tensor for each in fused if QUERIES in each.parts and each.kind == "weight"), None)
        if joined is None:
            kv_width = mapped.shape(layer[f"{KEYS}.weight"])[0]
        else:
            kv_width = (mapped.shape(joined)[0] - width) // 2
        heads, kv_heads = width // head_dim, kv_width // head_dim
        if width % head_dim or kv_width % head_dim or not kv_heads or heads % kv_heads:
            raise ExportError(
                f"layer {index}: query width {width} and key width {kv_width} do not divide into heads of {head_dim} "
                "with as many query heads for each KV head, which is all that a GGUF file can describe"
            )
    if f"{DOWN}.weight" in layer:
        mlp = mapped.shape(layer[f"{DOWN}.weight"])[-1]
    if f"{DOWN}_exps.weight" in layer:
        experts, _, mlp = mapped.shape(layer[f"{DOWN}_exps.weight"])
    return LayerSizes(heads, kv_heads, mlp, experts)


def _check_values(mapped: MappedModel, layer: LazyTensors, size: LayerSizes, index: int) -> None:
    if not size.heads:
        return
    for part, heads in ((QUERIES, size.heads), (KEYS, size.kv_heads), (VALUES, size.kv_heads)):
        rows = mapped.shape(layer[f"{part}.weight"])[0]
        if rows != heads * mapped.head_dim:
            raise ExportError(
                f"layer {index}: {part} has {rows} rows for {heads} heads of {mapped.head_dim}; llama.cpp expects "
                "values as wide as keys: plan the cut without the axis head_dim"
            )


def _check_skipped(model: nn.Module, sizes: list[LayerSizes]) -> None:
    """A sub-layer without weights must be one that the model skips."""
    skipped = skipped_in(model)
    for index, size in enumerate(sizes):
        missing = [what for what, n in (("attention", size.heads), ("MLP", size.mlp)) if not n]
        known = [path for path in skipped if re.search(rf"\.{index}\.", path)]
        if len(missing) != len(known):
            raise ExportError(f"layer {index} has no {' and no '.join(missing)} that we know, and skips {known}")
