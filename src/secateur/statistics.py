"""Calibration tokens -> what the scores need to know of the model on them, a few numbers for each row and column.

A salience gives every element of a weight a number, from the weight W, its gradient G and the mean square A of the
samples' own gradients. Of these numbers only sums are kept: for every dimension of the weight, the sum over all the
others. Whatever a score does with units, axes and reductions can be told from them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from secateur.errors import ScoreError
from secateur.gradients import Progress as Progress
from secateur.gradients import stream_gradients

# W, G, A (None where it is not asked for), all float32 -> s, shaped like W.
Salience = Callable[[Tensor, Tensor | None, Tensor | None], Tensor]
SPARE_SHARE = 0.2  # of the bytes of the weights: activations that may be remembered instead of computed again
LEAST_MEMORY = 3 * 2**29  # bytes of weights and activations that are never too much


@dataclass(frozen=True, slots=True)
class Statistics:
    """Sums of saliences over the elements of every weight, and what they were computed on."""

    sums: Mapping[str, Mapping[str, tuple[Tensor, ...]]]  # salience -> weight -> for each dimension, float32
    loss: float | None = None  # mean cross-entropy in nats per token
    samples: int = 0
    tokens: int = 0  # scored tokens


def weight_statistics(weights: Mapping[str, Tensor], saliences: Mapping[str, Salience]) -> Statistics:
    """Sums of saliences that the weights alone decide. Raises `ScoreError` for a weight that is not finite.

    >>> found = weight_statistics({"w": torch.tensor([[1.0, -2.0], [3.0, 4.0]])}, {"l1": lambda w, g, a: w.abs()})
    >>> [sums.tolist() for sums in found.sums["l1"]["w"]]
    [[3.0, 7.0], [4.0, 6.0]]
    """
    gathered = _Gathered(saliences)
    for name, weight in weights.items():
        for rows in _rows(weight):
            gathered.visit(name, rows, weight[rows].float(), None, None, shape=weight.shape)
    return Statistics(gathered.finished())


def gradient_statistics(
    model: PreTrainedModel,
    windows: Tensor,
    saliences: Mapping[str, Salience],
    *,
    second_order: bool = False,
    wanted: Sequence[str] | None = None,
    layers: Sequence[str] = (),
    progress: Progress | None = None,
) -> Statistics:
    """Sums of saliences of the gradients of the mean cross-entropy over the windows (int64, samples x length).

    With `second_order`, the saliences get the mean over the samples of the square of each one's gradient (LLM-Pruner,
    arXiv 2305.11627, equation 5: the Hessian's diagonal by the Fisher information). The gradient of the batched mean
    is the mean of the samples' gradients, since all windows are equally long. `layers` names the modules that may be
    computed again to save memory; `wanted` the parameters (by default, all). Raises `ScoreError` for a loss or a
    gradient that is not finite, and where all gradients are zero.

    >>> from transformers import AutoConfig, AutoModelForCausalLM
    >>> config = AutoConfig.for_model("opt", hidden_size=12, num_attention_heads=2, ffn_dim=24, num_hidden_layers=1)
    >>> model = AutoModelForCausalLM.from_config(config)
    >>> found = gradient_statistics(model, torch.arange(20).reshape(2, 10), {"first": lambda w, g, a: (w * g).abs()})
    >>> found.samples, found.tokens, [len(sums) for sums in found.sums["first"]["model.decoder.layers.0.fc1.weight"]]
    (2, 18, [24, 12])
    """
    samples, length = windows.shape
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    gathered = _Gathered(saliences)
    some_gradient = False

    def visit(name: str, rows: slice, weight: Tensor, gradient: Tensor, squared: Tensor | None) -> None:
        nonlocal some_gradient
        some_gradient = some_gradient or bool(gradient.any())
        gathered.visit(name, rows, weight, gradient, squared, shape=shapes[name])

    loss = stream_gradients(
        model,
        windows,
        visit,
        wanted=wanted,
        second_order=second_order,
        recomputed=layers,
        memory=_spare_memory(model),
        progress=progress,
    )
    if not some_gradient:
        raise ScoreError(
            f"all gradients are zero (loss {loss:.4g}): nothing can be told from them. Check the weights and the "
            "calibration text, or use dtype float32 or bfloat16"
        )
    return Statistics(gathered.finished(), loss, samples, samples * (length - 1))


class _Gathered:
    """Sums as they come, a few rows of a weight at a time."""

    def __init__(self, saliences: Mapping[str, Salience]) -> None:
        self.saliences = saliences
        self.sums: dict[str, dict[str, tuple[Tensor, ...]]] = {name: {} for name in saliences}

    def visit(
        self,
        name: str,
        rows: slice,
        weight: Tensor,
        gradient: Tensor | None,
        squared: Tensor | None,
        *,
        shape: Sequence[int],
    ) -> None:
        """Add what these rows give."""
        for key, salience in self.saliences.items():
            s = salience(weight, gradient, squared)
            if name not in self.sums[key]:
                self.sums[key][name] = tuple(torch.zeros(size, device=s.device) for size in shape)
            for dim, total in enumerate(self.sums[key][name]):
                others = [other for other in range(s.dim()) if other != dim]
                part = s.sum(others) if others else s
                if not torch.isfinite(part).all():
                    raise ScoreError(_not_finite(name, weight, gradient, key))
                if dim == 0:
                    total[rows] += part
                else:
                    total += part

    def finished(self) -> dict[str, dict[str, tuple[Tensor, ...]]]:
        """The sums on the CPU."""
        return {
            key: {name: tuple(sums.cpu() for sums in dims) for name, dims in by_weight.items()}
            for key, by_weight in self.sums.items()
        }


def _not_finite(name: str, weight: Tensor, gradient: Tensor | None, salience: str) -> str:
    advice = "check the weights, or use dtype float32 or bfloat16"
    for what, values in (("weight", weight), ("gradient of the weight", gradient)):
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


# --- files ----------------------------------------------------------------------------------------------------------


def write_statistics(path: Path, statistics: Statistics) -> None:
    """Write statistics as one safetensors file, whole or not at all; `read_statistics` reads it back.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = Path(folder) / "statistics.safetensors"
    ...     write_statistics(file, Statistics({"l1": {"w": (torch.ones(2), torch.zeros(3))}}, loss=1.5))
    ...     found = read_statistics(file)
    >>> found.loss, [sums.tolist() for sums in found.sums["l1"]["w"]]
    (1.5, [[1.0, 1.0], [0.0, 0.0, 0.0]])
    """
    tensors = {
        f"{key}/{dim}/{name}": sums.contiguous()
        for key, by_weight in statistics.sums.items()
        for name, dims in by_weight.items()
        for dim, sums in enumerate(dims)
    }
    about = {
        "loss": statistics.loss,
        "samples": statistics.samples,
        "tokens": statistics.tokens,
    }
    temporary = path.with_name(f".{path.name}.partial")
    save_file(tensors, temporary, metadata={"secateur": json.dumps(about)})
    temporary.replace(path)


def read_statistics(path: Path) -> Statistics:
    """Read what `write_statistics` wrote. Raises `ScoreError` when the file is missing or not of statistics."""
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["secateur"])
            found: dict[str, dict[str, dict[int, Tensor]]] = {}
            for key in sorted(file.keys()):
                salience, dim, name = key.split("/", 2)
                found.setdefault(salience, {}).setdefault(name, {})[int(dim)] = file.get_tensor(key)
            sums = {
                salience: {name: tuple(dims[i] for i in range(len(dims))) for name, dims in by_weight.items()}
                for salience, by_weight in found.items()
            }
            return Statistics(sums, about["loss"], about["samples"], about["tokens"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ScoreError(f"{path} holds no statistics ({error}); expected what write_statistics writes") from error
