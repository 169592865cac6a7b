"""Discovery, config and plan -> what a model costs by arithmetic: multiply-accumulates, weights, the cache; no weights.

What a forward pass keeps for the next token is not computed by a formula: the model runs once, and what it returned is
looked at. On `meta` that takes no memory, so the cache of a config is known as well as that of a model.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from secateur.discovery.algebra import size_after, variables_in
from secateur.discovery.config_settings import with_settings
from secateur.discovery.counting import count_macs, count_parameters
from secateur.discovery.groups import BATCH, KINDS, SEQUENCE, Discovery, Operation
from secateur.discovery.layers import layer_of
from secateur.discovery.tracing import run_without_memory
from secateur.errors import DiscoveryError
from secateur.evaluation.perplexity import STATE_NAMES, evaluation_mode, input_device, vocabulary_size
from secateur.models.loading import skeleton
from secateur.models.tensors import plain_tensors
from secateur.planning.plan import Plan
from secateur.pruning.prune import check_plan, prune

logger = logging.getLogger(__name__)

UNGROUPED = "frozen"  # work over dimensions of which none can be cut
# To which kind of group a product belongs that runs over several: what lies inside experts, MLPs, attention and states
# comes before what runs through the whole model. The projections of attention are attention's.
_BY_KIND = ("expert", "expert_mlp", "shared_mlp", "mlp", "state", "latent", "attention", "query", "head_dim", "other")
_INSIDE = {"query": "attention", "head_dim": "attention", "latent": "attention", "expert_mlp": "expert"}


@dataclass(frozen=True, slots=True)
class Cell:
    """What a batch of prompts costs, counted and, where the model has weights, measured; None is not measured.

    >>> Cell(batch=4, seq_len=64, macs=1000, kv_cache_bytes=256).to_json()
    {'batch': 4, 'seq_len': 64, 'macs': 1000, 'kv_cache_bytes': 256}
    """

    batch: int
    seq_len: int
    macs: int  # of one pass over the whole batch
    kv_cache_bytes: int | None  # of the whole batch, when the prompts have been read
    prefill_seconds: float | None = None  # the median, for the whole batch
    prefill_quartiles: tuple[float, float] | None = None
    decode_tokens_per_second: float | None = None  # of all rows of the batch together
    peak_bytes: int | None = None
    macs_ratio: float | None = None  # against the first model, in the same cell
    prefill_speedup: float | None = None
    decode_speedup: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data, without what is not known."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, slots=True)
class Sizes:
    """What one model costs before anything is measured; the counts are of one sequence of `seq_len` tokens.

    >>> Sizes("m", 10, 4, 64, 120, {"matmul": 120}, {"mlp": 120}, 40, 16, (16,), ()).macs
    120
    """

    model: str
    parameters: int
    non_embedding_parameters: int
    seq_len: int
    macs: int
    macs_by_operator: Mapping[str, int]  # matmul, norm, softmax, ...
    macs_by_kind: Mapping[str, int]  # by kind of group: attention, mlp, expert, ...
    weight_bytes: int
    kv_cache_bytes: int | None  # what a pass keeps for the next token: keys and values, latents, recurrent states
    kv_cache_bytes_by_layer: tuple[int, ...]  # empty where the cache is not made of layers
    grid: tuple[Cell, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data, as `secateur profile --json` writes it."""
        return {**asdict(self), "grid": [cell.to_json() for cell in self.grid]}


