"""What to cut and how much: the options of a cut, and the presets.

Every option has one default, and `auto` options follow from the others, so equal options mean the same everywhere: in
Python, on the command line and in a recipe. `CutOptions()` is the default preset, `best`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from secateur.data.calibration import DEMO, CalibrationOptions
from secateur.decoding import check_choices
from secateur.errors import PlanError, check_known, check_least

AxisName = Literal[
    "attention", "mlp", "query", "head_dim", "experts", "latent", "state", "hidden", "layers", "vocabulary"
]
BudgetName = Literal["non-embedding", "parameters", "macs", "memory", "latency", "units"]
Reduction = Literal["auto", "sum", "mean", "max", "prod", "first", "last"]

AXES: dict[str, tuple[str, ...]] = {  # axis -> the kinds of group that it cuts
    "attention": ("attention",),
    "query": ("query",),
    "head_dim": ("head_dim",),  # channels of values: the same number in every head of a layer
    "mlp": ("mlp", "expert_mlp", "shared_mlp"),
    "experts": ("expert",),
    "latent": ("latent",),
    "state": ("state",),
    "hidden": ("hidden",),
    "layers": ("layer",),
    "vocabulary": ("vocabulary",),
}
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
VARIED = 0.375  # of the windows that repair sees, a third in each form; measured in docs/research.md
COPIED = 0.125  # of the windows that scores see
USUAL_AXES: tuple[AxisName, ...] = ("attention", "mlp")
ALONE = ("hidden", "layers")  # axes that run through all layers: each is cut in a run of its own
TOKENS: Final = "vocabulary"


@dataclass(frozen=True, slots=True, kw_only=True)
class CutOptions:
    """What to cut, and how much of it.

    Raises `PlanError` or `ScoreError` for a value that cannot be, alone or with the others.

    >>> options = CutOptions()
    >>> options.ratio, options.score, options.scope, options.shape, options.choose, options.repair
    (0.2, 'fisher', 'global', 'per-layer', 'obs', 'auto')
    >>> CutOptions(ratio=0.25, of="units").shape
    'uniform'
    """

    ratio: float | None = None
    """Share to remove of what `of` counts, 0 <= ratio < 1. Default: 0.2, unless `target` is given."""
    of: BudgetName = "non-embedding"
    """What ratio and target count: parameters (all, or without embeddings), MACs of 64 tokens, bytes of the weights,
    measured time on this machine, or the units of each group."""
    target: int | None = None
    """Size to leave instead of a ratio: a number of parameters or MACs, bytes (memory), microseconds (latency)."""
    axes: tuple[AxisName, ...] = USUAL_AXES
    """What to cut. The default takes whichever of the two the model has. `hidden` and `layers` each need a run of their
    own. `vocabulary` removes tokens that the calibration text hardly uses, and rewrites the tokenizer."""
    keep_text: tuple[str, ...] = ()
    """Files of text whose tokens stay when the vocabulary is cut, one or more."""
    shape: Literal["auto", "uniform", "per-layer"] = "auto"
    """`uniform`: all layers keep the same sizes, which a stock config can say. `per-layer`: each its own.
    Auto: per-layer, but uniform for of=units, hidden and layers."""
    repair: Literal["auto", "none", "bias", "least-squares", "reconstruct"] = "auto"
    """Fit the weights that stay to make up for those that go: output biases, least squares on what reads cut units,
    or that and then training layer by layer. Auto: least-squares, in a model of less than 50 million parameters
    reconstruct, where `samples` is not given; none for whole layers and for tokens."""
    score: str = "auto"
    """Importance of a unit. Auto: `fisher`; `param_second` for hidden and layers."""
    reduce: Reduction = "auto"
    """How the scores of a unit's weights become one. Auto: the score's own, usually their sum."""
    prices: Literal["auto", "estimated", "measured"] = "auto"
    """What channels of different layers are compared by: the score as it is, or scaled layer by layer to what the loss
    really loses without the cheapest. Auto: measured with the score fisher and the scope global."""
    choose: Literal["auto", "score", "obs"] = "auto"
    """Which units of a group go: those of the lowest score, or among these and the next cheapest, half as many, by
    optimal brain surgeon during repair. Auto: obs with the score fisher."""
    scope: Literal["auto", "local", "global"] = "auto"
    """How the budget is shared: the same share of every group (local), or one ranking of all units by score per
    parameter (global). Auto: global with the score fisher, whose nats compare all layers; local with others, for
    of=units, hidden, layers and a schedule."""
    layers: tuple[float, float] | None = None
    """Cut only layers first <= i < last: numbers of layers, or shares of the depth such as 0.125:0.9375."""
    within: str | None = None
    """Cut only groups that lie wholly in this module, for example `model.language_model` or `encoder`."""
    schedule: tuple[float, float] | None = None
    """Cut the first and the last layer in this proportion, linear between, for example 0.5:1.5."""
    min_keep: float = 0.05
    """Share of each group's units that stays whatever the ranking says."""
    engine: Literal["transformers", "vllm", "sglang", "llama.cpp"] | None = None
    """The program that is to run the result: widths are multiples that its kernels or formats take, sglang gets a
    uniform shape, and a plan that the program cannot run is refused."""
    round_to: int | None = None
    """Widths are multiples of this. Default: of 64 for MLPs of at least 1,536 channels, fewer for narrower ones, in
    per-layer shapes with the scope global; with an engine as it needs."""
    tensor_parallel: int = 1
    """Number of GPUs over which an engine is to split every layer: heads and widths of all layers divide by it."""
    iterations: int = 1
    """Number of pruning iterations: score, plan, repair and prune what the one before left."""
    sublayers: bool = False
    """Allow the attention or MLP of a layer to go as a whole."""
    memory_dtype: Literal["bfloat16", "float32", "float16", "int8"] = "bfloat16"
    """Dtype in which of=memory counts bytes."""

    def __post_init__(self) -> None:
        """Check each value, fill in what is automatic, then check what must go together."""
        check_choices(self, PlanError)
        if not self.axes:
            raise PlanError(f"axes is empty: name what to cut, for example axes=mlp. Known: {', '.join(AXES)}")
        for name, value in automatic(self).items():
            depends_on_model = name == "repair" and not set(self.axes) & {*ALONE, TOKENS}  # see `with_repair`
            if getattr(self, name) in ("auto", None) and not depends_on_model:
                object.__setattr__(self, name, value)
        _check_numbers(self)
        _check_together(self)

    @property
    def repairs(self) -> bool:
        """Whether a pass over the calibration windows fits what stays, or chooses it."""
        return self.repair != "none" or self.choose != "score"

    @property
    def item_bytes(self) -> int:
        """Bytes of a weight, as a budget of memory counts them."""
        return ITEM_BYTES[self.memory_dtype]

    def layer_range(self, depth: int) -> tuple[int, int]:
        """The layers that may be cut, first <= i < last, of a model with so many. Raises `PlanError` outside it.

        >>> CutOptions(layers=(0.125, 0.9375)).layer_range(32), CutOptions(layers=(3, 5)).layer_range(6)
        ((4, 30), (3, 5))
        """
        first, last = self.layers if self.layers is not None else (0, depth)
        if isinstance(first, float) or isinstance(last, float):
            first, last = round(first * depth), round(last * depth)
        if not 0 <= first < last <= depth:
            raise PlanError(
                f"layers={first}:{last} is outside the model: it has layers 0:{depth} (the end is left out)"
            )
        return first, last


