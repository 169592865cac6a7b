"""Weights and statistics -> one score per unit; the higher, the more the unit is worth keeping.

A score gives every element of a weight a salience s. A channel (one index of an axis) adds up its elements, a unit
its channels, and a group's axes are reduced by sum, mean, max, prod, first or last. To add a score, write its salience
and put an entry in `SCORES`.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.axes import discover
from secateur.axes.algebra import units_along, variables_in
from secateur.axes.groups import Discovery, Group
from secateur.calibration import SELF, CalibrationOptions, calibration_windows, check_positions, digest, self_written
from secateur.errors import ScoreError
from secateur.statistics import Progress, Salience, Statistics, gradient_statistics, weight_statistics


@dataclass(frozen=True, slots=True)
class Score:
    """How elements are scored, what that needs, and where it comes from."""

    salience: Salience
    needs: str  # "weights", "gradient" or "second order"
    signed: bool = False  # a channel is abs(sum s), not sum abs(s)
    reduce: str = "sum"  # the default over a group's axes
    source: str = "LLM-Pruner, arXiv 2305.11627"


def _first(weight: Tensor, gradient: Tensor | None, squared: Tensor | None) -> Tensor:
    assert gradient is not None
    return weight * gradient


def _second(weight: Tensor, gradient: Tensor | None, squared: Tensor | None) -> Tensor:
    assert squared is not None
    return weight * squared * weight


def _mix(weight: Tensor, gradient: Tensor | None, squared: Tensor | None) -> Tensor:
    return _first(weight, gradient, squared) - _second(weight, gradient, squared) / 2


SCORES: dict[str, Score] = {
    "random": Score(lambda w, g, a: w, "weights", source="uniform, seeded"),
    "l1": Score(lambda w, g, a: w.abs(), "weights", reduce="mean"),
    "l2": Score(lambda w, g, a: w.square(), "weights", reduce="mean"),
    "vectorize": Score(_first, "gradient", signed=True, source="arXiv 2305.11627, equation 3"),
    "param_first": Score(_first, "gradient", source="arXiv 2305.11627, equation 5, first-order term"),
    "param_second": Score(_second, "second order", source="arXiv 2305.11627, equation 5, second-order term"),
    "param_mix": Score(_mix, "second order", source="arXiv 2305.11627, equation 5"),
}

REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {  # axes x units -> units
    "sum": lambda x: x.sum(0),
    "mean": lambda x: x.mean(0),
    "max": lambda x: x.amax(0),
    "prod": lambda x: x.prod(0),
    "first": lambda x: x[0],
    "last": lambda x: x[-1],
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
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ScoreError(f"unknown {what} {name!r}{hint} Known: {', '.join(names)}")


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
    """Score every unit of the groups named (by default, of all); weights of none of them take no time or memory.

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
    discovery = discovery or discover(model)
    reduce = reduce or SCORES[name].reduce
    known(reduce, REDUCTIONS, "reduction")
    options = calibration or CalibrationOptions()
    drawn = calibration is not None or windows is None  # whether the options say where the windows are from
    on_text = SCORES[name].needs != "weights"
    if on_text:
        if windows is None and tokenizer is None and options.text != SELF:
            raise ScoreError(f"score {name} takes gradients: give a tokenizer, or windows of token ids")
        check_positions(model.config, options.length if windows is None else windows.shape[1])
        if windows is None and options.text == SELF:
            windows = self_written(model, options, progress=progress)
        elif windows is None and tokenizer is not None:
            windows = calibration_windows(tokenizer, options)
    chosen = [group for group in discovery.groups if groups is None or group.name in groups]
    statistics = statistics_for(name, model, discovery, windows, groups=chosen, progress=progress)
    return Scores(
        score=name,
        reduce=reduce,
        units=unit_scores(discovery, statistics, groups=chosen, name=name, reduce=reduce, seed=options.seed),
        calibration=digest(windows) if on_text and windows is not None else None,
        loss=statistics.loss,
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
    progress: Progress | None = None,
) -> Statistics:
    """The statistics that a score needs for some groups, and those of the scores that need no more than it.

    Scores of weights need no windows. Raises what `statistics` raises.

    >>> from transformers import AutoConfig, AutoModelForCausalLM
    >>> config = AutoConfig.for_model("opt", hidden_size=12, num_attention_heads=2, ffn_dim=24, num_hidden_layers=1)
    >>> model = AutoModelForCausalLM.from_config(config)
    >>> sorted(statistics_for("param_first", model, discover(model), torch.arange(20).reshape(2, 10)).sums)
    ['param_first', 'vectorize']
    """
    if name == "random":
        return Statistics({})
    needs = SCORES[name].needs
    saliences = {key: _absolute(score) for key, score in SCORES.items() if score.needs == needs and key != "random"}
    if needs == "second order":
        saliences |= {key: _absolute(score) for key, score in SCORES.items() if score.needs == "gradient"}
    groups = discovery.groups if groups is None else groups
    wanted = {axis.weight for group in groups for axis in group.axes}
    if any(group.kind == "layer" for group in groups):
        wanted |= {weight.name for weight in discovery.weights if weight.layer is not None}
    if needs == "weights":
        weights = {key: parameter.detach() for key, parameter in model.named_parameters() if key in wanted}
        return weight_statistics(weights, saliences)
    if windows is None:
        raise ScoreError(f"score {name} takes gradients: give windows of token ids")
    layers = [f"{prefix}.{i}" for prefix in discovery.layer_lists for i in range(discovery.depth)]
    modules = dict(model.named_modules())
    return gradient_statistics(
        model,
        windows,
        saliences,
        second_order=needs == "second order",
        wanted=sorted(wanted),
        layers=[path for path in layers if path in modules],
        progress=progress,
    )


