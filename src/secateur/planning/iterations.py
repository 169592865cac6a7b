"""A large cut in several iterations: what each of them is to cut, and one plan for all of them.

What a unit is worth changes when others are gone, the more so the more go, so a large cut may gain from small steps.
"""

from __future__ import annotations

from dataclasses import replace

from transformers import PreTrainedModel

from secateur.discovery.config_settings import stock_settings
from secateur.discovery.groups import Discovery
from secateur.errors import PlanError
from secateur.models.classes import config_of
from secateur.models.trust import runs_remote_code
from secateur.planning.budget import counter
from secateur.planning.options import CutOptions
from secateur.planning.plan import Plan, counted, plan


def composed(first: Plan, second: Plan, dense: Discovery) -> Plan:
    """One plan of the dense model for two, of which the second cuts what the first leaves.

    Groups keep their names from one iteration to the next; where layers go, no other group can be cut, so no layer is
    numbered anew.
    """
    groups = {group.name: group for group in first.groups}
    for group in second.groups:
        before = groups.get(group.name)
        keep, spare = group.keep, group.spare
        if before is not None and before.keep is not None:
            keep, spare = (at and tuple(before.keep[unit] for unit in at) for at in (keep, spare))
        groups[group.name] = replace(group, units=dense.group(group.name).units, keep=keep, spare=spare)
    order = {group.name: i for i, group in enumerate(dense.groups)}
    in_order = tuple(sorted(groups.values(), key=lambda group: order[group.name]))
    return counted(dense, replace(second, model=first.model, groups=in_order))


def options_of_iteration(options: CutOptions, dense: Discovery, number: int) -> CutOptions:
    """The options of iteration `number`, for the model that the one before it leaves.

    Raises `PlanError` for a budget of latency.

    >>> options, dense = CutOptions(ratio=0.5, of="units", iterations=2), Discovery("none", (), (), (), ())
    >>> round(options_of_iteration(options, dense, 2).ratio, 4)
    0.3333
    """
    if options.of == "latency":
        raise PlanError("several iterations with a budget of latency are not supported: use iterations=1, or of=macs")
    if options.of == "units":
        assert options.ratio is not None
        before, after = (1 - options.ratio * i / options.iterations for i in (number - 1, number))
        return replace(options, ratio=1 - after / before, iterations=1)
    whole = counter(options.of, dense, item_bytes=options.item_bytes)({})
    left = options.target if options.target is not None else round(whole * (1 - (options.ratio or 0)))
    wanted = whole - round((whole - left) * number / options.iterations)
    return replace(options, ratio=None, target=wanted, iterations=1)


def sizes_after_iteration(options: CutOptions, dense: Discovery, number: int) -> dict[str, int] | None:
    """Units of each group that are left after iteration `number`, where the budget is a share of the units; else None.

    Shares of what the iteration before left are rounded each time, and would not add up to the share of the whole.

    >>> from transformers import AutoConfig
    >>> from secateur.discovery.discover import discover
    >>> sizes = {"hidden_size": 12, "num_attention_heads": 2, "ffn_dim": 24, "word_embed_proj_dim": 12}
    >>> dense = discover(AutoConfig.for_model("opt", num_hidden_layers=1, **sizes))
    >>> options = CutOptions(ratio=0.5, of="units", axes=("mlp",), iterations=4)
    >>> [sizes_after_iteration(options, dense, number) for number in (1, 4)]
    [{'layers.0.mlp': 21}, {'layers.0.mlp': 12}]
    """
    if options.of != "units" or options.ratio is None:
        return None
    so_far = plan(dense, replace(options, ratio=options.ratio * number / options.iterations, iterations=1))
    return {group.name: group.kept for group in so_far.groups}


def as_of_dense(whole: Plan, options: CutOptions, dense: Discovery, model: PreTrainedModel) -> Plan:
    """The plan with the sizes and config settings of the dense model."""
    settings, refusal = None, None
    try:
        settings = stock_settings(config_of(model), dense, whole.sizes, trust_remote_code=runs_remote_code(model))
    except PlanError as error:
        refusal = str(error)
    return replace(
        whole,
        model=dense.model,
        options=replace(options, choose=whole.options.choose),  # where repair has chosen, a repetition chooses no more
        settings=settings,
        refusal=refusal,
    )
