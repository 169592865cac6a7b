"""A model's weights -> the tensors of a GGUF file, each with a recipe that makes it when it is written.

Weights are first taken apart to the same parts for every model: queries, keys and values, gate and up. Then every layer
gets sizes that the architecture can hold, and parts are joined as it wants them. A recipe asks for weights by name, so
that shapes are found by running it on `meta`, and one tensor at a time is in memory while the file is written.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import gguf
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from secateur.discovery.sublayers import skipped_in
from secateur.errors import ExportError
from secateur.export.architectures import Architecture, ModelType

Fetch = Callable[[str], Tensor]  # the name of a parameter -> its values
Recipe = Callable[[Fetch], Tensor]
Recipes = Mapping[str, Recipe]

QUERIES, KEYS, VALUES, OUTPUT = "attn_q", "attn_k", "attn_v", "attn_output"
QUERY_NORM, KEY_NORM = "attn_q_norm", "attn_k_norm"
GATE, UP, DOWN = "ffn_gate", "ffn_up", "ffn_down"
EMBEDDING, HEAD = "token_embd.weight", "output.weight"
BLOCK = 32  # channels by which MLPs grow: whole blocks of every quantised type, and what llama.cpp's fast products take


@dataclass(frozen=True, slots=True)
class LayerSizes:
    """How large a layer is; zeros for an attention or an MLP that is skipped."""

    heads: int
    kv_heads: int
    mlp: int  # channels, of each expert where there are experts
    experts: int = 0


@dataclass(frozen=True)
class Parts:
    """A model taken apart."""

    whole: Recipes  # what belongs to no layer, by the file's name: "token_embd.weight"
    layers: tuple[Recipes, ...]  # of each layer, without its number: "attn_q.weight"
    sizes: tuple[LayerSizes, ...]
    head_dim: int
    hidden: int
    fetch: Fetch  # the model's weights

    @property
    def uniform(self) -> bool:
        """Whether all layers have the same sizes, and none skips anything."""
        return len(set(self.sizes)) == 1 and 0 not in (self.sizes[0].heads, self.sizes[0].mlp)


def take_apart(model: PreTrainedModel, model_type: ModelType) -> Parts:
    """Name the parts of a model as GGUF does, and read each layer's sizes from its weights.

    Raises `ExportError` for a weight that GGUF has no name for, and for heads that differ in more than their number.

    >>> from transformers import AutoConfig, AutoModelForCausalLM
    >>> from secateur.export.architectures import type_of
    >>> config = AutoConfig.for_model("granite", hidden_size=12, num_attention_heads=4, num_key_value_heads=2,
    ...     intermediate_size=20, num_hidden_layers=2, vocab_size=8)
    >>> parts = take_apart(AutoModelForCausalLM.from_config(config), type_of(config))
    >>> parts.sizes[0].kv_heads, parts.head_dim
    (2, 3)
    """
    weights = dict(model.named_parameters())
    head = getattr(model.get_output_embeddings(), "weight", None)

    def fetch(name: str) -> Tensor:
        return weights[name].detach()

    count = int(model.config.num_hidden_layers)
    names = gguf.get_tensor_name_map(architecture_number(model_type.architectures[0]), count)
    whole: dict[str, Recipe] = {}
    layers: list[dict[str, Recipe]] = [{} for _ in range(count)]
    joined: list[dict[tuple[tuple[str, ...], str], Recipe]] = [{} for _ in range(count)]
    for name in weights:
        recipe = _reading(name, transposed=_is_transposed(model, name))
        if (found := _joined(name, model_type)) is not None:
            number, key = found
            joined[number][key] = recipe
            continue
        called = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if called is None and weights[name] is head:
            called = HEAD  # which not every architecture has
        if called is None:
            raise ExportError(f"GGUF has no name for the weight {name} of a model of type {model_type.name}")
        if not called.endswith((".weight", ".bias")):
            called += ".weight"  # a stack of matrices is a parameter without a module of its own
        if match := re.fullmatch(r"blk\.(\d+)\.(.*)", called):
            layers[int(match[1])][match[2]] = recipe
        else:
            whole[called] = recipe
    head_dim = _head_dim(model, weights)
    sizes = []
    for index, (layer, fused) in enumerate(zip(layers, joined, strict=True)):
        size = _sizes(layer, fused, head_dim, fetch, index)
        sizes.append(size)
        for (parts, kind), recipe in fused.items():
            layer.update(_apart(parts, kind, recipe, size, head_dim, by_head=model_type.split_by_head))
        _check_values(layer, size, head_dim, fetch, index)
    _check_skipped(model, sizes)
    hidden = shape_of(whole[EMBEDDING], fetch)[-1]
    return Parts(whole, tuple(layers), tuple(sizes), head_dim, hidden, fetch)


def architecture_number(name: str) -> Any:
    """The member of gguf's enumeration of architectures that has this name in files."""
    return next(number for number, known in gguf.MODEL_ARCH_NAMES.items() if known == name)


