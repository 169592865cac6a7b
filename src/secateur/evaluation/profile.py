"""Models -> what they cost, counted (`costs.py`) and measured (`speed.py`), each beside the first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

from transformers import PreTrainedModel

from secateur.discovery.discover import discover
from secateur.evaluation.costs import BatchCost, Profile, RelativeCost, config_costs, model_costs, with_any_units
from secateur.evaluation.options import ProfileOptions
from secateur.evaluation.speed import measure_speed
from secateur.models.config import load_config, writes_text
from secateur.models.inputs import are_registered
from secateur.models.loading import DTYPES, load
from secateur.models.options import LoadOptions
from secateur.models.weight_files import has_weights
from secateur.planning.plan import Plan
from secateur.progress import Progress
from secateur.pruning.prune import prune


def profile(
    models: Mapping[str, PreTrainedModel], options: ProfileOptions | None = None, *, progress: Progress | None = None
) -> list[Profile]:
    """Count and measure all models side by side; sizes and MACs come from the discovery of each model.

    `progress` counts the pairs of length and batch size. Raises as `measure_speed` does.
    """
    options = options or ProfileOptions()
    speeds = measure_speed(models, options, progress=progress)
    profiles: list[Profile] = []
    for name, model in models.items():
        costs = model_costs(model, discover(model, name=name), name=name, options=options)
        first = profiles[0] if profiles else None
        grid = tuple(replace(cost, speed=measured[name]) for cost, measured in zip(costs.grid, speeds, strict=True))
        if first is not None:
            grid = tuple(_against(cost, base) for cost, base in zip(grid, first.grid, strict=True))
            ratio = costs.weight_bytes / first.weight_bytes
            costs = replace(costs, first_model=first.model, weight_bytes_ratio=ratio)
        profiles.append(replace(costs, grid=grid))
    return profiles


def profile_models(
    models: Sequence[str],
    options: ProfileOptions | None = None,
    *,
    plan: Plan | None = None,
    plan_name: str = "plan",
    loading: LoadOptions | None = None,
    progress: Progress | None = None,
) -> list[Profile]:
    """Profile MODEL arguments, each as it is and, with a plan, as the plan cuts it; `MODEL + plan_name` is its name.

    What is measured depends on sizes alone, so a plan that does not say which units stay will do, and nothing is
    repaired. With `sizes_only`, or where one of the models has no weights, continues no text or has registered inputs,
    everything is counted and nothing measured: weights are not read. Raises `SecateurError`.
    """
    options, loading = options or ProfileOptions(), loading or LoadOptions()
    trust = loading.trust_remote_code
    configs = {name: load_config(name, trust_remote_code=trust) for name in models}
    timed = all(writes_text(config) and not are_registered(config) for config in configs.values())
    measured = not options.sizes_only and all(map(has_weights, configs)) and timed
    if not measured:
        dtype = None if loading.dtype == "auto" else DTYPES[loading.dtype]
        counted = []
        for name, config in configs.items():
            discovery = discover(name, trust_remote_code=trust)
            costs = partial(config_costs, config, discovery, options=options, dtype=dtype, trust_remote_code=trust)
            counted.append(costs(name=name))
            if plan is not None:
                counted.append(costs(name=f"{name} + {plan_name}", plan=plan))
        return counted
    loaded: dict[str, PreTrainedModel] = {}
    for name in configs:
        loaded[name] = load(name, dtype=loading.dtype, device=loading.device, trust_remote_code=trust)
        if plan is not None:
            discovery = discover(name, trust_remote_code=trust)
            loaded[f"{name} + {plan_name}"] = prune(loaded[name], with_any_units(plan), discovery=discovery)
    return profile(loaded, options, progress=progress)


def _against(cost: BatchCost, first: BatchCost) -> BatchCost:
    """A cost with its proportion to the first model's."""
    if cost.speed is None or first.speed is None:
        return cost
    against = RelativeCost(
        macs_ratio=cost.macs / first.macs,
        prefill_speedup=first.speed.prefill_seconds / cost.speed.prefill_seconds,
        decode_speedup=cost.speed.decode_tokens_per_second / first.speed.decode_tokens_per_second,
    )
    return replace(cost, against=against)
