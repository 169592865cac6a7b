"""A discovery -> the share of the parameters that each kind of group covers, and why the rest is frozen."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from secateur.discovery.counting import count_parameters
from secateur.discovery.groups import KINDS, Discovery, Group, Weight
from secateur.discovery.layers import path_and_parents
from secateur.discovery.weight_names import fold_names, without_layer_number


@dataclass(frozen=True, slots=True)
class Coverage:
    """How much of a model some groups cover: the parameters of all weights with an axis in one of them."""

    groups: int
    units: int
    parameters: int
    share: float  # of the model's parameters


@dataclass(frozen=True, slots=True)
class FrozenReason:
    """The axes of parameters that cannot be cut, or not wholly, for one reason."""

    reason: str
    axes: int
    partly: int  # how many of them hold units of a group, too
    weights: tuple[str, ...]  # "model.layers.*.self_attn.q_proj[0]" by its dimension; "model.vision.*" for all in it
    parameters: int  # of the weights with such an axis
    share: float


def coverage_of(groups: Sequence[Group], discovery: Discovery) -> Coverage:
    """How much of the model these groups cover; a group of layers covers all that lies in a layer."""
    names = {axis.weight for group in groups for axis in group.axes}
    layers = any(group.kind == "layer" for group in groups)
    parameters = number_of_parameters(
        weight for weight in discovery.weights if weight.name in names or (layers and weight.layer is not None)
    )
    share = parameters / count_parameters(discovery)
    return Coverage(len(groups), sum(group.units for group in groups), parameters, share)


def number_of_parameters(weights: Iterable[Weight]) -> int:
    """The parameters that these weights hold before a cut; buffers hold none."""
    return sum(prod(weight.shape) for weight in weights if weight.parameter)


def coverage_by_kind(discovery: Discovery) -> dict[str, Coverage]:
    """For every kind of group, how much of the model it covers; several may cover the same parameter.

    >>> from transformers import AutoConfig
    >>> from secateur.discovery.discover import discover
    >>> sizes = {"hidden_size": 12, "num_attention_heads": 2, "ffn_dim": 24, "word_embed_proj_dim": 12}
    >>> covered = coverage_by_kind(discover(AutoConfig.for_model("opt", num_hidden_layers=2, vocab_size=50, **sizes)))
    >>> covered["mlp"].groups, covered["mlp"].units, covered["mlp"].parameters  # 2 x (12 x 24 + 24 + 24 x 12)
    (2, 48, 1200)
    """
    return {
        kind: coverage_of(groups, discovery)
        for kind in KINDS
        if (groups := [group for group in discovery.groups if group.kind == kind])
    }


def total_coverage(discovery: Discovery, *, layers: bool = True) -> Coverage:
    """How much of the model all groups cover together, counted once; without `layers`, all but whole layers."""
    return coverage_of([group for group in discovery.groups if layers or group.kind != "layer"], discovery)


def coverage_as_json(discovery: Discovery) -> dict[str, dict[str, Any]]:
    """The coverage of every kind, and that of all together as "any", as plain data."""
    coverages = {**coverage_by_kind(discovery), "any": total_coverage(discovery)}
    return {kind: asdict(coverage) for kind, coverage in coverages.items()}


def frozen_reasons(discovery: Discovery) -> tuple[FrozenReason, ...]:
    """Why axes of parameters cannot be cut, or not wholly; the reason that holds most parameters first.

    >>> from transformers import AutoConfig
    >>> from secateur.discovery.discover import discover
    >>> sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 3}
    >>> (rotary,) = frozen_reasons(discover(AutoConfig.for_model("granite", num_key_value_heads=2, **sizes)))
    >>> rotary.axes, rotary.weights
    (6, ('model.layers.*.self_attn.q_proj[0]', 'model.layers.*.self_attn.k_proj[0]'))
    """
    weights = {weight.name: weight for weight in discovery.weights}
    names = [weight.name for weight in discovery.weights]
    held = {(axis.weight, axis.dim) for group in discovery.groups for axis in group.axes}
    total = count_parameters(discovery)
    axes: dict[str, dict[tuple[str, int], Weight]] = defaultdict(dict)  # by reason
    for frozen in discovery.frozen:
        weight = weights[frozen.weight]
        if weight.parameter:
            reason = frozen.reason if weight.layer is None else without_layer_number(frozen.reason, weight.layer)
            axes[reason][frozen.weight, frozen.dim] = weight
    reasons = []
    for reason, at in axes.items():
        parameters = number_of_parameters({weight.name: weight for weight in at.values()}.values())
        reasons.append(
            FrozenReason(
                reason=reason,
                axes=len(at),
                partly=sum((name, dim) in held for name, dim in at),
                weights=fold_names(_axes_or_modules(at, discovery), names),
                parameters=parameters,
                share=parameters / total,
            )
        )
    return tuple(sorted(reasons, key=lambda reason: -reason.parameters))


def _axes_or_modules(axes: Iterable[tuple[str, int]], discovery: Discovery) -> Iterator[str]:
    """The names of axes; instead of them that of the outermost module with nothing but such axes, if it has several."""
    frozen = dict.fromkeys(axes)
    inside: dict[str, set[tuple[str, int]]] = defaultdict(set)
    for weight in discovery.weights:
        if weight.parameter:
            for module in path_and_parents(weight.name):
                inside[module] |= {(weight.name, dim) for dim, size in enumerate(weight.shape) if size > 1}
    whole = {module for module, held in inside.items() if held <= frozen.keys() and len({name for name, _ in held}) > 1}
    for name, dim in frozen:
        outermost = next((module for module in reversed(path_and_parents(name)) if module in whole), None)
        yield f"{name.removesuffix('.weight')}[{dim}]" if outermost is None else f"{outermost}.*"