def shape_of(recipe: Recipe, fetch: Fetch) -> tuple[int, ...]:
    """What shape a recipe makes, without making it.

    >>> shape_of(lambda fetch: fetch("a").T, lambda name: torch.ones(2, 3))
    (3, 2)
    """
    return tuple(recipe(lambda name: fetch(name).to("meta")).shape)


def weights_of(recipe: Recipe, fetch: Fetch) -> tuple[str, ...]:
    """The names of the weights that a recipe asks for.

    >>> weights_of(lambda fetch: fetch("a").T, lambda name: torch.ones(2, 3))
    ('a',)
    """
    asked = []

    def note(name: str) -> Tensor:
        asked.append(name)
        return fetch(name).to("meta")

    recipe(note)
    return tuple(asked)


def _is_transposed(model: nn.Module, name: str) -> bool:
    path, _, last = name.rpartition(".")
    return last == "weight" and isinstance(model.get_submodule(path), Conv1D)


def _reading(name: str, *, transposed: bool) -> Recipe:
    return lambda fetch: fetch(name).T if transposed else fetch(name)


def _joined(name: str, model_type: ModelType) -> tuple[int, tuple[tuple[str, ...], str]] | None:
    """The layer of a weight that holds several parts, those parts and whether it is a weight or a bias."""
    for end, parts in model_type.splits.items():
        if match := re.fullmatch(rf".*\.(\d+)\.{re.escape(end)}(?:\.(weight|bias))?", name):
            return int(match[1]), (parts, match[2] or "weight")
    return None


def _head_dim(model: nn.Module, weights: Mapping[str, Tensor]) -> int:
    """The numbers of one head, which its module knows."""
    found = set()
    for path in sorted({name.rpartition(".")[0].rpartition(".")[0] for name in weights}):
        module = model.get_submodule(path)
        size = next((vars(module)[key] for key in ("head_dim", "head_size") if key in vars(module)), None)
        if isinstance(size, int):
            found.add(size)
    if len(found) != 1:
        raise ExportError(
            f"a GGUF file gives the heads of all layers one size, and this model has "
            f"{sorted(found) or 'none to be found'}; plan the cut without the axis head_dim"
        )
    return found.pop()


def _sizes(
    layer: Recipes, fused: Mapping[tuple[tuple[str, ...], str], Recipe], head_dim: int, fetch: Fetch, index: int
) -> LayerSizes:
    heads = kv_heads = mlp = experts = 0
    if f"{OUTPUT}.weight" in layer:
        width = shape_of(layer[f"{OUTPUT}.weight"], fetch)[-1]
        three = next((recipe for (parts, kind), recipe in fused.items() if QUERIES in parts and kind == "weight"), None)
        kv_width = (
            shape_of(layer[f"{KEYS}.weight"], fetch)[0] if three is None else (shape_of(three, fetch)[0] - width) // 2
        )
        heads, kv_heads = width // head_dim, kv_width // head_dim
        if width % head_dim or kv_width % head_dim or not kv_heads or heads % kv_heads:
            raise ExportError(
                f"layer {index}: {width} numbers of queries and {kv_width} of keys are no heads of {head_dim} in "
                "groups of one size, which is all that a GGUF file can say"
            )
    if f"{DOWN}.weight" in layer:
        mlp = shape_of(layer[f"{DOWN}.weight"], fetch)[-1]
    if f"{DOWN}_exps.weight" in layer:
        experts, _, mlp = shape_of(layer[f"{DOWN}_exps.weight"], fetch)
    return LayerSizes(heads, kv_heads, mlp, experts)


