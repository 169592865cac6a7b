"""Plan -> which layers of the dense and the pruned model match; and the loss between their hidden states.

Tensor names end in their axes: B batch, T token, D hidden, M position with a label, L compared layer.
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

COMPARED_LAYERS = 4  # at equal distances; the last layer is always one of them
ITEM_BYTES = 2  # of a channel on the disk, in bfloat16
LEAST_VARIANCE = 1e-6  # a distance is divided by no less, where a state is nearly constant


@dataclass(frozen=True, slots=True)
class MatchedLayers:
    """Layers of the pruned model, the dense layers that they were, and the dense channels that are left."""

    pruned: tuple[str, ...]  # paths of modules
    dense: tuple[str, ...]  # as many
    channels: tuple[int, ...] | None  # indices into the dense hidden size; None: all
    width: int  # number of channels that are compared

    @property
    def key(self) -> str:
        """Identify what is compared of the dense model, as a short hash."""
        return hashlib.sha256(repr((self.dense, self.channels)).encode()).hexdigest()[:12]

    def bytes_for(self, positions: int) -> int:
        """Return the bytes on the disk of the dense model's states at so many positions."""
        return positions * len(self.pruned) * self.width * ITEM_BYTES


def match_layers(plan: Plan, dense: Discovery, pruned: Discovery, *, teacher: str, width: int) -> MatchedLayers:
    """Match layers by the plan that cut one model from the other; `width` is the dense hidden size.

    Raises `ModelError` where the plan is of another model than the teacher, and where a model has no list of layers.

    >>> from transformers import AutoConfig
    >>> from secateur.discovery.discover import discover
    >>> from secateur.planning.plan import CutOptions, PlannedGroup
    >>> sizes = {"hidden_size": 12, "num_attention_heads": 2, "ffn_dim": 24, "word_embed_proj_dim": 12}
    >>> dense, pruned = (discover(AutoConfig.for_model("opt", num_hidden_layers=n, **sizes)) for n in (3, 2))
    >>> dropped = PlannedGroup("layers", "layer", None, 3, 2, (0, 2))
    >>> counts = {"dense": count_parameters(dense)}
    >>> plan = Plan("dense", CutOptions(ratio=0.3, axes=("layers",)), (dropped,), counts, {})
    >>> match_layers(plan, dense, pruned, teacher="dense", width=12).dense
    ('model.decoder.layers.0', 'model.decoder.layers.2')
    """
    if plan.parameters.get("dense") != count_parameters(dense):
        raise ModelError(
            f"the plan of the folder is of {plan.model}, a model with {plan.parameters.get('dense')} parameters, and "
            f"the teacher {teacher!r} has {count_parameters(dense)}: which of its hidden states belong to which layer "
            "is not known. Expected the model that was cut as the teacher; or leave out --hidden-states-weight"
        )
    if not dense.layer_lists or dense.layer_lists[0] not in pruned.layer_lists:
        raise ModelError(
            f"the teacher {teacher!r} has no list of layers whose hidden states could be compared; leave out "
            "--hidden-states-weight"
        )
    groups = {group.kind: group for group in plan.groups if group.kind in ("layer", "hidden")}
    kept = tuple(range(dense.depth)) if "layer" not in groups else groups["layer"].keep or ()
    channels = groups["hidden"].keep if "hidden" in groups else None
    count = min(COMPARED_LAYERS, len(kept))
    chosen = [round((i + 1) * len(kept) / count) - 1 for i in range(count)]
    path = dense.layer_lists[0]
    return MatchedLayers(
        tuple(f"{path}.{layer}" for layer in chosen),
        tuple(f"{path}.{kept[layer]}" for layer in chosen),
        channels,
        width if channels is None else len(channels),
    )


@contextmanager
def record_outputs(model: nn.Module, paths: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Record the outputs of these modules (B x T x D) while the block runs the model once.

    >>> model = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
    >>> with record_outputs(model, ["0"]) as states:
    ...     _ = model(torch.zeros(1, 4, 3))
    >>> {path: tuple(state.shape) for path, state in states.items()}
    {'0': (1, 4, 2)}
    """
    outputs: dict[str, Tensor] = {}

    def record(path: str, output: Any) -> None:
        outputs.setdefault(path, output[0] if isinstance(output, (tuple, list)) else output)

    handles = [
        model.get_submodule(path).register_forward_hook(lambda _, __, output, path=path: record(path, output))
        for path in paths
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def select_states(states: dict[str, Tensor], paths: Sequence[str], mask_BT: Tensor) -> Tensor:
    """Return the states of these layers at the positions of a mask: states_MLD.

    >>> states = {"a": torch.zeros(2, 3, 4), "b": torch.ones(2, 3, 4)}
    >>> select_states(states, ["a", "b"], torch.tensor([[True, False, False], [True, True, False]])).shape
    torch.Size([3, 2, 4])
    """
    return torch.stack([states[path][mask_BT.to(states[path].device)] for path in paths], dim=1)


def hidden_states_loss(student_MLD: Tensor, teacher_MLD: Tensor) -> Tensor:
    r"""Sum the distance of the student's states from the teacher's over positions; float32, without a unit.

    At each position it is the mean over layers of

        sum_D (s - t)^2 / sum_D (t - mean_D t)^2,

    the mean squared error of hidden states (TinyBERT, arXiv 1909.10351, equation 8; Minitron, arXiv 2407.14679, section
    3), relative to the variance of the teacher's state over its channels. No matrix is learned between the two, because
    the student's channels are kept channels of the teacher. The variance is taken per position: a few tokens, above all
    the first, have states a hundred times as large as others and would dominate the loss. Where the student returns the
    mean of the teacher's state in all channels, the loss is 1. Raises `TrainingError` for different shapes.

    >>> teacher = torch.tensor([[[1.0, -1.0, 3.0, 1.0]]])
    >>> float(hidden_states_loss(teacher, teacher)), float(hidden_states_loss(torch.ones(1, 1, 4), teacher))
    (0.0, 1.0)
    """
    if student_MLD.shape != teacher_MLD.shape:
        raise TrainingError(
            f"the model gives hidden states of {list(student_MLD.shape)} (positions, layers, channels), and those of "
            f"the teacher that the plan leaves are {list(teacher_MLD.shape)}; leave out --hidden-states-weight"
        )
    student_MLD, teacher_MLD = student_MLD.float(), teacher_MLD.to(student_MLD.device).float()
    variance_ML = (teacher_MLD - teacher_MLD.mean(dim=-1, keepdim=True)).square().sum(dim=-1)
    error_ML = (student_MLD - teacher_MLD).square().sum(dim=-1)
    return (error_ML / variance_ML.clamp(min=LEAST_VARIANCE)).mean(dim=1).sum()
