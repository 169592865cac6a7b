"""State of a training <-> a checkpoint: a folder of safetensors and JSON, whole or not at all, without pickles.

Every process writes its own part of the tensors and reads its own (torch.distributed.checkpoint), so none gathers
them; a checkpoint of several processes can be read by another number of them.
"""

from __future__ import annotations

import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.fsdp import FSDPModule
from transformers import TrainerState

from secateur import processes
from secateur.errors import CheckpointError
from secateur.files import atomic_folder, read_json, write_json

STATE_FILE = "trainer_state.json"  # Trainer's own: steps done, what was logged
WEIGHTS_FOLDER = "trained"  # the trained weights, by name
OPTIMIZER_FOLDER = "optimizer"
OPTIMIZER_FILE = "optimizer.json"  # numbers of the optimizer and of the learning rate schedule
FILE_BYTES = 2**26  # of tensors in one file; so much is copied at a time


def last_checkpoint(folder: Path) -> Path | None:
    """Return the whole checkpoint of the latest step in a folder; None where there is none."""
    named = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return max((path for path in named if (path / STATE_FILE).is_file()), key=_step_of, default=None)


def save_checkpoint(
    folder: Path, model: nn.Module, optimizer: Any, schedule: Any, state: TrainerState, *, best: int | None
) -> None:
    """Write the state of a training as the checkpoint of this step; keep it and the best, remove the others.

    Every process writes what it holds. Raises `CheckpointError`.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # an evaluation leaves some weights gathered, which the optimizer does not know as such
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wraps torch's
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    moments = {
        f"{names[id(parameter)]}/{key}": value
        for group in optimizer.param_groups
        for parameter in group["params"]
        for key, value in optimizer.state[parameter].items()
    }
    with _written_by_all(folder / f"checkpoint-{state.global_step}") as unfinished:
        _write_tensors(unfinished / WEIGHTS_FOLDER, weights)
        _write_tensors(unfinished / OPTIMIZER_FOLDER, moments)
        if processes.is_first():
            groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
            write_json(unfinished / OPTIMIZER_FILE, {"groups": groups, "schedule": schedule.state_dict()})
            state.save_to_json(str(unfinished / STATE_FILE))
    if processes.is_first():
        for other in folder.glob("checkpoint-*"):
            if _step_of(other) not in (state.global_step, best):
                shutil.rmtree(other, ignore_errors=True)
    processes.wait()


def load_weights_in_place(model: nn.Module, checkpoint: Path, *, alone: bool = False) -> None:
    """Load the trained weights of a checkpoint into a model, which may be sharded.

    `alone`: the other processes do not load them. Raises `CheckpointError` for a file that cannot be read, and for a
    name or a shape that the model does not have.
    """
    parameters = dict(model.named_parameters())
    with _reading(checkpoint / WEIGHTS_FOLDER) as reader:
        saved = reader.read_metadata().state_dict_metadata
        for name, about in saved.items():
            own = parameters.get(name)
            if own is None or own.shape != about.size:
                raise CheckpointError(
                    f"the checkpoint has {name} of shape {tuple(about.size)}, which the model has not: it is of "
                    "another training; start without --resume"
                )
        _load({name: parameters[name].detach() for name in saved}, reader, alone=alone)


def load_optimizer_in_place(checkpoint: Path, model: nn.Module, optimizer: Any, schedule: Any) -> None:
    """Load the optimizer and the learning rate schedule of a checkpoint. Raises `CheckpointError`."""
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wraps torch's
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    numbers = read_json(checkpoint / OPTIMIZER_FILE)
    with _reading(checkpoint / OPTIMIZER_FOLDER) as reader:
        moments = {
            name: torch.zeros_like(parameters[name.rpartition("/")[0]]) if about.size else torch.zeros(())
            for name, about in reader.read_metadata().state_dict_metadata.items()
        }
        _load(moments, reader)
    try:
        names = {id(parameter): name for name, parameter in parameters.items()}
        state = optimizer.state_dict()
        of_optimizer = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        state["state"] = {
            index: {
                key.rpartition("/")[2]: value
                for key, value in moments.items()
                if key.rpartition("/")[0] == names[id(parameter)]
            }
            for index, parameter in enumerate(of_optimizer)
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


@contextmanager
def _written_by_all(path: Path) -> Iterator[Path]:
    """Give all processes the same unfinished folder, which becomes `path` once they have written to it."""
    first = processes.largest(os.getpid() if processes.is_first() else 0)
    if processes.is_first():
        with atomic_folder(path, overwrite=True, mark=STATE_FILE) as unfinished:
            processes.wait()
            yield unfinished
            processes.wait()
    else:
        processes.wait()
        yield path.with_name(f".{path.name}.{first}.partial")
        processes.wait()
    processes.wait()


def _write_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write this process's parts of the tensors, in files of at most `FILE_BYTES` unless one tensor is larger."""
    folder.mkdir(exist_ok=True)
    files: dict[str, int] = {}
    number, room = 0, 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if size > room or not number:
            number, room = number + 1, FILE_BYTES
        files[name], room = number, room - size
    writer = HuggingFaceStorageWriter(str(folder), files, save_distributed=True)
    with _without_warnings():
        save(dict(tensors), storage_writer=writer, no_dist=processes.count() == 1)


@contextmanager
def _reading(folder: Path) -> Iterator[Any]:
    try:
        yield HuggingFaceStorageReader(str(folder))
    except CheckpointError:
        raise
    except Exception as error:  # of safetensors, of the file system, or of torch around those of all processes
        raise _unreadable(folder, error) from error


def _load(tensors: dict[str, Tensor], reader: Any, *, alone: bool = False) -> None:
    with _without_warnings():
        load(tensors, storage_reader=reader, no_dist=alone or processes.count() == 1)


@contextmanager
def _without_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # one process is no mistake
        yield


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])
