"""Weights and statistics -> one score per unit; the higher, the more the unit is worth keeping.

A score gives every element of a weight a salience s. A channel (one index of an axis) adds up its elements, a unit
its channels, and a group's axes are reduced by sum, mean, max, prod, first or last. Scores of inputs count the axes
that read the units alone. To add a score, write its salience and decorate it with `register_score`.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.data.calibration import SELF, CalibrationOptions
from secateur.data.generated import generate_windows
from secateur.data.windows import calibration_windows, digest
from secateur.discovery.algebra import units_along, variables_in
from secateur.discovery.discover import discover
from secateur.discovery.groups import Discovery, Group
from secateur.errors import CheckpointError, ScoreError, did_you_mean
from secateur.files import read_tensors, write_tensors
from secateur.models.config import check_not_quantised, check_positions
from secateur.progress import Progress
from secateur.scoring.statistics import (
    Salience,
    Statistics,
    UnitsOf,
    activation_statistics,
    gradient_statistics,
    layer_loss_statistics,
    mask_statistics,
    weight_statistics,
)

REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {  # axes x units -> units
    "sum": lambda x: x.sum(0),
    "mean": lambda x: x.mean(0),
    "max": lambda x: x.amax(0),
    "prod": lambda x: x.prod(0),
    "first": lambda x: x[0],
    "last": lambda x: x[-1],
}


NEEDS = ("weights", "inputs", "gradient", "second order")  # what a salience may ask for
Needs = Literal["weights", "inputs", "gradient", "second order", "masks", "grams", "layers", "losses"]


@dataclass(frozen=True, slots=True)
class Score:
    """How elements are scored, what that needs, and where it comes from."""

    salience: Salience | None  # None where units are scored as wholes (see `activation_statistics`)
    needs: Needs
    signed: bool = False  # a channel is abs(sum s), not sum abs(s)
    reduce: str = "sum"  # the default over a group's axes
    source: str = ""
    own: bool = False  # the user's
    positive: bool = False  # never negative as it is


SCORES: dict[str, Score] = {}


def register_score(
    name: str, *, needs: Needs = "weights", signed: bool = False, reduce: str = "sum", source: str = ""
) -> Callable[[Salience], Salience]:
    """Make a function of a weight's `Evidence` the score `name`, for Python and the command line alike.

    The function gives one number for each element of the weight; their absolute values are summed over a unit's
    elements, or with `signed` the numbers themselves, and then made absolute by channel. `needs` says what it looks at:
    "weights", "inputs" (one forward pass), "gradient" or "second order" (one forward and backward pass). `reduce` is
    the default over a group's axes. Raises `ScoreError` for an unknown need or reduction, or a name that is ours.

    >>> @register_score("magnitude_times_input", needs="inputs")
    ... def magnitude_times_input(seen):
    ...     return seen.weight * seen.inputs.mean
    >>> SCORES.pop("magnitude_times_input").needs
    'inputs'
    """
    known(needs, NEEDS, "need of a score")
    known(reduce, REDUCTIONS, "reduction")
    if name in SCORES and not SCORES[name].own:
        raise ScoreError(f"the score {name!r} is Secateur's own; give yours another name")
    if not name.isidentifier():
        raise ScoreError(f"{name!r} is no name of a score; use letters, digits and underscores, for example my_score")

    def put(function: Salience) -> Salience:
        SCORES[name] = Score(function, needs, signed, reduce, source, own=True)
        return function

    return put


SCORES |= {
    "random": Score(None, "weights", source="uniform, seeded"),
    "l1": Score(lambda seen: seen.weight.abs(), "weights", reduce="mean", source="sum |W|; arXiv 2305.11627"),
    "l2": Score(
        lambda seen: seen.weight.square(), "weights", positive=True, reduce="mean", source="sum W^2; arXiv 2305.11627"
    ),
    "vectorize": Score(lambda seen: seen.first, "gradient", signed=True, source="|sum W G|; arXiv 2305.11627, eq. 3"),
    "param_first": Score(lambda seen: seen.first, "gradient", source="sum |W G|; arXiv 2305.11627, eq. 5, first order"),
    "param_second": Score(
        lambda seen: seen.second,
        "second order",
        source="sum |W A W|; arXiv 2305.11627, eq. 5, second order",
        positive=True,
    ),
    "param_mix": Score(
        lambda seen: seen.first.sub(seen.second, alpha=0.5),
        "second order",
        source="sum |W G - W A W / 2|; arXiv 2305.11627, eq. 5",
    ),
    "wanda": Score(
        lambda seen: seen.weight * seen.inputs.norm, "inputs", source="sum |W| norm(X); Wanda, arXiv 2306.11695, eq. 1"
    ),
    "fluctuation": Score(
        lambda seen: seen.weight.square() * seen.inputs.variance,
        "inputs",
        source="sum W^2 var(X); FLAP, arXiv 2312.11983 (WIFV)",
    ),
    "obs": Score(None, "grams", source="w ((X'X)^-1)_uu^-1 w'; ZipLM, arXiv 2302.04089"),
    "fisher": Score(
        None,
        "masks",
        source="nats per token: 1/2 sum over samples of (dL/dm)^2, m a mask over the unit; arXiv 2204.09656, eq. 6-8",
    ),
    "obs_greedy": Score(None, "grams", source="the same, one unit after the other; ZipLM, arXiv 2302.04089"),
    "layer_loss": Score(None, "losses", source="loss without the layer - loss, nats per token"),
    "block_influence": Score(None, "layers", source="1 - mean cos(h, layer(h)); ShortGPT, arXiv 2403.03853"),
}


@dataclass(frozen=True, slots=True)
class Scores:
    """One score per unit of each group, and what they were computed with."""

    score: str
    reduce: str
    units: Mapping[str, Tensor]  # group -> float32, one per unit
    calibration: str | None = None  # hash of the tokens
    loss: float | None = None
    seed: int = 0
    options: CalibrationOptions | None = None


def known(name: str, table: Iterable[str], what: str) -> None:
    """Raise `ScoreError` with a suggestion when `name` is not in the table."""
    names = list(table)
    if name not in names:
        raise ScoreError(f"unknown {what} {name!r}{did_you_mean(name, names) or '.'} Known: {', '.join(names)}")


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    discovery: Discovery | None = None,
    name: str = "param_second",
    reduce: str | None = None,
    calibration: CalibrationOptions | None = None,
    windows: Tensor | None = None,
    groups: Collection[str] | None = None,
    progress: Progress | None = None,
) -> Scores:
    """Score every unit of the groups named; weights of none of them take no time or memory.

    By default, all groups are scored of which the score says something (scores of inputs say nothing of a vocabulary).

    Gradient scores need calibration tokens: `windows` (int64, samples x length), a tokenizer to take them from the
    calibration text, or `CalibrationOptions("self")` to let the model write them. Raises `ScoreError` for unknown names
    and for weights or gradients that are not finite, and `DataError` for samples longer than the model's positions.

    >>> from transformers import AutoConfig, AutoModelForCausalLM
    >>> config = AutoConfig.for_model("opt", hidden_size=12, num_attention_heads=2, ffn_dim=24, num_hidden_layers=2)
    >>> model = AutoModelForCausalLM.from_config(config)
    >>> scores = score(model, name="l2")
    >>> scores.units["layers.0.mlp"].shape
    torch.Size([24])
    """
    known(name, SCORES, "score")
    check_not_quantised(model.config)
    discovery = discovery or discover(model)
    reduce = reduce or SCORES[name].reduce
    known(reduce, REDUCTIONS, "reduction")
    options = calibration or CalibrationOptions()
    drawn = calibration is not None or windows is None  # whether the options say where the windows are from
    on_text = SCORES[name].needs != "weights"
    if on_text:
        if windows is None and tokenizer is None and options.text != SELF:
            raise ScoreError(f"score {name} needs calibration text: give a tokenizer, or windows of token ids")
        check_positions(model.config, options.length if windows is None else windows.shape[1])
        if windows is None and options.text == SELF:
            windows = generate_windows(model, options, progress=progress)
        elif windows is None and tokenizer is not None:
            windows = calibration_windows(tokenizer, options)
        windows = windows if not drawn or windows is None else options.scored(windows)
    chosen = None if groups is None else [group for group in discovery.groups if group.name in groups]
    statistics = statistics_for(name, model, discovery, windows, groups=chosen, progress=progress)
    return scores_from(discovery, statistics, groups=chosen, name=name, reduce=reduce, options=options, drawn=drawn)


def scores_from(
    discovery: Discovery,
    statistics: Statistics,
    *,
    groups: Sequence[Group] | None = None,
    name: str = "param_second",
    reduce: str | None = None,
    options: CalibrationOptions | None = None,
    drawn: bool = True,
) -> Scores:
    """Scores from statistics, with what they were computed on: `options`, where the tokens were `drawn` as they say.

    >>> from transformers import AutoConfig, AutoModelForCausalLM
    >>> config = AutoConfig.for_model("opt", hidden_size=12, num_attention_heads=2, ffn_dim=24, num_hidden_layers=1)
    >>> model = AutoModelForCausalLM.from_config(config)
    >>> discovery, windows = discover(model), torch.arange(20).reshape(2, 10)
    >>> statistics = statistics_for("param_first", model, discovery, windows)
    >>> scores_from(discovery, statistics, name="vectorize").units["layers.0.mlp"].shape
    torch.Size([24])
    """
    options = options or CalibrationOptions()
    on_text = SCORES[name].needs != "weights"
    reduce = reduce or SCORES[name].reduce
    return Scores(
        score=name,
        reduce=reduce,
        units=unit_scores(discovery, statistics, groups=groups, name=name, reduce=reduce, seed=options.seed),
        calibration=statistics.calibration if on_text else None,
        loss=statistics.loss if on_text else None,
        seed=options.seed,
        options=options if on_text and drawn else None,
    )


def statistics_for(
    name: str,
    model: PreTrainedModel,
    discovery: Discovery,
    windows: Tensor | None = None,
    *,
    groups: Sequence[Group] | None = None,
    journal: Path | None = None,
    progress: Progress | None = None,
) -> Statistics:
    """The statistics that a score needs for some groups, and those of the scores that need no more than it.

    Scores of weights need no windows. A journal is a folder from which a pass that was killed goes on (see
    `gradient_statistics`). Raises what the functions in `statistics` raise.

    >>> from transformers import AutoConfig, AutoModelForCausalLM
    >>> config = AutoConfig.for_model("opt", hidden_size=12, num_attention_heads=2, ffn_dim=24, num_hidden_layers=1)
    >>> model = AutoModelForCausalLM.from_config(config)
    >>> sorted(statistics_for("param_first", model, discover(model), torch.arange(20).reshape(2, 10)).sums)
    ['param_first', 'vectorize']
    """
    if name == "random":
        return Statistics({})
    how = SCORES[name]
    if groups is not None:
        check_kinds(name, groups)
    groups = discovery.groups if groups is None else groups
    saliences = _saliences_beside(name)
    wanted = _weights_of(discovery, groups)
    if how.needs == "weights":
        weights = {key: parameter.detach() for key, parameter in model.named_parameters() if key in wanted}
        return weight_statistics(weights, saliences)
    if windows is None:
        raise ScoreError(f"score {name} needs calibration text: give windows of token ids")
    modules = dict(model.named_modules())
    layers = {f"{prefix}.{i}": i for prefix in discovery.layer_lists for i in range(discovery.depth)}
    layers = {path: i for path, i in layers.items() if path in modules}
    if how.needs in ("inputs", "grams", "layers"):
        found = activation_statistics(
            model,
            windows,
            saliences,
            wanted=wanted,
            gram_units=_units_of(discovery, groups) if how.needs == "grams" else None,
            gram_score=name,
            layers=layers,
            progress=progress,
        )
    elif how.needs == "losses":
        found = layer_loss_statistics(model, windows, layers, progress=progress)
    elif how.needs == "masks":
        dims: dict[str, set[int]] = defaultdict(set)
        for axis in (axis for group in groups for axis in group.axes if axis.weight in wanted):
            dims[axis.weight].add(axis.dim)
        found = mask_statistics(model, windows, wanted=dims, layers=[*layers], journal=journal, progress=progress)
    else:
        found = gradient_statistics(
            model,
            windows,
            saliences,
            second_order=how.needs == "second order",
            wanted=sorted(wanted),
            layers=[*layers],
            journal=journal,
            progress=progress,
        )
    return replace(found, calibration=digest(windows))


def check_kinds(name: str, groups: Iterable[Group]) -> None:
    """Raise `ScoreError` where a score says nothing about groups of such kinds."""
    whole = SCORES[name].needs in ("layers", "losses")
    for group in groups:
        if whole and group.kind != "layer":
            raise ScoreError(f"score {name} compares whole layers, not {group.kind}: cut layers, with --axes layers")
        if SCORES[name].needs in ("grams", "masks") and group.kind == "layer":
            raise ScoreError(f"score {name} is not for whole layers: use --score block_influence, or cut other axes")


def holds(statistics: Statistics, name: str, discovery: Discovery, groups: Sequence[Group]) -> bool:
    """Whether statistics have all that a score needs for some groups; of the user's own scores, none ever do."""
    how = SCORES[name]
    if how.own or name == "random":
        return name == "random"
    if how.needs == "masks":
        return all(any(axis.weight in statistics.masks for axis in group.axes) for group in groups)
    if how.salience is None:
        return all(group.name in statistics.units.get(name, {}) for group in groups)
    sums = statistics.sums.get(name, {})
    if how.needs == "inputs":
        return all(
            any(axis.weight in sums for axis in group.axes) for group in groups if group.kind != "layer"
        ) and bool(sums)
    return all(weight in sums for weight in _weights_of(discovery, groups))


