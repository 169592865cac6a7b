"""Calibration tokens -> what the scores need to know of the model on them, a few numbers for each row and column.

A salience gives every element of a weight a number, from the evidence there is: the weight W, its gradient G and the
mean square A of the samples' own gradients, or what is known of the features that the weight reads. Of these numbers
only sums are kept: for every dimension of the weight, the sum over all the others. Whatever a score does with units,
axes and reductions can be told from them. What takes more than single elements (Gram matrices, whole layers) is
reduced to units at once.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from secateur import processes
from secateur.errors import CheckpointError, ScoreError
from secateur.files import METADATA_KEY, read_tensors, write_tensors
from secateur.progress import Progress
from secateur.scoring.activations import reading_dims, stream_inputs
from secateur.scoring.gradients import stream_gradients, stream_masks
from secateur.scoring.gram import add_gram
from secateur.scoring.obs import removal_costs, unit_costs
from secateur.scoring.probe import Remembered, entrance, two_samples

SPARE_SHARE = 0.2  # of the bytes of the weights: activations that may be remembered instead of computed again
LEAST_MEMORY = 3 * 2**29  # bytes of weights and activations that are never too much
AT_ONCE = 2**20  # elements whose saliences are formed at once


class Evidence:
    """What a salience may look at: some rows of a weight and what is known of them, float32, to be left unchanged.

    Raises `ScoreError` where the score has not said that it needs what it looks at.

    >>> Evidence(torch.ones(2, 3)).gradient
    Traceback (most recent call last):
    secateur.errors.ScoreError: the score looks at the gradient, which it does not ask for: needs="gradient"
    """

    def __init__(
        self,
        weight: Tensor,
        *,
        gradient: Tensor | None = None,
        squared: Tensor | None = None,
        moments: Moments | None = None,
    ) -> None:
        self.weight = weight
        self._gradient, self._squared, self._moments = gradient, squared, moments

    def part(self, rows: slice) -> Evidence:
        """The evidence on some of these rows."""
        return Evidence(
            self.weight[rows],
            gradient=None if self._gradient is None else self._gradient[rows],
            squared=None if self._squared is None else self._squared[rows],
            moments=None if self._moments is None else self._moments.rows(rows),
        )

    @property
    def gradient(self) -> Tensor:
        """G: of the mean loss over the samples, shaped like the weight."""
        if self._gradient is None:
            raise ScoreError('the score looks at the gradient, which it does not ask for: needs="gradient"')
        return self._gradient

    @property
    def squared(self) -> Tensor:
        """A: the mean over the samples of the square of each one's own gradient, shaped like the weight."""
        if self._squared is None:
            raise ScoreError('the score looks at squared gradients, which it does not ask for: needs="second order"')
        return self._squared

    @property
    def inputs(self) -> Moments:
        """Of the features that the weight reads, over all calibration tokens."""
        if self._moments is None:
            raise ScoreError('the score looks at the inputs, which it does not ask for: needs="inputs"')
        return self._moments

    @cached_property
    def first(self) -> Tensor:
        """W G, the first-order term of the loss's change."""
        return self.weight * self.gradient

    @cached_property
    def second(self) -> Tensor:
        """W A W, twice the second-order term."""
        return self.weight * self.squared * self.weight


@dataclass(frozen=True, slots=True)
class Moments:
    """Of each feature over tokens, float32, shaped so that they multiply with the weight that reads it."""

    norm: Tensor  # the square root of the sum of squares
    mean: Tensor
    variance: Tensor  # unbiased
    tokens: Tensor  # how many: fewer for experts that do not get all

    def rows(self, rows: slice) -> Moments:
        """Those that go with these rows of the weight."""
        parts = (x[rows] if x.shape[0] > 1 else x for x in (self.norm, self.mean, self.variance, self.tokens))
        return Moments(*parts)


Salience = Callable[[Evidence], Tensor]  # shaped like the weight
# A weight and its dimension that is read -> group -> the unit of each index (-1 for none).
UnitsOf = Callable[[str, int], Mapping[str, Tensor]]