def automatic(options: CutOptions) -> dict[str, Any]:
    """What follows from the other options where it is not given, by name.

    >>> automatic(CutOptions(axes=("hidden",), scope="global"))["scope"]
    'local'
    """
    alone, no_repair = bool(set(ALONE) & set(options.axes)), options.axes in (("layers",), (TOKENS,))
    even = options.of == "units" or alone
    usual = "param_second" if alone else "fisher"
    score = usual if options.score == "auto" else options.score
    # In nats, units of all layers compare; with these options they have to.
    compared = score == "fisher" or options.sublayers or TOKENS in options.axes
    scope = "global" if compared and not even and options.schedule is None else "local"
    ranked = score == "fisher" and (scope if options.scope == "auto" else options.scope) == "global"
    return {
        "ratio": 0.2 if options.target is None else None,
        "score": usual,
        "scope": scope,
        "prices": "measured" if ranked else "estimated",
        "shape": "uniform" if even or options.engine == "sglang" else "per-layer",
        "choose": "obs" if score == "fisher" and not alone and options.axes != (TOKENS,) else "score",
        "repair": "none" if no_repair else "least-squares",
    }


def with_repair(options: CutOptions, *, small: bool = False) -> CutOptions:
    """The options with the repair that follows from the model: a small one has time for its layers to be trained.

    >>> with_repair(CutOptions()).repair, with_repair(CutOptions(), small=True).repair
    ('least-squares', 'reconstruct')
    """
    if options.repair != "auto":
        return options
    return replace(options, repair="reconstruct" if small else automatic(options)["repair"])


