"""The registry of operator rules: operator name -> rule.

A rule takes the inference so far and one node of the graph. It unifies the dimensions that the operator forces to
agree and returns the dimensions of each output. An operator without a rule is treated as element-wise where torch tags
it so; otherwise all its dimensions are frozen, with a reason that names the operator.

To add a rule, write it in the file of its family (a new file goes into `FAMILIES` in `inference`), or register it in
your own code before you call `discover`:

    >>> from secateur.discovery.graph import Node
    >>> from secateur.discovery.rules.state import Dims, Inference
    >>> @rule("mylib.swiglu")
    ... def swiglu(state: Inference, node: Node) -> list[Dims]:
    ...     '''Gate (..., F) and up (..., F) -> (..., F).'''
    ...     gate, up = state.argument(node, "gate"), state.argument(node, "up")
    ...     for a, b in zip(gate, up):
    ...         state.unifier.unify(a, b)  # unit i of the gate is unit i of up
    ...     state.record_operation("activation", gate)
    ...     return [gate]  # the dimensions of each output
    >>> RULES.pop("mylib.swiglu") is swiglu
    True

Then give the operator a case in `tests/operator_cases`: its axes are checked, and in float64 that the cut
operator computes what the masked one does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from secateur.discovery.graph import Node, references
from secateur.discovery.rules.state import Dims, Inference

Rule = Callable[[Inference, Node], Sequence[Dims]]
RULES: dict[str, Rule] = {}


def rule(*operators: str) -> Callable[[Rule], Rule]:
    """Register a function as the rule of the named operators ("aten.mm"; without the `_` of in-place variants)."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(operators, function))
        return function

    return register


def aten(names: str) -> list[str]:
    """Full names of ATen operators.

    >>> aten("mm bmm")
    ['aten.mm', 'aten.bmm']
    """
    return [f"aten.{name}" for name in names.split()]


def no_rule(state: Inference, node: Node) -> Sequence[Dims]:
    """Freeze every dimension that an unknown operator reads or writes."""
    reason = f"there is no rule for this use of the operator {node.op} (in {node.module or 'the model'})"
    for ref in references(node.arguments.values()):
        for dim in state.dims_of(ref):
            state.unifier.freeze(dim, reason)
    return [state.new_dims(state.graph.shapes[number], frozen=reason) for number in node.outputs]