@dataclass(frozen=True, slots=True)
class Statistics:
    """Sums of saliences over the elements of every weight, and what they were computed on."""

    sums: Mapping[str, Mapping[str, tuple[Tensor, ...]]]  # salience -> weight -> for each dimension, float32
    units: Mapping[str, Mapping[str, Mapping[str, Tensor]]] = field(default_factory=dict)  # score -> group -> axis
    # Weight -> dimension -> samples x size, float32: derivatives of the mean loss by masks over what the weight reads.
    masks: Mapping[str, Mapping[int, Tensor]] = field(default_factory=dict)
    reads: Mapping[str, int] = field(default_factory=dict)  # weight -> its dimension that meets the inputs
    loss: float | None = None  # mean cross-entropy in nats per token
    samples: int = 0
    tokens: int = 0  # scored tokens
    calibration: str | None = None  # hash of the tokens

    def joined(self, other: Statistics) -> Statistics:
        """These and those of another pass over the same tokens; the other's where both have them.

        >>> one = Statistics({"l1": {"v": (torch.ones(1),)}})
        >>> two = Statistics({"l1": {"w": (torch.ones(2),)}}, loss=2.0)
        >>> sorted(one.joined(two).sums["l1"]), one.joined(two).loss
        (['v', 'w'], 2.0)
        """
        return Statistics(
            sums={key: {**self.sums.get(key, {}), **other.sums.get(key, {})} for key in {**self.sums, **other.sums}},
            units={
                key: {
                    group: {**self.units.get(key, {}).get(group, {}), **other.units.get(key, {}).get(group, {})}
                    for group in {**self.units.get(key, {}), **other.units.get(key, {})}
                }
                for key in {**self.units, **other.units}
            },
            masks={**self.masks, **other.masks},
            reads={**self.reads, **other.reads},
            loss=self.loss if other.loss is None else other.loss,
            samples=other.samples or self.samples,
            tokens=other.tokens or self.tokens,
            calibration=other.calibration or self.calibration,
        )


def weight_statistics(weights: Mapping[str, Tensor], saliences: Mapping[str, Salience]) -> Statistics:
    """Sums of saliences that the weights alone decide. Raises `ScoreError` for a weight that is not finite.

    >>> weights = {"w": torch.tensor([[1.0, -2.0], [3.0, 4.0]])}
    >>> found = weight_statistics(weights, {"l1": lambda seen: seen.weight.abs()})
    >>> [sums.tolist() for sums in found.sums["l1"]["w"]]
    [[3.0, 7.0], [4.0, 6.0]]
    """
    gathered = _Gathered(saliences)
    for name, weight in weights.items():
        for rows in _rows(weight):
            gathered.add(name, rows, Evidence(weight[rows].float()), weight.shape)
    return Statistics(gathered.finished())


def gradient_statistics(
    model: PreTrainedModel,
    windows: Tensor,
    saliences: Mapping[str, Salience],
    *,
    second_order: bool = False,
    wanted: Sequence[str] | None = None,
    layers: Sequence[str] = (),
    journal: Path | None = None,
    progress: Progress | None = None,
) -> Statistics:
    """Sums of saliences of the gradients of the mean cross-entropy over the windows (int64, samples x length).

    With `second_order`, the saliences get the mean over the samples of the square of each one's gradient (LLM-Pruner,
    arXiv 2305.11627, equation 5: the Hessian's diagonal by the Fisher information). The gradient of the batched mean
    is the mean of the samples' gradients, since all windows are equally long. `layers` names the modules that may be
    computed again to save memory; `wanted` the parameters (by default, all). `journal` is a folder in which every
    layer is kept when it is done: the same call goes on from there. Raises `ScoreError` for a loss or a gradient that
    is not finite, and where all gradients are zero.

    >>> from transformers import AutoConfig, AutoModelForCausalLM
    >>> config = AutoConfig.for_model("opt", hidden_size=12, num_attention_heads=2, ffn_dim=24, num_hidden_layers=1)
    >>> model = AutoModelForCausalLM.from_config(config)
    >>> found = gradient_statistics(model, torch.arange(20).reshape(2, 10), {"first": lambda seen: seen.first.abs()})
    >>> found.samples, found.tokens, [len(sums) for sums in found.sums["first"]["model.decoder.layers.0.fc1.weight"]]
    (2, 18, [24, 12])
    """
    samples, length = windows.shape
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    gathered = _Gathered(saliences)
    kept = None if journal is None else _Journal(journal, _HeldSums(gathered))
    some_gradient = kept is not None and bool(kept.finished)

    def visit(name: str, rows: slice, weight: Tensor, gradient: Tensor, squared: Tensor | None) -> None:
        nonlocal some_gradient
        some_gradient = some_gradient or bool(gradient.any())
        gathered.add(name, rows, Evidence(weight, gradient=gradient, squared=squared), shapes[name])

    loss = stream_gradients(
        model,
        windows,
        visit,
        wanted=wanted,
        second_order=second_order,
        recomputed=layers,
        memory=_spare_memory(model),
        journal=kept,
        progress=progress,
    )
    if not some_gradient:
        raise ScoreError(
            f"all gradients are zero (loss {loss:.4g}): nothing can be told from them. Check the weights and the "
            "calibration text, or use dtype float32 or bfloat16"
        )
    return Statistics(gathered.finished(), loss=loss, samples=samples, tokens=samples * (length - 1))


