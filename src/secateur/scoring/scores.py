"""Model, groups and calibration windows -> scores: which pass a score needs, and the value and file of its result."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.data.calibration import CalibrationOptions
from secateur.data.encoder_windows import as_read
from secateur.data.generated import generate_windows
from secateur.data.windows import behind, calibration_windows, digest, scored
from secateur.discovery.discover import discover
from secateur.discovery.groups import Discovery, Group
from secateur.errors import CheckpointError, ScoreError, check_known
from secateur.models.classes import objective
from secateur.models.config import check_not_quantized, check_positions
from secateur.models.tensor_files import read_tensors, write_tensors
from secateur.progress import Progress
from secateur.scoring.collect_backward import gradient_statistics, mask_statistics
from secateur.scoring.collect_experts import expert_modules, expert_statistics
from secateur.scoring.collect_forward import activation_statistics, layer_loss_statistics
from secateur.scoring.registry import REDUCTIONS, SCORES
from secateur.scoring.saliences import Salience, weight_statistics
from secateur.scoring.statistics import Statistics
from secateur.scoring.unit_scores import check_kinds, unit_scores, units_reached, weights_scored


@dataclass(frozen=True, slots=True)
class Scores:
    """One score per unit of each group, and what they were computed with."""

    score: str
    reduce: str
    units: Mapping[str, Tensor]
    """Group -> float32, one per unit."""
    calibration: str | None = None
    """Hash of the token ids."""
    loss: float | None = None
    """On the calibration windows, nats per token."""
    seed: int = 0
    options: CalibrationOptions | None = None
    """Where the windows came from, if they came from a text."""


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    discovery: Discovery | None = None,
    name: str = "fisher",
    calibration: CalibrationOptions | None = None,
    windows: Tensor | None = None,
    groups: Collection[str] | None = None,
    progress: Progress | None = None,
) -> Scores:
    """Score every unit of the groups named; weights of no such group take no time or memory.

    By default, all groups are scored of which the score says something: scores of inputs say nothing of a vocabulary,
    and `fisher` nothing of whole layers.

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
    check_known(ScoreError, "score", name, SCORES)
    check_not_quantized(model.config)
    options = calibration or CalibrationOptions()
    discovery = discovery or discover(model, start_tokens=options.start_tokens)
    from_text = calibration is not None or windows is None  # whether the options say where the windows are from
    if SCORES[name].needs != "weights":
        if windows is None and tokenizer is None and not options.generated:
            raise ScoreError(f"score {name} needs calibration text: give a tokenizer, or windows of token ids")
        check_positions(model.config, options.length if windows is None else windows.shape[1])
        if windows is None and options.generated:
            windows = generate_windows(model, options, start_tokens=discovery.start_tokens, progress=progress)
        elif windows is None and tokenizer is not None:
            windows = as_read(calibration_windows(tokenizer, options), tokenizer, objective(model), seed=options.seed)
        if from_text and windows is not None:
            windows = behind(torch.tensor(discovery.start_tokens, dtype=torch.int64), scored(windows, options))
    chosen = None if groups is None else [group for group in discovery.groups if group.name in groups]
    statistics = statistics_for(name, model, discovery, windows, groups=chosen, progress=progress)
    return scores_from(
        discovery, statistics, groups=chosen, name=name, options=options if from_text else None, seed=options.seed
    )


def scores_from(
    discovery: Discovery,
    statistics: Statistics,
    *,
    groups: Sequence[Group] | None = None,
    name: str,
    reduce: str | None = None,
    options: CalibrationOptions | None = None,
    seed: int | None = None,
) -> Scores:
    """Scores from statistics; `options` says where the windows are from, `seed` (by default, its own) is for `random`.

    Raises `ScoreError` for an unknown reduction, and as `unit_scores` does.

    >>> from transformers import AutoConfig
    >>> config = AutoConfig.for_model("opt", hidden_size=12, num_attention_heads=2, ffn_dim=24, num_hidden_layers=1)
    >>> scores_from(discover(config), Statistics({}), name="random").units["layers.0.mlp"].shape
    torch.Size([24])
    """
    on_text = SCORES[name].needs != "weights"
    reduce = reduce or SCORES[name].reduce
    check_known(ScoreError, "reduce", reduce, REDUCTIONS)
    if seed is None:
        seed = 0 if options is None else options.seed
    return Scores(
        score=name,
        reduce=reduce,
        units=unit_scores(discovery, statistics, groups=groups, name=name, reduce=reduce, seed=seed),
        calibration=statistics.calibration if on_text else None,
        loss=statistics.loss if on_text else None,
        seed=seed,
        options=options if on_text else None,
    )


