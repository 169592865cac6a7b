"""Discovery, config and plan -> a model's cost by arithmetic: parameters, multiply-accumulates and bytes."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from secateur.discovery.algebra import variables_in
from secateur.discovery.config_settings import with_settings
from secateur.discovery.counting import count_macs, count_parameters, macs_by_operation
from secateur.discovery.groups import KINDS, SEQUENCE, Discovery, Operation
from secateur.discovery.layers import layer_of, path_and_parents
from secateur.discovery.sizes import PrunedSizes
from secateur.evaluation.memory import cache_bytes_by_layer, weight_bytes
from secateur.evaluation.options import ProfileOptions
from secateur.evaluation.speed import Speed
from secateur.models.loading import skeleton
from secateur.planning.plan import Plan
from secateur.pruning.prune import check_plan, prune

UNGROUPED = "frozen"  # operations over dimensions of which none can be cut
# An operation over the units of several groups belongs to the first of these kinds: what lies inside experts, MLPs,
# attention and states comes before what runs through the whole model.
_INNERMOST = ("expert", "expert_mlp", "shared_mlp", "mlp", "state", "latent", "attention", "query", "head_dim", "other")
_PART_OF = {"query": "attention", "head_dim": "attention", "latent": "attention", "expert_mlp": "expert"}


@dataclass(frozen=True, slots=True)
class RelativeCost:
    """A cost beside the first model's: ratios are shares of the first's, speed-ups how many times as fast."""

    macs_ratio: float
    prefill_speedup: float
    decode_speedup: float


@dataclass(frozen=True, slots=True)
class BatchCost:
    """What a batch of prompts costs: counted, and measured where the model has weights."""

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
    """What one model costs; the counts are of one sequence of `seq_len` tokens, the first of the grid."""

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
            first = {"model": self.first_model, "weight_bytes_ratio": self.weight_bytes_ratio}
            data["against"] = {**first, **asdict(against)}
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
    """
    pruned = PrunedSizes()
    if plan is not None:
        plan = with_any_units(plan)
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
    caches = {n: cache_bytes_by_layer(model, seq_len=n) for n in options.seq_lens}
    totals = {n: None if cache is None else sum(cache) for n, cache in caches.items()}
    grid = []
    for n, batch in options.grid:
        cache = totals[n]
        grid.append(BatchCost(batch, n, batch * sum(macs[n].values()), None if cache is None else batch * cache))
    first = options.seq_lens[0]
    return Profile(
        model=name,
        parameters=count_parameters(discovery, kept, dropped_layers=dropped),
        non_embedding_parameters=count_parameters(discovery, kept, dropped_layers=dropped, embeddings=False),
        seq_len=first,
        macs=sum(macs[first].values()),
        macs_by_operator=macs[first],
        macs_by_kind=count_macs_by_kind(discovery, pruned, tokens=first),
        weight_bytes=weight_bytes(model),
        kv_cache_bytes=totals[first],
        kv_cache_bytes_by_layer=caches[first] or (),
        grid=tuple(grid),
    )


def with_any_units(plan: Plan) -> Plan:
    """The plan for what depends on sizes alone: of a group whose units were not chosen, the first stay."""
    groups = tuple(replace(g, keep=tuple(range(g.kept)) if g.keep is None else g.keep) for g in plan.groups)
    return replace(plan, groups=groups)


def count_macs_by_kind(discovery: Discovery, pruned: PrunedSizes | None = None, *, tokens: int = 64) -> dict[str, int]:
    """Multiply-accumulates of one pass over `tokens` tokens by kind of group, as `count_macs` counts them.

    Operations over the units of several groups belong to the innermost: a projection of attention to attention, though
    it reads `hidden` as well. What runs over `hidden` alone is norms; the output head is `vocabulary`. Operations of
    which no dimension can be cut are `frozen`.

    >>> from transformers import AutoConfig
    >>> from secateur.discovery.discover import discover
    >>> sizes = {"hidden_size": 12, "num_attention_heads": 2, "ffn_dim": 24, "word_embed_proj_dim": 12}
    >>> discovery = discover(AutoConfig.for_model("opt", num_hidden_layers=1, vocab_size=50, **sizes))
    >>> macs = count_macs_by_kind(discovery, tokens=1)
    >>> macs["mlp"], macs["vocabulary"]  # 2 x 12 x 24 and one activation of each; 12 x 50
    (600, 600)
    """
    pruned = pruned or PrunedSizes()
    counts = macs_by_operation(discovery, pruned.sizes, tokens=tokens)
    macs: Counter[str] = Counter()
    for operation, kind, count in zip(discovery.operations, _kinds(discovery), counts, strict=True):
        if layer_of(operation.module, discovery.layer_lists) not in pruned.dropped_layers:
            macs[kind] += count
    order = [*KINDS, UNGROUPED]
    return dict(sorted(macs.items(), key=lambda item: order.index(item[0])))


def _kinds(discovery: Discovery) -> list[str]:
    """The kind of group that each operation belongs to, in order."""
    kind_of = {group.name: group.kind for group in discovery.groups}
    all_kinds = [
        {kind_of[v.name] for dim in operation.dims for v in variables_in(dim) if v.name in kind_of}
        for operation in discovery.operations
    ]
    own = [_innermost(kinds) for kinds in all_kinds]
    # A single head or expert is no group. Its operations belong to what their module computes; a module with a softmax
    # over positions by positions is attention.
    inside: dict[str, set[str]] = defaultdict(set)  # module -> kinds of the operations in it
    for operation, kind in zip(discovery.operations, own, strict=True):
        if kind is None and operation.kind == "softmax":
            names = [variable.name for dim in operation.dims for variable in variables_in(dim)]
            kind = "attention" if names.count(SEQUENCE) > 1 else None
        if kind is not None:
            for module in _modules_around(operation, discovery):
                inside[module].add(kind)
    result = []
    for operation, kinds, kind in zip(discovery.operations, all_kinds, own, strict=True):
        if kind is None and not (operation.kind == "norm" and "hidden" in kinds) and "vocabulary" not in kinds:
            around = (_innermost(inside[module]) for module in _modules_around(operation, discovery))
            kind = next((each for each in around if each is not None), None)
        result.append(kind or next((each for each in ("vocabulary", "hidden") if each in kinds), UNGROUPED))
    return result


def _innermost(kinds: set[str]) -> str | None:
    kind = next((kind for kind in _INNERMOST if kind in kinds), None)
    return None if kind is None else _PART_OF.get(kind, kind)


def _modules_around(operation: Operation, discovery: Discovery) -> list[str]:
    """The modules that an operation runs in, innermost first, within its layer; outside layers, none."""
    if layer_of(operation.module, discovery.layer_lists) is None:
        return []
    prefix = next(name for name in discovery.layer_lists if operation.module.startswith(f"{name}."))
    return [path for path in path_and_parents(operation.module) if path.count(".") > prefix.count(".") + 1]