def sizes_of(
    config: PreTrainedConfig,
    discovery: Discovery,
    *,
    name: str,
    plan: Plan | None = None,
    seq_lens: Sequence[int] = (64,),
    batches: Sequence[int] = (1,),
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> Sizes:
    """Count what the model of a config costs, as it is or as a plan cuts it; nothing of its size is allocated.

    The counts are for the first of `seq_lens`, and in the grid for each with each batch. The bytes of weights and cache
    are those of `dtype` (None: the one that the config names, else float32). The cache's are None for code that runs
    with weights alone. Raises `ModelError` when no model can be built from the config, and `PlanError` when the plan is
    of another model.

    >>> from transformers import AutoConfig
    >>> from secateur.discovery.discover import discover
    >>> sizes = {"hidden_size": 12, "num_attention_heads": 2, "ffn_dim": 24, "word_embed_proj_dim": 12}
    >>> config = AutoConfig.for_model("opt", num_hidden_layers=2, **sizes)
    >>> found = sizes_of(config, discover(config), name="opt", seq_lens=[10])
    >>> found.kv_cache_bytes == 2 * 2 * 12 * 10 * 4  # layers, keys and values, hidden, tokens, float32
    True
    """
    kept: Mapping[str, int] = {}
    dropped: frozenset[int] = frozenset()
    if plan is not None:
        plan = _with_any_units(plan)
        check_plan(plan, discovery)
        kept, dropped = dict(plan.sizes.sizes), plan.sizes.dropped_layers
    if plan is not None and plan.settings is not None:
        twin = skeleton(with_settings(config, plan.settings), trust_remote_code=trust_remote_code)
    else:
        twin = skeleton(config, trust_remote_code=trust_remote_code)
        twin = twin if plan is None else prune(twin, plan, discovery=discovery)
    dtype = dtype or getattr(config, "dtype", None) or torch.float32
    twin = twin.to(dtype)  # type: ignore[arg-type]  # transformers wraps `to`
    return _sizes(twin, discovery, kept, dropped, name=name, seq_lens=seq_lens, batches=batches)


def sizes_of_model(
    model: PreTrainedModel,
    discovery: Discovery,
    *,
    name: str,
    seq_lens: Sequence[int] = (64,),
    batches: Sequence[int] = (1,),
) -> Sizes:
    """The same of a model with its weights, from its own discovery: its cache is what a pass on its device returned.

    Raises `ModelError` for weights on `meta`.
    """
    input_device(model)  # which refuses them
    return _sizes(model, discovery, {}, frozenset(), name=name, seq_lens=seq_lens, batches=batches)


def _sizes(
    model: PreTrainedModel,
    discovery: Discovery,
    kept: Mapping[str, int],
    dropped: frozenset[int],
    *,
    name: str,
    seq_lens: Sequence[int],
    batches: Sequence[int],
) -> Sizes:
    operators = {n: count_macs(discovery, kept, dropped_layers=dropped, tokens=n) for n in seq_lens}
    caches: dict[int, tuple[int, ...] | None] = {}
    for seq_len in seq_lens:
        try:
            caches[seq_len] = cache_bytes_by_layer(model, seq_len=seq_len)
        except DiscoveryError as error:  # code that runs with weights alone
            logger.debug("%s", error)
            caches[seq_len] = None
    totals = {n: None if by_layer is None else sum(by_layer) for n, by_layer in caches.items()}
    first = seq_lens[0]
    cells = [
        Cell(batch, n, batch * sum(operators[n].values()), None if (total := totals[n]) is None else batch * total)
        for n in seq_lens
        for batch in batches
    ]
    return Sizes(
        model=name,
        parameters=count_parameters(discovery, kept, dropped_layers=dropped),
        non_embedding_parameters=count_parameters(discovery, kept, dropped_layers=dropped, embeddings=False),
        seq_len=first,
        macs=sum(operators[first].values()),
        macs_by_operator=operators[first],
        macs_by_kind=count_macs_by_kind(discovery, kept, dropped_layers=dropped, tokens=first),
        weight_bytes=weight_bytes(model),
        kv_cache_bytes=totals[first],
        kv_cache_bytes_by_layer=caches[first] or (),
        grid=tuple(cells),
    )


def cut_to_sizes(model: PreTrainedModel, plan: Plan, discovery: Discovery) -> PreTrainedModel:
    """The model cut to a plan's sizes, for what depends on sizes alone: unrepaired, and of units not chosen the first.

    Raises `PlanError` when the plan is of another model.
    """
    return prune(model, _with_any_units(plan), discovery=discovery)


def _with_any_units(plan: Plan) -> Plan:
    groups = tuple(replace(g, keep=tuple(range(g.kept)) if g.keep is None else g.keep) for g in plan.groups)
    return replace(plan, groups=groups)


def count_macs_by_kind(
    discovery: Discovery,
    kept: Mapping[str, int] | None = None,
    *,
    dropped_layers: frozenset[int] = frozenset(),
    tokens: int = 64,
) -> dict[str, int]:
    """Multiply-accumulates of one pass over `tokens` tokens by kind of group, as `count_macs` counts them.

    Work that runs over the units of several groups belongs to the innermost: a projection of attention to attention,
    though it reads `hidden` as well. What runs over `hidden` alone is norms; the output head is `vocabulary`. Work of
    which no dimension can be cut is `frozen`.

    >>> from transformers import AutoConfig
    >>> from secateur.discovery.discover import discover
    >>> sizes = {"hidden_size": 12, "num_attention_heads": 2, "ffn_dim": 24, "word_embed_proj_dim": 12}
    >>> discovery = discover(AutoConfig.for_model("opt", num_hidden_layers=1, vocab_size=50, **sizes))
    >>> found = count_macs_by_kind(discovery, tokens=1)
    >>> found["mlp"], found["vocabulary"]  # 2 x 12 x 24 and one activation of each; 12 x 50
    (600, 600)
    """
    sizes = {**(kept or {}), BATCH: 1, SEQUENCE: tokens}
    macs: Counter[str] = Counter()
    for work, kind in zip(discovery.operations, _kinds_of_work(discovery), strict=True):
        if layer_of(work.module, discovery.layer_lists) not in dropped_layers:
            macs[kind] += prod(size_after(dim, sizes) for dim in work.dims)
    order = [*KINDS, UNGROUPED]
    return dict(sorted(macs.items(), key=lambda item: order.index(item[0])))


def _kinds_of_work(discovery: Discovery) -> list[str]:
    """To which kind of group each operation belongs, in order."""
    kind_of = {group.name: group.kind for group in discovery.groups}
    over = [
        {kind_of[v.name] for dim in work.dims for v in variables_in(dim) if v.name in kind_of}
        for work in discovery.operations
    ]
    inside = [_innermost(kinds) for kinds in over]
    # One head or one expert is no group. Its work is what the module does that it lies in: one with a softmax over
    # positions by positions is attention.
    within: dict[str, set[str]] = defaultdict(set)
    for work, kind in zip(discovery.operations, inside, strict=True):
        if kind is None and work.kind == "softmax" and _times(work, SEQUENCE) > 1:
            kind = "attention"
        if kind is not None:
            for module in _modules_around(work, discovery):
                within[module].add(kind)
    found = []
    for work, kinds, kind in zip(discovery.operations, over, inside, strict=True):
        if kind is None and not (work.kind == "norm" and "hidden" in kinds) and "vocabulary" not in kinds:
            around = (_innermost(within[module]) for module in _modules_around(work, discovery))
            kind = next((each for each in around if each is not None), None)
        found.append(kind or next((each for each in ("vocabulary", "hidden") if each in kinds), UNGROUPED))
    return found


def _innermost(kinds: set[str]) -> str | None:
    kind = next((kind for kind in _BY_KIND if kind in kinds), None)
    return None if kind is None else _INSIDE.get(kind, kind)


def _times(work: Operation, name: str) -> int:
    return sum(v.name == name for dim in work.dims for v in variables_in(dim))


def _modules_around(work: Operation, discovery: Discovery) -> list[str]:
    """The modules that an operation runs in, innermost first, within its layer; outside layers, none."""
    if layer_of(work.module, discovery.layer_lists) is None:
        return []
    prefix = next(name for name in discovery.layer_lists if work.module.startswith(f"{name}."))
    parts = work.module.split(".")
    return [".".join(parts[:end]) for end in range(len(parts), len(prefix.split(".")) + 1, -1)]


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of all parameters and persistent buffers; a tied weight counts once, a packed one as packed.

    >>> model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    >>> weight_bytes(model)  # 2 x 16 float32
    128
    >>> model[1].weight = model[0].weight
    >>> weight_bytes(model)
    64
    """
    state = [value for value in model.state_dict(keep_vars=True).values() if isinstance(value, Tensor)]
    tensors = [plain for tensor in state for plain in plain_tensors(tensor)]
    # Two parameters may share memory without being one object; on `meta` there is no address, and the object counts.
    sizes = {(tensor.device, tensor.data_ptr() or id(tensor), tensor.shape): tensor.nbytes for tensor in tensors}
    return sum(sizes.values())


def cache_bytes_by_layer(model: PreTrainedModel, *, seq_len: int) -> tuple[int, ...]:
    """Return the bytes that a pass over one sequence of `seq_len` tokens keeps for the next, by layer.

    The model runs once, on `meta` too, and every tensor of what it returned is counted with the elements that it has:
    a window that slides keeps what is in it, and a layer without attention its state. What is not made of layers is
    one entry, and what returns nothing none. Raises `DiscoveryError` when the pass on `meta` fails.

    >>> from transformers import AutoConfig
    >>> sizes = {"hidden_size": 12, "num_attention_heads": 2, "ffn_dim": 24, "word_embed_proj_dim": 12}
    >>> config = AutoConfig.for_model("opt", num_hidden_layers=2, vocab_size=9, **sizes)
    >>> cache_bytes_by_layer(skeleton(config), seq_len=5)
    (480, 480)
    """
    on_meta = not hasattr(model, "_hf_hook") and any(weight.device.type == "meta" for weight in model.parameters())
    with evaluation_mode(model), torch.no_grad():
        if on_meta:
            outputs = run_without_memory(model, sequence=seq_len, use_cache=True)
        else:
            # Code that looks for marks among the tokens does not take a row of one and the same.
            drawn_BT = torch.randint(vocabulary_size(model), (1, seq_len), generator=torch.Generator().manual_seed(0))
            outputs = model(input_ids=drawn_BT.to(input_device(model)), use_cache=True)
    state = next((outputs[name] for name in STATE_NAMES if name in outputs), None)
    layers = getattr(state, "layers", state)
    entries = list(layers) if isinstance(layers, list | tuple) else [layers]
    found = tuple(sum(tensor.nbytes for tensor in _tensors_in(entry)) for entry in entries)
    return found if any(found) else ()


def _tensors_in(value: Any) -> list[Tensor]:
    """Every tensor that is reached through containers and attributes, each once; counters are no part of a cache."""
    seen: dict[int, Any] = {}

    def walk(value: Any) -> Iterator[Tensor]:
        if id(value) in seen:
            return
        seen[id(value)] = value
        if isinstance(value, Tensor):
            if value.dim() > 1:
                yield value
        elif isinstance(value, dict):
            for item in value.values():
                yield from walk(item)
        elif isinstance(value, list | tuple):
            for item in value:
                yield from walk(item)
        elif hasattr(value, "__dict__") and not isinstance(value, nn.Module | PreTrainedConfig | type):
            yield from walk(vars(value))

    return [*walk(value)]
