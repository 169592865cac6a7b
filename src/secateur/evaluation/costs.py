"""Discovery, config and plan -> a model's cost by arithmetic: parameters, multiply-accumulates and bytes."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from secateur.discovery.config_settings import with_settings
from secateur.discovery.counting import count_macs, count_parameters
from secateur.discovery.groups import Discovery
from secateur.discovery.sizes import PrunedSizes
from secateur.errors import DiscoveryError
from secateur.evaluation.macs import count_macs_by_kind
from secateur.evaluation.memory import cache_bytes_by_layer, weight_bytes
from secateur.evaluation.options import ProfileOptions
from secateur.evaluation.speed import Speed
from secateur.models.loading import skeleton
from secateur.planning.plan import Plan
from secateur.pruning.prune import check_plan, prune

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RelativeCost:
    """A cost beside the first model's: ratios are shares of the first's, speed-ups how many times as fast.

    >>> RelativeCost(macs_ratio=0.8, prefill_speedup=1.21, decode_speedup=1.15).macs_ratio
    0.8
    """

    macs_ratio: float
    prefill_speedup: float
    decode_speedup: float


@dataclass(frozen=True, slots=True)
class BatchCost:
    """What a batch of prompts costs: counted, and measured where the model has weights.

    >>> BatchCost(batch=4, seq_len=64, macs=1000, kv_cache_bytes=256).to_json()
    {'batch': 4, 'seq_len': 64, 'macs': 1000, 'kv_cache_bytes': 256}
    """

    batch: int
    seq_len: int
    macs: int  # of one pass over the whole batch
    kv_cache_bytes: int | None  # of the whole batch, after the prefill; None: not known
    speed: Speed | None = None
    against: RelativeCost | None = None  # None for the first model

    def to_json(self) -> dict[str, Any]:
        """Plain data, without what is not known."""
        data = {"batch": self.batch, "seq_len": self.seq_len, "macs": self.macs, "kv_cache_bytes": self.kv_cache_bytes}
        for part in (self.speed, self.against):
            data |= asdict(part) if part is not None else {}
        return {name: value for name, value in data.items() if value is not None}


@dataclass(frozen=True, slots=True)
class Profile:
    """What one model costs; the counts are of one sequence of `seq_len` tokens, the first of the grid.

    >>> Profile("m", 10, 4, 64, 120, {"matmul": 120}, {"mlp": 120}, 40, 16, (16,), ()).macs
    120
    """

    model: str  # the name the caller gave it
    parameters: int
    non_embedding_parameters: int
    seq_len: int
    macs: int  # of one forward pass
    macs_by_operator: Mapping[str, int]  # matmul, norm, softmax, ...
    macs_by_kind: Mapping[str, int]  # by kind of group: attention, mlp, expert, ...
    weight_bytes: int
    kv_cache_bytes: int | None  # what a pass keeps for the next token: keys and values, latents, recurrent states
    kv_cache_bytes_by_layer: tuple[int, ...]  # empty where the cache is not made of layers
    grid: tuple[BatchCost, ...]
    first_model: str | None = None  # the one that ratios are against; None for the first itself
    weight_bytes_ratio: float | None = None

    @property
    def speed(self) -> Speed | None:
        """What was measured of the grid's first batch; None where nothing was."""
        return self.grid[0].speed

    def to_json(self) -> dict[str, Any]:
        """Plain data, as `secateur profile --json` writes it."""
        data = {**asdict(self), "grid": [cost.to_json() for cost in self.grid]}
        del data["first_model"], data["weight_bytes_ratio"]
        if self.speed is not None:
            data |= {name: value for name, value in asdict(self.speed).items() if name != "prefill_quartiles"}
        if (against := self.grid[0].against) is not None:
            data["against"] = {
                "model": self.first_model,
                "weight_bytes_ratio": self.weight_bytes_ratio,
                **asdict(against),
            }
        return data