def _apart(
    parts: tuple[str, ...], kind: str, recipe: Recipe, size: LayerSizes, head_dim: int, *, by_head: bool
) -> dict[str, Recipe]:
    """Cut a weight or a bias that holds several parts."""
    widths = [size.heads * head_dim, size.kv_heads * head_dim, size.kv_heads * head_dim]

    def piece(at: int) -> Recipe:
        def cut(fetch: Fetch) -> Tensor:
            values = recipe(fetch)
            if QUERIES not in parts:
                return values.chunk(len(parts), dim=-2 if kind == "weight" else -1)[at]
            if by_head:
                each: Tensor = values.unflatten(0, (size.heads, len(parts), head_dim))[:, at]
                return each.flatten(0, 1)
            rows: Tensor = values.split(widths)[at]
            return rows

        return cut

    return {f"{part}.{kind}": piece(at) for at, part in enumerate(parts)}


def _check_values(layer: Recipes, size: LayerSizes, head_dim: int, fetch: Fetch, index: int) -> None:
    if not size.heads:
        return
    for part, heads in ((QUERIES, size.heads), (KEYS, size.kv_heads), (VALUES, size.kv_heads)):
        rows = shape_of(layer[f"{part}.weight"], fetch)[0]
        if rows != heads * head_dim:
            raise ExportError(
                f"layer {index}: {part} has {rows} rows for {heads} heads of {head_dim}; llama.cpp wants values as "
                "wide as keys: plan the cut without the axis head_dim"
            )


def _check_skipped(model: nn.Module, sizes: list[LayerSizes]) -> None:
    """What a layer lacks must be known to be skipped."""
    skipped = skipped_in(model)
    for index, size in enumerate(sizes):
        lacking = [what for what, n in (("attention", size.heads), ("MLP", size.mlp)) if not n]
        known = [path for path in skipped if re.search(rf"\.{index}\.", path)]
        if len(lacking) != len(known):
            raise ExportError(f"layer {index} has no {' and no '.join(lacking)} that we know, and skips {known}")


# --- sizes that the architecture can hold -----------------------------------------------------------------------


def misfits(parts: Parts, wanted: Architecture, *, in_part: bool) -> list[str]:
    """Why an architecture cannot hold a model as it is; nothing when it can. `in_part` heads are rotated in part."""
    reasons = []
    if not wanted.per_layer and not parts.uniform:
        reasons.append("its layers are all of one size, and the model's are not")
    heads = max(size.heads for size in parts.sizes)
    if wanted.width == "hidden" and heads * parts.head_dim != parts.hidden:
        reasons.append(
            f"its heads are together as wide as the hidden states ({parts.hidden}), and the model's {heads} heads of "
            f"{parts.head_dim} are not"
        )
    return reasons + hard_misfits(parts, wanted, in_part=in_part)


def hard_misfits(parts: Parts, wanted: Architecture, *, in_part: bool) -> list[str]:
    """Why an architecture cannot hold a model even with zeros around what is too small for it."""
    reasons = []
    if wanted.output == "tied" and HEAD in parts.whole:
        reasons.append("its output matrix is the embedding, and the model has one of its own")
    if in_part and not wanted.part_rotary:
        reasons.append("it rotates whole heads, and the model a part of each")
    biased = {
        name.removesuffix(".bias") for each in (parts.whole, *parts.layers) for name in each if name.endswith(".bias")
    }
    if wanted.biases != "all" and (odd := sorted(biased - set(wanted.biases))):
        reasons.append(f"it has no bias for {', '.join(odd)}")
    known = {gguf.TENSOR_NAMES[tensor] for tensor in gguf.MODEL_TENSORS[architecture_number(wanted.name)]}
    known = {name.removeprefix("blk.{bid}.") for name in known} | {
        part for parts in wanted.joins.values() for part in parts
    }
    here = {name.rpartition(".")[0] for each in (parts.whole, *parts.layers) for name in each if name != HEAD}
    if odd := sorted(here - known):
        reasons.append(f"it has no {', '.join(odd)}")
    return reasons


def resize(parts: Parts, wanted: Architecture) -> Parts:
    """Add zeros until the architecture can hold the model: heads, channels and whole sub-layers that give nothing.

    What the model computes stays the same. MLP widths become multiples of `BLOCK`. An attention or MLP that is
    skipped becomes one of zeros, unless the architecture knows layers without attention. Raises `ExportError` where
    zeros would change the result.
    """
    targets = _targets(parts, wanted)
    layers = []
    for index, (layer, before, after) in enumerate(zip(parts.layers, parts.sizes, targets, strict=True)):
        if before != after:
            layer = _padded(layer, before, after, parts, index)
        if not after.heads:
            layer = {name: recipe for name, recipe in layer.items() if not name.startswith("attn_norm.")}
        layers.append(layer)
    return replace(parts, layers=tuple(layers), sizes=tuple(targets))


