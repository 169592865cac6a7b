"""Torch-Pruning's DependencyGraph, held to the contract of `tests/contract.py`: same models, same units, same masks.

It gets more help than its own example for language models (`examples/LLMs/prune_llm.py`) gives it. For each of our
groups it is told which rows of which layers hold the units that go. Any of those layers may be the first one cut; the
others follow by hand where its own graph does not take them along. Parameters that lie in no layer it knows may be
declared with the dimension that holds the units. Afterwards the sizes that modules and configs remember are set by
hand, in several ways. One way that gives the logits of the mask is enough.

Its graph takes the halves of a rotary embedding for channels where they add up to the width of the output projection,
which is so with two query heads for each KV head, and it leaves KV heads that several query heads share to its pruner,
which does not cut them. So heads that it cannot cut are tried again in a model with three query heads for each KV head,
and in one without shared KV heads.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest.mock import patch

import torch
import torch_pruning
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

import every_type
from contract import Subject, family, logits, masked, planned, subject, tolerance
from masked_pass import OverKept
from secateur.discovery.algebra import (
    Concat,
    Expression,
    Product,
    concat,
    kept_along,
    product,
    size_after,
    variables_in,
)
from secateur.discovery.groups import Group
from secateur.models.inputs import predicted
from secateur.models.silence import quiet

ROOTS = 4  # layers that are tried as the first one cut
LONGEST = 1000  # entries of a pruning group; those of the tiny models that end have a few dozen
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "kv_n_heads")
OTHER_KV_HEADS = (2, 6)  # of 6 query heads
Keep = Mapping[str, Sequence[int]]  # group -> the units that stay


class Off(AssertionError):
    """The cut model runs, and is not the masked one."""


def build_graph(
    model: PreTrainedModel, inputs: Mapping[str, Any], declared: Sequence[tuple[nn.Parameter, int]] = ()
) -> Any:
    """Trace the model as Torch-Pruning does; `declared`: along which dimension parameters outside layers are cut."""
    options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}

    def run(traced: nn.Module, given: Mapping[str, Any]) -> Tensor:
        return predicted(traced(**given, **options))

    parameters = [torch_pruning._helpers.UnwrappedParameters(parameter, dim) for parameter, dim in declared]
    with quiet():
        return torch_pruning.DependencyGraph().build_dependency(
            model,
            example_inputs=dict(inputs),
            forward_fn=run,
            unwrapped_parameters=parameters or None,
            verbose=False,
        )


def check_peer_graph(tested: Subject) -> None:
    """Build the graph of the model, with one kind of attention or the other."""
    try:
        build_graph(copy.deepcopy(tested.model), tested.inputs)
    except Exception:
        model = copy.deepcopy(tested.model)
        with quiet():
            model.set_attn_implementation("sdpa")
        build_graph(model, tested.inputs)


def check_peer_cut(tested: Subject, kind: str) -> None:
    """Cut every group of a kind through the graph, as `contract.check_cut` does with ours; compare with the mask."""
    try:
        check_families(tested, kind)
    except Exception:
        if kind not in ("attention", "query") or not any(passes_with(tested, kind, heads) for heads in OTHER_KV_HEADS):
            raise


def passes_with(tested: Subject, kind: str, kv_heads: int) -> bool:
    """Whether it can cut the heads of the same type's model with another number of KV heads."""
    with patch.dict(every_type.SIZES, dict.fromkeys(KV_HEADS, kv_heads)):
        try:
            other = subject(tested.model_type)
            if kind not in other.kinds or other.model.config.to_dict() == tested.model.config.to_dict():
                return False
            check_families(other, kind)
        except Exception:  # whatever fails, the first failure is told
            return False
    return True


def check_families(tested: Subject, kind: str) -> None:
    """Cut the groups of a kind that bear the same name, one in each layer, together."""
    families: dict[str, list[Group]] = defaultdict(list)
    for group in tested.discovery.groups:
        if group.kind == kind:
            families[family(group.name)].append(group)
    for groups in families.values():
        check_groups(tested, groups)