def _check_numbers(options: CutOptions) -> None:
    if options.ratio is not None and options.target is not None:
        raise PlanError(
            f"ratio={options.ratio:g} and target={options.target:,}: give either a ratio (the share to remove) or a "
            "target (what is left), for example ratio=0.2"
        )
    if options.ratio is not None and not 0 <= options.ratio < 1:
        raise PlanError(f"ratio={options.ratio:g} is outside [0, 1): it is the share to remove, for example ratio=0.2")
    if options.target is not None and options.of == "units":
        raise PlanError(
            "a target counts parameters, macs, bytes (of=memory) or microseconds (of=latency): use one of these or "
            "of=non-embedding with it"
        )
    if not 0 <= options.min_keep < 1:
        raise PlanError(f"min_keep={options.min_keep:g} is outside [0, 1): a share of units, for example 0.1")
    check_least(PlanError, "iterations", options.iterations, 1, 4)
    if options.round_to is not None:
        check_least(PlanError, "round_to", options.round_to, 1, 64)
    check_least(PlanError, "tensor_parallel", options.tensor_parallel, 1, 2)


def _check_together(options: CutOptions) -> None:
    alone = bool(set(ALONE) & set(options.axes))
    if len(options.axes) > 1 and alone:
        raise PlanError(f"axes={','.join(options.axes)}: hidden and layers are cut alone, for example axes=hidden")
    if options.scope != "local" and options.of == "units":
        raise PlanError("of=units takes the same share from every group: use scope=local, or another budget")
    if options.of == "latency" and options.axes == ("layers",):
        raise PlanError(
            "of=latency times cuts within layers, and axes=layers takes whole ones, which save as large a share of the "
            "time as of the parameters: use of=non-embedding"
        )
    if options.repair == "reconstruct" and (alone or TOKENS in options.axes):
        raise PlanError(
            f"repair=reconstruct fits every layer to the dense model's, which axes={','.join(options.axes)} changes: "
            f"use repair={automatic(options)['repair']}"
        )
    if options.sublayers and (options.scope == "local" or options.shape != "per-layer"):
        raise PlanError("sublayers=True lets single layers lose one: use shape=per-layer and scope=global with it")
    if options.prices == "measured" and (options.scope != "global" or options.score != "fisher"):
        raise PlanError(
            f"prices=measured scales scores in nats that rank the units of all layers, and score={options.score}, "
            f"scope={options.scope}: use score=fisher and scope=global with it"
        )
    if options.engine == "sglang" and options.shape != "uniform":
        raise PlanError(f"engine=sglang reads layers of one size, and shape={options.shape}: use shape=uniform")
    _check_tokens(options)
    if options.engine not in (None, "transformers") and "head_dim" in options.axes:
        raise PlanError(
            f"engine={options.engine} runs values as wide as keys, which axes=head_dim makes narrower: leave it out"
        )
    if options.schedule is not None:
        first, last = options.schedule
        if not (0 <= first < math.inf and 0 <= last < math.inf and first + last > 0):
            raise PlanError(f"schedule={first:g}:{last:g}: expected shares in proportion, for example 0.5:1.5")
        if options.scope != "local" or options.shape != "per-layer" or alone:
            raise PlanError(
                f"schedule={first:g}:{last:g} gives every layer its share of units: use scope=local and "
                "shape=per-layer with it, and axes inside layers"
            )


def _check_tokens(options: CutOptions) -> None:
    """What goes together with a cut of the vocabulary."""
    if TOKENS not in options.axes:
        if options.keep_text:
            raise PlanError(
                f"keep_text={','.join(options.keep_text)} keeps tokens, and axes={','.join(options.axes)} cuts none: "
                f"add {TOKENS} to the axes, or leave it out"
            )
        return
    with_vocabulary = f"axes={','.join(options.axes)}"
    if options.of == "non-embedding":
        raise PlanError(
            f"{with_vocabulary}: tokens are rows of the embedding, which of={options.of} does not count. Use "
            "of=parameters (or of=memory, of=latency)"
        )
    if options.iterations > 1:
        raise PlanError(f"{with_vocabulary}: the vocabulary is cut once, and iterations={options.iterations}: use 1")
    if len(options.axes) > 1 and options.scope == "global" and options.score != "fisher":
        raise PlanError(
            f"{with_vocabulary} weighs tokens against other units in nats, as score=fisher gives them, and "
            f"score={options.score}: use score=fisher, or cut the vocabulary in a run of its own"
        )


