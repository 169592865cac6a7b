"""Dimensions that must agree -> one expression for each: unification, as for types in Hindley-Milner inference.

    a variable          is bound to what it is compared with, and refined everywhere when it meets something finer
    a product           is matched factor by factor, from the right (the last factor varies fastest)
    a concatenation     is matched part by part, from the left
    no way to agree     freezes the variables of both sides: nothing is cut along them, so the result stays correct

The guarantee, which the property tests check: after `unify(a, b)`, every index of a and the same index of b name the
same unit of every variable that is not frozen.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

from secateur.discovery.algebra import (
    ONE,
    Concat,
    Expression,
    Fixed,
    Product,
    Variable,
    concat,
    product,
    show,
    substitute,
    variables_in,
)

FIXED_POSITIONS = "the code addresses its positions one by one"
CUT_INSIDE = "the code cuts through it at a position that is no whole unit"
NO_COMMON_FACTOR = "the code reshapes it into sizes that do not factor"


class Unifier:
    """The variables of one model, the expression that each is bound to, and why some are frozen.

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
        """Why the variable is frozen, or None where it can be cut."""
        return self._reasons.get(variable.name)

    def resolve(self, expression: Expression) -> Expression:
        """The expression in normal form with every bound variable replaced by what it is bound to."""
        return substitute(expression, self._resolved)

    def _resolved(self, variable: Variable) -> Expression:
        if variable.name not in self._bound:
            return variable
        resolved = self._bound[variable.name] = self.resolve(self._bound[variable.name])
        return resolved

    # --- frozen variables

    def freeze(self, expression: Expression, reason: str) -> None:
        """Freeze every variable of the expression; a variable keeps its first reason."""
        for variable in variables_in(self.resolve(expression)):
            self._reasons.setdefault(variable.name, reason)

    def is_frozen(self, expression: Expression) -> bool:
        """Whether every variable of the expression is frozen."""
        return all(variable.name in self._reasons for variable in variables_in(self.resolve(expression)))

    # --- equality

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
            case (Variable() as variable, other) | (other, Variable() as variable):
                self._bind_or_freeze(variable, other)
            case (Fixed(), other) | (other, Fixed()):
                self.freeze(other, FIXED_POSITIONS)
            case (Product(), Product()):
                self._unify_products(left, right)
            case (Concat(), Concat()):
                self._unify_concats(left, right)
            case (Product() as factors, Concat() as parts) | (Concat() as parts, Product() as factors):
                self._unify_product_and_concat(factors, parts)

    # --- refinement: views split a dimension into factors, slices into parts

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
                self.freeze(expression, NO_COMMON_FACTOR)
                return self.variable(outer, frozen=NO_COMMON_FACTOR), self.variable(inner, frozen=NO_COMMON_FACTOR)
            case Concat(parts=parts):
                # Where every part holds whole runs of `inner`, the parts share the inner factor: (q + k)·dim.
                if all(part.size % inner == 0 for part in parts):
                    pairs = [self.factor(part, inner) for part in parts]
                    for _, right in pairs[1:]:
                        self.unify(pairs[0][1], right)
                    return concat([left for left, _ in pairs]), self.resolve(pairs[0][1])
                # Else each run of `inner` is a concatenation itself, and all of them agree.
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
                # The cut goes through one unit of the first factor: that unit stays, whole or in two parts.
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

    # --- matching

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
