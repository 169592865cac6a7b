"""Rows of tokens: packed, put in the order in which the steps of a training take them, and made into batches.

Tensor names end in their axes: R row, T token.
"""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.data.windows import digest

GROUPED_STEPS = 16  # whose rows are sorted by length together, where that is asked for
IGNORED = -100  # of a target: nothing is to be learned there


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Rows of tokens, one after the other in one tensor."""

    ids_T: Tensor  # int32
    learned_T: Tensor  # bool: whether the token is to be predicted
    starts: Tensor  # int64, of every row and of the end
    sources: Tensor  # int32, of every row: which source it is from
    positions_T: Tensor | None = None  # int32, of the token in its text; where several texts are in a row

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> Tensor:
        """Tokens of every row, int64."""
        return self.starts.diff()

    def slice_of(self, row: int) -> slice:
        """Where the tokens of a row stand."""
        return slice(int(self.starts[row]), int(self.starts[row + 1]))

    def select(self, rows: Tensor) -> Rows:
        """Some of the rows, in the order given."""
        places = [torch.arange(*self.starts[[int(row), int(row) + 1]].tolist()) for row in rows]
        at = torch.cat(places) if places else torch.zeros(0, dtype=torch.int64)
        return Rows(
            self.ids_T[at],
            self.learned_T[at],
            starts_of(self.lengths[rows].tolist()),
            self.sources[rows],
            None if self.positions_T is None else self.positions_T[at],
        )

    def digest(self) -> str:
        """Hash the tokens, what is learned of them, and where rows begin: SHA-256, in hex."""
        parts = [self.ids_T, self.learned_T, self.starts, *([] if self.positions_T is None else [self.positions_T])]
        return hashlib.sha256("".join(map(digest, parts)).encode()).hexdigest()


def starts_of(lengths: Sequence[int]) -> Tensor:
    """Where rows of these lengths begin, and where the last ends: int64.

    >>> starts_of([2, 3]).tolist()
    [0, 2, 5]
    """
    return torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0)


def packed(rows: Rows, length: int) -> Rows:
    """Put several rows of the same source into one of at most `length` tokens; each keeps positions of its own.

    The longest go first, each into the fullest row that has room for it.

    >>> ids = torch.arange(9, dtype=torch.int32)
    >>> rows = Rows(ids, ids > 0, torch.tensor([0, 2, 7, 9]), torch.zeros(3, dtype=torch.int32))
    >>> fewer = packed(rows, 7)
    >>> fewer.ids_T.tolist(), fewer.lengths.tolist(), fewer.positions_T.tolist()
    ([2, 3, 4, 5, 6, 0, 1, 7, 8], [7, 2], [0, 1, 2, 3, 4, 0, 1, 0, 1])
    """
    bins: list[list[int]] = []
    room: list[tuple[int, int, int]] = []  # source, tokens left, number of the bin; sorted
    lengths = rows.lengths.tolist()
    for row in sorted(range(len(rows)), key=lambda i: -lengths[i]):
        source, need = int(rows.sources[row]), lengths[row]
        at = bisect.bisect_left(room, (source, need, -1))
        if at < len(room) and room[at][0] == source:
            _, left, number = room.pop(at)
        else:
            left, number = length, len(bins)
            bins.append([])
        bins[number].append(row)
        bisect.insort(room, (source, left - need, number))
    flat = rows.select(torch.tensor([row for each in bins for row in each], dtype=torch.int64))
    positions = torch.cat([torch.arange(n) for n in flat.lengths.tolist()]) if len(flat) else torch.zeros(0)
    return Rows(
        flat.ids_T,
        flat.learned_T,
        starts_of([sum(lengths[row] for row in each) for each in bins]),
        torch.tensor([int(rows.sources[each[0]]) for each in bins], dtype=torch.int32),
        positions.to(torch.int32),
    )


def whole_steps(rows: int, epochs: float, batch_size: int) -> int:
    """How many steps of `batch_size` rows come nearest to so many epochs; at least one.

    >>> whole_steps(1000, 1, 64)
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
    """The numbers of the rows that every step takes: int64, steps x batch_size.

    Rows are shuffled anew each time that all have been taken. With weights, each source has that share of all draws.
    Within a step the longest come first, so that a micro-batch holds rows of like length and little padding: the
    gradient of a step is a sum, so this changes nothing of it. `group_by_length` also sorts among the rows of
    `GROUPED_STEPS` steps, which then differ from each other more than a shuffle would make them.

    >>> ids = torch.arange(9, dtype=torch.int32)
    >>> rows = Rows(ids, ids > 0, torch.tensor([0, 2, 7, 9]), torch.zeros(3, dtype=torch.int32))
    >>> training_order(rows, steps=2, batch_size=3, seed=0).sort(dim=1).values.tolist()
    [[0, 1, 2], [0, 1, 2]]
    """
    generator = torch.Generator().manual_seed(seed)
    wanted = steps * batch_size
    if weights is None:
        order = _drawn(torch.arange(len(rows)), wanted, generator)
    else:
        shares = torch.tensor(weights, dtype=torch.float64)
        ends = (shares.cumsum(0) / shares.sum() * wanted).round().long()
        counts = ends.diff(prepend=torch.zeros(1, dtype=torch.int64))
        order = torch.cat(
            [
                _drawn(torch.nonzero(rows.sources == source).flatten(), int(count), generator)
                for source, count in enumerate(counts)
            ]
        )[torch.randperm(wanted, generator=generator)]
    lengths = rows.lengths
    if group_by_length:
        parts = []
        for part in order.split(GROUPED_STEPS * batch_size):
            by_length = part[lengths[part].argsort(descending=True, stable=True)].reshape(-1, batch_size)
            parts.append(by_length[torch.randperm(len(by_length), generator=generator)])
        order = torch.cat(parts).flatten()
    by_step = order.reshape(steps, batch_size)
    return by_step.gather(1, lengths[by_step].argsort(dim=1, descending=True, stable=True))


