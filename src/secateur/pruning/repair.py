"""Model, plan and calibration windows -> the weights that make up for what a plan cuts, in closed form.

Every unit of a group is read by matrices: the MLP's last, the attention's output, each expert's own. When the units go,
those matrices give something else, and what is left of them can be fitted anew. This happens in one forward pass of the
dense model, where each product with such a matrix is seen as it is computed: its inputs are what the already repaired
part of the model before it gives, so errors are not carried on unseen. Which units stay can be chosen there as well, by
optimal brain surgeon on these very inputs.

`bias` puts the mean of what is lost into the matrix's bias (FLAP, arXiv 2312.11983), where the architecture has one.
`least-squares` fits the columns that stay (see `obs`), and the bias too where there is one. Where the hidden width is
cut, a norm takes its statistic over fewer features, which changes the size of what it gives: its weight is scaled so
that this comes nearest to what it was, and what reads it is fitted to the scaled one.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateur.discovery.algebra import units_along, variables_in
from secateur.discovery.groups import Discovery
from secateur.errors import PlanError
from secateur.planning.plan import Plan
from secateur.progress import Progress
from secateur.scoring.gram import add_cross_gram, add_gram
from secateur.scoring.obs import DAMPING, least_squares, output_error, removal_costs
from secateur.scoring.passes.activations import input_dims
from secateur.scoring.passes.forward import eager_experts, input_device, probe_windows, split_output_head
from secateur.scoring.passes.products import WeightProduct, WeightProducts

METHODS = ("none", "bias", "least-squares")
TARGETS = ("prefix", "dense")


@dataclass(frozen=True, slots=True)
class Repaired:
    """New weights by name, as large as the dense ones and zero where units go, and the plan they were made for."""

    plan: Plan
    weights: Mapping[str, Tensor]
    # By matrix: the squared error of its outputs on the calibration text, as a share of their squares: when its inputs
    # are left out, and when it is repaired.
    errors: Mapping[str, tuple[float, float]]
    # Where `bias` found no bias to put it into: by weight, the mean of what its outputs lose.
    shifts: Mapping[str, Tensor] = field(default_factory=dict)


@torch.no_grad()
def repair(
    model: PreTrainedModel,
    plan: Plan,
    discovery: Discovery,
    windows: Tensor,
    *,
    method: str = "least-squares",
    target: str = "prefix",
    choose: bool = False,
    sequential: bool = True,
    damping: float = DAMPING,
    progress: Progress | None = None,
) -> Repaired:
    """Fit what reads the units that the plan cuts; the model is left as it is, and `prune` takes the weights.

    Windows are int64, samples x length; all go through the model together. The target is what a matrix gives for the
    whole of its inputs in the part of the model that is already cut (`prefix`), or in the dense model (`dense`).
    Without `sequential`, every matrix is fitted to the inputs that the dense model gives it. With `choose`, a group
    that a single matrix reads keeps as many units as planned, and which ones is decided here. Groups that no matrix
    reads are left as planned. Raises `PlanError` for a method or target that is unknown.

    >>> from secateur.discovery.discover import discover
    >>> from secateur.planning.plan import CutOptions, plan
    >>> from secateur.scoring.scores import score
    >>> from transformers import AutoConfig, AutoModelForCausalLM
    >>> config = AutoConfig.for_model("opt", hidden_size=12, num_attention_heads=2, ffn_dim=24, num_hidden_layers=2)
    >>> model, discovery = AutoModelForCausalLM.from_config(config), discover(config)
    >>> options = CutOptions(ratio=0.5, of="units", axes=("mlp",), score="l2")
    >>> decided = plan(discovery, options, scores=score(model, discovery=discovery, name="l2"))
    >>> found = repair(model, decided, discovery, torch.arange(60).reshape(3, 20))
    >>> before, after = found.errors["model.decoder.layers.0.fc2.weight"]
    >>> after < before
    True
    """
    if method not in METHODS:
        raise PlanError(f"repair={method!r} is unknown. Known: {', '.join(METHODS)}")
    if target not in TARGETS:
        raise PlanError(f"repair target {target!r} is unknown. Known: {', '.join(TARGETS)}")
    reads = input_dims(model, probe_windows(windows))
    pass_ = _RepairPass(model, plan, discovery, reads, windows, method, target, choose, damping)
    pass_.sequential = sequential
    if pass_.units:
        ids = windows.to(input_device(model))
        if target == "dense":
            ids = torch.cat([ids, ids])  # the first half stays dense, the second is cut
        layers = [f"{prefix}.{i}" for prefix in discovery.layer_lists for i in range(discovery.depth)]
        modules = dict(model.named_modules())
        with ExitStack() as stack:
            stack.enter_context(eager_experts(model))
            tail = split_output_head(model, probe_windows(windows).to(ids.device))
            done = 0

            def passed(*_: Any) -> None:
                nonlocal done
                done += 1
                if progress is not None:
                    progress(done, len(layers))

            for path in layers:
                if path in modules:
                    stack.callback(modules[path].register_forward_hook(passed).remove)
            for path in pass_.norms:
                stack.callback(modules[path].register_forward_hook(pass_.scaled(path)).remove)
            stack.enter_context(pass_.products)
            if tail is None:
                model(input_ids=ids, use_cache=False)
            else:
                tail.hidden(ids)
    return Repaired(pass_.plan(), pass_.weights, pass_.errors, pass_.shifts)


@dataclass(frozen=True, slots=True)
class _Inputs:
    """What is known of what a matrix reads, over all tokens: float64."""

    gram_CC: Tensor
    mean_C: Tensor
    tokens: int
    # Where the target is the dense model's output: x_dense' x, and the mean of x_dense.
    cross_CC: Tensor | None = None
    dense_mean_C: Tensor | None = None


class _RepairPass:
    """Looks at the products with every weight that reads units which go, and gives them another weight."""

    def __init__(
        self,
        model: PreTrainedModel,
        plan: Plan,
        discovery: Discovery,
        reads: Mapping[str, int],
        windows: Tensor,
        method: str,
        target: str,
        choose: bool,
        damping: float,
    ) -> None:
        self.given, self.method, self.target, self.damping = plan, method, target, damping
        self.samples, self.length = windows.shape
        self.kept = {g.name: g.kept for g in plan.groups if g.kind != "layer"}
        self.keep = {g.name: g.keep for g in plan.groups if g.kind != "layer"}
        self.parameters = dict(model.named_parameters())
        self.name_of = {id(parameter): name for name, parameter in self.parameters.items()}
        self.units: dict[str, dict[str, Tensor]] = {}  # weight -> group -> the unit of every column that it reads
        for weight in discovery.weights:
            if weight.name in reads and weight.parameter and not weight.embedding:  # tables may be looked up as well
                expression = weight.dims[reads[weight.name]]
                groups = dict.fromkeys(v.name for v in variables_in(expression) if v.name in self.keep)
                if groups:
                    self.units[weight.name] = {g: torch.tensor(units_along(expression, g)) for g in groups}
        readers = Counter(group for groups in self.units.values() for group in groups)
        self.chosen = {
            group
            for name, groups in self.units.items()
            for group in groups
            if choose and len(groups) == 1 and readers[group] == 1 and self.parameters[name].dim() == 2
        }
        self.norms = _norms(model, discovery, self.keep, reads) if method == "least-squares" else {}
        self.weights: dict[str, Tensor] = {}
        self.errors: dict[str, tuple[float, float]] = {}
        self.shifts: dict[str, Tensor] = {}
        self.sequential = True
        self.done: set[tuple[str, int | None]] = set()
        wanted = {name: parameter for name, parameter in model.named_parameters() if name in self.units}
        self.products = WeightProducts(wanted, self._look)

    def plan(self) -> Plan:
        """The plan with the units that stay, for good."""
        options = replace(self.given.options, choose="score")
        return replace(
            self.given,
            options=options,
            groups=tuple(replace(g, keep=self.keep.get(g.name, g.keep)) for g in self.given.groups),
        )

    def scaled(self, path: str) -> Callable[..., Tensor | None]:
        """A hook on a norm: what it gives when it only sees the features that stay, scaled to what it gave."""
        kept = torch.tensor(self.keep[self.norms[path]] or ())

        def hook(norm: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor | None:
            if not args or not isinstance(output, Tensor) or args[0].shape != output.shape:
                return None
            at = kept.to(output.device)
            smaller = _narrowed(norm, at)
            name = f"{path}.weight"
            before = self.weights.get(name)
            if before is None:
                weight = _scaled_weight(smaller, args[0][..., at], output[..., at])
                if weight is None:
                    return None
                self.weights[name] = norm.get_parameter("weight").detach().clone()
                self.weights[name][at] = weight
            if not self.sequential:
                return None
            smaller.weight = nn.Parameter(self.weights[name][at])
            return output.index_copy(-1, at, smaller(args[0][..., at]))

        return hook

    def _look(self, product: WeightProduct) -> Tensor | None:
        weight = self.parameters[product.weight]
        halves = self._halves(product.inputs)
        new = self.weights.setdefault(product.weight, weight.detach().clone())
        bias = None if product.bias is None else self.name_of.get(id(product.bias))
        for index, inputs in product.parts:
            if (product.weight, index) not in self.done and len(inputs):
                self.done.add((product.weight, index))
                dense, cut = inputs.chunk(2) if halves else (None, inputs)
                self._refit(product, index, _inputs(cut, dense), bias)
        new_bias = product.bias if bias is None else self.weights.get(bias, product.bias)
        if not self.sequential:
            return None
        if not halves:
            return product.compute(product.inputs, new, new_bias)
        dense, cut = product.inputs.chunk(2)
        return torch.cat([product.compute(dense, weight, product.bias), product.compute(cut, new, new_bias)])

    def _halves(self, inputs: Tensor) -> bool:
        """Whether the first half of the inputs is the dense model's; of what a router picks, none can be told."""
        rows = (2 * self.samples, 2 * self.samples * self.length)
        return self.target == "dense" and inputs.shape[0] in rows and inputs.dim() > 1

    def _refit(self, product: WeightProduct, index: int | None, inputs: _Inputs, bias: str | None) -> None:
        """Decide which columns of a matrix stay, fit them, and write them into the new weight."""
        name = product.weight
        new = self.weights[name] if index is None else self.weights[name][index]
        along = product.dim - (self.weights[name].dim() - new.dim())
        columns = new if along == 1 else new.t()
        old = columns.double().clone()
        kept = torch.ones(columns.shape[1], dtype=torch.bool)
        for group, unit_of in self.units[name].items():
            if group in self.chosen:
                gone, _ = removal_costs(old, inputs.gram_CC / inputs.tokens, unit_of, keep=self.kept[group])
                self.keep[group] = tuple(unit for unit in range(int(unit_of.max()) + 1) if unit not in set(gone))
            stays = torch.zeros(int(unit_of.max()) + 1, dtype=torch.bool)
            stays[list(self.keep[group] or ())] = True
            kept &= (unit_of < 0) | stays[unit_of.clamp_min(0)]
        if kept.all():
            return
        at = torch.nonzero(kept).flatten().to(columns.device)
        fitted = torch.zeros_like(old)
        fitted[:, at] = old[:, at]
        about = inputs.gram_CC.float()  # enough for what is only told
        left_out = output_error(fitted - old, about)
        shift = None
        if self.method == "least-squares":
            fitted[:, at], shift = _fit(old, inputs, at, self.damping, with_bias=bias is not None)
        elif self.method == "bias":
            mean = inputs.mean_C if inputs.dense_mean_C is None else inputs.dense_mean_C
            shift = old @ mean - fitted @ inputs.mean_C
        columns.copy_(fitted)
        if shift is not None and bias is None:
            self.shifts[name if index is None else f"{name}[{index}]"], shift = shift, None
        elif bias is not None and shift is not None:
            before = self.weights.get(bias, self.parameters[bias].detach())
            self.weights[bias] = (before.double() + shift).to(before.dtype)
        self._note(name, index, inputs, about, old, fitted, shift, left_out)

    def _note(
        self,
        name: str,
        index: int | None,
        inputs: _Inputs,
        gram_CC: Tensor,
        old: Tensor,
        fitted: Tensor,
        shift: Tensor | None,
        left_out: float,
    ) -> None:
        """Note the errors, against what the matrix gives for all of its inputs."""
        change = fitted - old
        repaired = output_error(change, gram_CC)
        if shift is not None:
            mean_error = change @ inputs.mean_C
            repaired += inputs.tokens * float((2 * mean_error * shift + shift.square()).sum())
        whole = max(output_error(old, gram_CC), 1e-30)
        self.errors[name if index is None else f"{name}[{index}]"] = (left_out / whole, repaired / whole)


