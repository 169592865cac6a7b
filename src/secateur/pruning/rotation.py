"""Dense model and calibration windows -> the same model, with the value channels of every head at their principal axes.

Nothing nonlinear lies between the matrix that makes values and the one that reads them after attention has mixed them
over tokens. So the channels of each KV head can be changed by any invertible matrix, and its inverse goes into the
columns of all query heads that read it. Here the i-th channel of every head becomes the one that, of those after the
first i, matters most to the outputs: channels that go as a unit, one of each head, are then equally far down in all.

Names of tensors end in their axes: N tokens, K blocks (a head in an axis), D channels of a head, R rows (outputs).
"""

from __future__ import annotations

import copy
import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateur.discovery.algebra import Expression, units_along, variables_in
from secateur.discovery.groups import Discovery, Group
from secateur.discovery.padding import INPUT_DIM, PADDED_KIND
from secateur.models.inputs import arguments, predicted
from secateur.models.streaming import check_in_place
from secateur.progress import Progress
from secateur.scoring.obs import add_gram, fill_above
from secateur.scoring.passes.forward import embedding_device, probe_windows
from secateur.scoring.passes.products import stream_inputs

logger = logging.getLogger(__name__)

SAME = {torch.float64: 1e-8, torch.float32: 1e-3}  # relative difference of the logits that rounding may make
SAME_IN_HALF = 0.1
NOISE = 1e-4  # of the mean of a Gram matrix's diagonal, added to it: axes on which nothing was seen

Key = tuple[int, ...]  # of the heads that share values: their numbers along the variables of the writing axis


@dataclass(frozen=True, slots=True)
class _Axis:
    """Where the channels of a group lie in one dimension of a weight."""

    weight: str
    dim: int
    at_KD: Tensor
    """Positions: for each head, those of its channels."""
    keys: tuple[Key, ...]
    """Of each head, which values it has."""


@dataclass(frozen=True, slots=True)
class _Values:
    """A group of value channels: the matrix (and bias) that makes them, and the matrix that reads them."""

    group: Group
    written: tuple[_Axis, ...]
    read: _Axis


@torch.no_grad()
def rotated(
    model: PreTrainedModel, discovery: Discovery, windows: Tensor, *, progress: Progress | None = None
) -> PreTrainedModel:
    """The model with rotated values, which gives the same logits; it shares all other weights with the one given.

    Groups whose channels pass through anything but sums over tokens stay as they are: those that a norm counts, that
    more than one matrix makes or reads, and those where the logits of two short samples show it. Windows are int64,
    samples x length.

    >>> from secateur.discovery.discover import discover
    >>> from transformers import AutoConfig, AutoModelForCausalLM
    >>> config = AutoConfig.for_model("opt", hidden_size=12, num_attention_heads=2, ffn_dim=24, num_hidden_layers=1)
    >>> model, windows = AutoModelForCausalLM.from_config(config).eval(), torch.arange(60).reshape(3, 20)
    >>> same = rotated(model, discover(config), windows)
    >>> before, after = (each.model.decoder.layers[0].self_attn.v_proj.weight for each in (model, same))
    >>> bool((before != after).any()), torch.allclose(model(windows).logits, same(windows).logits, atol=1e-5)
    (True, True)
    """
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    check_in_place(model, "axes=head_dim", "other axes")
    result: PreTrainedModel = copy.deepcopy(model, memo=dict(shared))
    values = [found for group in discovery.groups if (found := _values(model, discovery, group)) is not None]
    if not values:
        return result
    grams = _grams(model, values, windows, discovery, progress)
    ids_BT = probe_windows(windows).to(embedding_device(model))
    wanted = predicted(model(**arguments(model, ids_BT)))
    families: dict[str, list[_Values]] = defaultdict(list)
    for each in values:
        families[each.group.family].append(each)
    for name, members in families.items():
        before = [(axis.weight, result.get_parameter(axis.weight)) for each in members for axis in _axes(each)]
        for each in members:
            _rotate_in_place(result, each, grams)
        off = (predicted(result(**arguments(result, ids_BT))) - wanted).norm() / wanted.norm().clamp_min(1e-30)
        if not off < SAME.get(model.dtype, SAME_IN_HALF):
            logger.warning("channels of %s are cut as they are: something nonlinear lies on them (%.1e)", name, off)
            for weight, parameter in before:
                _set(result, weight, parameter)
    return result


def principal_axes(gram_DD: Tensor, reads_DD: Tensor) -> tuple[Tensor, Tensor]:
    """What changes the channels x of a head, and its inverse, which goes to their readers: float64.

    `gram_DD` is the mean of xx', `reads_DD` the sum of W'W over all W that read them. The channels after it are
    uncorrelated, and the first n of them give the outputs Wx with the least squared error that any n give.

    >>> change, back = principal_axes(torch.diag(torch.tensor([1.0, 9.0])), torch.eye(2))
    >>> (change @ torch.tensor([0.0, 3.0]).double()).abs().round(decimals=1)
    tensor([1., 0.], dtype=torch.float64)
    """
    gram_DD, reads_DD = gram_DD.double().clone(), reads_DD.double()
    gram_DD.diagonal().add_(NOISE * float(gram_DD.diagonal().mean().clamp_min(1e-12)))
    sizes_D, axes_DD = torch.linalg.eigh(gram_DD)
    root_DD, inverse_DD = (axes_DD * power_D @ axes_DD.t() for power_D in (sizes_D.sqrt(), sizes_D.rsqrt()))
    order_DD = torch.linalg.eigh(root_DD @ reads_DD @ root_DD).eigenvectors.flip(1)  # the most important first
    return order_DD.t() @ inverse_DD, root_DD @ order_DD


