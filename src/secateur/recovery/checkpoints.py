"""Checkpoints of a training: folders of safetensors and JSON that appear whole or not at all, with no pickle in them.

Tensors that are spread over processes are gathered, so a checkpoint looks the same for one process and for several.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import TrainerState

from secateur import processes
from secateur.errors import CheckpointError
from secateur.files import atomic_folder, write_json

STATE_FILE = "trainer_state.json"  # Trainer's own: steps done, what was logged
WEIGHTS_FILE = "trained.safetensors"  # the weights that are trained, by name
OPTIMIZER_FILE = "optimizer.safetensors"
ABOUT_FILE = "optimizer.json"  # what of the optimizer and the schedule is no tensor


def last_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the latest step in a folder; None where there is none.

    >>> last_checkpoint(Path("no-such-folder")) is None
    True
    """
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    whole = [path for path in found if (path / STATE_FILE).is_file()]
    return max(whole, key=_step_of, default=None)


def read_weights(checkpoint: Path) -> dict[str, Tensor]:
    """The trained weights of a checkpoint, by their names in the model that was trained.

    Raises `CheckpointError` where they cannot be read. `train` shows a run.
    """
    try:
        return load_file(checkpoint / WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{checkpoint / WEIGHTS_FILE} cannot be read ({error}); start without --resume"
        ) from error


def put_weights_in_place(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give the model these weights. Raises `CheckpointError` for one that it does not have, or not in that shape."""
    parameters = dict(model.named_parameters())
    for name, value in weights.items():
        own = parameters.get(name)
        if own is None or own.shape != value.shape:
            raise CheckpointError(
                f"the checkpoint has {name} of shape {tuple(value.shape)}, which the model has not: it is of another "
                "training; start without --resume"
            )
        with torch.no_grad():
            own.copy_(_as_part(value, own))


def write_checkpoint(folder: Path, own: nn.Module, optimizer: Any, schedule: Any, state: TrainerState) -> None:
    """Write the state of a training into the folder as its checkpoint of this step, and remove those not needed more.

    Needed are the last and the best. Every process takes part in gathering what is spread over them; the first writes.
    """
    for module in own.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # an evaluation leaves some weights whole, which the optimizer does not know as such
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wraps torch's
    names = {id(parameter): name for name, parameter in own.named_parameters()}
    weights = {name: _whole(p) for name, p in own.named_parameters() if p.requires_grad}
    moments = {
        f"{names[id(parameter)]}/{key}": _whole(value)
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
            write_json(unfinished / ABOUT_FILE, {"groups": groups, "schedule": schedule.state_dict()})
            state.save_to_json(str(unfinished / STATE_FILE))
        needed = {state.global_step, state.best_global_step}
        for other in folder.glob("checkpoint-*"):
            if _step_of(other) not in needed:
                shutil.rmtree(other, ignore_errors=True)
    processes.wait()


def read_optimizer_in_place(checkpoint: Path, own: nn.Module, optimizer: Any, schedule: Any) -> None:
    """Give the optimizer and the schedule what a checkpoint has of them. Raises `CheckpointError`."""
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wraps torch's
    names = {id(parameter): name for name, parameter in own.named_parameters()}
    try:
        moments = load_file(checkpoint / OPTIMIZER_FILE)
        about = json.loads((checkpoint / ABOUT_FILE).read_text(encoding="utf-8"))
        state = optimizer.state_dict()
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        state["state"] = {
            number: {
                key.rpartition("/")[2]: _as_part(value, parameter)
                for key, value in moments.items()
                if key.rpartition("/")[0] == names[id(parameter)]
            }
            for number, parameter in enumerate(parameters)
        }
        for group, kept in zip(state["param_groups"], about["groups"], strict=True):
            group.update(kept, betas=tuple(kept["betas"]))
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{checkpoint} cannot be read ({error}); start without --resume") from error
    optimizer.load_state_dict(state)
    schedule.load_state_dict(about["schedule"])


def read_state(checkpoint: Path) -> TrainerState:
    """Trainer's own state: steps done, what was logged. Raises `CheckpointError` where it cannot be read."""
    try:
        state: TrainerState = TrainerState.load_from_json(str(checkpoint / STATE_FILE))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{checkpoint / STATE_FILE} cannot be read ({error}); start without --resume") from error
    return state


def _whole(tensor: Tensor) -> Tensor:
    """A copy on the CPU of a tensor that may be spread over processes."""
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().to("cpu", copy=True).contiguous()


def _as_part(value: Tensor, like: Tensor) -> Tensor:
    """The value as this process holds it, where the tensor that it is for is spread over processes."""
    if isinstance(like, DTensor) and value.dim():
        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
    return value


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])
