"""Setup -> the layers of the pruned model, each trained alone to give what the dense one's gives, before the training.

What that repairs, the training of the whole model does not: both together give back more than either for the same time.
"""

from __future__ import annotations

import gc
import logging
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur import processes
from secateur.checkpoint.record import read_record
from secateur.data.rows import Rows
from secateur.discovery.discover import discover
from secateur.errors import PlanError, RecipeError, TrainingError
from secateur.files import RECIPE_FILE
from secateur.models.precision import matmul_precision
from secateur.models.sources import resolve
from secateur.models.tensor_files import read_tensors, write_tensors
from secateur.pipeline.recipe import load_recipe
from secateur.progress import Clock, Progress
from secateur.pruning.held_out import checked_reconstruction
from secateur.pruning.reconstruct import HELD_OUT, LayerTraining
from secateur.recovery.options import RecoverOptions
from secateur.recovery.setup import TrainingSetup, load_finite, load_teacher

logger = logging.getLogger(__name__)

LAYERS_FILE = "layers.safetensors"  # in the work folder
SHARE = 1 / 3  # of the time of a training that layers may take
COST = 1.0  # times that of a token that the whole model is trained on, is that of one that layers are trained on
BATCH_TOKENS = (1024, 512)  # of a step of a layer: the first for which there is time
PASSES = 2.3  # over the windows, in the steps of a layer
JUDGED_TOKENS = 8192  # not trained on, by whose loss layers are taken: of 1,536 it is off by as much as they gain


def check_layers_first(options: RecoverOptions) -> None:
    """Raise `TrainingError` where layers are to be trained first and cannot be."""
    if not options.layers_first:
        return
    asked = "layers_first=True"
    if not options.has_teacher:
        raise TrainingError(
            f"{asked}: the layers learn from the dense model, and method={options.method!r} has none. Expected a "
            "method with a teacher, --method lora+distill"
        )
    if options.save_adapter:
        raise TrainingError(f"{asked} changes the model that an adapter belongs to. Leave out --save-adapter")
    if processes.count() > 1:
        raise TrainingError(
            f"{asked}: one process trains layers, and there are {processes.count()}. Train them with the cut: "
            "secateur prune MODEL OUT --repair reconstruct"
        )


def layer_batch_tokens(tokens: float) -> int | None:
    """The tokens of each step of a layer, before a training on so many tokens; None where there is time for none.

    >>> [layer_batch_tokens(tokens) for tokens in (500_000, 250_000, 100_000)]
    [1024, 512, None]
    """
    steps = LayerTraining().steps
    return next((each for each in BATCH_TOKENS if COST * steps * each <= SHARE * tokens), None)


def train_layers_first(setup: TrainingSetup, work: Path, *, tokens: float, clock: Clock) -> None:
    """Train the layers and keep them in the work folder, if that is asked for or pays before so many tokens.

    What an earlier run has kept stays. Raises `PlanError` where it was asked for and cannot be done.
    """
    asked, file = setup.recipe.options.layers_first, work / LAYERS_FILE
    batch_tokens = layer_batch_tokens(tokens) or (BATCH_TOKENS[-1] if asked else None)
    if batch_tokens is None or setup.teacher is None or asked is False or file.exists():
        return
    if not asked and not _pays(setup):
        return
    with clock.stage("layers") as progress, matmul_precision(exact=False):
        try:
            found = _trained(setup, setup.teacher, batch_tokens, progress)
        except (PlanError, torch.OutOfMemoryError) as error:
            if asked:
                raise
            logger.info("layers are not trained first: %s", error)
        else:
            write_tensors(file, *found)
    gc.collect()  # both models