def statistics_for(
    name: str,
    model: PreTrainedModel,
    discovery: Discovery,
    windows: Tensor | None = None,
    *,
    groups: Sequence[Group] | None = None,
    layer_cache: Path | None = None,
    progress: Progress | None = None,
) -> Statistics:
    """The statistics that a score needs for some groups, and those of the scores that need no more than it.

    Scores of weights need no windows. `layer_cache` is a folder from which a pass that was killed resumes (see
    `gradient_statistics`). Raises `ScoreError` as the collectors do.

    >>> import torch
    >>> from transformers import AutoConfig, AutoModelForCausalLM
    >>> config = AutoConfig.for_model("opt", hidden_size=12, num_attention_heads=2, ffn_dim=24, num_hidden_layers=1)
    >>> model = AutoModelForCausalLM.from_config(config)
    >>> sorted(statistics_for("param_first", model, discover(model), torch.arange(20).reshape(2, 10)).sums)
    ['param_first', 'vectorize']
    """
    if name == "random":
        return Statistics({})
    if groups is not None:
        check_kinds(name, groups)
    groups = discovery.groups if groups is None else groups
    needs, wanted, saliences = SCORES[name].needs, weights_scored(discovery, groups), _saliences_beside(name)
    if needs == "weights":
        weights = {key: parameter.detach() for key, parameter in model.named_parameters() if key in wanted}
        return weight_statistics(weights, saliences)
    if windows is None:
        raise ScoreError(f"score {name} needs calibration text: give windows of token ids")
    modules = dict(model.named_modules())
    layers = {path: number for path, number in discovery.layer_paths.items() if path in modules}
    cached: dict[str, Any] = {"layers": [*layers], "layer_cache": layer_cache, "progress": progress}
    if needs in ("gradient", "second order"):
        second_order = needs == "second order"
        found = gradient_statistics(model, windows, saliences, second_order=second_order, wanted=wanted, **cached)
    elif needs == "masks":
        found = mask_statistics(model, windows, wanted=_dims_of(groups, wanted), **cached)
    elif needs == "experts":
        found = expert_statistics(
            model, windows, expert_modules(model, discovery, groups), layers=[*layers], progress=progress
        )
    elif needs == "losses":
        found = layer_loss_statistics(model, windows, layers, progress=progress)
    else:
        names, shapes = {group.name for group in groups}, {weight.name: weight.dims for weight in discovery.weights}
        found = activation_statistics(
            model,
            windows,
            saliences,
            wanted=wanted,
            units_of=(lambda weight, dim: units_reached(shapes[weight][dim], names)) if needs == "grams" else None,
            greedy=name == "obs_greedy",
            layers=layers,
            progress=progress,
        )
    return replace(found, calibration=digest(windows))


def _dims_of(groups: Sequence[Group], wanted: Collection[str]) -> dict[str, set[int]]:
    """Weights -> their dimensions along which the units of groups lie."""
    dims: dict[str, set[int]] = defaultdict(set)
    for axis in (axis for group in groups for axis in group.axes if axis.weight in wanted):
        dims[axis.weight].add(axis.dim)
    return dims


def _saliences_beside(name: str) -> dict[str, Salience]:
    """The saliences of a score and of Secateur's own that need no more than it."""
    needs = SCORES[name].needs
    enough = {"second order": ("gradient", "second order"), "grams": ("inputs",), "layers": ()}.get(needs, (needs,))
    return {
        key: how.salience if how.signed else _absolute(how.salience)
        for key, how in SCORES.items()
        if how.salience is not None and how.needs in enough and (key == name or not how.own)
    }


def _absolute(salience: Salience) -> Salience:
    return lambda evidence: salience(evidence).abs()


def save_scores(path: Path, scores: Scores) -> None:
    """Write scores as one safetensors file, whole or not at all; `load_scores` reads it back.

    >>> import tempfile, torch
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_scores(Path(folder) / "s.safetensors", Scores("l2", "mean", {"hidden": torch.tensor([1.0, 2.0])}))
    ...     load_scores(Path(folder) / "s.safetensors").units
    {'hidden': tensor([1., 2.])}
    """
    metadata = asdict(replace(scores, units={}))
    del metadata["units"]
    write_tensors(path, scores.units, metadata)


def load_scores(path: Path) -> Scores:
    """Read what `save_scores` wrote. Raises `ScoreError` when the file is missing or not of scores."""
    try:
        units, metadata = read_tensors(path)
        options = metadata.pop("options")
        return Scores(units=units, options=None if options is None else CalibrationOptions(**options), **metadata)
    except (CheckpointError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise ScoreError(f"{path} holds no scores ({error}); expected what save_scores writes") from error