def _saliences_beside(name: str) -> dict[str, Salience]:
    """The saliences of a score and of those of ours that need no more than it."""
    needs = SCORES[name].needs
    enough = {"second order": ("gradient", "second order"), "grams": ("inputs",), "layers": ()}.get(needs, (needs,))
    return {
        key: how.salience if how.signed or how.positive else _absolute(how.salience)
        for key, how in SCORES.items()
        if how.salience is not None and how.needs in enough and (key == name or not how.own)
    }


def _absolute(salience: Salience) -> Salience:
    return lambda seen: salience(seen).abs()


def _weights_of(discovery: Discovery, groups: Sequence[Group]) -> set[str]:
    wanted = {axis.weight for group in groups for axis in group.axes}
    if any(group.kind == "layer" for group in groups):
        wanted |= {weight.name for weight in discovery.weights if weight.layer is not None}
    return wanted & {weight.name for weight in discovery.weights if weight.parameter}


def _units_of(discovery: Discovery, groups: Sequence[Group]) -> UnitsOf:
    names = {group.name for group in groups}
    weights = {weight.name: weight for weight in discovery.weights}

    def units_of(name: str, dim: int) -> dict[str, Tensor]:
        expression = weights[name].dims[dim]
        reached = dict.fromkeys(v.name for v in variables_in(expression) if v.name in names)
        return {group: torch.tensor(units_along(expression, group)) for group in reached}

    return units_of


