"""What to cut and how much: the options of a cut, and the presets that stand for some of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from secateur.data.calibration import COLUMN, DEMO, SELF, CalibrationOptions
from secateur.discovery.groups import Discovery
from secateur.errors import PlanError, ScoreError, did_you_mean
from secateur.planning.budget import COUNTERS
from secateur.scoring.scores import REDUCTIONS, SCORES

BUDGETS = ("units", *COUNTERS)
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
SCOPES = ("local", "global", "sensitivity")
SHAPES = ("uniform", "free")
REPAIRS = ("none", "bias", "least-squares", "reconstruct")
AXES = {
    "attention": ("attention",),
    "query": ("query",),
    "mlp": ("mlp", "expert_mlp", "shared_mlp"),
    "experts": ("expert",),
    "latent": ("latent",),
    "state": ("state",),
    "hidden": ("hidden",),
    "layers": ("layer",),
}
STRATEGIES = {"block": ("attention", "mlp"), "channel": ("hidden",), "layer": ("layers",)}


@dataclass(frozen=True, slots=True)
class CutOptions:
    """What to cut, and how much of it. `ratio` is the share removed of what `of` names; `target` is what is left."""

    ratio: float | None = None
    of: str = "non-embedding"
    target: int | None = None
    axes: tuple[str, ...] = ("attention", "mlp")
    layers: tuple[int, int] | None = None  # half-open, of the dense model
    score: str = "param_second"
    reduce: str | None = None
    round_to: int = 1
    scope: str = "local"  # the same share of every group, one ranking of all units, or by the damage that is measured
    shape: str = "uniform"  # layers alike, as stock configs want them, or each with its own sizes
    at_least: float = 0.0  # the share of a group's units that stays where scopes are not local
    choose: str = "score"  # which units of a group go: by the score, or by optimal brain surgeon while repairing
    repair: str = "none"
    at_dtype: str = "bfloat16"  # in which bytes of memory are counted
    steps: int = 1  # of plan, cut, repair and scoring anew
    sublayers: bool = False  # whether the attention or MLP of a layer may go as a whole
    schedule: tuple[float, float] | None = None  # the shares of the first and last layer, in proportion; linear between

    def __post_init__(self) -> None:
        """Check every value on its own; what depends on the model is checked by `plan`."""
        if self.of not in BUDGETS:
            raise PlanError(f"of={self.of!r} is no budget. Known: {', '.join(BUDGETS)}{did_you_mean(self.of, BUDGETS)}")
        if (self.ratio is None) == (self.target is None):
            raise PlanError(
                "give either a ratio (the share to remove) or a target (what is left), for example ratio=0.2"
            )
        if self.ratio is not None and not 0 <= self.ratio < 1:
            raise PlanError(f"ratio={self.ratio:g} is outside [0, 1): it is the share to remove, for example ratio=0.2")
        if self.target is not None and self.of == "units":
            raise PlanError(
                "a target counts parameters, macs, bytes (of=memory) or microseconds (of=latency): use one of these or "
                "of=non-embedding with it"
            )
        for axis in self.axes:
            if axis not in AXES:
                raise PlanError(f"axes={axis!r} cannot be cut. Known: {', '.join(AXES)}{did_you_mean(axis, AXES)}")
        if not self.axes:
            raise PlanError(f"axes is empty: name what to cut, for example axes=mlp. Known: {', '.join(AXES)}")
        if len(self.axes) > 1 and {"hidden", "layers"} & set(self.axes):
            raise PlanError(f"axes={','.join(self.axes)}: hidden and layers are cut alone, for example axes=hidden")
        if self.reduce is not None and self.reduce not in REDUCTIONS:
            hint = did_you_mean(self.reduce, REDUCTIONS)
            raise ScoreError(f"reduce={self.reduce!r} is unknown. Known: {', '.join(REDUCTIONS)}{hint}")
        for name, value, known in (
            ("scope", self.scope, SCOPES),
            ("shape", self.shape, SHAPES),
            ("choose", self.choose, ("score", "obs")),
            ("repair", self.repair, REPAIRS),
            ("at_dtype", self.at_dtype, tuple(ITEM_BYTES)),
        ):
            if value not in known:
                raise PlanError(f"{name}={value!r} is unknown. Known: {', '.join(known)}{did_you_mean(value, known)}")
        if self.scope != "local" and self.of == "units":
            raise PlanError("of=units takes the same share from every group: use scope=local, or another budget")
        if self.scope == "sensitivity" and {"hidden", "layers"} & set(self.axes):
            raise PlanError(
                f"scope=sensitivity weighs groups of single layers: axes={','.join(self.axes)} needs scope=local"
            )
        if self.repair == "reconstruct" and {"hidden", "layers"} & set(self.axes):
            raise PlanError(
                f"repair=reconstruct fits every layer to the dense model's, which axes={','.join(self.axes)} changes: "
                "use repair=none"
            )
        if not 0 <= self.at_least < 1:
            raise PlanError(f"at_least={self.at_least:g} is outside [0, 1): a share of units, for example 0.1")
        if self.sublayers and (self.scope == "local" or self.shape != "free"):
            raise PlanError("sublayers=True lets single layers lose one: use shape=free and scope=global with it")
        if self.schedule is not None:
            first, last = self.schedule
            if not (0 <= first < math.inf and 0 <= last < math.inf and first + last > 0):
                raise PlanError(f"schedule={first:g}:{last:g}: expected shares in proportion, for example 0.5:1.5")
            if self.scope != "local" or self.shape != "free" or {"hidden", "layers"} & set(self.axes):
                raise PlanError(
                    f"schedule={first:g}:{last:g} gives every layer its share of units: use scope=local and shape=free "
                    "with it, and axes inside layers"
                )
        if self.steps < 1:
            raise PlanError(f"steps={self.steps} cuts nothing: give 1, or for example 4")
        if self.round_to < 1:
            raise PlanError(f"round_to={self.round_to} is not a width: give 1 for any width, or for example 64")

    @property
    def repairs(self) -> bool:
        """Whether a pass over the text follows that fits what is left, or chooses it."""
        return self.repair != "none" or self.choose == "obs"

    @property
    def closed_form(self) -> str:
        """The repair that comes first, in closed form."""
        return "least-squares" if self.repair == "reconstruct" else self.repair

    @property
    def item_bytes(self) -> int:
        """Bytes of a weight, as a budget of memory counts them."""
        return ITEM_BYTES[self.at_dtype]


def check_score(options: CutOptions) -> None:
    """Raise an error when the score is unknown, or says nothing of such axes.

    Plans that are read are not held to it: which units stay is decided, and the score may be one that its maker has.
    """
    if options.score not in SCORES:
        raise ScoreError(
            f"score={options.score!r} is unknown. Known: {', '.join(SCORES)}{did_you_mean(options.score, SCORES)}"
        )
    if SCORES[options.score].needs in ("layers", "losses") and options.axes != ("layers",):
        raise PlanError(f"score={options.score} compares whole layers: use axes=layers with it")
    if SCORES[options.score].needs in ("grams", "masks") and options.axes == ("layers",):
        raise PlanError(f"score={options.score} is not for whole layers: use score=block_influence with axes=layers")


PRESETS = ("best", "fast", "llm-pruner")
SHUFFLED = 0.25  # of the windows of `best` and `fast`; measured in docs/choosing.md


def preset(name: str, layers: int) -> CutOptions:
    """The options of a preset for a model with that many layers.

    `llm-pruner` is the paper's recipe: 25 % of the heads and MLP channels of layers 4 to 30 of 32 (as shares of the
    depth for other models), first-order Taylor scores. `best` cuts 20 % of the non-embedding parameters: how much of
    which layer by one ranking of all units by their Fisher information per parameter, which of a layer's units by
    optimal brain surgeon, and least squares for what reads them. `fast` is the same on a tenth of the text. See
    `calibration_for` for their text.

    >>> preset("llm-pruner", 32).layers, preset("best", 32).repair
    ((4, 30), 'least-squares')
    """
    if name == "llm-pruner":
        first, last = round(layers * 4 / 32), round(layers * 2 / 32)
        return CutOptions(ratio=0.25, of="units", layers=(first, layers - last), score="param_first")
    if name in ("best", "fast"):
        return CutOptions(
            ratio=0.2,
            score="fisher",
            scope="global",
            shape="free",
            at_least=0.05,
            choose="obs",
            repair="least-squares",
        )
    raise PlanError(f"preset {name!r} is unknown. Known: {', '.join(PRESETS)}{did_you_mean(name, PRESETS)}")


def calibration_for(
    name: str,
    *,
    text: str = DEMO,
    samples: int | None = None,
    length: int | None = None,
    seed: int = 0,
    column: str = COLUMN,
    chat: bool = False,
    shuffled: float | None = None,
) -> CalibrationOptions:
    """The calibration of a preset, with what is given: the paper's 10 windows of 64 tokens, or ours.

    How much of a text `best` and `fast` read in random order is `settled` with the cut; of what the model writes,
    nothing.

    >>> usual = calibration_for("llm-pruner", seed=3)
    >>> usual.text, usual.samples, usual.length, usual.seed
    ('demo', 10, 64, 3)
    """
    usual = {
        "llm-pruner": CalibrationOptions(samples=10, length=64),
        "fast": CalibrationOptions(samples=24, length=256, score_samples=8, shuffled=None),
        "best": CalibrationOptions(samples=256, length=256, score_samples=64, shuffled=None),
    }.get(name, CalibrationOptions())
    if text == SELF:  # it takes a model as long to write as everything else together
        most, longest = min(usual.samples, 64), min(usual.length, 128)
        usual = CalibrationOptions(samples=most, length=longest)
    return replace(
        usual,
        text=text,
        seed=seed,
        column=column,
        chat=chat,
        shuffled=usual.shuffled if shuffled is None else shuffled,
        samples=usual.samples if samples is None else samples,
        length=usual.length if length is None else length,
    )


def settled(calibration: CalibrationOptions, options: CutOptions) -> CalibrationOptions:
    """The calibration, with a share of windows in random order that suits the cut where none was named.

    Raises `PlanError` where they are asked for and no repair looks at them.

    >>> settled(calibration_for("best"), preset("best", 30)).shuffled
    0.25
    >>> settled(calibration_for("best"), CutOptions(ratio=0.2)).shuffled
    0.0
    >>> settled(CalibrationOptions(shuffled=0.5), CutOptions(ratio=0.2))
    Traceback (most recent call last):
    secateur.errors.PlanError: shuffled=0.5 is for repair, and repair=none does without: leave it out, or use ...
    """
    if calibration.shuffled is None:
        return replace(calibration, shuffled=SHUFFLED if options.repairs else 0.0)
    if calibration.shuffled and not options.repairs:
        raise PlanError(
            f"shuffled={calibration.shuffled:g} is for repair, and repair=none does without: leave it out, or use "
            "repair=least-squares, as preset=best does"
        )
    return calibration


def options_for(name: str, discovery: Discovery, given: Mapping[str, Any]) -> CutOptions:
    """The preset's options with those that are given; `strategy` is a shorthand for axes."""
    changes = dict(given)
    strategy = changes.pop("strategy", None)
    if strategy is not None:
        if strategy not in STRATEGIES:
            known = ", ".join(STRATEGIES)
            raise PlanError(f"strategy={strategy!r} is unknown. Known: {known}{did_you_mean(strategy, STRATEGIES)}")
        changes.setdefault("axes", STRATEGIES[strategy])
    base = preset(name, discovery.depth)
    if {"hidden", "layers"} & set(changes.get("axes", ())):
        axes = changes.pop("axes")
        repair = base.repair if axes == ("hidden",) else "none"
        base = replace(CutOptions(ratio=base.ratio, of=base.of), axes=axes, repair=repair)
    if changes.get("of") == "units":  # a share of each group's units
        changes = {"scope": "local", "shape": "uniform", **changes}
    if "schedule" in changes:
        changes = {"scope": "local", "shape": "free", **changes}
    if "score" in changes:  # then it decides
        changes.setdefault("choose", "score")
    if "target" in changes and changes["target"] is not None:
        changes.setdefault("ratio", None)
    options = replace(base, **changes)
    check_score(options)
    return options
