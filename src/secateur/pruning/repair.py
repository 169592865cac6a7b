"""Model, plan and calibration windows -> the weights that make up for what a plan cuts.

Every unit of a group is read by matrices: the MLP's last, the attention's output, each expert's own. When units go, the
outputs of those matrices change, and the columns that stay can be fitted anew (`closed_form`). This happens in one
forward pass of the dense model, where each product with such a matrix is seen as it is computed: the pass goes on with
the repaired matrix, so later ones are fitted to what the repaired part before them gives. Which units stay can be
chosen there as well, by optimal brain surgeon on the same inputs. Where the activations of a layer over all windows
take too much memory, the layer runs on a few windows at a time: once for each matrix that is fitted, up to that matrix,
and once more for its output.

Names of tensors end in their axes: R rows (outputs), C columns (inputs), K columns that are kept.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel

from secateur.discovery.algebra import Expression, kept_along
from secateur.discovery.groups import Discovery
from secateur.discovery.weight_names import without_numbers
from secateur.errors import PlanError, check_known
from secateur.models.streaming import streamed_layers
from secateur.planning.plan import Plan
from secateur.progress import Progress, return_freed_memory
from secateur.pruning.closed_form import (
    REPAIRS,
    CutMatrix,
    InputSums,
    MatrixInputs,
    Repair,
    damping_for,
    inputs_of,
    leave_out,
)
from secateur.pruning.experts import fit_experts_in_place
from secateur.pruning.norms import narrowed, norms_over, scaled_weight
from secateur.pruning.prune import new_tensor, prune
from secateur.scoring.collect_experts import expert_modules
from secateur.scoring.obs import gram_dtype, removal_costs
from secateur.scoring.passes.forward import pass_to_hidden, plain_products, probe_windows, replaced_forward
from secateur.scoring.passes.layers import LayerCall, joined, layers_in_parts
from secateur.scoring.passes.products import WeightProduct, WeightProducts, input_dims
from secateur.scoring.unit_scores import units_reached

logger = logging.getLogger(__name__)

LARGE_INPUTS = 2**26  # bytes of a matrix's inputs, from which on freed memory goes back to the system
SUMS_AT_ONCE = 2**30  # bytes of the Gram matrices of experts for which a layer is run once


@dataclass(frozen=True, slots=True)
class Repaired:
    """What a repair decided and computed."""

    plan: Plan
    """The plan, with the units that were chosen."""
    weights: Mapping[str, Tensor]
    """New weights by name, as large as the dense ones and zero where units go."""


@torch.no_grad()
def repair(
    model: PreTrainedModel,
    plan: Plan,
    discovery: Discovery,
    windows: Tensor,
    *,
    method: str = "least-squares",
    room: Path | None = None,
    progress: Progress | None = None,
) -> Repaired:
    """Fit the matrices that read the units which go; the model is left as it is, and `prune` takes the weights.

    Windows are int64, samples x length; all go through a layer before the next one runs. Where the plan has spare units
    and a single matrix reads their group, it is decided here which go: as many as planned. Groups that no matrix reads
    are left as planned. Where experts go, those that stay are fitted to the dense experts in a second pass, of the
    smaller model. New weights and that model are held in memory, or in files in the folder `room`. Raises `PlanError`
    for an unknown method, and `DiskError` when the room is too small.

    >>> from secateur.planning.options import CutOptions
    >>> from secateur.planning.plan import PlannedGroup
    >>> half = PlannedGroup("layers.0.mlp", "mlp", 0, units=24, kept=12, keep=tuple(range(12)))
    >>> by_hand = Plan("opt", CutOptions(ratio=0.2), (half,), {}, {})
    >>> from secateur.discovery.discover import discover
    >>> from transformers import AutoConfig, AutoModelForCausalLM
    >>> config = AutoConfig.for_model("opt", hidden_size=12, num_attention_heads=2, ffn_dim=24, num_hidden_layers=1)
    >>> windows = torch.arange(60).reshape(3, 20)
    >>> repaired = repair(AutoModelForCausalLM.from_config(config), by_hand, discover(config), windows)
    >>> list(repaired.weights), repaired.weights["model.decoder.layers.0.fc2.weight"].shape
    (['model.decoder.layers.0.fc2.weight', 'model.decoder.layers.0.fc2.bias'], torch.Size([12, 24]))
    """
    check_known(PlanError, "repair", method, REPAIRS)
    # 1. The matrices that read the units which go.
    reads = input_dims(model, probe_windows(windows))
    pass_ = _RepairPass(model, plan, discovery, reads, REPAIRS[method], room)
    # 2. One forward pass of all windows, in which each of them is fitted.
    if pass_.unit_of and (pass_.chosen or REPAIRS[method].fit is not leave_out):
        pass_.run(windows, [*discovery.layer_paths], progress)
    found = Repaired(pass_.decided(), pass_.weights)
    # 3. A pass of the smaller model, in which its experts are fitted to the dense model's.
    return _with_experts(model, found, discovery, windows, room, progress) if REPAIRS[method].fits_experts else found


def _with_experts(
    model: PreTrainedModel,
    found: Repaired,
    discovery: Discovery,
    windows: Tensor,
    room: Path | None,
    progress: Progress | None,
) -> Repaired:
    """The repair with the experts that stay fitted as well, where some go."""
    fewer = {group.name for group in found.plan.groups if group.kind == "expert" and group.kept < group.units}
    experts = expert_modules(model, discovery, [group for group in discovery.groups if group.name in fewer])
    if not experts:
        return found
    if streamed_layers(model) is not None:
        logger.warning("the experts that stay are not fitted: layers are brought to the GPU one by one")
        return found
    with TemporaryDirectory(dir=room) as folder:
        where = None if room is None else Path(folder)
        smaller = prune(model, found.plan, discovery=discovery, weights=found.weights, room=where)
        better = fit_experts_in_place(model, smaller, [*experts], windows, progress=progress)
        new = {name: parameter for name, parameter in smaller.named_parameters() if name in better}
        keep = {group.name: group.keep or () for group in found.plan.groups if group.kind != "layer"}
        dims = {weight.name: weight.dims for weight in discovery.weights if weight.name in new}
        fitted = {name: _as_large_as_dense(new[name].detach(), dims[name], keep, room) for name in new}
    return Repaired(found.plan, {**found.weights, **fitted})


def _as_large_as_dense(
    weight: Tensor, dims: Sequence[Expression], keep: Mapping[str, Sequence[int]], room: Path | None
) -> Tensor:
    """A cut weight where its entries were in the dense one, which is zero elsewhere; in a file in the room."""
    for dim, expression in enumerate(dims):
        if len(kept := kept_along(expression, keep)) < expression.size:
            shape = [expression.size if other == dim else size for other, size in enumerate(weight.shape)]
            at = torch.tensor(kept, device=weight.device, dtype=torch.long)
            weight = new_tensor(shape, weight, room).zero_().index_copy_(dim, at, weight)
    return weight


@dataclass(frozen=True, slots=True)
class _Matrix:
    """A weight that reads units which go, or one matrix of a stack of weights."""

    weight: str
    columns_RC: Tensor
    """A view of the new weight."""
    bias: str | None


def _features_like(output: Tensor, at: Tensor, given: Tensor) -> Tensor:
    """Of what a norm is given, the features that stay: of its inputs, and of a gate as large as they are."""
    return given[..., at] if given.shape == output.shape else given


_Address = tuple[str, int | None]  # a weight, and which matrix of a stack


class _Collected(Exception):
    """All that was to be seen of some windows has been seen."""


class _RepairPass:
    """A forward pass that looks at the products with every matrix that reads units which go, and replaces the matrix.

    Stacked experts are computed one by one; what no token reaches stays as it is.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        plan: Plan,
        discovery: Discovery,
        reads: Mapping[str, int],
        method: Repair,
        room: Path | None,
    ) -> None:
        self.model, self.plan, self.method, self.room = model, plan, method, room
        self.keep = {g.name: g.keep for g in plan.groups if g.kind != "layer" and g.kept < g.units}
        self.spare = {g.name: g.spare for g in plan.groups}
        self.parameters = dict(model.named_parameters())
        self.name_of = {id(parameter): name for name, parameter in self.parameters.items()}
        self.unit_of = {  # weight -> group -> the unit of every column that it reads
            weight.name: groups
            for weight in discovery.weights
            if weight.name in reads and weight.parameter and not weight.embedding  # tables may be looked up as well
            if (groups := units_reached(weight.dims[reads[weight.name]], self.keep))
        }
        readers = Counter(group for groups in self.unit_of.values() for group in groups)
        self.chosen = {  # groups whose units are chosen here
            group
            for name, groups in self.unit_of.items()
            for group in groups
            if self.spare[group] and len(groups) == 1 and readers[group] == 1 and self.parameters[name].dim() == 2
        }
        self.norms = norms_over(model, discovery, self.keep) if method.scales_norms else {}
        self.windows = 1
        self.weights: dict[str, Tensor] = {}
        self.done: set[_Address] = set()
        self.some: tuple[int, int] | None = None  # the first window and how many, of those that a layer runs on
        self.sums: dict[_Address, InputSums] = {}  # of the matrices that a layer is run for
        self.matrices: dict[_Address, _Matrix] = {}
        self.alike: Counter[str] = Counter()  # names without numbers -> how many weights of the layer have it

    def run(self, windows: Tensor, layers: list[str], progress: Progress | None) -> None:
        """Pass all windows through the model."""
        self.windows = len(windows)
        modules = dict(self.model.named_modules())
        passed = itertools.count(1)

        def count(*_: Any) -> None:
            if streamed_layers(self.model) is not None:  # the next layer needs the room
                self.weights = {name: weight.cpu() for name, weight in self.weights.items()}
            if progress is not None:
                progress(next(passed), len(layers))

        with ExitStack() as stack:
            stack.enter_context(plain_products(self.model))
            run = pass_to_hidden(self.model, windows)
            layers = [path for path in layers if path in modules]
            for path, parts in ({} if self.norms else layers_in_parts(self.model, windows, layers)).items():
                forward = self._forward_in_parts(path, modules[path].forward, parts)
                stack.enter_context(replaced_forward(modules[path], forward))
            for path in layers:
                stack.callback(modules[path].register_forward_hook(count).remove)
            for path in self.norms:
                hook = modules[path].register_forward_hook(self._scale_norm(path), with_kwargs=True)
                stack.callback(hook.remove)
            wanted = {name: self.parameters[name] for name in self.unit_of}
            stack.enter_context(WeightProducts(wanted, self._replace))
            run()

    def decided(self) -> Plan:
        """The plan with the units that stay; it leaves no choice to a repetition."""
        return replace(
            self.plan,
            options=replace(self.plan.options, choose="score"),
            groups=tuple(replace(g, keep=self.keep.get(g.name, g.keep), spare=None) for g in self.plan.groups),
        )

    def _scale_norm(self, path: str) -> Callable[..., Tensor | None]:
        """A hook on a norm: its output when it only sees the features that stay, scaled to what it was."""
        kept = torch.tensor(self.keep[self.norms[path]] or ())

        def hook(norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor | None:
            if not args or not isinstance(output, Tensor) or args[0].shape != output.shape:
                return None
            at = kept.to(output.device)
            smaller = narrowed(norm, at)
            args, kwargs = pytree.tree_map_only(Tensor, partial(_features_like, output, at), (args, kwargs))
            name = f"{path}.weight"
            if name not in self.weights:
                weight = scaled_weight(smaller, output[..., at], *args, **kwargs)
                if weight is None:
                    return None
                self.weights[name] = norm.get_parameter("weight").detach().clone()
                self.weights[name][at] = weight
            smaller.weight = nn.Parameter(self.weights[name][at])
            return output.index_copy(-1, at, smaller(*args, **kwargs))

        return hook

    def _copied(self, weight: Tensor) -> Tensor:
        """A weight to be changed; in a file in the room, where there is one."""
        return new_tensor(weight.shape, weight, self.room).copy_(weight)

    def _forward_in_parts(
        self, path: str, forward: Callable[..., Any], parts: tuple[Tensor, ...]
    ) -> Callable[..., Any]:
        """The forward of a layer that runs on some windows at a time, until each of its matrices has been fitted."""
        alike = Counter(without_numbers(name) for name in self.unit_of if name.startswith(f"{path}."))

        def run(*args: Any, **kwargs: Any) -> Any:
            call = LayerCall.of(forward, args, kwargs, self.windows)
            self.alike = alike
            while True:
                outputs = []
                for part in parts:
                    self.some = int(part[0]), len(part)
                    try:
                        outputs.append(call.run(part))
                    except _Collected:
                        continue
                    finally:
                        self.some = None
                if not self.sums:
                    return joined(outputs, parts)
                for at, sums in self.sums.items():
                    self._refit(self.matrices[at], sums.inputs())
                self.done |= self.sums.keys()
                self.sums, self.matrices = {}, {}
                return_freed_memory()

        return run

    def _replace(self, product: WeightProduct) -> Tensor:
        """The product with the repaired weight, which is fitted when its inputs are first seen."""
        new = self.weights.get(product.weight)
        if new is None:
            new = self.weights[product.weight] = self._copied(self.parameters[product.weight].detach())
        bias = None if product.bias is None else self.name_of.get(id(product.bias))
        for index, inputs in product.parts:
            at = product.weight, index
            if at in self.done or not len(inputs):
                continue
            matrix = new if index is None else new[index]
            along = product.dim - (new.dim() - matrix.dim())
            found = _Matrix(product.weight, matrix if along == 1 else matrix.t(), bias)
            if self.some is not None:
                self._collect(at, found, inputs, *self.some)
                continue
            self.done.add(at)
            self._refit(found, inputs_of(inputs, self.windows))
            if inputs.nbytes >= LARGE_INPUTS:  # else what attention has freed stays beside what the MLP needs
                return_freed_memory()
        new_bias = product.bias if bias is None else self.weights.get(bias, product.bias)
        return product.compute(product.inputs, new, new_bias)

    def _collect(self, at: _Address, matrix: _Matrix, inputs: Tensor, first: int, count: int) -> None:
        """Add what a matrix reads of some windows; raises `_Collected` when another matrix waits for that."""
        kind = without_numbers(matrix.weight)
        if any(without_numbers(weight) != kind for weight, _ in self.sums):
            raise _Collected
        held = 2 * gram_dtype(inputs).itemsize * inputs.shape[1] ** 2
        if at not in self.sums and self.sums and (len(self.sums) + 1) * held > SUMS_AT_ONCE:
            return  # another time
        self.matrices[at] = matrix
        self.sums.setdefault(at, InputSums(self.windows)).add(inputs, first=first, count=count)
        if self.parameters[matrix.weight].dim() == 2 and self.alike[kind] == 1:  # else other experts are to come
            raise _Collected

    def _refit(self, matrix: _Matrix, inputs: MatrixInputs) -> None:
        """Decide which columns of a matrix stay, fit them, and write them into the new weight."""
        # 1. As planned: how strongly its fit is damped.
        cut = CutMatrix(matrix.columns_RC.double().clone(), inputs, self._kept(matrix), matrix.bias is not None)
        columns = cut.dense_RC.shape[1]
        if self.method.fits_columns and len(cut.kept_K) < columns:
            damping, inputs = damping_for(cut), replace(inputs, held_out=None)  # which is as large as all
            cut = replace(cut, damping=damping, inputs=inputs)
        # 2. Which columns stay, where that is decided here, and their fit.
        for group in self.unit_of[matrix.weight].keys() & self.chosen:
            self.keep[group] = self._chosen(group, cut, self.unit_of[matrix.weight][group])
        cut = replace(cut, kept_K=self._kept(matrix))
        if len(cut.kept_K) == columns:
            return
        fit = self.method.fit(cut)
        matrix.columns_RC.zero_()
        matrix.columns_RC[:, cut.kept_K] = fit.columns_RK.to(matrix.columns_RC.dtype)
        if matrix.bias is not None and fit.shift_R is not None:
            before_R = self.weights.get(matrix.bias, self.parameters[matrix.bias].detach())
            self.weights[matrix.bias] = (before_R.double() + fit.shift_R).to(before_R.dtype)

    def _kept(self, matrix: _Matrix) -> Tensor:
        """The columns of a matrix that stay, int64, ascending."""
        kept_C = torch.ones(matrix.columns_RC.shape[1], dtype=torch.bool)
        for group, unit_of_C in self.unit_of[matrix.weight].items():
            stays_U = torch.zeros(int(unit_of_C.max()) + 1, dtype=torch.bool)
            stays_U[list(self.keep[group] or ())] = True
            kept_C &= (unit_of_C < 0) | stays_U[unit_of_C.clamp_min(0)]
        return torch.nonzero(kept_C).flatten().to(matrix.columns_RC.device)

    def _chosen(self, group: str, cut: CutMatrix, unit_of_C: Tensor) -> tuple[int, ...]:
        """The units that stay when, of the cheapest, those go that the other columns best make up for.

        Where the others make up for nothing, it is the cheapest that go.
        """
        keep, spare, units = set(self.keep[group] or ()), self.spare[group] or (), int(unit_of_C.max()) + 1
        if math.isinf(cut.damping):
            return tuple(sorted(keep))
        cheapest = sorted({*range(units)} - keep | {*spare})
        number_U = torch.full((units,), -1)
        number_U[cheapest] = torch.arange(len(cheapest))
        number_C = number_U[unit_of_C.clamp_min(0)].where(unit_of_C >= 0, -1)
        gone, _ = removal_costs(cut.dense_RC, cut.inputs.gram_CC, number_C, keep=len(spare), damping=cut.damping)
        return tuple(sorted({*range(units)} - {cheapest[number] for number in gone}))
