"""Mapped model -> an architecture of llama.cpp that holds it, with padding where asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import gguf
from transformers import PreTrainedModel

from secateur.errors import ExportError
from secateur.export.architectures import Architecture, ModelType, architecture
from secateur.export.mapping import HEAD, MappedModel, architecture_number, map_model
from secateur.export.metadata import Positions, positions, rotary_dim
from secateur.export.padding import count_padding, pad_layers


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
            return _padded(mapped, candidate, where)
    if unsaid is not None:
        raise unsaid
    paddable = [each for each in candidates if not hard_misfits(mapped, each, partial_rotary=partial_rotary)]
    if pad and paddable:
        return _padded(mapped, paddable[0], positions(model, paddable[0], mapped))
    raise _no_architecture(reasons, paddable=bool(paddable) and not mapped.sizes[0].experts)


def _padded(mapped: MappedModel, chosen: Architecture, where: Positions) -> Fitted:
    padded = pad_layers(mapped, chosen)
    return Fitted(padded, chosen, where, count_padding(mapped, padded))


def misfits(mapped: MappedModel, wanted: Architecture, *, partial_rotary: bool) -> list[str]:
    """Why an architecture cannot hold a model as it is; empty when it can."""
    reasons = []
    if not wanted.per_layer and not mapped.uniform:
        reasons.append("its layers are all of one size, and the model's are not")
    heads = max(size.heads for size in mapped.sizes)
    if wanted.width == "hidden" and heads * mapped.head_dim != mapped.hidden:
        reasons.append(
            f"its heads are together as wide as the hidden states ({mapped.hidden}), and the model's {heads} heads of "
            f"{mapped.head_dim} are not"
        )
    return reasons + hard_misfits(mapped, wanted, partial_rotary=partial_rotary)


def hard_misfits(mapped: MappedModel, wanted: Architecture, *, partial_rotary: bool) -> list[str]:
    """Why an architecture cannot hold a model even with padding."""
    reasons = []
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