# Preset -> the options in which it departs from the defaults. `llm-pruner` is the paper's recipe (arXiv 2305.11627):
# 25 % of the heads and MLP channels of layers 4 to 30 of 32, by first-order Taylor scores on 10 windows of 64 tokens.
PRESETS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "best": {"cut": {}, "calibration": {}},
    "fast": {"cut": {}, "calibration": {"samples": 24, "held_out": 4, "score_samples": 8, "tokens_per_column": 2.0}},
    "llm-pruner": {
        "cut": {
            "ratio": 0.25,
            "of": "units",
            "layers": (4 / 32, 30 / 32),
            "score": "param_first",
            "scope": "local",
            "shape": "uniform",
            "choose": "score",
            "repair": "none",
        },
        "calibration": {"samples": 10, "length": 64, "score_samples": None},
    },
}
# Windows that the model writes itself: fewer and shorter, for writing them takes as long as the rest.
WRITTEN = {"samples": 64, "length": 128, "score_samples": None, "varied": 0.0}


def with_preset(
    name: str, cut: Mapping[str, Any] | None = None, calibration: Mapping[str, Any] | None = None
) -> tuple[CutOptions, CalibrationOptions]:
    """The options of a preset, but for those that are given by name. Raises `PlanError` for an unknown preset.

    A ratio or target that is given counts non-embedding parameters under every preset, unless `of` is given, too.

    >>> cut, calibration = with_preset("llm-pruner")
    >>> cut.ratio, cut.of, cut.layers, calibration.samples
    (0.25, 'units', (0.125, 0.9375), 10)
    >>> with_preset("llm-pruner", {"ratio": 0.2})[0].of
    'non-embedding'
    """
    check_known(PlanError, "preset", name, PRESETS)
    cut, calibration = dict(cut or {}), dict(calibration or {})
    preset = dict(PRESETS[name]["cut"])
    if cut.keys() & {"ratio", "target"}:
        for budget in ("ratio", "target", "of"):
            preset.pop(budget, None)
    if set(ALONE) & set(cut.get("axes", ())):  # no range of layers, and scores of their own
        for inside in ("layers", "score"):
            preset.pop(inside, None)
    usual = dict(PRESETS[name]["calibration"])
    if "samples" in calibration:  # then there are as many, however wide the model is
        usual["tokens_per_column"] = 0.0
    if CalibrationOptions(calibration.get("text", DEMO)).generated:
        usual = {**WRITTEN, **{key: min(value, WRITTEN[key]) for key, value in usual.items() if key == "samples"}}
    return CutOptions(**{**preset, **cut}), CalibrationOptions(**{**usual, **calibration})


def settled(
    calibration: CalibrationOptions, options: CutOptions, *, columns: int = 0, parameters: int = 0, pairs: bool = False
) -> CalibrationOptions:
    """The calibration with what depends on the cut: windows, of which some are varied and some copied.

    Where there is a repair, `columns` are those of the widest matrix that it fits (`columns_fitted`), and `parameters`
    those of the model without embeddings. Windows of images or sound with their texts, `pairs`, are as many as they
    are, and neither varied nor copied. Raises `PlanError` where windows are to be varied and no repair looks at them.

    >>> settled(CalibrationOptions(), CutOptions()).varied
    0.375
    >>> settled(CalibrationOptions(varied=0.5), CutOptions(repair="none", choose="score"))
    Traceback (most recent call last):
    secateur.errors.PlanError: varied=0.5 is for repair, and repair=none does without: leave it out, or use ...
    """
    if pairs:
        copied, varied = (0.0 if share is None else share for share in (calibration.copied, calibration.varied))
        calibration, columns = replace(calibration, copied=copied, varied=varied), 0
    calibration = calibration.for_model(columns=columns if options.repairs else 0, parameters=parameters)
    if calibration.copied is None:
        calibration = replace(calibration, copied=COPIED if options.score == "fisher" else 0.0)
    if calibration.varied is None:
        return replace(calibration, varied=VARIED if options.repairs and not calibration.generated else 0.0)
    if calibration.varied and not options.repairs:
        raise PlanError(
            f"varied={calibration.varied:g} is for repair, and repair=none does without: leave it out, or use "
            "repair=least-squares, as preset=best does"
        )
    return calibration