def _norms(
    model: PreTrainedModel, discovery: Discovery, keep: Mapping[str, Any], reads: Mapping[str, int]
) -> dict[str, str]:
    """Modules with a weight for each unit of a group that is cut, and no matrix: path -> group."""
    found = {}
    for weight in discovery.weights:
        path, _, last = weight.name.rpartition(".")
        groups = [v.name for v in variables_in(weight.dims[0])] if len(weight.dims) == 1 else []
        if last == "weight" and weight.parameter and len(groups) == 1 and groups[0] in keep:
            module = model.get_submodule(path)
            group = discovery.group(groups[0])
            if group.normed and group.units == weight.shape[0] and not any(p.dim() > 1 for p in module.parameters()):
                found[path] = group.name
    return found


def _narrowed(norm: nn.Module, at: Tensor) -> Any:
    """The norm over some of its features."""
    smaller: Any = copy.deepcopy(norm)
    smaller._forward_hooks.clear()
    for name, parameter in norm.named_parameters(recurse=False):
        setattr(smaller, name, nn.Parameter(parameter.detach()[at], requires_grad=False))
    if isinstance(getattr(norm, "normalized_shape", None), tuple):
        smaller.normalized_shape = (len(at),)
    return smaller


def _scaled_weight(smaller: Any, x: Tensor, wanted: Tensor) -> Tensor | None:
    """The weight with which the smaller norm's output comes nearest to what is wanted; None where none scales it.

    Some norms multiply by their weight, some by one more than it.
    """
    weight = smaller.weight.detach()
    bias = getattr(smaller, "bias", None)
    shift = torch.zeros_like(weight) if bias is None else bias.detach()
    given, target = (smaller(x) - shift).double(), (wanted - shift).double()
    scale = float((given * target).sum() / given.square().sum().clamp_min(1e-30))
    few, expected = x[:1], given[:1] * scale
    near = 1e-2 * float(expected.abs().max())
    candidates: tuple[Tensor, ...] = (weight * scale, (weight + 1) * scale - 1)
    for scaled in candidates:
        smaller.weight = nn.Parameter(scaled)
        if torch.allclose((smaller(few) - shift).double(), expected, rtol=1e-2, atol=near):
            return scaled
    return None