def config_costs(
    config: PreTrainedConfig,
    discovery: Discovery,
    *,
    name: str,
    plan: Plan | None = None,
    options: ProfileOptions | None = None,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> Profile:
    """Count what the model of a config costs, as it is or as a plan cuts it; nothing of its size is allocated.

    The bytes of weights and cache are those of `dtype` (None: the one that the config names, else float32). The
    cache's are None for code that runs with weights alone. Raises `ModelError` when no model can be built from the
    config, and `PlanError` when the plan is of another model.

    >>> from transformers import AutoConfig
    >>> from secateur.discovery.discover import discover
    >>> sizes = {"hidden_size": 12, "num_attention_heads": 2, "ffn_dim": 24, "word_embed_proj_dim": 12}
    >>> config = AutoConfig.for_model("opt", num_hidden_layers=2, **sizes)
    >>> costs = config_costs(config, discover(config), name="opt", options=ProfileOptions(seq_lens=(10,)))
    >>> costs.kv_cache_bytes == 2 * 2 * 12 * 10 * 4  # layers, keys and values, hidden, tokens, float32
    True
    """
    pruned = PrunedSizes()
    if plan is not None:
        plan = _with_any_units(plan)
        check_plan(plan, discovery)
        pruned = plan.sizes
    if plan is not None and plan.settings is not None:
        twin = skeleton(with_settings(config, plan.settings), trust_remote_code=trust_remote_code)
    else:
        twin = skeleton(config, trust_remote_code=trust_remote_code)
        twin = twin if plan is None else prune(twin, plan, discovery=discovery)
    twin = twin.to(dtype or getattr(config, "dtype", None) or torch.float32)  # type: ignore[arg-type]  # as typed by transformers
    return model_costs(twin, discovery, name=name, pruned=pruned, options=options)


def model_costs(
    model: PreTrainedModel,
    discovery: Discovery,
    *,
    name: str,
    pruned: PrunedSizes | None = None,
    options: ProfileOptions | None = None,
) -> Profile:
    """Count what a model costs; its cache is what one pass on its device, or on `meta`, returned.

    `discovery` is the model's own, or with `pruned` the dense model's.
    """
    pruned, options = pruned or PrunedSizes(), options or ProfileOptions()
    kept, dropped = pruned.sizes, pruned.dropped_layers
    macs = {n: count_macs(discovery, kept, dropped_layers=dropped, tokens=n) for n in options.seq_lens}
    caches = {n: _cache_bytes(model, n) for n in options.seq_lens}
    grid = []
    for n, batch in options.grid:
        cache = caches[n]
        grid.append(BatchCost(batch, n, batch * sum(macs[n].values()), None if cache is None else batch * sum(cache)))
    first, cache = options.seq_lens[0], caches[options.seq_lens[0]]
    return Profile(
        model=name,
        parameters=count_parameters(discovery, kept, dropped_layers=dropped),
        non_embedding_parameters=count_parameters(discovery, kept, dropped_layers=dropped, embeddings=False),
        seq_len=first,
        macs=sum(macs[first].values()),
        macs_by_operator=macs[first],
        macs_by_kind=count_macs_by_kind(discovery, pruned, tokens=first),
        weight_bytes=weight_bytes(model),
        kv_cache_bytes=None if cache is None else sum(cache),
        kv_cache_bytes_by_layer=cache or (),
        grid=tuple(grid),
    )


def _cache_bytes(model: PreTrainedModel, seq_len: int) -> tuple[int, ...] | None:
    try:
        return cache_bytes_by_layer(model, seq_len=seq_len)
    except DiscoveryError as error:  # code that runs with weights alone
        logger.debug("%s", error)
        return None


def prune_to_sizes(model: PreTrainedModel, plan: Plan, discovery: Discovery) -> PreTrainedModel:
    """The model cut to a plan's sizes, for what depends on sizes alone: unrepaired, and of units not chosen the first.

    Raises `PlanError` when the plan is of another model.
    """
    return prune(model, _with_any_units(plan), discovery=discovery)


def _with_any_units(plan: Plan) -> Plan:
    groups = tuple(replace(g, keep=tuple(range(g.kept)) if g.keep is None else g.keep) for g in plan.groups)
    return replace(plan, groups=groups)
