"""Expressions for the dimensions of tensors, and what a cut leaves of them.

A dimension of size n is written as an expression over **variables**:

    Variable(name, n)    n units of their own
    Fixed(n)             n positions that stay as they are
    Product((a, b, c))   row-major: index = (i_a * |b| + i_b) * |c| + i_c
    Concat((a, b))       the indices of a, then those of b

The output rows of a query projection are `kv·query·(64)`: for every KV head its query heads, 64 rows each.
`unification` finds these expressions; this module holds them. It knows nothing of tensors, models or torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod


@dataclass(frozen=True, slots=True)
class Variable:
    """`size` units that can be told apart; `name` says which."""

    name: str
    size: int


@dataclass(frozen=True, slots=True)
class Fixed:
    """`size` positions that no cut touches."""

    size: int


@dataclass(frozen=True, slots=True)
class Product:
    """A row-major product of factors; the last one varies fastest."""

    factors: tuple[Expression, ...]

    @property
    def size(self) -> int:
        """Product of the sizes of the factors."""
        return prod(factor.size for factor in self.factors)


@dataclass(frozen=True, slots=True)
class Concat:
    """Parts one after another."""

    parts: tuple[Expression, ...]

    @property
    def size(self) -> int:
        """Sum of the sizes of the parts."""
        return sum(part.size for part in self.parts)


Expression = Variable | Fixed | Product | Concat
ONE = Fixed(1)


def product(factors: Sequence[Expression]) -> Expression:
    """The product in normal form: flat, without factors of size 1, with neighbouring fixed factors merged.

    >>> show(product([Variable("kv", 4), Fixed(2), Fixed(8), Fixed(1)]))
    'kv·(16)'
    """
    flat: list[Expression] = []
    for factor in factors:
        for item in factor.factors if isinstance(factor, Product) else (factor,):
            if item.size == 1:
                continue
            if isinstance(item, Fixed) and flat and isinstance(flat[-1], Fixed):
                flat[-1] = Fixed(flat[-1].size * item.size)
            else:
                flat.append(item)
    if not flat:
        return ONE
    return flat[0] if len(flat) == 1 else Product(tuple(flat))


def concat(parts: Sequence[Expression]) -> Expression:
    """The concatenation in normal form: flat, no empty parts, equal neighbours as one product with a fixed factor.

    >>> half = Variable("half", 32)
    >>> show(concat([half, half]))
    '(2)·half'
    >>> show(concat([Variable("q", 8), Variable("k", 4), Fixed(2), Fixed(1)]))
    'q + k + (3)'
    """
    flat: list[Expression] = []
    for part in parts:
        for item in part.parts if isinstance(part, Concat) else (part,):
            if item.size == 0:
                continue
            (n, body), (m, other) = _repetition(flat[-1]) if flat else (0, None), _repetition(item)
            if body == other:
                flat[-1] = product([Fixed(n + m), other])
            else:
                flat.append(item)
    if not flat:
        return Fixed(0)
    return flat[0] if len(flat) == 1 else Concat(tuple(flat))


def _repetition(expression: Expression) -> tuple[int, Expression]:
    """How often an expression repeats the same body, and the body."""
    if isinstance(expression, Fixed):
        return expression.size, ONE
    if isinstance(expression, Product) and isinstance(expression.factors[0], Fixed):
        return expression.factors[0].size, product(expression.factors[1:])
    return 1, expression


def variables_in(expression: Expression) -> Iterator[Variable]:
    """The variables of an expression from left to right, with repetitions.

    >>> [variable.name for variable in variables_in(concat([Variable("q", 8), product([Variable("kv", 2), Fixed(4)])]))]
    ['q', 'kv']
    """
    match expression:
        case Variable():
            yield expression
        case Product(factors=items) | Concat(parts=items):
            for item in items:
                yield from variables_in(item)


def substitute(expression: Expression, replacement: Callable[[Variable], Expression]) -> Expression:
    """The expression in normal form with every variable replaced.

    >>> show(substitute(product([Variable("v7", 4), Fixed(8)]), lambda v: Variable("kv", v.size)))
    'kv·(8)'
    """
    match expression:
        case Variable():
            return replacement(expression)
        case Product(factors=factors):
            return product([substitute(factor, replacement) for factor in factors])
        case Concat(parts=parts):
            return concat([substitute(part, replacement) for part in parts])
        case Fixed():
            return expression


def show(expression: Expression) -> str:
    """The expression as people read it; `parse` reads it back.

    >>> show(Product((Concat((Variable("q", 4), Variable("k", 2))), Fixed(8))))
    '(q + k)·(8)'
    """
    match expression:
        case Variable(name=name):
            return name
        case Fixed(size=size):
            return f"({size})"
        case Product(factors=factors):
            return "·".join(f"({show(f)})" if isinstance(f, Concat) else show(f) for f in factors)
        case Concat(parts=parts):
            return " + ".join(show(part) for part in parts)


def size_after(expression: Expression, kept: Mapping[str, int]) -> int:
    """The size of the dimension when variable `name` keeps `kept[name]` of its units.

    >>> size_after(product([Variable("kv", 4), Fixed(16)]), {"kv": 3})
    48
    """
    match expression:
        case Variable(name=name, size=size):
            return kept.get(name, size)
        case Fixed(size=size):
            return size
        case Product(factors=factors):
            return prod(size_after(factor, kept) for factor in factors)
        case Concat(parts=parts):
            return sum(size_after(part, kept) for part in parts)


def units_along(expression: Expression, variable: str) -> list[int]:
    """For every index of the dimension the unit of `variable` that it belongs to, or -1.

    >>> units_along(concat([product([Variable("kv", 2), Fixed(2)]), Fixed(1)]), "kv")
    [0, 0, 1, 1, -1]
    """
    match expression:
        case Variable(name=name, size=size):
            return list(range(size)) if name == variable else [-1] * size
        case Fixed(size=size):
            return [-1] * size
        case Product(factors=factors):
            units = [-1]
            for factor in factors:
                inner = units_along(factor, variable)
                units = [b if a < 0 else a for a in units for b in inner]
            return units
        case Concat(parts=parts):
            return [unit for part in parts for unit in units_along(part, variable)]


def kept_along(expression: Expression, keep: Mapping[str, Sequence[int]]) -> list[int]:
    """The indices of the dimension that stay when each variable keeps the units `keep[name]`, in order.

    >>> kept_along(product([Variable("kv", 3), Fixed(2)]), {"kv": (0, 2)})
    [0, 1, 4, 5]
    """
    match expression:
        case Variable(name=name, size=size):
            return list(keep.get(name, range(size)))
        case Fixed(size=size):
            return list(range(size))
        case Product(factors=factors):
            indices = [0]
            for factor in factors:
                inner = kept_along(factor, keep)
                indices = [a * factor.size + b for a in indices for b in inner]
            return indices
        case Concat(parts=parts):
            indices, offset = [], 0
            for part in parts:
                indices += [offset + index for index in kept_along(part, keep)]
                offset += part.size
            return indices