def _values(model: PreTrainedModel, discovery: Discovery, group: Group) -> _Values | None:
    """How the channels of a group lie in its weights, if one linear layer makes and one reads them."""
    if group.kind != PADDED_KIND or group.normed or group.chosen:
        return None
    writes: dict[tuple[str, int], Expression] = {}
    reads: dict[tuple[str, int], Expression] = {}
    for axis in group.axes:
        path, _, last = axis.weight.rpartition(".")
        module = model.get_submodule(path)
        if last not in ("weight", "bias") or type(module) not in INPUT_DIM or axis.weight in discovery.tied.values():
            return None
        is_read = last == "weight" and axis.dim == INPUT_DIM[type(module)]
        (reads if is_read else writes)[axis.weight, axis.dim] = axis.expression
    if len(reads) != 1 or len({weight.rpartition(".")[0] for weight, _ in writes}) != 1:
        return None
    (read_at, read), (written, *_) = next(iter(reads.items())), writes.values()
    positions_KD = _positions(written, group)
    if len({len(row) for row in positions_KD}) != 1 or len(positions_KD) < 1:
        return None
    names = {variable.name for variable in variables_in(read)} - {group.name}
    outer = [name for name in sorted(names) if int(_along(written, name)[positions_KD[:, 0]].min()) >= 0]
    axes = [_Axis(*at, _positions(e, group), _keys(e, group, outer)) for at, e in [*writes.items(), (read_at, read)]]
    alike = all(set(axis.keys) == set(axes[0].keys) for axis in axes)
    return _Values(group, tuple(axes[:-1]), axes[-1]) if alike else None


def _positions(expression: Expression, group: Group) -> Tensor:
    """The positions of a group's units in a dimension, as often as they lie there: heads x channels."""
    unit_of_C = _along(expression, group.name)
    return torch.stack([torch.nonzero(unit_of_C == unit).flatten() for unit in range(group.units)], 1)


def _keys(expression: Expression, group: Group, outer: Sequence[str]) -> tuple[Key, ...]:
    first_K = _positions(expression, group)[:, 0]
    numbers = [_along(expression, name)[first_K].tolist() for name in outer]
    return tuple(zip(*numbers, strict=True)) if numbers else ((),) * len(first_K)


def _along(expression: Expression, name: str) -> Tensor:
    return torch.tensor(units_along(expression, name))


def _axes(values: _Values) -> tuple[_Axis, ...]:
    return (*values.written, values.read)


Grams = dict[tuple[str, Key], Tensor]  # of the inputs of a weight, for the heads that share values: D x D


def _grams(
    model: PreTrainedModel,
    values: Sequence[_Values],
    windows: Tensor,
    discovery: Discovery,
    progress: Progress | None,
) -> Grams:
    """The mean of xx' over all tokens and heads that share values."""
    by_weight = {each.read.weight: each.read for each in values}
    grams: Grams = {}

    def visit(weight: str, _: int, __: int | None, x_NC: Tensor) -> None:
        read = by_weight[weight]
        for at_D, key in zip(read.at_KD, read.keys, strict=True):
            total_DD = grams.setdefault((weight, key), x_NC.new_zeros(len(at_D), len(at_D), dtype=torch.float64))
            add_gram(total_DD, x_NC[:, at_D.to(x_NC.device)])

    modules = dict(model.named_modules())
    layers = [path for path in discovery.layer_paths if path in modules]
    stream_inputs(model, windows, visit, wanted=by_weight, layers=layers, progress=progress)
    for total_DD in grams.values():
        fill_above(total_DD)
    return {at: total_DD / windows.numel() for at, total_DD in grams.items()}


def _rotate_in_place(model: PreTrainedModel, values: _Values, grams: Grams) -> None:
    """Give the model new parameters for the weights that make and read the channels."""
    read = values.read
    reader_CR = model.get_parameter(read.weight).double().movedim(read.dim, 0)
    changes: dict[Key, tuple[Tensor, Tensor]] = {}
    for key in dict.fromkeys(read.keys):
        if (read.weight, key) not in grams:
            return  # no token came here
        heads = [at_D for at_D, own in zip(read.at_KD.to(reader_CR.device), read.keys, strict=True) if own == key]
        reads_DD = torch.stack([reader_CR[at_D] @ reader_CR[at_D].t() for at_D in heads]).sum(0)
        changes[key] = principal_axes(grams[read.weight, key], reads_DD)
    for axis in _axes(values):
        parameter = model.get_parameter(axis.weight)
        new = parameter.detach().double().movedim(axis.dim, 0).clone()
        for at_D, key in zip(axis.at_KD.to(new.device), axis.keys, strict=True):
            change_DD, back_DD = changes[key]
            by_DD = back_DD.t() if axis is read else change_DD
            new[at_D] = (by_DD @ new[at_D].reshape(len(at_D), -1)).reshape(new[at_D].shape)
        _set(model, axis.weight, nn.Parameter(new.movedim(0, axis.dim).to(parameter.dtype), parameter.requires_grad))


def _set(model: PreTrainedModel, name: str, parameter: nn.Parameter) -> None:
    path, _, last = name.rpartition(".")
    setattr(model.get_submodule(path), last, parameter)
