"""Products of matrices and vectors: contracted dimensions agree, and so do batch dimensions."""

from __future__ import annotations

from collections.abc import Sequence

from secateur.discovery.graph import Node
from secateur.discovery.rules.registry import aten, no_rule, rule
from secateur.discovery.rules.state import Dims, Inference


@rule(*aten("mm bmm"))
def matmul(state: Inference, node: Node) -> Sequence[Dims]:
    """(M, K) times (K, N), or (B, M, K) times (B, K, N)."""
    return [_contract(state, state.argument(node), state.argument(node, "mat2"))]


@rule(*aten("addmm baddbmm"))
def add_matmul(state: Inference, node: Node) -> Sequence[Dims]:
    """A matrix product plus a bias that broadcasts."""
    left, right = ("mat1", "mat2") if "mat1" in node.arguments else ("batch1", "batch2")
    result = _contract(state, state.argument(node, left), state.argument(node, right))
    return [state.broadcast([result, state.argument(node)])]


def _contract(state: Inference, left: Dims, right: Dims) -> Dims:
    batch = len(right) - 2
    state.batched += left[:batch]
    for a, b in zip(left[:batch], right[:batch], strict=True):
        state.unifier.unify(a, b)
    state.unifier.unify(left[-1], right[batch])
    state.record_operation("matmul", (*left, *right[batch + 1 :]))
    return (*left[:-1], *right[batch + 1 :])


@rule(*aten("mv dot"))
def matrix_vector(state: Inference, node: Node) -> Sequence[Dims]:
    """(M, K) times (K), or (K) times (K)."""
    left = state.argument(node)
    (right,) = state.argument(node, "vec" if "vec" in node.arguments else "tensor")
    state.unifier.unify(left[-1], right)
    state.record_operation("matmul", left)
    return [left[:-1]]


@rule("aten._grouped_mm", "transformers.grouped_mm_fallback")
def grouped_matmul(state: Inference, node: Node) -> Sequence[Dims]:
    """Rows (S, K) sorted by expert times one (K, N) of each expert (E, K, N); `offs` (E) says where each ends."""
    tokens, inner = state.argument(node, "self" if "self" in node.arguments else "input")
    experts, contracted, outer = state.argument(node, "mat2" if "mat2" in node.arguments else "weight")
    state.unifier.unify(inner, contracted)
    state.unifier.unify(experts, state.argument(node, "offs")[0])
    state.selected.append(experts)
    state.record_operation("matmul", (tokens, inner, outer))
    return [(tokens, outer)]


@rule("aten.linalg_solve_triangular")
def solve_triangular(state: Inference, node: Node) -> Sequence[Dims]:
    """A triangular system (..., N, N) solved for (..., N, K)."""
    matrix, right = state.argument(node), state.argument(node, "B")
    batch = state.broadcast([matrix[:-2], right[:-2]])
    if not node.arguments["left"]:
        return no_rule(state, node)
    for dim in (*matrix[-2:], right[-2]):
        state.unifier.freeze(dim, "a triangular system orders its positions")
    state.record_operation("matmul", (*batch, matrix[-2], *right[-2:]))
    return [(*batch, *right[-2:])]