def unit_scores(
    discovery: Discovery,
    statistics: Statistics,
    *,
    groups: Sequence[Group] | None = None,
    name: str = "param_second",
    reduce: str = "sum",
    seed: int = 0,
) -> dict[str, Tensor]:
    """Scores by group: float32, one per unit. A layer's axes are all of its weights, whole.

    Raises `ScoreError` for a weight that the statistics lack, and for a group named of which nothing is known; by
    default, all groups are scored of which something is.
    """
    asked = groups is not None
    groups = discovery.groups if groups is None else groups
    if name == "random":
        return {group.name: _random(group, seed) for group in groups}
    if asked:
        check_kinds(name, groups)
    if SCORES[name].needs == "masks":
        axes = _from_masks(discovery, statistics, groups)
    elif SCORES[name].salience is None:
        known_units = statistics.units.get(name, {})
        axes = {group.name: [*known_units.get(group.name, {}).values()] for group in groups}
    else:
        axes = _from_sums(discovery, statistics, groups, name, reduce)
    for group in groups:
        if asked and not axes.get(group.name):
            raise ScoreError(
                f"score {name} knows nothing of {group.name}: no product with a weight that we follow reads its units. "
                "Use a score of gradients, for example --score param_second"
            )
    return {group.name: REDUCTIONS[reduce](torch.stack(axes[group.name])) for group in groups if axes.get(group.name)}


