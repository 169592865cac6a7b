"""Pieces and how often each occurs -> the order in which tokens go, and what each costs.

A token goes before its parts do, and leaves its occurrences to them. So the first to go are tokens that the text does
not use, then those that lengthen it least.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from secateur.errors import PlanError
from secateur.vocabulary.pieces import Pieces

COUNTED = 50_000_000  # characters of all texts together, at most
BATCH, PIECE = 256, 1_000_000  # texts encoded at once, and characters of a longer one
NATS = 6.0  # that a token costs by which a text grows; measured in docs/research.md
ZIPF_OFFSET = 1000  # of the Zipf-Mandelbrot law: the token of rank r has a share of 1 / (r + ZIPF_OFFSET)


@dataclass(frozen=True, slots=True)
class TokenRanking:
    """How dear every token is, in tokens by which a token of text grows longer when it goes."""

    growth_V: Tensor
    """float64: the number of tokens added per token of text; inf for those that stay."""
    order: tuple[int, ...]
    """The tokens that may go, the cheapest first."""

    @property
    def least(self) -> int:
        """The number of tokens that stay whatever is asked for."""
        return len(self.growth_V) - len(self.order)

    def scores(self, nats: float) -> Tensor:
        """float64, one for each token: nats per token of text, strictly ascending along the order.

        `nats` is what a token that a text grows by costs. The tokens that stay are dearer than all that may go.
        """
        scores_V = torch.empty_like(self.growth_V)
        order = torch.tensor(self.order, dtype=torch.int64)
        price = torch.cat([torch.zeros(1, dtype=torch.float64), self.growth_V[order] * nats]).cummax(0).values[1:]
        highest = max(price.tolist(), default=0.0)
        step = 1e-9 * max(highest, 1e-9)  # apart, but by less than a rare token costs
        scores_V.fill_(2 * highest + 1e-6)
        scores_V[order] = price + step * torch.arange(1, len(order) + 1, dtype=torch.float64) / max(len(order), 1)
        return scores_V

    def growth(self, number: int) -> float:
        """The tokens by which a token of text grows where only so many tokens stay.

        >>> TokenRanking(torch.tensor([float("inf"), 0.5, 0.25]).double(), order=(2, 1)).growth(2)
        0.25
        """
        return float(self.growth_V[torch.tensor(self.order[: len(self.growth_V) - number], dtype=torch.int64)].sum())

    def kept(self, number: int) -> tuple[int, ...]:
        """The ids, ascending, of so many tokens that stay.

        >>> TokenRanking(torch.tensor([float("inf"), 0.2, 0.1]).double(), order=(2, 1)).kept(2)
        (0, 1)
        """
        gone = {*self.order[: len(self.growth_V) - number]}
        return tuple(token for token in range(len(self.growth_V)) if token not in gone)


def token_counts(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], size: int) -> Tensor:
    """float64 (size): how often each token occurs in the texts, up to `COUNTED` characters; they are read one by one.

    >>> from types import SimpleNamespace
    >>> letters = lambda texts, **_: SimpleNamespace(input_ids=[[ord(each) - 97 for each in text] for text in texts])
    >>> token_counts(letters, ["abba", "c"], 4).tolist()
    [2.0, 2.0, 1.0, 0.0]
    """
    counts_V = torch.zeros(size, dtype=torch.float64)
    left, waiting = COUNTED, itertools.chain.from_iterable(map(_pieces_of_text, texts))
    while left > 0 and (batch := [*_batch(waiting)]):
        encoded = tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False).input_ids
        ids = torch.tensor([*itertools.chain.from_iterable(encoded)], dtype=torch.int64)
        counts_V += torch.bincount(ids[ids < size], minlength=size)
        left -= sum(map(len, batch))
    return counts_V


def _batch(texts: Iterator[str]) -> Iterator[str]:
    """The next texts, as many as are encoded at once."""
    characters = 0
    for text in itertools.islice(texts, BATCH):
        yield text
        characters += len(text)
        if characters >= PIECE:
            return


def _pieces_of_text(text: str) -> Iterator[str]:
    """A long text in pieces that end where a word does, if one does."""
    first = 0
    while len(text) - first > PIECE:
        end = first + PIECE
        end = next((at for at in range(end, end - PIECE // 10, -1) if text[at].isspace()), end)
        yield text[first:end]
        first = end
    yield text[first:]


def _uses(pieces: Pieces, counts_V: Tensor, unseen: float) -> list[float]:
    """The counts with those of the prior, of which tokens that do not occur have `unseen` in all."""
    zipf = {number: 1 / (number + ZIPF_OFFSET) for number in pieces.parts}
    not_seen = sum(share for number, share in zipf.items() if counts_V[number] == 0)
    scale = unseen / not_seen if not_seen else 0.0
    uses: list[float] = counts_V.tolist()
    for number, share in zipf.items():
        uses[number] += scale * share
    return uses


def rank_tokens(
    pieces: Pieces, counts_V: Tensor, *, unseen: float = 0.0, protected: Sequence[int] = ()
) -> TokenRanking:
    """Rank the tokens of a vocabulary by their counts (float64, one for each row of the embedding).

    Every token gets a prior count by Zipf's law in its id, since tokenizers list frequent tokens first; the prior is
    scaled so that tokens with a count of zero get `unseen` in total. `protected` tokens stay. Raises `PlanError` for
    pieces that have more tokens than there are rows.

    >>> pieces = Pieces({0: "a", 1: "b", 2: "ab", 3: "aba"}, {2: (0, 1), 3: (2, 0)}, frozenset({0, 1}), closed=True)
    >>> rank_tokens(pieces, torch.tensor([1.0, 1.0, 5.0, 2.0]).double()).order
    (3, 2)
    """
    size = len(counts_V)
    if pieces.tokens and max(pieces.tokens) >= size:
        raise PlanError(
            f"axes=vocabulary: the tokenizer has token {max(pieces.tokens)}, and the model a vocabulary of {size}. "
            "They do not belong together: cut other axes"
        )
    total, uses = max(float(counts_V.sum()), 1.0), _uses(pieces, counts_V, unseen)
    needed = pieces.needed | {*protected}
    above = dict.fromkeys(range(size), 0)  # kept tokens that are made of this one
    for parts in pieces.parts.values():
        for part in {*parts} if pieces.closed else ():
            above[part] += 1
    growth_V = torch.full((size,), float("inf"), dtype=torch.float64)
    order = [number for number in range(size) if number not in pieces.tokens]  # rows without a token
    growth_V[torch.tensor(order, dtype=torch.int64)] = 0.0
    of, gone = {**pieces.parts}, set[int]()

    def remaining(number: int) -> tuple[int, ...]:
        """What a token is made of, by those that stay: another may have gone before the token made of it."""
        if not gone.isdisjoint(of[number]):
            of_each = (remaining(part) if part in gone else (part,) for part in of[number])
            of[number] = tuple(itertools.chain.from_iterable(of_each))
        return of[number]

    def price(number: int) -> float:
        return uses[number] * max(len(remaining(number)) - 1, 1)

    waiting = [(price(n), -n) for n in pieces.parts if n not in needed and not above[n]]
    heapq.heapify(waiting)
    while waiting:
        found, number = heapq.heappop(waiting)
        number = -number
        if found < price(number):  # it has inherited since
            heapq.heappush(waiting, (price(number), -number))
            continue
        order.append(number)
        growth_V[number] = found / total
        gone.add(number)
        for part in remaining(number):
            uses[part] += uses[number]
        for part in {*pieces.parts[number]} if pieces.closed else ():
            above[part] -= 1
            if not above[part] and part not in needed and part in pieces.parts:
                heapq.heappush(waiting, (price(part), -part))
    return TokenRanking(growth_V, tuple(order))
