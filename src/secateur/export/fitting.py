"""Mapped model -> an architecture of llama.cpp that holds it, with zeros in the weights where padding is asked for.

Heads, channels and whole sub-layers of zeros add nothing to the hidden states, so the outputs stay the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

import gguf
import torch
from torch import Tensor
from transformers import PreTrainedModel

from secateur.errors import ExportError
from secateur.export.mapping import (
    DOWN,
    GATE,
    HEAD,
    KEYS,
    KINDS,
    OUTPUT,
    QUERIES,
    UP,
    VALUES,
    Fetch,
    LayerSizes,
    LazyTensor,
    LazyTensors,
    MappedModel,
    architecture_number,
    map_model,
)
from secateur.export.metadata import Positions, positions, rotary_dim
from secateur.models.llama_cpp_architectures import Architecture, ModelType, architecture

Grid = tuple[int, ...]  # sizes that a dimension is the product of

HEAD_NORMS = ("attn_q_norm.weight", "attn_k_norm.weight")
BLOCK = 32  # multiple of MLP widths: whole blocks of every quantized type, and what llama.cpp's fast kernels take


@dataclass(frozen=True)
class Fitted:
    """A model in sizes that its architecture can hold."""

    mapped: MappedModel
    architecture: Architecture
    positions: Positions
    padding: int  # zeros that were added


def fit(model: PreTrainedModel, model_type: ModelType, *, pad: bool) -> Fitted:
    """Choose the first architecture that holds the model as it is, or with `pad` the first that padding makes fit.

    Raises `ExportError` with each architecture's reasons where there is none.
    """
    mapped = map_model(model, model_type)
    rotary = rotary_dim(model)
    partial_rotary = 0 < rotary < mapped.head_dim
    candidates = [architecture(name) for name in model_type.architectures]
    reasons = {each.name: misfits(mapped, each, partial_rotary=partial_rotary) for each in candidates}
    unsaid: ExportError | None = None
    for candidate in (each for each in candidates if not reasons[each.name]):
        try:
            where = positions(model, candidate, mapped)
        except ExportError as error:
            unsaid = unsaid or error
        else:
            return _fitted(mapped, candidate, where)
    if unsaid is not None:
        raise unsaid
    paddable = [each for each in candidates if not misfits(mapped, each, partial_rotary=partial_rotary, padded=True)]
    if pad and paddable:
        return _fitted(mapped, paddable[0], positions(model, paddable[0], mapped))
    raise _no_architecture(reasons, paddable=bool(paddable) and not mapped.sizes[0].experts)


def _fitted(mapped: MappedModel, chosen: Architecture, where: Positions) -> Fitted:
    padded = pad_layers(mapped, chosen)
    return Fitted(padded, chosen, where, count_padding(mapped, padded))


def misfits(mapped: MappedModel, wanted: Architecture, *, partial_rotary: bool, padded: bool = False) -> list[str]:
    """Why an architecture cannot hold a model as it is, or not even padded; empty when it can."""
    reasons = []
    if not padded and not wanted.per_layer and not mapped.uniform:
        reasons.append("its layers are all of one size, and the model's are not")
    heads = max(size.heads for size in mapped.sizes)
    if not padded and wanted.width == "hidden" and heads * mapped.head_dim != mapped.hidden:
        reasons.append(
            f"its heads are together as wide as the hidden states ({mapped.hidden}), and the model's {heads} heads of "
            f"{mapped.head_dim} are not"
        )
    if wanted.output == "tied" and HEAD in mapped.outside:
        reasons.append("its output matrix is the embedding, and the model has one of its own")
    if partial_rotary and not wanted.part_rotary:
        reasons.append("it rotates whole heads, and the model a part of each")
    names = {name for tensors in (mapped.outside, *mapped.layers) for name in tensors}
    biased = {name.removesuffix(".bias") for name in names if name.endswith(".bias")}
    if wanted.biases != "all" and (unknown := sorted(biased - set(wanted.biases))):
        reasons.append(f"it has no bias for {', '.join(unknown)}")
    known = {gguf.TENSOR_NAMES[tensor] for tensor in gguf.MODEL_TENSORS[architecture_number(wanted.name)]}
    known = {name.removeprefix("blk.{bid}.") for name in known}.union(*wanted.joins.values())
    if unknown := sorted({name.rpartition(".")[0] for name in names if name != HEAD} - known):
        reasons.append(f"it has no {', '.join(unknown)}")
    return reasons


def _no_architecture(reasons: Mapping[str, list[str]], *, paddable: bool) -> ExportError:
    each = "; ".join(f"{name}: {', and '.join(why)}" for name, why in reasons.items())
    remedy = "Cut all layers alike (secateur prune --shape uniform), and the MLP alone if heads do not fit (--axes mlp)"
    if paddable:
        remedy += ", or pad with zeros, which makes the file as large as that of the widest layers: --pad (pad=True)"
    return ExportError(f"no architecture of llama.cpp holds this model. {each}. {remedy}")


def pad_layers(mapped: MappedModel, architecture: Architecture) -> MappedModel:
    """Add zeros until the architecture can hold the model.

    MLP widths become multiples of `BLOCK`. A skipped attention or MLP becomes one of zeros, unless the architecture
    has layers without attention. Raises `ExportError` where zeros would change the outputs.
    """
    targets = _target_sizes(mapped, architecture)
    layers = []
    for index, (layer, before, after) in enumerate(zip(mapped.layers, mapped.sizes, targets, strict=True)):
        if before != after:
            layer = _padded(mapped, index, after)
        if not after.heads:
            layer = {name: tensor for name, tensor in layer.items() if not name.startswith("attn_norm.")}
        layers.append(layer)
    return replace(mapped, layers=tuple(layers), sizes=tuple(targets))


def count_padding(before: MappedModel, after: MappedModel) -> int:
    """Number of zeros that padding has added."""

    def size(layer: LazyTensors, name: str) -> int:
        return torch.Size(before.shape(layer[name])).numel() if name in layer else 0

    pairs = zip(before.layers, after.layers, strict=True)
    return sum(size(new, name) - size(old, name) for old, new in pairs for name in new)


def _target_sizes(mapped: MappedModel, architecture: Architecture) -> list[LayerSizes]:
    def up(n: int) -> int:
        return -(-n // BLOCK) * BLOCK

    if any(size.experts for size in mapped.sizes):
        if not mapped.uniform:
            raise ExportError(
                "a GGUF file gives every layer the same number of experts, of one size; cut all layers alike: "
                "--shape uniform"
            )
        return list(mapped.sizes)
    if architecture.per_layer:
        targets = []
        for index, (size, layer) in enumerate(zip(mapped.sizes, mapped.layers, strict=True)):
            heads = (size.heads, size.kv_heads)
            if not size.heads and not (architecture.skips_attention and index and f"{OUTPUT}.bias" not in layer):
                heads = (1, 1)  # llama.cpp reads off the first layer whether the model has attention at all
            targets.append(LayerSizes(*heads, up(size.mlp) or BLOCK))
        return targets
    kv_heads = max(size.kv_heads for size in mapped.sizes)
    group = max(size.heads // size.kv_heads for size in mapped.sizes if size.kv_heads)
    if architecture.width == "hidden":
        kv_heads, group = _groups_of_hidden_width(mapped, kv_heads, group)
    mlp = up(max(size.mlp for size in mapped.sizes))
    return [LayerSizes(kv_heads * group, kv_heads, mlp)] * len(mapped.sizes)


def _groups_of_hidden_width(mapped: MappedModel, kv_heads: int, group: int) -> tuple[int, int]:
    """The fewest KV heads, and query heads for each, that together are as wide as the hidden states."""
    heads, rest = divmod(mapped.hidden, mapped.head_dim)
    fitting = [n for n in range(kv_heads, heads + 1) if heads % n == 0 and heads // n >= group]
    if rest or not fitting:
        raise ExportError(
            f"{kv_heads} KV heads with {group} query heads each, of size {mapped.head_dim}, cannot be padded to the "
            f"hidden width of {mapped.hidden}; cut the MLP alone: --axes mlp"
        )
    return fitting[0], heads // fitting[0]


def _padded(mapped: MappedModel, index: int, after: LayerSizes) -> LazyTensors:
    layer, before = mapped.layers[index], mapped.sizes[index]
    tensors = dict(layer)
    if (before.heads, before.kv_heads) != (after.heads, after.kv_heads) and after.heads:
        for name in HEAD_NORMS:
            if name in layer and mapped.shape(layer[name]) != (mapped.head_dim,):
                raise ExportError(
                    f"layer {index}: {name.removesuffix('.weight')} normalises all heads together, so heads of zeros "
                    "would change it; cut all layers alike (--shape uniform) or the MLP alone (--axes mlp)"
                )
        # KV heads, the query heads of each and the numbers of a head form a grid.
        sizes, head_dim = (before, after), mapped.head_dim
        queries, wider_queries = ((n.kv_heads, n.heads // max(n.kv_heads, 1), head_dim) for n in sizes)
        keys, wider_keys = ((n.kv_heads, 1, head_dim) for n in sizes)
        grids = {QUERIES: (queries, wider_queries), KEYS: (keys, wider_keys), VALUES: (keys, wider_keys)}
        tensors |= _widened(mapped, layer, grids, OUTPUT)
    if before.mlp != after.mlp:
        channels = ((before.mlp,), (after.mlp,))
        tensors |= _widened(mapped, layer, {GATE: channels, UP: channels}, DOWN)
    return tensors


def _widened(
    mapped: MappedModel, layer: LazyTensors, grids: Mapping[str, tuple[Grid, Grid]], last: str
) -> dict[str, LazyTensor]:
    """A sub-layer in wider grids: of the rows of each part, and of what the last matrix reads, as the first part's.

    One that the layer skips becomes one of zeros, with the biases and norms that other layers have.
    """
    rows = {f"{part}.{kind}": grid for kind in KINDS for part, grid in grids.items()}
    read = next(iter(grids.values()))
    if f"{last}.weight" in layer:
        grown = {name: _grown(layer[name], 0, *grid) for name, grid in rows.items() if name in layer}
        return grown | {f"{last}.weight": _grown(layer[f"{last}.weight"], 1, *read)}
    other = next(each for each in mapped.layers if f"{last}.weight" in each)
    widths = {name: prod(wide) for name, (_, wide) in rows.items() if name in other}
    zeros = {name: _zeros(width, *mapped.shape(other[name])[1:]) for name, width in widths.items()}
    zeros[f"{last}.weight"] = _zeros(mapped.hidden, prod(read[1]))
    if f"{last}.bias" in other and f"{last}.bias" not in layer:
        zeros[f"{last}.bias"] = _zeros(mapped.hidden)
    norms = HEAD_NORMS if last == OUTPUT else ()
    return zeros | {name: _zeros(*mapped.shape(other[name])) for name in norms if name in other}


def _zeros(*shape: int) -> LazyTensor:
    return lambda fetch: torch.zeros(shape)


def _grown(tensor: LazyTensor, dim: int, grid: Grid, wide: Grid) -> LazyTensor:
    """A tensor whose dimension, seen as a grid, is put into the first corner of a wider grid of zeros."""

    def grow(fetch: Fetch) -> Tensor:
        values: Tensor = tensor(fetch).unflatten(dim, grid)
        shape = (*values.shape[:dim], *wide, *values.shape[dim + len(grid) :])
        grown: Tensor = values.new_zeros(shape)
        corner = (slice(None),) * dim + tuple(slice(n) for n in grid)
        grown[corner] = values
        return grown.flatten(dim, dim + len(grid) - 1)

    return grow