def _from_sums(
    discovery: Discovery, statistics: Statistics, groups: Sequence[Group], name: str, reduce: str
) -> dict[str, list[Tensor]]:
    """For every group, what each of its axes says of its units."""
    units_of = {group.name: group.units for group in groups}
    sums = statistics.sums.get(name, {})
    signed, of_inputs = SCORES[name].signed, SCORES[name].needs == "inputs"
    per_axis: dict[str, list[Tensor]] = defaultdict(list)
    layers: dict[int, list[Tensor]] = defaultdict(list)
    for weight in discovery.weights:
        if not weight.parameter:
            continue
        reached = [dict.fromkeys(v.name for v in variables_in(dim) if v.name in units_of) for dim in weight.dims]
        if weight.name not in sums:
            if any(reached) and not of_inputs:
                raise ScoreError(f"there is no gradient for the weight {weight.name}: the loss does not depend on it")
            continue  # a weight that no cut touches may have none
        for dim, (expression, names) in enumerate(zip(weight.dims, reached, strict=True)):
            if of_inputs and dim != statistics.reads[weight.name] and not (dim == 0 and len(weight.dims) > 2):
                continue  # these are its outputs
            channels = sums[weight.name][dim].abs() if signed else sums[weight.name][dim]
            for reached_by in names:
                unit_of = torch.tensor(units_along(expression, reached_by))
                units = torch.zeros(units_of[reached_by])
                mine = unit_of >= 0
                per_axis[reached_by].append(units.index_add_(0, unit_of[mine], channels[mine]))
        if weight.layer is not None:
            layers[weight.layer].append(sums[weight.name][0].sum().abs())
    for group in groups:
        if group.kind == "layer" and layers:
            whole = [REDUCTIONS[reduce](torch.stack(layers[i])[:, None]) for i in range(group.units)]
            per_axis[group.name] = [torch.cat(whole)]
    return per_axis