def check_groups(tested: Subject, groups: Sequence[Group]) -> None:
    """Try all the ways to cut these groups; where none is right, raise what the best one met."""
    plan = planned(tested, groups)
    keep = {group.name: group.keep or () for group in plan.groups}
    with OverKept(tested.state, tested.discovery, keep):
        expected = logits(masked(tested.model, plan, tested.discovery), tested.inputs)
    failures: list[Exception] = []
    for declares, attention, first in itertools.product((False, True), ("eager", "sdpa"), range(ROOTS)):
        try:
            if not cut_one_way(tested, groups, keep, expected, declares=declares, attention=attention, first=first):
                continue  # this way is one of those before
        except Exception as error:  # the model's code and the library's may raise anything
            failures.append(error)
        else:
            return
    if not failures:
        raise LookupError("none of the layers that put out these units is in its graph")
    raise next((error for error in failures if isinstance(error, Off)), failures[0])


def cut_one_way(
    tested: Subject,
    groups: Sequence[Group],
    keep: Keep,
    expected: Tensor,
    *,
    declares: bool,
    attention: str,
    first: int,
) -> bool:
    """Cut with the `first` layer of each group as the root; False where this is no way of its own."""
    model = copy.deepcopy(tested.model)
    held = [(axis.weight, axis.dim) for group in groups for axis in group.axes]
    loose = [(weight, dim) for weight, dim in held if not in_layer(model, weight)] if declares else []
    if declares and not loose:
        return False
    with quiet():
        model.set_attn_implementation(attention)  # the model it is traced with
    parameters = dict(model.named_parameters())
    declared = [(parameters[weight], dim) for weight, dim in loose if weight in parameters]
    graph = build_graph(model, tested.inputs, declared)
    ordered = [roots_of(graph, model, group, keep, dict(loose)) for group in groups]
    if not any(first < len(roots) for roots in ordered):
        return False
    with patch.object(torch_pruning.dependency.graph, "Group", BoundedGroup):
        for roots in ordered:
            if roots:
                cut_through(graph, roots[first % len(roots) :] + roots[: first % len(roots)])
    with quiet():
        model.set_attn_implementation("eager")
    with_sizes(tested, model, groups, keep, expected)
    return True


class BoundedGroup(torch_pruning.dependency.Group):  # type: ignore[misc]
    """A pruning group that ends: where units come back with other numbers, the library's walk goes on for ever."""

    def add_dep(self, dep: Any, idxs: Any) -> None:
        """Add an entry."""
        if len(self) >= LONGEST:
            raise RecursionError("its walk through the graph does not end")
        super().add_dep(dep, idxs)


# --- the cut ----------------------------------------------------------------------------------------------------


def roots_of(
    graph: Any, model: nn.Module, group: Group, keep: Keep, declared: Mapping[str, int]
) -> list[tuple[Any, list[int]]]:
    """The nodes that put out the units of the group, and which of their outputs go: layers first, small ones first.

    When a parameter is cut another takes its place in the model; its node stays.
    """
    found = []
    for axis in group.axes:
        path, _, name = axis.weight.rpartition(".")
        holder = model.get_submodule(path)
        weight: Any = getattr(holder, name)
        if in_layer(model, axis.weight):
            root, dim = holder, 1 if isinstance(holder, nn.Embedding) else 0
        elif weight in graph.module2node:
            root, dim = weight, declared.get(axis.weight, graph.module2node[weight].pruning_dim % weight.dim())
        else:
            continue
        if dim == axis.dim and name != "bias" and root in graph.module2node:
            goes = sorted(set(range(axis.expression.size)) - set(kept_along(axis.expression, dict(keep))))
            found.append((isinstance(root, nn.Parameter), axis.expression.size, (graph.module2node[root], goes)))
    return [node for _, _, node in sorted(found, key=lambda each: each[:2])]


def cut_through(graph: Any, roots: Sequence[tuple[Any, list[int]]]) -> None:
    """Cut the outputs of the first root with all that its graph couples, then those of the others that are whole."""
    done: set[tuple[int, bool]] = set()
    for node, goes in roots:
        if (id(node), True) in done:
            continue
        cut = graph.get_pruner_of_module(node.module).prune_out_channels
        coupled = graph.get_pruning_group(node.module, cut, goes)
        for i, (dependency, _) in enumerate(coupled):
            end = (id(dependency.target), graph.is_out_channel_pruning_fn(dependency.handler))
            if end in done:
                coupled[i] = torch_pruning._helpers.GroupItem(dependency, [])  # as its own pruner skips KV layers
            done.add(end)
        if not graph.check_pruning_group(coupled):
            raise ValueError("check_pruning_group refuses: nothing would be left of a layer")
        with torch.no_grad():
            coupled.prune(record_history=False)