def _absolute(how: Score) -> Salience:
    return how.salience if how.signed else lambda w, g, a: how.salience(w, g, a).abs()


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

    Raises `ScoreError` for a weight that the statistics lack.
    """
    groups = discovery.groups if groups is None else groups
    if name == "random":
        return {group.name: _random(group, seed) for group in groups}
    units_of = {group.name: group.units for group in groups}
    sums = statistics.sums[name]
    signed = SCORES[name].signed
    per_axis: dict[str, list[Tensor]] = defaultdict(list)
    layers: dict[int, list[Tensor]] = defaultdict(list)
    for weight in discovery.weights:
        if not weight.parameter:
            continue
        reached = [dict.fromkeys(v.name for v in variables_in(dim) if v.name in units_of) for dim in weight.dims]
        if weight.name not in sums:
            if any(reached):
                raise ScoreError(f"there is no gradient for the weight {weight.name}: the loss does not depend on it")
            continue  # a weight that no cut touches may have none
        for dim, (expression, names) in enumerate(zip(weight.dims, reached, strict=True)):
            channels = sums[weight.name][dim].abs() if signed else sums[weight.name][dim]
            for reached_by in names:
                unit_of = torch.tensor(units_along(expression, reached_by))
                units = torch.zeros(units_of[reached_by])
                mine = unit_of >= 0
                per_axis[reached_by].append(units.index_add_(0, unit_of[mine], channels[mine]))
        if weight.layer is not None:
            layers[weight.layer].append(sums[weight.name][0].sum().abs())
    found = {key: REDUCTIONS[reduce](torch.stack(axes)) for key, axes in per_axis.items()}
    for group in groups:
        if group.kind == "layer":
            whole = [REDUCTIONS[reduce](torch.stack(layers[i])[:, None]) for i in range(group.units)]
            found[group.name] = torch.cat(whole)
    return {group.name: found[group.name] for group in groups}


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
    temporary = path.with_name(f".{path.name}.partial")
    units = {name: values.contiguous() for name, values in scores.units.items()}
    save_file(units, temporary, metadata={"secateur": json.dumps(about)})
    temporary.replace(path)


def read_scores(path: Path) -> Scores:
    """Read what `write_scores` wrote. Raises `ScoreError` when the file is missing or not of scores."""
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["secateur"])
            units = {name: file.get_tensor(name) for name in sorted(file.keys())}
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ScoreError(f"{path} holds no scores ({error}); expected what write_scores writes") from error
    options = about.pop("options")
    return Scores(units=units, options=None if options is None else CalibrationOptions(**options), **about)
