"""What layers of a dense model give, for the layers of the cut one to learn; which belong together, a plan says.

Tensor names end in their axes: M place that is learned, L layer that is compared, D channel.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.discovery.counting import count_parameters
from secateur.discovery.groups import Discovery
from secateur.errors import ModelError, TrainingError
from secateur.planning.plan import Plan

COMPARED = 4  # layers, at equal distances; the last is always one of them
BYTES = 2  # of a channel on the disk, in bfloat16
LEAST_VARIANCE = 1e-6  # of a state that is nearly constant: a distance is not divided by less


@dataclass(frozen=True, slots=True)
class Counterparts:
    """Layers of the cut model and those of the dense one that they were, by path, and the channels that are left."""

    layers: tuple[str, ...]  # of the cut model
    dense_layers: tuple[str, ...]  # of the dense model, as many
    channels: tuple[int, ...] | None  # of the dense model's hidden width; None: all
    width: int  # channels that are compared

    @property
    def key(self) -> str:
        """What of the dense model is compared, as a short hash."""
        return hashlib.sha256(repr((self.dense_layers, self.channels)).encode()).hexdigest()[:12]

    def bytes_for(self, places: int) -> int:
        """What the dense model's states of so many places take on the disk."""
        return places * len(self.layers) * self.width * BYTES


def counterparts(plan: Plan, dense: Discovery, cut: Discovery, *, teacher: str, width: int) -> Counterparts:
    """Find the layers to compare, by the plan that cut one model from the other; `width` is the dense model's.

    Raises `ModelError` where the plan is of another model than the teacher, and where a model has no layers that can
    be told apart.

    >>> from transformers import AutoConfig
    >>> from secateur.discovery.discover import discover
    >>> from secateur.planning.plan import CutOptions, PlannedGroup
    >>> sizes = {"hidden_size": 12, "num_attention_heads": 2, "ffn_dim": 24, "word_embed_proj_dim": 12}
    >>> dense, cut = (discover(AutoConfig.for_model("opt", num_hidden_layers=n, **sizes)) for n in (3, 2))
    >>> dropped = PlannedGroup("layers", "layer", None, 3, 2, (0, 2))
    >>> counts = {"dense": count_parameters(dense)}
    >>> plan = Plan("dense", CutOptions(ratio=0.3, axes=("layers",)), (dropped,), counts, {})
    >>> counterparts(plan, dense, cut, teacher="dense", width=12).dense_layers
    ('model.decoder.layers.0', 'model.decoder.layers.2')
    """
    if plan.parameters.get("dense") != count_parameters(dense):
        raise ModelError(
            f"the plan of the folder is of {plan.model}, a model with {plan.parameters.get('dense')} parameters, and "
            f"the teacher {teacher!r} has {count_parameters(dense)}: which of its hidden states belong to which layer "
            "is not known. Expected the model that was cut as the teacher; or leave out --hidden-states-weight"
        )
    if not dense.layer_lists or dense.layer_lists[0] not in cut.layer_lists:
        raise ModelError(
            f"the teacher {teacher!r} has no list of layers whose hidden states could be compared; leave out "
            "--hidden-states-weight"
        )
    groups = {group.kind: group for group in plan.groups if group.kind in ("layer", "hidden")}
    kept = tuple(range(dense.depth)) if "layer" not in groups else groups["layer"].keep or ()
    channels = groups["hidden"].keep if "hidden" in groups else None
    count = min(COMPARED, len(kept))
    chosen = [round((i + 1) * len(kept) / count) - 1 for i in range(count)]
    path = dense.layer_lists[0]
    return Counterparts(
        tuple(f"{path}.{layer}" for layer in chosen),
        tuple(f"{path}.{kept[layer]}" for layer in chosen),
        channels,
        width if channels is None else len(channels),
    )


@contextmanager
def gathered(model: nn.Module, paths: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Collect what these modules give, batch x tokens x channels, while the block runs the model once.

    >>> model = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
    >>> with gathered(model, ["0"]) as states:
    ...     _ = model(torch.zeros(1, 4, 3))
    >>> {path: tuple(state.shape) for path, state in states.items()}
    {'0': (1, 4, 2)}
    """
    found: dict[str, Tensor] = {}

    def keep(path: str, output: Any) -> None:
        found.setdefault(path, output[0] if isinstance(output, (tuple, list)) else output)

    handles = [
        model.get_submodule(path).register_forward_hook(lambda _, __, output, path=path: keep(path, output))
        for path in paths
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def states_at(states: dict[str, Tensor], paths: Sequence[str], places: Tensor) -> Tensor:
    """The states of these layers at the places of a mask, batch x tokens: states_MLD.

    >>> states = {"a": torch.zeros(2, 3, 4), "b": torch.ones(2, 3, 4)}
    >>> states_at(states, ["a", "b"], torch.tensor([[True, False, False], [True, True, False]])).shape
    torch.Size([3, 2, 4])
    """
    return torch.stack([states[path][places.to(states[path].device)] for path in paths], dim=1)


def states_loss(student_MLD: Tensor, teacher_MLD: Tensor) -> Tensor:
    r"""Sum over the places how far the student's states are from the teacher's; float32, without a unit.

    At a place it is the mean over the layers of

        sum_D (s - t)^2 / sum_D (t - mean_D t)^2,

    the mean squared error of hidden states (TinyBERT, arXiv 1909.10351, equation 8; Minitron, arXiv 2407.14679, section
    3) as a share of the variance of the teacher's state over its channels. There is no matrix between the two, because
    the student's channels are the teacher's that were kept. The variance is that of the place: a few tokens, the first
    above all, have states a hundred times as large as others, and would else be all that is learned. Where the student
    gives the mean of the teacher's state in all channels, it is 1.

    >>> teacher = torch.tensor([[[1.0, -1.0, 3.0, 1.0]]])
    >>> float(states_loss(teacher, teacher)), float(states_loss(torch.ones(1, 1, 4), teacher))
    (0.0, 1.0)
    """
    if student_MLD.shape != teacher_MLD.shape:
        raise TrainingError(
            f"the model gives hidden states of {list(student_MLD.shape)} (places, layers, channels), and those of the "
            f"teacher that the plan leaves are {list(teacher_MLD.shape)}; leave out --hidden-states-weight"
        )
    student, teacher = student_MLD.float(), teacher_MLD.to(student_MLD.device).float()
    variance_ML = (teacher - teacher.mean(dim=-1, keepdim=True)).square().sum(dim=-1).clamp(min=LEAST_VARIANCE)
    return ((student - teacher).square().sum(dim=-1) / variance_ML).mean(dim=1).sum()