def activation_statistics(
    model: PreTrainedModel,
    windows: Tensor,
    saliences: Mapping[str, Salience],
    *,
    wanted: Collection[str] | None = None,
    gram_units: UnitsOf | None = None,
    gram_score: str = "obs",
    layers: Mapping[str, int] | None = None,
    progress: Progress | None = None,
) -> Statistics:
    """What one forward pass over the windows (int64, samples x length) tells, without gradients.

    Sums of saliences of what the weights wanted (by default, all) read. With `gram_units`, the score `obs` of its
    units, from the Gram matrices X'X of the inputs: what it costs to leave out a unit's inputs when all other weights
    that read the same features make up for it (optimal brain surgeon, for whole units: ZipLM, arXiv 2302.04089), per
    token, in squares of the output; as `gram_score` says, of each unit alone (`obs`) or of one after the other, with
    those before it gone (`obs_greedy`). With `layers` (path -> number), the score `block_influence` of each: 1 - the
    mean cosine of a token's hidden states before and after it (ShortGPT, arXiv 2403.03853).

    Raises `ScoreError` for inputs that are not finite.

    >>> from transformers import AutoConfig, AutoModelForCausalLM
    >>> config = AutoConfig.for_model("opt", hidden_size=12, num_attention_heads=2, ffn_dim=24, num_hidden_layers=1)
    >>> model, windows = AutoModelForCausalLM.from_config(config), torch.arange(20).reshape(2, 10)
    >>> found = activation_statistics(model, windows, {"wanda": lambda seen: seen.weight.abs() * seen.inputs.norm})
    >>> found.reads["model.decoder.layers.0.fc1.weight"], found.samples
    (1, 2)
    """
    weights = {
        name: p.detach() for name, p in model.named_parameters() if p.dim() > 1 and (wanted is None or name in wanted)
    }
    gathered = _GatheredInputs(model, weights, _Gathered(saliences), gram_units, layers or {})
    gathered.gram_score = gram_score
    mine = processes.share_of(windows)
    stream_inputs(model, mine, gathered, wanted=weights, layers=[*(layers or {})], progress=progress)
    gathered.finish_all()
    return Statistics(
        sums=gathered.gathered.finished(),
        units=gathered.units,
        reads=gathered.reads_along,
        samples=len(windows),
        tokens=windows.numel(),
    )


def mask_statistics(
    model: PreTrainedModel,
    windows: Tensor,
    *,
    wanted: Mapping[str, Collection[int]] | None = None,
    layers: Sequence[str] = (),
    journal: Path | None = None,
    progress: Progress | None = None,
) -> Statistics:
    """Derivatives by masks over what every weight reads, sample by sample, from one forward and backward pass.

    Windows are int64, samples x length. `wanted` names weights and dimensions of theirs: those that read along one of
    them are looked at (by default, all). `layers` and `journal` are as in `gradient_statistics`, which see for the
    errors.

    >>> from transformers import AutoConfig, AutoModelForCausalLM
    >>> config = AutoConfig.for_model("opt", hidden_size=12, num_attention_heads=2, ffn_dim=24, num_hidden_layers=1)
    >>> found = mask_statistics(AutoModelForCausalLM.from_config(config), torch.arange(20).reshape(2, 10))
    >>> found.masks["model.decoder.layers.0.fc2.weight"][1].shape
    torch.Size([2, 24])
    """
    samples, length = windows.shape
    reads = reading_dims(model, two_samples(windows))
    if wanted is not None:
        wanted = {
            name: dims
            for name, dims in wanted.items()
            if name not in reads or reads[name] in dims or model.get_parameter(name).dim() > 2  # stacked: experts, too
        }
    masks: dict[str, dict[int, Tensor]] = defaultdict(dict)
    kept = None if journal is None else _Journal(journal, _HeldMasks(masks))

    def visit(name: str, dim: int, derivatives: Tensor) -> None:
        if not torch.isfinite(derivatives).all():
            raise ScoreError(
                f"the gradient of what {name} reads has values that are NaN or Inf; check the weights, or use dtype "
                "float32 or bfloat16"
            )
        if dim == reads.get(name, dim) or (dim == 0 and model.get_parameter(name).dim() > 2):
            masks[name][dim] = derivatives.cpu()

    memory = _spare_memory(model)
    # Samples have nothing to do with each other here, so as many go together as can be remembered.
    parts = [windows] if kept is not None else _parts_of(model, windows, layers, memory)
    loss = 0.0
    for number, part in enumerate(parts):
        before = {name: dict(dims) for name, dims in masks.items()}
        if len(parts) > 1:
            masks.clear()
        loss += (
            len(part)
            / samples
            * stream_masks(
                model,
                part,
                visit,
                wanted=None if wanted is None else sorted(wanted),
                recomputed=layers,
                memory=memory,
                journal=kept,
                progress=None if progress is None else _part_of(progress, number, len(parts)),
            )
        )
        if len(parts) > 1:
            _append(masks, before, done=sum(map(len, parts[:number])), new=len(part), samples=samples)
    if not any(bool(each.any()) for by_dim in masks.values() for each in by_dim.values()):
        raise ScoreError(
            f"all gradients are zero (loss {loss:.4g}): nothing can be told from them. Check the weights and the "
            "calibration text, or use dtype float32 or bfloat16"
        )
    return Statistics({}, masks=dict(masks), reads=reads, loss=loss, samples=samples, tokens=samples * (length - 1))