def _trained(
    setup: TrainingSetup, dense_name: str, batch_tokens: int, progress: Progress | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights of the layers that were trained, by name, and what the record says of them."""
    recipe = setup.recipe
    pruned = load_finite(recipe.model, recipe.loading)
    if len(devices := {parameter.device for parameter in pruned.parameters()}) > 1:
        raise PlanError(
            f"layers_first=True: the layers lie on {len(devices)} devices, and each is trained with the one before. "
            "Train on one, or leave them as they are: --no-layers-first"
        )
    dense = load_teacher(recipe, dense_name, bf16=False)
    windows, held_out = windows_for(setup, int(LayerTraining().steps * batch_tokens / PASSES))
    before = {name: parameter.data for name, parameter in pruned.named_parameters()}
    discovery = discover(dense_name, trust_remote_code=recipe.loading.trust_remote_code)
    losses = checked_reconstruction(
        dense,
        pruned,
        discovery,
        windows,
        held_out,
        training=LayerTraining(batch_tokens=batch_tokens, seed=recipe.options.seed),
        progress=progress,
    )
    trained = {
        name: parameter.data
        for name, parameter in pruned.named_parameters()
        if parameter.data.data_ptr() != before[name].data_ptr()
    }
    taken = sum(any(name.startswith(f"{path}.") for name in trained) for path in discovery.layer_paths)
    return trained, {"batch_tokens": batch_tokens, "losses": losses, "taken": taken}


def windows_for(setup: TrainingSetup, tokens: int) -> tuple[Tensor, Tensor | None]:
    """Windows of about so many tokens to train layers on, and others that judge them.

    Both are of the first rows that the whole model is trained on afterwards, each of another row; of little text the
    validation rows judge, or nothing does.
    """
    train, validation = setup.data.train, setup.data.validation
    numbers = torch.tensor(list(dict.fromkeys(setup.order_SB.flatten().tolist())))
    length = min(setup.recipe.data.max_length, int(train.lengths_R[numbers].sum()))
    count, judging = max(HELD_OUT, tokens // length), max(1, JUDGED_TOKENS // length)
    windows = windows_of(train, numbers, length, count + judging)
    if len(windows) >= min(count, judging) + judging:
        return windows[:-judging], windows[-judging:]
    held_out = windows_of(validation, torch.arange(len(validation)), length, len(validation))
    return windows[:count], held_out if len(held_out) else None


def _pays(setup: TrainingSetup) -> bool:
    """Whether layers are trained without being asked for: of a model that was cut, and not trained in any way yet."""
    if setup.recipe.options.save_adapter or processes.count() > 1:
        return False
    path = resolve(setup.recipe.model).path
    record = read_record(path)
    if path is None or record is None or record.recovery is not None:
        return False
    with suppress(RecipeError):
        return load_recipe(path / RECIPE_FILE).cut.repair != "reconstruct"
    return True


def windows_of(rows: Rows, numbers: Tensor, length: int, count: int) -> Tensor:
    """At most so many windows of rows in this order, int64, windows x length.

    Each begins with a row. Others follow in it until it is full, and what is too long is cut off.

    >>> ids = torch.arange(9, dtype=torch.int32)
    >>> rows = Rows(ids, ids > 0, torch.tensor([0, 2, 7, 9]), torch.zeros(3, dtype=torch.int32))
    >>> windows_of(rows, torch.tensor([1, 0, 2, 0]), 3, 4).tolist()
    [[2, 3, 4], [0, 1, 7]]
    """
    windows: list[Tensor] = []
    parts: list[Tensor] = []
    for number in numbers.tolist():
        if len(windows) == count:
            break
        parts.append(rows.ids_T[rows.slice_of(number)].long())
        if sum(map(len, parts)) >= length:
            windows.append(torch.cat(parts)[:length])
            parts = []
    return torch.stack(windows) if windows else torch.zeros(0, length, dtype=torch.int64)


def put_layers(model: nn.Module, work: Path) -> None:
    """Give the pruned model the layers that are kept in the work folder, if there are any."""
    if not (work / LAYERS_FILE).exists():
        return
    parameters = dict(model.named_parameters())
    for name, tensor in read_tensors(work / LAYERS_FILE)[0].items():
        own = parameters[name]
        own.data = tensor.to(own.device, own.dtype, copy=True)  # not mapped from the file


def layers_in(work: Path) -> Any:
    """What the record says of layers that were trained first; None where none were."""
    return read_tensors(work / LAYERS_FILE)[1] if (work / LAYERS_FILE).exists() else None
