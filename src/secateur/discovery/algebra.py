"""Expressions for the dimensions of tensors, and their unification.

A dimension of size n is written as an expression over **variables**:

    Variable(name, n)        n units of their own
    Fixed(n)             n positions that stay as they are
    Product((a, b, c))   row-major: index = (i_a * |b| + i_b) * |c| + i_c
    Concat((a, b))       the indices of a, then those of b

Two dimensions that must agree are unified, as types are in Hindley-Milner inference: a variable is bound to what it is
compared with, a product is matched factor by factor from the right, a concatenation part by part from the left, and
a variable that meets something finer is refined everywhere. Where two expressions cannot be made to agree, their
variables are **frozen**: correct, since nothing is then cut along them.

What it guarantees (and what the property tests check): after `unify(a, b)`, every index of a and the same index of b
name the same unit of every variable that is not frozen.

This module knows nothing of tensors, models or torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
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
            merged = _repeated(flat[-1], item) if flat else None
            if merged is None:
                flat.append(item)
            else:
                flat[-1] = merged
    if not flat:
        return Fixed(0)
    return flat[0] if len(flat) == 1 else Concat(tuple(flat))


def _repeated(left: Expression, right: Expression) -> Expression | None:
    """Left and right as one product (n + m)·body when they repeat the same body, else None."""
    (n, body), (m, other) = _repetition(left), _repetition(right)
    return product([Fixed(n + m), body]) if body == other else None


def _repetition(expression: Expression) -> tuple[int, Expression]:
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


def parse(text: str, sizes: dict[str, int]) -> Expression:
    """Read what `show` wrote; `sizes` gives the number of units of every variable named.

    >>> parse("(q + k)·(8)", {"q": 4, "k": 2}).size
    48
    """
    tokens = [token for token in _tokens(text) if token.strip()]
    expression, rest = _parse_sum(tokens, sizes)
    if rest:
        raise ValueError(f"cannot read {text!r}: {rest[0]!r} was not expected")
    return expression


def _tokens(text: str) -> Iterator[str]:
    word = ""
    for character in text:
        if character in "()·+":
            yield word.strip()
            yield character
            word = ""
        else:
            word += character
    yield word.strip()


def _parse_sum(tokens: list[str], sizes: dict[str, int]) -> tuple[Expression, list[str]]:
    parts = []
    while True:
        part, tokens = _parse_product(tokens, sizes)
        parts.append(part)
        if not tokens or tokens[0] != "+":
            return concat(parts), tokens
        tokens = tokens[1:]


def _parse_product(tokens: list[str], sizes: dict[str, int]) -> tuple[Expression, list[str]]:
    factors: list[Expression] = []
    while True:
        if not tokens:
            raise ValueError("the expression ends too early")
        head, tokens = tokens[0], tokens[1:]
        if head == "(" and tokens and tokens[0].isdigit():
            factors.append(Fixed(int(tokens[0])))
            tokens = tokens[2:]
        elif head == "(":
            inner, tokens = _parse_sum(tokens, sizes)
            factors.append(inner)
            tokens = tokens[1:]
        else:
            factors.append(Variable(head, sizes[head]))
        if not tokens or tokens[0] != "·":
            return product(factors), tokens
        tokens = tokens[1:]


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


class Unifier:
    """The variables of one model, what each is bound to, and why some are frozen.

    >>> u = Unifier()
    >>> rows, head, dim = u.variable(12), u.variable(3), u.variable(4)
    >>> u.unify(rows, product([head, dim]))
    >>> show(u.resolve(rows)) == f"{head.name}·{dim.name}"
    True
    """

    def __init__(self) -> None:
        self._bound: dict[str, Expression] = {}
        self._reasons: dict[str, str] = {}
        self._numbers = count()

    def variable(self, size: int, *, frozen: str | None = None, prefix: str = "v") -> Expression:
        """A new variable of `size` units (0 and 1 need no name); `frozen` is the reason when it must not be cut."""
        if size <= 1:
            return Fixed(size)
        variable = Variable(f"{prefix}{next(self._numbers)}", size)
        if frozen is not None:
            self._reasons[variable.name] = frozen
        return variable

    def reason(self, variable: Variable) -> str | None:
        """Why the variable is frozen, or None when it is free."""
        return self._reasons.get(variable.name)

    def resolve(self, expression: Expression) -> Expression:
        """The expression in normal form with every bound variable replaced by what it is bound to."""
        match expression:
            case Variable(name=name):
                if name not in self._bound:
                    return expression
                resolved = self.resolve(self._bound[name])
                self._bound[name] = resolved
                return resolved
            case Fixed():
                return expression
            case Product(factors=factors):
                return product([self.resolve(factor) for factor in factors])
            case Concat(parts=parts):
                return concat([self.resolve(part) for part in parts])

    def freeze(self, expression: Expression, reason: str) -> None:
        """Freeze every variable of the expression; the first reason given for a variable stays."""
        for variable in variables_in(self.resolve(expression)):
            self._reasons.setdefault(variable.name, reason)

    def is_frozen(self, expression: Expression) -> bool:
        """Whether no variable of the expression is free."""
        return all(variable.name in self._reasons for variable in variables_in(self.resolve(expression)))

    def unify(self, left: Expression, right: Expression) -> None:
        """Make the two expressions agree index by index; freeze what cannot be made to agree."""
        left, right = self.resolve(left), self.resolve(right)
        if left == right:
            return
        if left.size != right.size:
            raise ValueError(f"sizes differ: {show(left)} is {left.size}, {show(right)} is {right.size}")
        match left, right:
            case (Variable(), Variable()):
                self._bind(right, left)
            case (Variable(), _):
                self._bind_or_freeze(left, right)
            case (_, Variable()):
                self._bind_or_freeze(right, left)
            case (Fixed(), _):
                self.freeze(right, FIXED_POSITIONS)
            case (_, Fixed()):
                self.freeze(left, FIXED_POSITIONS)
            case (Product(), Product()):
                self._unify_products(left, right)
            case (Concat(), Concat()):
                self._unify_concats(left, right)
            case (Product(), Concat()):
                self._unify_product_and_concat(left, right)
            case (Concat(), Product()):
                self._unify_product_and_concat(right, left)

    def factor(self, expression: Expression, inner: int) -> tuple[Expression, Expression]:
        """Write the expression as outer·inner with an inner factor of size `inner`, which must divide its size."""
        expression = self.resolve(expression)
        outer = expression.size // inner
        if inner == 1:
            return expression, ONE
        if outer == 1:
            return ONE, expression
        match expression:
            case Variable():
                reason = self.reason(expression)
                parts = self.variable(outer, frozen=reason), self.variable(inner, frozen=reason)
                if reason is None:  # a frozen variable is never cut: it can stay whole
                    self._bound[expression.name] = product(parts)
                return parts
            case Fixed():
                return Fixed(outer), Fixed(inner)
            case Product(factors=(*rest, last)):
                if inner % last.size == 0:
                    left, right = self.factor(product(rest), inner // last.size)
                    return left, product([right, last])
                if last.size % inner == 0:
                    left, right = self.factor(last, inner)
                    return product([*rest, left]), right
                return self._opaque(expression, outer, inner)
            case Concat(parts=parts):
                if all(part.size % inner == 0 for part in parts):
                    pairs = [self.factor(part, inner) for part in parts]
                    for _, right in pairs[1:]:
                        self.unify(pairs[0][1], right)
                    return concat([left for left, _ in pairs]), self.resolve(pairs[0][1])
                chunks = self.cut(expression, [inner] * outer)
                for chunk in chunks[1:]:
                    self.unify(chunks[0], chunk)
                return Fixed(outer), self.resolve(chunks[0])
        raise AssertionError(expression)

    def cut(self, expression: Expression, sizes: Sequence[int]) -> list[Expression]:
        """Write the expression as a concatenation of parts of the given sizes, which must add up to its size."""
        pieces, rest = [], expression
        for size in sizes[:-1]:
            piece, rest = self._cut_once(rest, size)
            pieces.append(piece)
        return [*pieces, rest]

    def _cut_once(self, expression: Expression, at: int) -> tuple[Expression, Expression]:
        expression = self.resolve(expression)
        if at == 0 or at == expression.size:
            empty = Fixed(0)
            return (empty, expression) if at == 0 else (expression, empty)
        match expression:
            case Variable(size=size):
                reason = self.reason(expression)
                parts = self.variable(at, frozen=reason), self.variable(size - at, frozen=reason)
                if reason is None:  # as in `factor`
                    self._bound[expression.name] = concat(parts)
                    parts = self.resolve(parts[0]), self.resolve(parts[1])
                return parts
            case Fixed(size=size):
                return Fixed(at), Fixed(size - at)
            case Product(factors=(first, *others)):
                rest = product(others)
                if at % rest.size == 0:
                    left, right = self._cut_once(first, at // rest.size)
                    return product([left, rest]), product([right, rest])
                self.freeze(first, CUT_INSIDE)
                whole, offset = divmod(at, rest.size)
                left, right = self._cut_once(rest, offset)
                rest = self.resolve(rest)
                before, after = product([Fixed(whole), rest]), product([Fixed(first.size - whole - 1), rest])
                return (
                    concat([before, left]) if whole else left,
                    concat([right, after]) if after.size else right,
                )
            case Concat(parts=(first, *others)):
                if at <= first.size:
                    left, right = self._cut_once(first, at)
                    return left, concat([right, *others])
                left, right = self._cut_once(concat(others), at - first.size)
                return concat([first, left]), right
        raise AssertionError(expression)

    def _bind(self, variable: Variable, to: Variable) -> None:
        reason = self.reason(variable) or self.reason(to)
        self._bound[variable.name] = to
        if reason is not None:
            self.freeze(to, reason)

    def _bind_or_freeze(self, variable: Variable, other: Expression) -> None:
        reason = self.reason(variable)
        if reason is not None and self.is_frozen(other):
            return  # nothing can be cut on either side, so nothing is learnt; the variable stays whole
        if isinstance(other, Fixed):
            self.freeze(variable, FIXED_POSITIONS)
            return
        self._bound[variable.name] = other
        if reason is not None:
            self.freeze(other, reason)

    def _unify_products(self, left: Product, right: Product) -> None:
        a, b = left.factors[-1], right.factors[-1]
        small = min(a.size, b.size)
        if a.size % small or b.size % small:
            self.freeze(left, NO_COMMON_FACTOR)
            self.freeze(right, NO_COMMON_FACTOR)
            return
        outer_left, inner_left = self.factor(left, small)
        outer_right, inner_right = self.factor(right, small)
        self.unify(inner_left, inner_right)
        self.unify(outer_left, outer_right)

    def _unify_concats(self, left: Concat, right: Concat) -> None:
        at = min(left.parts[0].size, right.parts[0].size)
        head_left, tail_left = self._cut_once(left, at)
        head_right, tail_right = self._cut_once(right, at)
        self.unify(head_left, head_right)
        self.unify(tail_left, tail_right)

    def _unify_product_and_concat(self, left: Product, right: Concat) -> None:
        inner = left.factors[-1].size
        if all(part.size % inner == 0 for part in right.parts):
            outer_right, inner_right = self.factor(right, inner)
            self.unify(left.factors[-1], inner_right)
            self.unify(product(left.factors[:-1]), outer_right)
            return
        head, tail = self._cut_once(left, right.parts[0].size)
        self.unify(head, right.parts[0])
        self.unify(tail, concat(right.parts[1:]))

    def _opaque(self, expression: Expression, outer: int, inner: int) -> tuple[Expression, Expression]:
        self.freeze(expression, NO_COMMON_FACTOR)
        return self.variable(outer, frozen=NO_COMMON_FACTOR), self.variable(inner, frozen=NO_COMMON_FACTOR)


FIXED_POSITIONS = "the code addresses its positions one by one"
CUT_INSIDE = "the code cuts through it at a position that is no whole unit"
NO_COMMON_FACTOR = "the code reshapes it into sizes that do not factor"
