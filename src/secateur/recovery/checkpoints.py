"""State of a training <-> a checkpoint: a folder of safetensors and JSON, whole or not at all, without pickles.

Tensors that are sharded over processes are gathered, so a checkpoint is the same for one process and for several.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import TrainerState

from secateur import processes
from secateur.errors import CheckpointError
from secateur.files import atomic_folder, read_json, read_tensors, write_json

STATE_FILE = "trainer_state.json"  # Trainer's own: steps done, what was logged
WEIGHTS_FILE = "trained.safetensors"  # the trained weights, by name
OPTIMIZER_FILE = "optimizer.safetensors"
OPTIMIZER_NUMBERS_FILE = "optimizer.json"  # of the optimizer and the learning rate schedule


def last_checkpoint(folder: Path) -> Path | None:
    """Return the whole checkpoint of the latest step in a folder; None where there is none."""
    named = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return max((path for path in named if (path / STATE_FILE).is_file()), key=_step_of, default=None)


def load_weights(checkpoint: Path) -> dict[str, Tensor]:
    """Load the trained weights of a checkpoint, by their names in the trained model. Raises `CheckpointError`."""
    return read_tensors(checkpoint / WEIGHTS_FILE)[0]


def set_weights_in_place(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy weights into the model's. Raises `CheckpointError` for a name or a shape that the model does not have."""
    parameters = dict(model.named_parameters())
    for name, value in weights.items():
        own = parameters.get(name)
        if own is None or own.shape != value.shape:
            raise CheckpointError(
                f"the checkpoint has {name} of shape {tuple(value.shape)}, which the model has not: it is of another "
                "training; start without --resume"
            )
        with torch.no_grad():
            own.copy_(_shard(value, own))


def save_checkpoint(folder: Path, model: nn.Module, optimizer: Any, schedule: Any, state: TrainerState) -> None:
    """Write the state of a training as the checkpoint of this step; keep the last and the best, remove the others.

    Every process takes part in gathering sharded tensors; the first writes. Raises `CheckpointError`.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # an evaluation leaves some weights gathered, which the optimizer does not know as such
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wraps torch's
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    weights = {name: _gather(p) for name, p in model.named_parameters() if p.requires_grad}
    moments = {
        f"{names[id(parameter)]}/{key}": _gather(value)
        for group in optimizer.param_groups
        for parameter in group["params"]
        for key, value in optimizer.state[parameter].items()
    }
    if processes.is_first():
        path = folder / f"checkpoint-{state.global_step}"
        with atomic_folder(path, overwrite=True, mark=STATE_FILE) as unfinished:
            save_file(weights, unfinished / WEIGHTS_FILE)
            save_file(moments, unfinished / OPTIMIZER_FILE)
            groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
            write_json(unfinished / OPTIMIZER_NUMBERS_FILE, {"groups": groups, "schedule": schedule.state_dict()})
            state.save_to_json(str(unfinished / STATE_FILE))
        for other in folder.glob("checkpoint-*"):
            if _step_of(other) not in (state.global_step, state.best_global_step):
                shutil.rmtree(other, ignore_errors=True)
    processes.wait()


def load_optimizer_in_place(checkpoint: Path, model: nn.Module, optimizer: Any, schedule: Any) -> None:
    """Load the optimizer and the learning rate schedule of a checkpoint. Raises `CheckpointError`."""
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wraps torch's
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    try:
        moments, _ = read_tensors(checkpoint / OPTIMIZER_FILE)
        numbers = read_json(checkpoint / OPTIMIZER_NUMBERS_FILE)
        state = optimizer.state_dict()
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        state["state"] = {
            index: {
                key.rpartition("/")[2]: _shard(value, parameter)
                for key, value in moments.items()
                if key.rpartition("/")[0] == names[id(parameter)]
            }
            for index, parameter in enumerate(parameters)
        }
        for group, saved in zip(state["param_groups"], numbers["groups"], strict=True):
            group.update(saved, betas=tuple(saved["betas"]))
    except (ValueError, KeyError) as error:
        raise _unreadable(checkpoint, error) from error
    optimizer.load_state_dict(state)
    schedule.load_state_dict(numbers["schedule"])


def load_state(checkpoint: Path) -> TrainerState:
    """Load Trainer's own state: steps done, what was logged. Raises `CheckpointError`."""
    try:
        state: TrainerState = TrainerState.load_from_json(str(checkpoint / STATE_FILE))
    except (OSError, ValueError, TypeError) as error:
        raise _unreadable(checkpoint / STATE_FILE, error) from error
    return state


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path} cannot be read ({error}); start without --resume")


def _gather(tensor: Tensor) -> Tensor:
    """Return a whole copy on the CPU of a tensor that may be sharded over processes."""
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().to("cpu", copy=True).contiguous()


def _shard(value: Tensor, like: Tensor) -> Tensor:
    """Return this process's part of a value, where `like` is sharded over processes."""
    if isinstance(like, DTensor) and value.dim():
        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
    return value


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])