def _inputs(x: Tensor, dense: Tensor | None) -> _Inputs:
    features = x.shape[-1]
    total = torch.zeros(features, features, dtype=torch.float64, device=x.device)
    cross = None if dense is None else torch.zeros_like(total)
    add_gram(total, x)
    if cross is not None and dense is not None:
        add_cross_gram(cross, dense, x)
    return _Inputs(
        total,
        x.mean(0, dtype=torch.float64),
        len(x),
        cross,
        None if dense is None else dense.mean(0, dtype=torch.float64),
    )


def _fit(
    old_RC: Tensor, inputs: _Inputs, at: Tensor, damping: float, *, with_bias: bool
) -> tuple[Tensor, Tensor | None]:
    """The columns that stay, and the change of the bias that goes with them, where there is one."""
    gram_CC, cross = inputs.gram_CC, inputs.cross_CC
    if not with_bias:
        return least_squares(old_RC, gram_CC, at, cross_CC=cross, damping=damping), None
    mean, n = inputs.mean_C, inputs.tokens
    target = mean if inputs.dense_mean_C is None else inputs.dense_mean_C
    about_mean = gram_CC - n * torch.outer(mean, mean)
    if cross is not None:
        cross = cross - n * torch.outer(target, mean)
    fitted = least_squares(old_RC, about_mean, at, cross_CC=cross, damping=damping)
    return fitted, old_RC @ target - fitted @ mean[at]