def _from_masks(discovery: Discovery, statistics: Statistics, groups: Sequence[Group]) -> dict[str, list[Tensor]]:
    """The Fisher information of one mask over all that reads a unit, in nats per token: one axis for each group."""
    derivatives: dict[str, Tensor] = {}
    units_of = {group.name: group.units for group in groups}
    for weight in discovery.weights:
        for dim, by_channel in statistics.masks.get(weight.name, {}).items():
            expression = weight.dims[dim]
            for name in dict.fromkeys(v.name for v in variables_in(expression) if v.name in units_of):
                unit_of = torch.tensor(units_along(expression, name))
                mine = unit_of >= 0
                units = torch.zeros(len(by_channel), units_of[name])
                units.index_add_(1, unit_of[mine], by_channel[:, mine])
                derivatives[name] = derivatives.get(name, 0) + units
    return {name: [statistics.tokens / 2 * each.square().sum(0)] for name, each in derivatives.items()}


def _random(group: Group, seed: int) -> Tensor:
    """Uniform scores that depend on the seed and the group's name alone, not on the order of groups."""
    key = int.from_bytes(hashlib.sha256(f"{seed}:{group.name}".encode()).digest()[:8], "little") >> 1
    return torch.rand(group.units, generator=torch.Generator().manual_seed(key))


def write_scores(path: Path, scores: Scores) -> None:
    """Write scores as one safetensors file, whole or not at all; `read_scores` reads it back.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_scores(Path(folder) / "s.safetensors", Scores("l2", "mean", {"hidden": torch.tensor([1.0, 2.0])}))
    ...     read_scores(Path(folder) / "s.safetensors").units
    {'hidden': tensor([1., 2.])}
    """
    about = {
        "score": scores.score,
        "reduce": scores.reduce,
        "calibration": scores.calibration,
        "loss": scores.loss,
        "seed": scores.seed,
        "options": None if scores.options is None else asdict(scores.options),
    }
    write_tensors(path, scores.units, about)


def read_scores(path: Path) -> Scores:
    """Read what `write_scores` wrote. Raises `ScoreError` when the file is missing or not of scores."""
    try:
        units, about = read_tensors(path)
        options = about.pop("options")
        return Scores(units=units, options=None if options is None else CalibrationOptions(**options), **about)
    except (CheckpointError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise ScoreError(f"{path} holds no scores ({error}); expected what write_scores writes") from error