@torch.no_grad()
def layer_loss_statistics(
    model: PreTrainedModel, windows: Tensor, layers: Mapping[str, int], *, progress: Progress | None = None
) -> Statistics:
    """How much the loss on the windows grows when each layer (path -> number) is left out: nats per token.

    One forward pass for every layer, in which its output is its input.

    >>> from transformers import AutoConfig, AutoModelForCausalLM
    >>> config = AutoConfig.for_model("opt", hidden_size=12, num_attention_heads=2, ffn_dim=24, num_hidden_layers=2)
    >>> model, layers = AutoModelForCausalLM.from_config(config), {f"model.decoder.layers.{i}": i for i in range(2)}
    >>> found = layer_loss_statistics(model, torch.arange(20).reshape(2, 10), layers)
    >>> found.units["layer_loss"]["layers"]["hidden"].shape
    torch.Size([2])
    """
    mine = processes.share_of(windows).to(entrance(model))

    def left_out(_: object, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> object:
        before = args[0] if args else kwargs.get("hidden_states")
        return (before, *output[1:]) if isinstance(output, tuple) else before

    def loss() -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for window in mine:
            logits = model(input_ids=window[None], use_cache=False).logits[0, :-1]
            total += functional.cross_entropy(logits.float(), window[1:].to(logits.device), reduction="sum").cpu()
        processes.add_up(total)
        return total / (len(windows) * (windows.shape[1] - 1))

    dense = loss()
    costs = torch.zeros(max(layers.values(), default=-1) + 1)
    for done, (path, number) in enumerate(layers.items(), 1):
        handle = model.get_submodule(path).register_forward_hook(left_out, with_kwargs=True)
        try:
            costs[number] += float(loss() - dense)
        finally:
            handle.remove()
        if progress is not None:
            progress(done, len(layers))
    if not torch.isfinite(costs).all():
        raise ScoreError("the loss without a layer is NaN or Inf: check the weights, or use dtype float32 or bfloat16")
    return Statistics(
        {},
        units={"layer_loss": {"layers": {"hidden": costs}}},
        loss=float(dense),
        samples=len(windows),
        tokens=windows.numel() - len(windows),
    )


def _parts_of(model: PreTrainedModel, windows: Tensor, layers: Sequence[str], memory: int) -> list[Tensor]:
    """The windows, as many at a time as the layers remember within the memory; at least one for each process."""
    remembered = Remembered(layers, windows)
    with torch.enable_grad(), remembered.progress_bars(model):
        model(input_ids=two_samples(windows).to(entrance(model)), use_cache=False)
    each = max(1, sum(remembered.bytes.values()) // len(windows))
    at_once = -processes.largest(-max(1, int(memory // each))) * processes.count()
    return list(windows.tensor_split(max(1, len(windows) // at_once)))


def _part_of(progress: Progress, number: int, parts: int) -> Progress:
    """Progress of one of several passes, as progress of all."""
    return lambda done, total: progress(number * total + done, parts * total)


def _append(
    masks: dict[str, dict[int, Tensor]],
    before: Mapping[str, Mapping[int, Tensor]],
    *,
    done: int,
    new: int,
    samples: int,
) -> None:
    """Put the derivatives of some more samples, which are of their own mean loss, after those of the ones before.

    A weight that some samples do not use (an expert) has no derivatives by theirs.
    """
    for name in {**before, **masks}:
        dims = {**before.get(name, {}), **masks[name]}
        for dim, like in dims.items():
            old = before.get(name, {}).get(dim, like.new_zeros(done, like.shape[1]))
            more = masks[name].get(dim, like.new_zeros(new, like.shape[1]))
            masks[name][dim] = torch.cat([old, more * (new / samples)])


def gram_matrices(model: PreTrainedModel, windows: Tensor, names: Collection[str]) -> dict[str, Tensor]:
    """X'X of what each of these weights reads, over all tokens of the windows, float64; for a stack, one per matrix.

    >>> from transformers import AutoConfig, AutoModelForCausalLM
    >>> config = AutoConfig.for_model("opt", hidden_size=12, num_attention_heads=2, ffn_dim=24, num_hidden_layers=1)
    >>> model, name = AutoModelForCausalLM.from_config(config), "model.decoder.layers.0.fc2.weight"
    >>> gram_matrices(model, torch.arange(20).reshape(2, 10), [name])[name].shape
    torch.Size([1, 24, 24])
    """
    weights = {name: parameter.detach() for name, parameter in model.named_parameters() if name in names}
    gathered = _GatheredInputs(model, weights, _Gathered({}), lambda name, dim: {}, {}, keep_grams=True)
    stream_inputs(model, processes.share_of(windows), gathered, wanted=weights)
    gathered.finish_all()
    return gathered.grams


# --- gathering --------------------------------------------------------------------------------------------------------


class _Gathered:
    """Sums as they come, a few rows of a weight at a time."""

    def __init__(self, saliences: Mapping[str, Salience]) -> None:
        self.saliences = saliences
        self.sums: dict[str, dict[str, tuple[Tensor, ...]]] = {name: {} for name in saliences}

    def add(self, name: str, rows: slice, evidence: Evidence, shape: Sequence[int]) -> None:
        """Add what these rows give, a few at a time, so that what is made of them stays in the cache."""
        count = len(evidence.weight)
        at_once = max(1, AT_ONCE * count // max(1, evidence.weight.numel()))
        for first in range(0, count, at_once):
            part = slice(first, min(first + at_once, count))
            self._add(name, slice(rows.start + part.start, rows.start + part.stop), evidence.part(part), shape)

    def _add(self, name: str, rows: slice, evidence: Evidence, shape: Sequence[int]) -> None:
        for key, salience in self.saliences.items():
            s = salience(evidence)
            if s.shape != evidence.weight.shape:
                raise ScoreError(
                    f"the score {key} gives {tuple(s.shape)} for {tuple(evidence.weight.shape)} elements of the weight "
                    f"{name}; expected one number for each"
                )
            if name not in self.sums[key]:
                self.sums[key][name] = tuple(torch.zeros(size, device=s.device) for size in shape)
            for dim, total in enumerate(self.sums[key][name]):
                others = [other for other in range(s.dim()) if other != dim]
                part = s.sum(others) if others else s
                if dim == 0:
                    if not torch.isfinite(part).all():
                        raise ScoreError(_not_finite(name, evidence, key))
                    total[rows] += part
                else:
                    total += part

    def finished(self) -> dict[str, dict[str, tuple[Tensor, ...]]]:
        """The sums on the CPU."""
        return {
            key: {name: tuple(sums.cpu() for sums in dims) for name, dims in by_weight.items()}
            for key, by_weight in self.sums.items()
        }


def _not_finite(name: str, evidence: Evidence, salience: str) -> str:
    advice = "check the weights, or use dtype float32 or bfloat16"
    known = {"weight": evidence.weight, "gradient of the weight": evidence._gradient}
    if evidence._moments is not None:
        known["norm of the inputs of the weight"] = evidence._moments.norm
    for what, values in known.items():
        if values is not None and not torch.isfinite(values).all():
            bad = int((~torch.isfinite(values)).sum())
            return f"the {what} {name} has {bad} values that are NaN or Inf; {advice}"
    return f"{salience} of the weight {name} is too large for float32; {advice}"


def _rows(weight: Tensor) -> Iterator[slice]:
    if weight.dim() == 0:
        return
    at_once = max(1, 2**24 * weight.shape[0] // max(1, weight.numel()))
    for first in range(0, weight.shape[0], at_once):
        yield slice(first, min(first + at_once, weight.shape[0]))


def _spare_memory(model: PreTrainedModel) -> int:
    """Bytes of activations that may be remembered instead of computed again."""
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return max(int(weights * SPARE_SHARE), LEAST_MEMORY - weights)


class _Features:
    """Running moments of the features that a weight reads; one row for each matrix of a stack."""

    def __init__(self, matrices: int, features: int, device: torch.device, *, grams: bool) -> None:
        self.tokens = torch.zeros(matrices, 1, dtype=torch.float64, device=device)
        self.mean = torch.zeros(matrices, features, dtype=torch.float64, device=device)
        self.deviations = torch.zeros_like(self.mean)  # sums of squared differences from the mean
        self.gram = self.mean.new_zeros(matrices, features, features) if grams else None

    def add(self, index: int, x: Tensor) -> None:
        """Take in inputs, tokens x features (Chan, Golub, LeVeque: updating formulae for sample variances)."""
        if not len(x):
            return
        x = x.float()
        variance, mean = torch.var_mean(x, 0, correction=0)
        n, before = len(x), float(self.tokens[index])
        change = mean.double() - self.mean[index]
        self.tokens[index] += n
        self.mean[index] += change * (n / (before + n))
        self.deviations[index] += variance.double() * n + change.square() * (before * n / (before + n))
        if self.gram is not None:
            add_gram(self.gram[index], x)

    def join(self) -> None:
        """Put together what all processes have."""
        if processes.count() == 1:
            return
        tokens, total = self.tokens.clone(), self.tokens * self.mean
        processes.add_up(tokens, total)
        mean = total / tokens.clamp_min(1)
        self.deviations += self.tokens * (self.mean - mean).square()
        processes.add_up(self.deviations, *([] if self.gram is None else [self.gram]))
        self.tokens, self.mean = tokens, mean

    def moments(self, weight: Tensor, dim: int) -> Moments:
        """Shaped for a weight that reads the features along `dim`."""
        shape = [1] * weight.dim()
        shape[dim] = weight.shape[dim]
        if len(self.mean) > 1 or weight.dim() > 2:
            shape[0] = len(self.mean)
        squares = self.deviations + self.tokens * self.mean.square()
        return Moments(
            norm=squares.sqrt().float().reshape(shape),
            mean=self.mean.float().reshape(shape),
            variance=(self.deviations / (self.tokens - 1).clamp_min(1)).float().reshape(shape),
            tokens=self.tokens.float().reshape([len(self.tokens), *[1] * (weight.dim() - 1)]),
        )


class _GatheredInputs:
    """Looks at a forward pass and reduces what it sees to sums and units, layer by layer."""

    def __init__(
        self,
        model: PreTrainedModel,
        weights: Mapping[str, Tensor],
        gathered: _Gathered,
        gram_units: UnitsOf | None,
        layers: Mapping[str, int],
        *,
        keep_grams: bool = False,
    ) -> None:
        self.weights, self.gathered, self.gram_units, self.layers = weights, gathered, gram_units, layers
        self.keep_grams, self.gram_score = keep_grams, "obs"
        names: dict[int, int] = defaultdict(int)
        for _, parameter in model.named_parameters(remove_duplicate=False):
            names[id(parameter)] += 1
        self.shared = {name for name, parameter in model.named_parameters() if names[id(parameter)] > 1}
        self.features: dict[str, _Features] = {}
        self.reads_along: dict[str, int] = {}
        self.units: dict[str, dict[str, dict[str, Tensor]]] = defaultdict(lambda: defaultdict(dict))
        self.grams: dict[str, Tensor] = {}
        self.cosines = torch.zeros(2, max(layers.values(), default=-1) + 1, dtype=torch.float64)  # sum, tokens

    def reads(self, weight: str, dim: int, index: int | None, inputs: Tensor) -> None:
        """Take in what a weight reads."""
        if weight not in self.features:
            matrices = 1 if index is None else self.weights[weight].shape[0]
            grams = self.gram_units is not None
            self.features[weight] = _Features(matrices, inputs.shape[-1], inputs.device, grams=grams)
            self.reads_along[weight] = dim
        self.features[weight].add(index or 0, inputs)

    def passed(self, layer: str, before: Tensor, after: Tensor) -> None:
        """Take in what a layer does, and finish its weights."""
        if layer in self.layers:
            cosine = functional.cosine_similarity(before.float(), after.float().to(before.device), dim=-1)
            self.cosines[0, self.layers[layer]] += cosine.double().sum().cpu()
            self.cosines[1, self.layers[layer]] += cosine.numel()
        self._finish(name for name in self.weights if name.startswith(f"{layer}.") and name not in self.shared)

    def finish_all(self) -> None:
        """Finish what is left."""
        self._finish(self.weights)
        if self.layers:
            processes.add_up(self.cosines)
            total, tokens = self.cosines
            if tokens.all():
                self.units["block_influence"]["layers"]["hidden"] = (1 - total / tokens).float()

    def _finish(self, names: Collection[str] | Iterator[str]) -> None:
        for name in sorted(names):
            features = self.features.pop(name, None)
            weight = self.weights[name]
            if processes.count() > 1:
                # A process may have seen none of what an expert reads.
                matrices = processes.largest(0 if features is None else len(features.mean))
                dim = processes.largest(self.reads_along.get(name, -1))
                if features is None and matrices:
                    features = _Features(matrices, weight.shape[dim], weight.device, grams=self.gram_units is not None)
                    self.reads_along[name] = dim
            if features is not None:
                features.join()
                self._reduce(name, weight, features)

    def _reduce(self, name: str, weight: Tensor, features: _Features) -> None:
        dim = self.reads_along[name]
        moments = features.moments(weight, dim)
        for rows in _rows(weight):
            evidence = Evidence(weight[rows].float(), moments=moments.rows(rows))
            self.gathered.add(name, rows, evidence, weight.shape)
        if self.gram_units is None or features.gram is None:
            return
        if self.keep_grams:
            self.grams[name] = features.gram.cpu()
        for group, unit_of in self.gram_units(name, dim).items():
            costs = _surgeon(weight, features, dim, unit_of, greedy=self.gram_score == "obs_greedy")
            self.units[self.gram_score][group][name] = costs.float().cpu()


def _surgeon(weight: Tensor, features: _Features, dim: int, unit_of: Tensor, *, greedy: bool) -> Tensor:
    """The optimal brain surgeon's cost of each unit over all matrices of a weight, per token."""
    assert features.gram is not None
    total = torch.zeros(int(unit_of.max()) + 1, dtype=torch.float64, device=weight.device)
    for i, gram in enumerate(features.gram):
        matrix = weight[i] if weight.dim() > 2 else weight
        along = dim - (weight.dim() - matrix.dim())
        tokens = float(features.tokens[i])
        if tokens:  # else an expert that no token was sent to
            columns = matrix if along == 1 else matrix.t()
            if greedy:
                order, costs = removal_costs(columns, gram / tokens, unit_of)
                total[order] += costs.cummax(0).values.to(total.device)  # whoever goes later is worth no less
            else:
                total += unit_costs(columns, gram / tokens, unit_of)
    return total


class _Held(Protocol):
    """What a pass has found of every weight that it is done with."""

    def by_weight(self) -> dict[str, dict[str, Tensor]]:
        """Weight -> tensors by name."""

    def take(self, weight: str, tensors: Mapping[str, Tensor]) -> None:
        """Take back what was found before."""


class _HeldSums:
    """Sums of saliences."""

    def __init__(self, gathered: _Gathered) -> None:
        self.sums = gathered.sums

    def by_weight(self) -> dict[str, dict[str, Tensor]]:
        """Weight -> tensors by name."""
        found: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for salience, by_weight in self.sums.items():
            for name, dims in by_weight.items():
                found[name] |= {f"{salience}/{dim}": sums for dim, sums in enumerate(dims)}
        return found

    def take(self, weight: str, tensors: Mapping[str, Tensor]) -> None:
        """Take back what was found before."""
        dims: dict[str, dict[int, Tensor]] = defaultdict(dict)
        for key, tensor in tensors.items():
            salience, _, dim = key.rpartition("/")
            dims[salience][int(dim)] = tensor
        for salience, found in dims.items():
            self.sums[salience][weight] = tuple(found[i] for i in range(len(found)))


class _HeldMasks:
    """Derivatives by masks."""

    def __init__(self, masks: dict[str, dict[int, Tensor]]) -> None:
        self.masks = masks

    def by_weight(self) -> dict[str, dict[str, Tensor]]:
        """Weight -> tensors by name."""
        return {name: {str(dim): found for dim, found in dims.items()} for name, dims in self.masks.items()}

    def take(self, weight: str, tensors: Mapping[str, Tensor]) -> None:
        """Take back what was found before."""
        self.masks[weight] = {int(dim): found for dim, found in tensors.items()}


class _Journal:
    """Layers of a pass that are done, one file each: what goes on to the next, and what was found of its weights."""

    def __init__(self, folder: Path, held: _Held) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.held = folder, held
        for path in sorted(folder.glob("*.safetensors")):
            found: dict[str, dict[str, Tensor]] = defaultdict(dict)
            try:
                with safe_open(path, framework="pt") as file:
                    for key in list(file.keys()):
                        if key.startswith("found/"):
                            _, name, what = key.split("/", 2)
                            found[name][what] = file.get_tensor(key).clone()
            except (OSError, SafetensorError):  # damaged: that layer is computed again
                path.unlink()
                continue
            for name, tensors in found.items():
                held.take(name, tensors)
        self.finished: set[str] = set(held.by_weight())

    def read(self, key: str) -> tuple[list[Tensor], str] | None:
        """The tensors written under a key, and what was said of them."""
        path = self._path(key)
        if not path.exists():
            return None
        with safe_open(path, framework="pt") as file:
            about: str = json.loads((file.metadata() or {})[METADATA_KEY])
            count = sum(name.startswith("given/") for name in list(file.keys()))
            return [file.get_tensor(f"given/{i}") for i in range(count)], about

    def write(self, key: str, tensors: Sequence[Tensor], about: str) -> None:
        """Write the tensors and all sums that are new, whole or not at all."""
        found = self.held.by_weight()
        new = {
            f"found/{name}/{what}": tensor.contiguous()
            for name, tensors in found.items()
            if name not in self.finished
            for what, tensor in tensors.items()
        }
        given = {f"given/{i}": tensor.detach().contiguous() for i, tensor in enumerate(tensors)}
        write_tensors(self._path(key), {**new, **given}, about)
        self.finished |= set(found)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key.replace('/', '-')}.safetensors"


# --- files ----------------------------------------------------------------------------------------------------------


def write_statistics(path: Path, statistics: Statistics, *, about: str = "") -> None:
    """Write statistics as one safetensors file, whole or not at all; `read_statistics` reads it back.

    `about` says what they are of, for whoever reads them.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = Path(folder) / "statistics.safetensors"
    ...     write_statistics(file, Statistics({"l1": {"w": (torch.ones(2), torch.zeros(3))}}, loss=1.5))
    ...     found = read_statistics(file)
    >>> found.loss, [sums.tolist() for sums in found.sums["l1"]["w"]]
    (1.5, [[1.0, 1.0], [0.0, 0.0, 0.0]])
    """
    tensors = {
        f"sums/{key}/{dim}/{name}": sums.contiguous()
        for key, by_weight in statistics.sums.items()
        for name, dims in by_weight.items()
        for dim, sums in enumerate(dims)
    }
    tensors |= {
        f"units/{key}/{group}/{axis}": values.contiguous()
        for key, by_group in statistics.units.items()
        for group, by_axis in by_group.items()
        for axis, values in by_axis.items()
    }
    tensors |= {
        f"masks/{dim}/{name}": derivatives.contiguous()
        for name, by_dim in statistics.masks.items()
        for dim, derivatives in by_dim.items()
    }
    told = {
        "about": about,
        "reads": dict(statistics.reads),
        "loss": statistics.loss,
        "samples": statistics.samples,
        "tokens": statistics.tokens,
        "calibration": statistics.calibration,
    }
    write_tensors(path, tensors, told)


def read_statistics(path: Path, *, about: str = "") -> Statistics:
    """Read what `write_statistics` wrote.

    Raises `ScoreError` when the file is missing, not of statistics, or of others than `about` says.
    """
    try:
        tensors, told = read_tensors(path)
        if told["about"] != about:
            raise ScoreError(f"{path} holds statistics of another model or calibration")
        found: dict[str, dict[str, dict[int, Tensor]]] = defaultdict(lambda: defaultdict(dict))
        units: dict[str, dict[str, dict[str, Tensor]]] = defaultdict(lambda: defaultdict(dict))
        masks: dict[str, dict[int, Tensor]] = defaultdict(dict)
        for key, tensor in tensors.items():
            if key.startswith("masks/"):
                _, along, name = key.split("/", 2)
                masks[name][int(along)] = tensor
                continue
            what, score, at, name = key.split("/", 3)
            if what == "sums":
                found[score][name][int(at)] = tensor
            else:
                units[score][at][name] = tensor
        sums = {
            score: {name: tuple(dims[i] for i in range(len(dims))) for name, dims in by_weight.items()}
            for score, by_weight in found.items()
        }
        return Statistics(
            sums=sums,
            units={score: {group: dict(axes) for group, axes in groups.items()} for score, groups in units.items()},
            masks=dict(masks),
            reads=dict(told["reads"]),
            loss=told["loss"],
            samples=told["samples"],
            tokens=told["tokens"],
            calibration=told["calibration"],
        )
    except (CheckpointError, KeyError, ValueError, TypeError) as error:
        raise ScoreError(f"{path} holds no statistics ({error}); expected what write_statistics writes") from error