def collate(rows: Rows, numbers: Sequence[int], *, pad: int) -> dict[str, Tensor]:
    """A batch of rows, padded on the right to the longest: what a model reads, and the `labels` of its logits.

    A label is the token that the logits at its place are to predict: the next one, or `IGNORED`. Packed rows have
    `position_ids` and no mask, from which transformers sees that several texts are in a row.

    >>> ids = torch.arange(9, dtype=torch.int32)
    >>> rows = Rows(ids, ids % 2 == 1, torch.tensor([0, 2, 7, 9]), torch.zeros(3, dtype=torch.int32))
    >>> batch = collate(rows, [2, 1], pad=0)
    >>> batch["input_ids"].tolist(), batch["labels"].tolist()
    ([[7, 8, 0, 0, 0], [2, 3, 4, 5, 6]], [[-100, -100, -100, -100, -100], [3, -100, 5, -100, -100]])
    """
    places = [rows.slice_of(number) for number in numbers]
    width = max(place.stop - place.start for place in places)
    ids = torch.full((len(places), width), pad, dtype=torch.int64)
    labels = torch.full_like(ids, IGNORED)
    mask = torch.zeros_like(ids)
    positions = torch.zeros_like(ids)
    for i, place in enumerate(places):
        own = rows.ids_T[place].long()
        ids[i, : len(own)] = own
        labels[i, : len(own) - 1] = own[1:].where(rows.learned_T[place][1:], IGNORED)
        mask[i, : len(own)] = 1
        if rows.positions_T is not None:
            positions[i, : len(own)] = rows.positions_T[place]
    return {
        "input_ids": ids,
        "labels": labels,
        **({"attention_mask": mask} if rows.positions_T is None else {"position_ids": positions}),
    }


def _drawn(pool: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """So many of the pool, all before any again, each time in another order."""
    if not len(pool) or not count:
        return torch.zeros(0, dtype=torch.int64)
    rounds = -(-count // len(pool))
    return torch.cat([pool[torch.randperm(len(pool), generator=generator)] for _ in range(rounds)])[:count]