def _targets(parts: Parts, wanted: Architecture) -> list[LayerSizes]:
    def up(n: int) -> int:
        return -(-n // BLOCK) * BLOCK

    if any(size.experts for size in parts.sizes):
        if not parts.uniform:
            raise ExportError(
                "a GGUF file gives every layer the same number of experts, of one size; cut all layers alike: "
                "--shape uniform"
            )
        return list(parts.sizes)
    if wanted.per_layer:
        targets = []
        for index, (size, layer) in enumerate(zip(parts.sizes, parts.layers, strict=True)):
            heads = (size.heads, size.kv_heads)
            if not size.heads and not (wanted.skips_attention and index and f"{OUTPUT}.bias" not in layer):
                heads = (1, 1)  # the first layer's are what the file is known to have attention by
            targets.append(LayerSizes(*heads, up(size.mlp) or BLOCK))
        return targets
    kv_heads = max(size.kv_heads for size in parts.sizes)
    group = max(size.heads // size.kv_heads for size in parts.sizes if size.kv_heads)
    if wanted.width == "hidden":
        kv_heads, group = _grouping(parts, kv_heads, group)
    mlp = up(max(size.mlp for size in parts.sizes))
    return [LayerSizes(kv_heads * group, kv_heads, mlp)] * len(parts.sizes)


def _grouping(parts: Parts, kv_heads: int, group: int) -> tuple[int, int]:
    """The fewest KV heads, and the query heads of each, that together are as wide as the hidden states."""
    heads, rest = divmod(parts.hidden, parts.head_dim)
    fitting = [n for n in range(kv_heads, heads + 1) if heads % n == 0 and heads // n >= group]
    if rest or not fitting:
        raise ExportError(
            f"{kv_heads} KV heads with {group} query heads each, of {parts.head_dim} numbers, cannot be filled up to "
            f"the hidden width of {parts.hidden}; cut the MLP alone: --axes mlp"
        )
    return fitting[0], heads // fitting[0]


def _padded(layer: Recipes, before: LayerSizes, after: LayerSizes, parts: Parts, index: int) -> dict[str, Recipe]:
    """The parts of a layer with zeros for the heads and channels that it does not have."""
    found = dict(layer)
    if (before.heads, before.kv_heads) != (after.heads, after.kv_heads) and after.heads:
        for norm in (QUERY_NORM, KEY_NORM):
            name = f"{norm}.weight"
            if name in layer and shape_of(layer[name], parts.fetch) != (parts.head_dim,):
                raise ExportError(
                    f"layer {index}: {norm} is taken over all heads at once, so heads of zeros would change it; cut "
                    "all layers alike (--shape uniform) or the MLP alone (--axes mlp)"
                )
        found |= _heads(layer, before, after, parts)
    if before.mlp != after.mlp:
        found |= _channels(layer, before, after, parts)
    return found


def _heads(layer: Recipes, before: LayerSizes, after: LayerSizes, parts: Parts) -> dict[str, Recipe]:
    size, reference = parts.head_dim, _reference(parts, OUTPUT)
    if not before.heads:
        found = {
            f"{QUERIES}.weight": _zeros(after.heads * size, parts.hidden),
            f"{KEYS}.weight": _zeros(after.kv_heads * size, parts.hidden),
            f"{VALUES}.weight": _zeros(after.kv_heads * size, parts.hidden),
            f"{OUTPUT}.weight": _zeros(parts.hidden, after.heads * size),
        }
        norms = [f"{norm}.weight" for norm in (QUERY_NORM, KEY_NORM) if f"{norm}.weight" in reference]
        found |= {name: _zeros(*shape_of(reference[name], parts.fetch)) for name in norms}
        widths = {QUERIES: after.heads, KEYS: after.kv_heads, VALUES: after.kv_heads}
        found |= {f"{n}.bias": _zeros(heads * size) for n, heads in widths.items() if f"{n}.bias" in reference}
        if f"{OUTPUT}.bias" in reference and f"{OUTPUT}.bias" not in layer:
            found[f"{OUTPUT}.bias"] = _zeros(parts.hidden)
        return found
    grid = (before.kv_heads, before.heads // before.kv_heads, size)
    wide = (after.kv_heads, after.heads // after.kv_heads, size)
    found = {}
    for kind in ("weight", "bias"):
        for part in (QUERIES, KEYS, VALUES):
            if (recipe := layer.get(f"{part}.{kind}")) is not None:
                queries = part == QUERIES
                found[f"{part}.{kind}"] = _grown(
                    recipe, 0, grid if queries else (grid[0], 1, size), wide if queries else (wide[0], 1, size)
                )
    found[f"{OUTPUT}.weight"] = _grown(layer[f"{OUTPUT}.weight"], 1, grid, wide)
    return found


def _channels(layer: Recipes, before: LayerSizes, after: LayerSizes, parts: Parts) -> dict[str, Recipe]:
    reference = _reference(parts, DOWN)
    if not before.mlp:
        found = {f"{n}.weight": _zeros(after.mlp, parts.hidden) for n in (GATE, UP) if f"{n}.weight" in reference}
        found |= {f"{n}.bias": _zeros(after.mlp) for n in (GATE, UP) if f"{n}.bias" in reference}
        found[f"{DOWN}.weight"] = _zeros(parts.hidden, after.mlp)
        if f"{DOWN}.bias" in reference and f"{DOWN}.bias" not in layer:
            found[f"{DOWN}.bias"] = _zeros(parts.hidden)
        return found
    rows = [f"{part}.{kind}" for part in (GATE, UP) for kind in ("weight", "bias")]
    found = {name: _grown(layer[name], 0, (before.mlp,), (after.mlp,)) for name in rows if name in layer}
    found[f"{DOWN}.weight"] = _grown(layer[f"{DOWN}.weight"], 1, (before.mlp,), (after.mlp,))
    return found


def _reference(parts: Parts, part: str) -> Recipes:
    """A layer that has the part: which norms and biases the others have, too."""
    return next(layer for layer in parts.layers if f"{part}.weight" in layer)


def _zeros(*shape: int) -> Recipe:
    return lambda fetch: torch.zeros(shape)


def _grown(recipe: Recipe, dim: int, grid: tuple[int, ...], wide: tuple[int, ...]) -> Recipe:
    """A recipe whose dimension, seen as a grid, is put into the first corner of a wider grid of zeros."""

    def grow(fetch: Fetch) -> Tensor:
        values: Tensor = recipe(fetch).unflatten(dim, grid)
        shape = (*values.shape[:dim], *wide, *values.shape[dim + len(grid) :])
        grown: Tensor = values.new_zeros(shape)
        corner = (slice(None),) * dim + tuple(slice(n) for n in grid)
        grown[corner] = values
        return grown.flatten(dim, dim + len(grid) - 1)

    return grow


# --- as the architecture wants them -----------------------------------------------------------------------------


def put_together(parts: Parts, wanted: Architecture, model_type: ModelType) -> dict[str, Recipe]:
    """The tensors of the file, by name, in its order: rotated pairs side by side, norms whole, parts joined."""
    pairs = wanted.rotary == "pairs" and model_type.rotary == "halves"
    whole = {name: _with_offset(name, recipe, model_type) for name, recipe in parts.whole.items()}
    if wanted.output == "required" and HEAD not in whole:
        whole[HEAD] = whole[EMBEDDING]
    found = dict(whole)
    for index, (layer, size) in enumerate(zip(parts.layers, parts.sizes, strict=True)):
        ready = {name: _with_offset(name, recipe, model_type) for name, recipe in layer.items()}
        if pairs:
            for part, heads in ((QUERIES, size.heads), (KEYS, size.kv_heads)):
                for name in (f"{part}.weight", f"{part}.bias"):
                    if name in ready:
                        ready[name] = _paired(ready[name], heads)
        for name, members in wanted.joins.items():
            for kind in ("weight", "bias"):
                if all(f"{member}.{kind}" in ready for member in members):
                    ready[f"{name}.{kind}"] = _cat([ready.pop(f"{member}.{kind}") for member in members])
        found |= {f"blk.{index}.{name}": recipe for name, recipe in ready.items()}
    return found


def _with_offset(name: str, recipe: Recipe, model_type: ModelType) -> Recipe:
    if not model_type.norm_offset or not name.endswith("_norm.weight"):
        return recipe
    return lambda fetch: recipe(fetch).float() + model_type.norm_offset


def _paired(recipe: Recipe, heads: int) -> Recipe:
    """Rows i and i + n/2 of every head, which are rotated together, one after the other."""
    return lambda fetch: recipe(fetch).unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _cat(recipes: list[Recipe]) -> Recipe:
    return lambda fetch: torch.cat([recipe(fetch) for recipe in recipes])
