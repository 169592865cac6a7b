"""Several processes that score or train one model: each takes its share of the samples, and sums go over all of them.

`accelerate launch` starts them and sets their ranks in the environment; without it there is one process.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, distributed

from secateur.errors import ScoreError


def join() -> None:
    """Join the process group, where several processes were started: gloo between CPUs, nccl between GPUs."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not distributed.is_initialized():
        state = PartialState(cpu=not torch.cuda.is_available())
        atexit.register(state.destroy_process_group)  # else the end of this process may be a crash


def count() -> int:
    """Number of processes.

    >>> count()
    1
    """
    return distributed.get_world_size() if distributed.is_initialized() else 1


def sharded() -> bool:
    """Whether each process is to have a shard of the weights: FSDP, as accelerate's config says.

    >>> sharded()
    False
    """
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" and count() > 1


def rank() -> int:
    """The number of this process, from 0.

    >>> rank()
    0
    """
    return distributed.get_rank() if distributed.is_initialized() else 0


def is_first() -> bool:
    """Whether this process is the one that writes files and prints for all.

    >>> is_first()
    True
    """
    return rank() == 0


def share_of(windows: Tensor) -> Tensor:
    """This process's samples, every n-th of them. Raises `ScoreError` where there are fewer samples than processes.

    >>> share_of(torch.zeros(3, 8)).shape
    torch.Size([3, 8])
    """
    if len(windows) < count():
        raise ScoreError(
            f"{len(windows)} calibration samples for {count()} processes: each needs at least one. Give more samples, "
            f"for example --samples {count()}, or start fewer processes"
        )
    return windows[rank() :: count()] if count() > 1 else windows


def add_up(*tensors: Tensor) -> None:
    """All-reduce: replace tensors in place by their sums over all processes."""
    if count() > 1:
        for tensor in tensors:
            _reduce(tensor, distributed.ReduceOp.SUM)


def largest(number: int) -> int:
    """The largest of the processes' numbers.

    >>> largest(3)
    3
    """
    if count() == 1:
        return number
    tensor = torch.tensor(number)
    _reduce(tensor, distributed.ReduceOp.MAX)
    return int(tensor)


def from_first(tensor: Tensor) -> Tensor:
    """Broadcast: the first process's tensor, in place of those of the others, which have the same shape."""
    if count() > 1:
        _on_its_backend(tensor, lambda each: distributed.broadcast(each, src=0))
    return tensor


def wait() -> None:
    """Wait until all processes have come here."""
    if count() > 1:
        distributed.barrier()


def _reduce(tensor: Tensor, operation: Any) -> None:
    _on_its_backend(tensor, lambda each: distributed.all_reduce(each, operation))


def _on_its_backend(tensor: Tensor, change: Callable[[Tensor], Any]) -> None:
    """Change a tensor in place, for nccl on a GPU: it knows no others."""
    if distributed.get_backend() == "nccl" and not tensor.is_cuda:
        on_gpu = tensor.cuda()
        change(on_gpu)
        tensor.copy_(on_gpu)
    else:
        change(tensor)
