"""Model and budget -> a model cut in several steps: plan, cut, repair, and score again what is left.

What a unit is worth changes when others are gone, and more so the more go, so large cuts may gain from small steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor
from transformers import PreTrainedModel

from secateur.data.calibration import CalibrationOptions
from secateur.discovery.config_settings import stock_settings
from secateur.discovery.counting import count_macs, count_parameters
from secateur.discovery.discover import discover
from secateur.discovery.groups import Discovery
from secateur.discovery.sizes import PrunedSizes
from secateur.errors import PlanError
from secateur.models.trust import runs_remote_code
from secateur.planning.options import CutOptions
from secateur.planning.plan import Plan, PlannedGroup, plan
from secateur.planning.selection import groups_to_cut
from secateur.progress import Progress
from secateur.pruning.prune import prune
from secateur.pruning.reconstruct import reconstruct_in_place
from secateur.pruning.repair import repair
from secateur.pruning.sensitivity import damage_curves
from secateur.scoring.scores import SCORES, scores_from, statistics_for


@dataclass(frozen=True, slots=True)
class Step:
    """What a step has left: the plan of the dense model so far, and the weights of the smaller one by name."""

    number: int
    plan: Plan
    weights: Mapping[str, Tensor]


def cut_in_steps(
    model: PreTrainedModel,
    discovery: Discovery,
    options: CutOptions,
    windows: Tensor | None,
    *,
    calibration: CalibrationOptions | None = None,
    begun: Step | None = None,
    keep: Callable[[Step], None] | None = None,
    progress: Callable[[str], Progress | None] | None = None,
) -> tuple[PreTrainedModel, Plan]:
    """Cut `options.steps` times, each step by the same share of the whole cut; the plan is of the dense model.

    Every step sees the same windows (int64, samples x length; None where neither the score nor the repair needs any).
    `keep` is given what every step leaves, and `begun` is what an earlier run of the very same has left. `progress`
    gives the callback of a stage, by its name. Raises `PlanError` where the budget cannot be cut in steps,
    and what `plan`, `repair` and the scores raise.

    >>> from transformers import AutoConfig, AutoModelForCausalLM
    >>> config = AutoConfig.for_model("opt", hidden_size=12, num_attention_heads=2, ffn_dim=24, num_hidden_layers=2)
    >>> model = AutoModelForCausalLM.from_config(config)
    >>> options = CutOptions(ratio=0.5, of="units", axes=("mlp",), score="l2", steps=2)
    >>> smaller, decided = cut_in_steps(model, discover(model), options, None)
    >>> [(group.name, group.units, group.kept) for group in decided.groups], smaller.config.ffn_dim
    ([('layers.0.mlp', 24, 12), ('layers.1.mlp', 24, 12)], 12)
    """
    calibration = calibration or CalibrationOptions()
    whole: Plan | None = None
    smaller, found, done = model, discovery, 0
    if begun is not None:
        whole, done = begun.plan, begun.number
        smaller = prune(model, begun.plan, discovery=discovery)
        for name, parameter in smaller.named_parameters():
            parameter.data = begun.weights[name].to(parameter.device)
        found = discover(smaller)
    for step in range(done + 1, options.steps + 1):
        now = share_of_step(options, discovery, step)
        kept = units_after_step(options, discovery, step)
        groups = [group for each in groups_to_cut(found, now).values() for group in each]
        statistics = statistics_for(
            now.score,
            smaller,
            found,
            None if windows is None or SCORES[now.score].needs == "weights" else calibration.scored(windows),
            groups=groups,
            progress=progress(f"score, step {step}") if progress else None,
        )
        scores = scores_from(found, statistics, groups=groups, name=now.score, reduce=now.reduce, options=calibration)
        damage = None
        if now.scope == "sensitivity" and windows is not None:
            bar = progress(f"measure damage, step {step}") if progress else None
            damage = damage_curves(smaller, found, groups, scores, windows, progress=bar)
        decided = plan(
            found,
            now,
            config=smaller.config,
            scores=scores,
            damage=damage,
            fixed_sizes=kept,
            trust_remote_code=runs_remote_code(smaller),
        )
        weights: Mapping[str, Tensor] = {}
        if windows is not None and now.repairs:
            repaired = repair(
                smaller,
                decided,
                found,
                windows,
                method=now.closed_form,
                choose=now.choose == "obs",
                progress=progress(f"repair, step {step}") if progress else None,
            )
            decided, weights = repaired.plan, repaired.weights
        smaller = prune(smaller, decided, discovery=found, weights=weights)
        whole = decided if whole is None else composed(whole, decided, discovery)
        if keep is not None:
            keep(Step(step, as_of_dense(whole, options, discovery, model), dict(smaller.named_parameters())))
        if step < options.steps:
            found = discover(smaller)
    assert whole is not None
    if options.repair == "reconstruct" and windows is not None:
        bar = progress("reconstruct") if progress else None
        reconstruct_in_place(model, smaller, discovery, windows, progress=bar)
    return smaller, as_of_dense(whole, options, discovery, model)


def composed(first: Plan, second: Plan, dense: Discovery) -> Plan:
    """One plan of the dense model for two, of which the second cuts what the first leaves.

    Groups keep their names from step to step; where layers go, no other group can be cut, so nothing is numbered anew.
    """
    groups = {group.name: group for group in first.groups}
    for group in second.groups:
        before = groups.get(group.name)
        keep = group.keep
        if before is not None and before.keep is not None and keep is not None:
            keep = tuple(before.keep[unit] for unit in keep)
        units = dense.group(group.name).units
        groups[group.name] = PlannedGroup(group.name, group.kind, group.layer, units, group.kept, keep)
    order = {group.name: i for i, group in enumerate(dense.groups)}
    return replace(
        second,
        model=first.model,
        groups=tuple(sorted(groups.values(), key=lambda group: order[group.name])),
        parameters={**second.parameters, **{k: v for k, v in first.parameters.items() if k.startswith("dense")}},
        macs={**second.macs, **{k: v for k, v in first.macs.items() if k.startswith("dense")}},
    )


def share_of_step(options: CutOptions, dense: Discovery, step: int) -> CutOptions:
    """The options of a step, as they are for what the step before it leaves.

    Raises `PlanError` for a budget of latency.

    >>> share_of_step(CutOptions(ratio=0.5, of="units", steps=2), Discovery("none", (), (), (), ()), 2).ratio
    0.33333333333333337
    """
    if options.of == "latency":
        raise PlanError("steps with a budget of latency are not there: use steps=1, or of=macs")
    if options.of == "units":
        assert options.ratio is not None
        before, after = (1 - options.ratio * i / options.steps for i in (step - 1, step))
        return replace(options, ratio=1 - after / before, steps=1)
    if options.of == "macs":
        whole = sum(count_macs(dense).values())
    else:
        whole = count_parameters(dense, embeddings=options.of != "non-embedding")
        if options.of == "memory":
            whole *= options.item_bytes
    left = options.target if options.target is not None else round(whole * (1 - (options.ratio or 0)))
    wanted = whole - round((whole - left) * step / options.steps)
    return replace(options, ratio=None, target=wanted, steps=1)


def units_after_step(options: CutOptions, dense: Discovery, step: int) -> dict[str, int] | None:
    """How many units of each group are left after a step, where the budget is a share of the units; else None.

    Shares of what the step before has left are rounded in every step, and would not come to the share of the whole.

    >>> from transformers import AutoConfig
    >>> from secateur.discovery.discover import discover
    >>> sizes = {"hidden_size": 12, "num_attention_heads": 2, "ffn_dim": 24, "word_embed_proj_dim": 12}
    >>> dense = discover(AutoConfig.for_model("opt", num_hidden_layers=1, **sizes))
    >>> options = CutOptions(ratio=0.5, of="units", axes=("mlp",), steps=4)
    >>> [units_after_step(options, dense, step) for step in (1, 4)]
    [{'layers.0.mlp': 21}, {'layers.0.mlp': 12}]
    """
    if options.of != "units" or options.ratio is None:
        return None
    so_far = plan(dense, replace(options, ratio=options.ratio * step / options.steps, steps=1))
    return {group.name: group.kept for group in so_far.groups}


def as_of_dense(whole: Plan, options: CutOptions, dense: Discovery, model: PreTrainedModel) -> Plan:
    """The sizes and settings that go with a plan of the dense model; `cut_in_steps` shows a run."""
    cut: PrunedSizes = whole.sizes
    settings, refusal = None, None
    try:
        settings = stock_settings(model.config, dense, cut, trust_remote_code=runs_remote_code(model))
    except PlanError as error:
        refusal = str(error)
    return replace(
        whole,
        model=dense.model,
        options=replace(options, choose=whole.options.choose),  # where repair has chosen, a repetition chooses no more
        parameters={
            **whole.parameters,
            "dense": count_parameters(dense),
            "dense_non_embedding": count_parameters(dense, embeddings=False),
        },
        macs={**whole.macs, "dense": sum(count_macs(dense).values())},
        settings=settings,
        refusal=refusal,
    )