def in_layer(model: nn.Module, weight: str) -> bool:
    """Whether the weight belongs to a layer that Torch-Pruning knows."""
    kind = torch_pruning.ops.module2type(model.get_submodule(weight.rpartition(".")[0]))
    return bool(kind != torch_pruning.ops.OPTYPE.ELEMENTWISE)


# --- sizes that modules remember --------------------------------------------------------------------------------


def with_sizes(tested: Subject, model: PreTrainedModel, groups: Sequence[Group], keep: Keep, expected: Tensor) -> None:
    """Compare with the mask as the model is, then with more and more remembered sizes set; raise what came nearest."""
    sizes = sizes_that_follow(groups, keep)
    failures: list[Exception] = []
    for reach in ("nothing", "heads", "own", "all"):
        changed = copy.deepcopy(model)
        if reach != "nothing":
            set_sizes(changed, groups, sizes, reach)
        try:
            compare(logits(changed, tested.inputs), expected, tolerance(tested))
        except Exception as error:  # sizes that do not fit make the model's code raise anything
            failures.append(error)
        else:
            return
    raise next((error for error in failures if isinstance(error, Off)), failures[0])


def compare(got: Tensor, expected: Tensor, within: float) -> None:
    """Raise `Off` unless the two are the same."""
    if got.shape != expected.shape:
        raise Off(f"logits {tuple(got.shape)} instead of {tuple(expected.shape)}")
    off = (got - expected).abs().max()
    if not off < within:
        raise Off(f"the cut model is off by {off:.1e}")


def sizes_that_follow(groups: Sequence[Group], keep: Keep) -> dict[int, int]:
    """Every size that the units are part of -> what is left of it: of heads, of their channels, of fused weights."""
    left: dict[int, int] = {}
    for group in groups:
        kept = {group.name: len(keep[group.name])}
        for axis in group.axes:
            for part in parts_of(axis.expression):
                if any(variable.name == group.name for variable in variables_in(part)):
                    left.setdefault(part.size, size_after(part, kept))
    return left


def parts_of(expression: Expression) -> Iterator[Expression]:
    """An expression, its neighbouring factors or parts, and theirs.

    >>> from secateur.discovery.algebra import Fixed
    >>> [part.size for part in parts_of(product([Variable("attention", 3), Variable("query", 2), Fixed(10)]))]
    [60, 6, 20, 3, 2, 10]
    """
    yield expression
    pieces: tuple[Expression, ...] = ()
    join: Callable[[Sequence[Expression]], Expression] = product
    if isinstance(expression, Product):
        pieces = expression.factors
    elif isinstance(expression, Concat):
        pieces, join = expression.parts, concat
    for length in range(len(pieces) - 1, 1, -1):
        yield from (join(pieces[at : at + length]) for at in range(len(pieces) - length + 1))
    for piece in pieces:
        yield from parts_of(piece)


def set_sizes(model: PreTrainedModel, groups: Sequence[Group], sizes: Mapping[int, int], reach: str) -> None:
    """Set whole numbers that modules hold and that follow the units, in place.

    `reach` is "heads": those with "head" in their name, of the modules around the group's weights; "own": all of
    these modules'; "all": those of every module that these lie in. The settings of heads in the config follow, too.
    """
    paths = {axis.weight.rpartition(".")[0] for group in groups for axis in group.axes}
    above = {path: [path[:i] for i, letter in enumerate(path) if letter == "."] for path in paths}
    if reach == "all":
        paths |= {"", *itertools.chain(*above.values())}
    else:
        paths |= {outer[-1] for outer in above.values() if outer}
    configs: dict[int, PreTrainedConfig] = {}
    for path in paths:
        module = model.get_submodule(path)
        if type(module).__module__.startswith("torch.nn"):
            continue
        for name, value in list(vars(module).items()):
            if isinstance(value, PreTrainedConfig):
                configs[id(value)] = value
            elif not name.startswith("_") and (reach != "heads" or "head" in name):
                follow(module, name, value, sizes)
    for config in configs.values():
        for name, value in list(vars(config).items()):
            if "head" in name:
                follow(config, name, value, sizes)


def follow(owner: Any, name: str, value: Any, sizes: Mapping[int, int]) -> None:
    """Give an attribute, or the numbers in it, what is left of its size, in place; numbers of layers are no sizes."""
    if "layer" in name or "idx" in name:
        return
    if type(value) is int and value in sizes:
        setattr(owner, name, sizes[value])
    elif type(value) in (list, tuple) and any(type(item) is int and item in sizes for item in value):
        setattr(owner, name, type(value)(sizes.get(item, item) if type(item) is int else item for item in value))
