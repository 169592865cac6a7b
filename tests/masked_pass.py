"""Runs a masked model as if the removed units were not there: sums, statistics and choices are over those that stay."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from secateur.discovery.algebra import kept_along, variables_in
from secateur.discovery.graph import Ref
from secateur.discovery.groups import Discovery
from secateur.discovery.rules.state import Inference


class StayDouble(TorchDispatchMode):
    """What is to be done in float32 whatever the model's type is done in float64 in a float64 model."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        to_float = func is torch.ops.aten._to_copy.default and (kwargs or {}).get("dtype") == torch.float32
        if to_float and args[0].dtype == torch.float64:
            return args[0].clone()
        return func(*args, **(kwargs or {}))


class Scalars(TorchDispatchMode):
    """Notes the numbers that code multiplies, divides, adds or raises by, for each call of an operator."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: dict[str, list[Any]] = defaultdict(list)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = _name(func)
        self.calls[name].append(args[1] if name in BY_A_NUMBER and isinstance(args[1], (int, float)) else None)
        return func(*args, **(kwargs or {}))


BY_A_NUMBER = frozenset({"aten.mul", "aten.div", "aten.add", "aten.sub", "aten.pow", "aten.rsub"})


def _name(func: Any) -> str:
    return f"{func.namespace}.{func._schema.name.split('::')[-1]}".rstrip("_")


class OverKept(TorchDispatchMode):
    """Sums, statistics and choices across the units of groups look at the units that stay.

    The operators of the pass are matched with those of the trace, one by one for each name of an operator. With
    `scalars`, numbers that the code derives from sizes are those of the model that is cut.
    """

    def __init__(
        self, state: Inference, discovery: Discovery, keep: Mapping[str, Sequence[int]], scalars: Scalars | None = None
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.scalars = scalars.calls if scalars is not None else {}
        graph = state.graph
        groups = _group_of_variable(state, discovery)
        by_variable = {v: keep[group] for v, group in groups.items() if group in keep}
        across: dict[int, list[tuple[int, list[int]]]] = defaultdict(list)
        for each in state.reductions:
            dim = state.unifier.resolve(each.dim)
            kept = kept_along(dim, by_variable)
            if len(kept) < dim.size:
                across[each.node].append((each.tensor_dim, kept))
        self.kept: dict[str, list[list[tuple[int, list[int]]]]] = defaultdict(list)
        for i, node in enumerate(graph.nodes):
            self.kept[node.op.rstrip("_")].append(across.get(i, []))
        self.calls: Counter[str] = Counter()

    @property
    def changes(self) -> bool:
        """Whether a pass would be another one."""
        return bool(self.scalars) or any(kept for calls in self.kept.values() for kept in calls)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = _name(func)
        call, self.calls[name] = self.calls[name], self.calls[name] + 1
        kept = self.kept[name][call] if call < len(self.kept[name]) else []
        given = self.scalars.get(name, [])
        if call < len(given) and given[call] is not None and isinstance(args[1], (int, float)):
            args = (args[0], given[call], *args[2:])
        if not kept:
            return func(*args, **(kwargs or {}))
        return over_kept(func, name, args, kwargs or {}, kept)


def _group_of_variable(state: Inference, discovery: Discovery) -> dict[str, str]:
    found: dict[str, str] = {}
    numbers = state.graph.parameters | state.graph.buffers
    for weight in discovery.weights:
        for before, after in zip(state.dims_of(Ref(numbers[weight.name])), weight.dims, strict=True):
            free = [v.name for v in variables_in(before) if state.unifier.reason(v) is None]
            found.update(zip(free, [v.name for v in variables_in(after)], strict=True))
    return found


def over_kept(func: Any, name: str, args: Any, kwargs: Any, kept: Sequence[tuple[int, Sequence[int]]]) -> Any:
    """Apply an operator that works across dimensions to the positions that stay."""
    x, *rest = args
    if name in ("aten.native_layer_norm", "aten._fused_rms_norm", "aten.rms_norm", "aten.layer_norm"):
        ((_, positions),) = kept
        index = torch.tensor(positions)
        scales = [w if w is None else w[index] for w in rest[1:3]]
        result = func(x[..., index], [len(index)], *scales, *rest[3:], **kwargs)
        full = torch.zeros_like(x)
        full[..., index] = result[0] if isinstance(result, tuple) else result
        return (full, *result[1:]) if isinstance(result, tuple) else full
    reduces = name in {f"aten.{n}" for n in "sum mean var std norm linalg_vector_norm".split()}
    for along, positions in kept:
        index = torch.tensor(positions)
        if reduces:
            x = x.index_select(along, index)
        else:
            stays = torch.zeros(x.shape[along], dtype=torch.bool)
            stays[index] = True
            stays = stays.reshape([-1 if i == along else 1 for i in range(x.dim())])
            x = torch.where(stays, x, _lowest(x, name))
    return func(x, *rest, **kwargs)


def _lowest(x: Tensor, name: str) -> Tensor:
    """What is never chosen."""
    if x.dtype == torch.bool:
        return torch.tensor(name == "aten.all")
    sign = 1 if name in ("aten.amin", "aten.min", "aten.argmin") else -1
    limit = float("inf") if x.dtype.is_floating_point else torch.iinfo(x.dtype).max
    return torch.tensor(sign * limit, dtype=x.dtype)
