"""Teacher and rows -> files with the teacher's distribution at every position that has a label.

The teacher reads every row once, before the training. At each position the `top_k` likeliest tokens are saved with
their log-probabilities, and the mass of all others; hidden states of a few layers, if asked for. So the teacher need
not be in memory during the training, and further epochs cost nothing.

Tensor names end in their axes: B batch, T token, V vocabulary, M position with a label, K top token, L compared layer,
D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from secateur import processes
from secateur.data.rows import IGNORED, Rows, collate, length_sorted_batches
from secateur.errors import CheckpointError, TrainingError
from secateur.evaluation.inference import LOGITS_BYTES, evaluation_mode, input_device, vocabulary_size
from secateur.models.precision import bfloat16_code, half_products
from secateur.models.tensor_files import read_tensors, write_tensors
from secateur.models.tensors import all_finite
from secateur.progress import Progress
from secateur.recovery.packing import check_packing

SHARD_ROWS = 256  # rows per file; a killed run goes on after the last whole file


@dataclass(frozen=True, slots=True)
class TeacherOutputs:
    """What is saved of the teacher: how many top tokens, at which temperature."""

    top_k: int
    temperature: float = 1.0


def save_teacher_outputs(
    teacher: Callable[[], PreTrainedModel],
    rows: Rows,
    folder: Path,
    outputs: TeacherOutputs,
    *,
    progress: Progress | None = None,
) -> None:
    """Run the teacher on the rows and write its outputs into files in the folder.

    Files that exist are not written again, and where all exist, the teacher is not loaded. Several processes share the
    files among them. `progress` counts files. Raises `TrainingError` where the logits hold NaN or Inf.

    >>> import tempfile
    >>> from transformers import AutoConfig, AutoModelForCausalLM
    >>> config = AutoConfig.for_model("opt", hidden_size=12, num_attention_heads=2, ffn_dim=24, num_hidden_layers=1)
    >>> ids = torch.arange(9, dtype=torch.int32)
    >>> rows = Rows(ids, ids % 2 == 1, torch.tensor([0, 4, 9]), torch.zeros(2, dtype=torch.int32))
    >>> model = AutoModelForCausalLM.from_config(config)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_teacher_outputs(lambda: model, rows, Path(folder), TeacherOutputs(top_k=3))
    ...     read = TeacherCache(Path(folder), rows).read([1, 0])
    >>> {name: tuple(tensor.shape) for name, tensor in read.items()}
    {'logp': (4, 3), 'rest': (4,), 'tokens': (4, 3)}
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards = range(-(-len(rows) // SHARD_ROWS))
    missing = [shard for shard in shards[processes.rank() :: processes.count()] if not _is_readable(folder, shard)]
    if missing:
        model = teacher()
        check_packing(model, rows)
        for done, shard in enumerate(missing, start=1):
            numbers = range(shard * SHARD_ROWS, min((shard + 1) * SHARD_ROWS, len(rows)))
            write_tensors(_file(folder, shard), _teacher_outputs(model, rows, numbers, outputs))
            if progress is not None:
                progress(done, len(missing))
    processes.wait()


class TeacherCache:
    """The saved outputs of a teacher, read from their files when they are needed."""

    def __init__(self, folder: Path, rows: Rows) -> None:
        self._folder = folder
        self._files: dict[int, dict[str, Tensor]] = {}
        labels_before = torch.cat([torch.zeros(1, dtype=torch.int64), rows.loss_mask_T.long().cumsum(0)])[rows.starts]
        shard_starts = torch.arange(len(rows) + 1) // SHARD_ROWS * SHARD_ROWS
        self._first = (labels_before - labels_before[shard_starts]).tolist()  # position of each row within its file
        self._count = labels_before.diff().tolist()

    def read(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Read `tokens` (M, K), `logp` (M, K) and `rest` (M) of these rows. Raises `CheckpointError`."""
        parts = [self._read_row(row) for row in rows]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _read_row(self, row: int) -> dict[str, Tensor]:
        shard = row // SHARD_ROWS
        if shard not in self._files:
            self._files[shard], _ = read_tensors(_file(self._folder, shard))
        first = self._first[row]
        positions = slice(first, first + self._count[row])
        outputs = {name: tensor[positions] for name, tensor in self._files[shard].items()}
        return outputs | {"logp": outputs["logp"].float()}


@torch.no_grad()
def _teacher_outputs(
    model: PreTrainedModel, rows: Rows, numbers: Sequence[int], outputs: TeacherOutputs
) -> dict[str, Tensor]:
    """Compute the teacher's outputs at all labels of some rows, in the order of the rows."""
    vocabulary = vocabulary_size(model)
    max_tokens = max(1, LOGITS_BYTES // (4 * vocabulary))  # of a batch, whose logits are in memory
    device = input_device(model)
    by_row: dict[int, list[Tensor]] = {}
    with evaluation_mode(model), bfloat16_code(), half_products(model):
        for batch_rows in length_sorted_batches(rows, numbers, max_tokens):
            batch = {name: tensor.to(device) for name, tensor in collate(rows, batch_rows, pad=0).items()}
            mask_BT = batch.pop("labels") != IGNORED
            logits_MV = model(**batch, use_cache=False).logits[mask_BT].float()
            if outputs.temperature != 1.0:
                logits_MV /= outputs.temperature
            logsumexp_M = logits_MV.logsumexp(dim=-1)
            if not all_finite(logsumexp_M):
                raise TrainingError(
                    f"the teacher {type(model).__name__} gives logits with NaN or Inf. Expected finite ones: load it "
                    "with --dtype float32 or bfloat16 (float16 overflows), or name another with --teacher"
                )
            logits_MK, tokens_MK = logits_MV.topk(min(outputs.top_k, vocabulary), dim=-1)
            logp_MK = logits_MK - logsumexp_M[:, None]
            rest_M = 1.0 - logp_MK.exp().sum(dim=-1)
            parts = [tokens_MK.int().cpu(), logp_MK.half().cpu(), rest_M.float().cpu()]
            counts = mask_BT.sum(dim=1).tolist()
            for row, *of_row in zip(batch_rows, *(part.split(counts) for part in parts), strict=True):
                by_row[row] = of_row
    return {name: torch.cat([by_row[row][i] for row in numbers]) for i, name in enumerate(("tokens", "logp", "rest"))}


def _file(folder: Path, shard: int) -> Path:
    return folder / f"teacher-{shard:05}.safetensors"


def _is_readable(folder: Path, shard: int) -> bool:
    try:
        read_tensors(_file(folder, shard))
    except CheckpointError:  # missing or damaged
        return False
    return True
