"""Rows of tokens -> packed rows, the order in which optimizer steps read them, and padded batches.

Tensor names end in their axes: R row, T token, S optimizer step, B row of a batch. `T` alone runs over the
tokens of all rows, one row after the other.
"""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.data.windows import digest

GROUPED_STEPS = 16  # group_by_length sorts among the rows of so many steps
IGNORED = -100  # a label without loss, as in PyTorch


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Rows of tokens of different lengths, concatenated."""

    ids_T: Tensor  # int32
    loss_mask_T: Tensor  # bool: whether the token counts in the loss
    starts: Tensor  # int64, R + 1: where each row starts, and where the last ends
    sources_R: Tensor  # int32: number of the source
    positions_T: Tensor | None = None  # int32: position within its text, where several texts are packed into a row

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths_R(self) -> Tensor:
        """Tokens of each row, int64."""
        return self.starts.diff()

    def slice_of(self, row: int) -> slice:
        """Return the slice of T that is a row."""
        return slice(int(self.starts[row]), int(self.starts[row + 1]))

    def select(self, rows: Tensor) -> Rows:
        """Return some of the rows, in the given order (int64 indices)."""
        parts = [torch.arange(*self.starts[[int(row), int(row) + 1]].tolist()) for row in rows]
        index_T = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)
        return Rows(
            self.ids_T[index_T],
            self.loss_mask_T[index_T],
            row_starts(self.lengths_R[rows].tolist()),
            self.sources_R[rows],
            None if self.positions_T is None else self.positions_T[index_T],
        )

    def digest(self) -> str:
        """Hash tokens, loss mask and row starts: SHA-256, in hex."""
        parts = [self.ids_T, self.loss_mask_T, self.starts, *([] if self.positions_T is None else [self.positions_T])]
        return hashlib.sha256("".join(map(digest, parts)).encode()).hexdigest()


def row_starts(lengths: Sequence[int]) -> Tensor:
    """Return where rows of these lengths start, and where the last ends: int64.

    >>> row_starts([2, 3]).tolist()
    [0, 2, 5]
    """
    return torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0)


def pack_rows(rows: Rows, max_length: int) -> Rows:
    """Pack rows of the same source into rows of at most `max_length` tokens; each text keeps its own positions.

    Best-fit decreasing: the longest go first, each into the fullest row that has room for it.

    >>> ids = torch.arange(9, dtype=torch.int32)
    >>> rows = Rows(ids, ids > 0, torch.tensor([0, 2, 7, 9]), torch.zeros(3, dtype=torch.int32))
    >>> packed = pack_rows(rows, 7)
    >>> packed.ids_T.tolist(), packed.lengths_R.tolist(), packed.positions_T.tolist()
    ([2, 3, 4, 5, 6, 0, 1, 7, 8], [7, 2], [0, 1, 2, 3, 4, 0, 1, 0, 1])
    """
    bins: list[list[int]] = []
    room: list[tuple[int, int, int]] = []  # (source, free tokens, bin), sorted
    lengths = rows.lengths_R.tolist()
    for row in sorted(range(len(rows)), key=lambda i: -lengths[i]):
        source, length = int(rows.sources_R[row]), lengths[row]
        at = bisect.bisect_left(room, (source, length, -1))
        if at < len(room) and room[at][0] == source:
            _, free, number = room.pop(at)
        else:
            free, number = max_length, len(bins)
            bins.append([])
        bins[number].append(row)
        bisect.insort(room, (source, free - length, number))
    flat = rows.select(torch.tensor([row for each in bins for row in each], dtype=torch.int64))
    positions_T = torch.cat([torch.arange(n) for n in flat.lengths_R.tolist()]) if len(flat) else torch.zeros(0)
    return Rows(
        flat.ids_T,
        flat.loss_mask_T,
        row_starts([sum(lengths[row] for row in each) for each in bins]),
        torch.tensor([int(rows.sources_R[each[0]]) for each in bins], dtype=torch.int32),
        positions_T.to(torch.int32),
    )


def steps_for_epochs(rows: int, epochs: float, batch_size: int) -> int:
    """Return how many steps of `batch_size` rows come nearest to `epochs`; at least one.

    >>> steps_for_epochs(1000, 1, 64)
    16
    """
    return max(1, round(epochs * rows / batch_size))


def training_order(
    rows: Rows,
    *,
    steps: int,
    batch_size: int,
    seed: int,
    weights: Sequence[float] | None = None,
    group_by_length: bool = False,
) -> Tensor:
    """Return the rows that each optimizer step reads: order_SB, int64, steps x batch_size.

    Rows are shuffled anew in each epoch. With `weights`, each source has that share of all rows read. Within a step the
    longest come first, so that a micro-batch holds rows of similar length and little padding; the gradient of a step is
    a sum over its rows, so their order does not change it. `group_by_length` also sorts among the rows of
    `GROUPED_STEPS` steps, which makes steps differ more from each other than a shuffle does.

    >>> ids = torch.arange(9, dtype=torch.int32)
    >>> rows = Rows(ids, ids > 0, torch.tensor([0, 2, 7, 9]), torch.zeros(3, dtype=torch.int32))
    >>> training_order(rows, steps=2, batch_size=3, seed=0).sort(dim=1).values.tolist()
    [[0, 1, 2], [0, 1, 2]]
    """
    generator = torch.Generator().manual_seed(seed)
    total = steps * batch_size
    if weights is None:
        order = _shuffled_epochs(torch.arange(len(rows)), total, generator)
    else:
        weights_of_sources = torch.tensor(weights, dtype=torch.float64)
        ends = (weights_of_sources.cumsum(0) / weights_of_sources.sum() * total).round().long()
        counts = ends.diff(prepend=torch.zeros(1, dtype=torch.int64))
        order = torch.cat(
            [
                _shuffled_epochs(torch.nonzero(rows.sources_R == source).flatten(), int(count), generator)
                for source, count in enumerate(counts)
            ]
        )[torch.randperm(total, generator=generator)]
    lengths_R = rows.lengths_R
    if group_by_length:
        parts = []
        for part in order.split(GROUPED_STEPS * batch_size):
            part_SB = part[lengths_R[part].argsort(descending=True, stable=True)].reshape(-1, batch_size)
            parts.append(part_SB[torch.randperm(len(part_SB), generator=generator)])
        order = torch.cat(parts).flatten()
    order_SB = order.reshape(steps, batch_size)
    return order_SB.gather(1, lengths_R[order_SB].argsort(dim=1, descending=True, stable=True))


def collate(rows: Rows, numbers: Sequence[int], *, pad: int, multiple: int = 1) -> dict[str, Tensor]:
    """Pad rows on the right to the longest of them; returns the model's inputs and `labels`, all B x T, int64.

    T is rounded up to a `multiple`, but is no longer than the longest of all rows. `labels[t]` is the token that
    `logits[t]` predict: the next token, or `IGNORED` where it does not count in the loss.
    Packed rows have `position_ids` and no mask; from that transformers sees that a row holds several texts.

    >>> ids = torch.arange(9, dtype=torch.int32)
    >>> rows = Rows(ids, ids % 2 == 1, torch.tensor([0, 2, 7, 9]), torch.zeros(3, dtype=torch.int32))
    >>> batch = collate(rows, [2, 1], pad=0)
    >>> batch["input_ids"].tolist(), batch["labels"].tolist()
    ([[7, 8, 0, 0, 0], [2, 3, 4, 5, 6]], [[-100, -100, -100, -100, -100], [3, -100, 5, -100, -100]])
    """
    slices = [rows.slice_of(number) for number in numbers]
    longest = max(each.stop - each.start for each in slices)
    width = max(longest, min(-(-longest // multiple) * multiple, int(rows.lengths_R.max())))
    ids_BT = torch.full((len(slices), width), pad, dtype=torch.int64)
    labels_BT = torch.full_like(ids_BT, IGNORED)
    mask_BT = torch.zeros_like(ids_BT)
    positions_BT = torch.zeros_like(ids_BT)
    for i, each in enumerate(slices):
        ids_T = rows.ids_T[each].long()
        ids_BT[i, : len(ids_T)] = ids_T
        labels_BT[i, : len(ids_T) - 1] = ids_T[1:].where(rows.loss_mask_T[each][1:], IGNORED)
        mask_BT[i, : len(ids_T)] = 1
        if rows.positions_T is not None:
            positions_BT[i, : len(ids_T)] = rows.positions_T[each]
    where = {"attention_mask": mask_BT} if rows.positions_T is None else {"position_ids": positions_BT}
    return {"input_ids": ids_BT, "labels": labels_BT, **where}


def length_sorted_batches(rows: Rows, numbers: Iterable[int], max_tokens: int) -> Iterator[list[int]]:
    """Yield these rows in batches of at most `max_tokens` tokens with the padding, or of one row; the longest first.

    >>> ids = torch.arange(9, dtype=torch.int32)
    >>> rows = Rows(ids, ids > 0, torch.tensor([0, 2, 7, 9]), torch.zeros(3, dtype=torch.int32))
    >>> list(length_sorted_batches(rows, range(3), max_tokens=4))
    [[1], [0, 2]]
    """
    lengths = rows.lengths_R.tolist()
    batch: list[int] = []
    for row in sorted(numbers, key=lambda i: -lengths[i]):
        if batch and lengths[batch[0]] * (len(batch) + 1) > max_tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _shuffled_epochs(pool: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return `count` entries of the pool: all of them before any again, in a new order each time."""
    if not len(pool) or not count:
        return torch.zeros(0, dtype=torch.int64)
    epochs = -(-count // len(pool))
    return torch.cat([pool[torch.randperm(len(pool), generator=generator)] for _ in range(epochs)])[:count]
