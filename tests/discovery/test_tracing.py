"""A forward pass is recorded whole, in order and by name, without allocating or changing anything."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from secateur.discovery.graph import Graph, Ref
from secateur.discovery.tracing import trace, unlike
from secateur.errors import DiscoveryError
from secateur.models.loading import skeleton

HIDDEN = 16


def tiny(**changes: Any) -> LlamaConfig:
    sizes: dict[str, Any] = {
        "vocab_size": 50,
        "hidden_size": HIDDEN,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return LlamaConfig(**sizes | changes)


class Plain(nn.Module):
    """Embedded tokens through one function, which sees the module."""

    def __init__(self, function: Callable[[Tensor, Any], Tensor], **children: nn.Module | Tensor) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 6)
        self.function = function
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> tuple[Tensor, ...]:
        return (self.function(self.embed(input_ids), self),)


class Inner(nn.Module):
    """A function with a module's name."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.fixture(scope="module")
def graph() -> Graph:
    return trace(skeleton(tiny()))


def batch_and_length(graph: Graph) -> tuple[int, ...]:
    return graph.shapes[graph.inputs["input_ids"]]


# --- what is recorded -------------------------------------------------------------------------------------------


def test_inputs_weights_and_outputs_have_their_shapes(graph: Graph) -> None:
    expected = {name: tuple(p.shape) for name, p in skeleton(tiny()).named_parameters()}
    assert {name: graph.shapes[number] for name, number in graph.parameters.items()} == expected
    assert list(graph.inputs) == ["input_ids"]
    assert batch_and_length(graph) == unlike({size for shape in expected.values() for size in shape}, 2)
    assert [graph.shapes[number] for number in graph.outputs] == [(*batch_and_length(graph), 50)]


def test_every_tensor_is_made_before_it_is_used(graph: Graph) -> None:
    known = {*graph.parameters.values(), *graph.buffers.values(), *graph.inputs.values(), *graph.constants}
    for node in graph.nodes:
        used = {value.tensor for value in node.arguments.values() if isinstance(value, Ref)}
        assert used <= known, node
        known.update(node.outputs)
    assert set(graph.outputs) <= known


def test_every_operator_names_the_module_whose_forward_ran_it(graph: Graph) -> None:
    modules = dict(skeleton(tiny()).named_modules())
    assert {node.module for node in graph.nodes} <= set(modules)
    for name, module in modules.items():
        if isinstance(module, nn.Linear):
            assert [node.op for node in graph.nodes if node.module == name][-2:] == ["aten.mm", "aten._unsafe_view"]
    assert "aten._softmax" in {node.op for node in graph.nodes if node.module == "model.layers.1.self_attn"}
    assert "aten.silu" in {node.op for node in graph.nodes if node.module == "model.layers.0.mlp.act_fn"}
    assert {node.op for node in graph.nodes if node.module == "model.layers.0"} == {"aten.add"}  # the residual sums


def test_arguments_are_by_name_with_tensors_replaced_by_references() -> None:
    graph = trace(Plain(lambda x, m: torch.cat([x, m.bias.expand_as(x)], -1).add_(1), bias=nn.Parameter(torch.ones(6))))
    nodes = {node.op: node for node in graph.nodes}
    (embedded,) = nodes["aten.embedding"].outputs
    (expanded,) = nodes["aten.expand"].outputs
    assert nodes["aten.expand"].arguments["self"] == Ref(graph.parameters["bias"])
    assert nodes["aten.cat"].arguments == {"tensors": (Ref(embedded), Ref(expanded)), "dim": -1}
    assert (nodes["aten.cat"].pointwise, nodes["aten.cat"].in_place) == (False, None)
    assert (nodes["aten.add_"].pointwise, nodes["aten.add_"].in_place) == (True, "self")
    assert nodes["aten.add_"].outputs == nodes["aten.cat"].outputs


def test_the_items_of_a_module_list_are_noted_with_what_they_take_and_give(graph: Graph) -> None:
    assert list(graph.item_calls) == ["model.layers.0", "model.layers.1"]
    (first, middle), (also_middle, last) = graph.item_calls.values()
    assert middle == also_middle
    assert {graph.shapes[number] for number in (first, middle, last)} == {(*batch_and_length(graph), HIDDEN)}


def test_tied_parameters_are_listed_under_their_first_name(graph: Graph) -> None:
    assert graph.tied == {}
    tied = trace(skeleton(tiny(tie_word_embeddings=True)))
    assert tied.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert "lm_head.weight" not in tied.parameters
    table = Ref(tied.parameters["model.embed_tokens.weight"])
    assert {node.module for node in tied.nodes if table in node.arguments.values()} == {"model.embed_tokens", "lm_head"}


def test_buffers_outside_the_checkpoint_are_computed_ones(graph: Graph) -> None:
    assert "model.rotary_emb.inv_freq" in graph.computed_buffers
    model = Plain(lambda x, m: x * m.saved + m.computed)
    model.register_buffer("saved", torch.ones(6))
    model.register_buffer("computed", torch.ones(6), persistent=False)
    plain = trace(model)
    assert set(plain.buffers) == {"saved", "computed"}
    assert plain.computed_buffers == {"computed"}


def test_tensors_that_the_code_holds_elsewhere_are_constants() -> None:
    model = Plain(lambda x, m: x + m.slopes, slopes=torch.arange(6.0))
    graph = trace(model)
    assert [graph.shapes[number] for number in graph.constants] == [(6,)]


def test_two_traces_are_equal(graph: Graph) -> None:
    assert trace(skeleton(tiny())) == graph


@given(st.sets(st.integers(0, 1000), max_size=8))
def test_batch_and_sequence_divide_no_size(sizes: set[int]) -> None:
    batch, sequence = unlike(sizes, 2)
    assert 5 <= batch < sequence
    assert all(size % batch and size % sequence for size in sizes if size)
    assert all(n % d for n in (batch, sequence) for d in range(2, n))


def test_sizes_of_the_model_push_the_batch_and_the_sequence_away() -> None:
    graph = trace(skeleton(tiny(vocab_size=5 * 7, intermediate_size=11 * 2)))
    assert batch_and_length(graph) == (13, 17)


# --- numbers that the code looks at -----------------------------------------------------------------------------


def lookups(graph: Graph) -> list[tuple[Any, Any]]:
    """What is looked up, and by which numbers."""
    return [(n.arguments["self"], n.arguments["indices"]) for n in graph.nodes if n.op == "aten.index"]


def added_in_place(positions: Tensor) -> Tensor:
    return positions.add_(1)


@pytest.mark.parametrize(
    ("function", "values"),
    [
        (lambda x, m: x[..., [-2, -1]], [(-2, -1)]),
        (lambda x, m: x[:, torch.tensor([0, 3])][..., [1]], [(0, 3), (1,)]),
        (lambda x, m: x[..., m.positions], [(4, 2)]),  # held outside the parameters and buffers
        (lambda x, m: x[..., added_in_place(torch.tensor([0, 1]))], []),
        (lambda x, m: x[..., torch.tensor([[0, 1]])], []),
        (lambda x, m: x[..., torch.arange(2)], []),
        (lambda x, m: x * torch.tensor([0.5, 1.0, 0.5, 1.0, 0.5, 1.0]), []),
        (lambda x, m: x, []),
    ],
    ids=["list", "two lists", "held", "changed", "two dimensions", "made", "no numbers of positions", "none"],
)
def test_positions_that_the_code_writes_out_are_kept(
    function: Callable[[Tensor, Any], Tensor], values: list[tuple[int, ...]]
) -> None:
    graph = trace(Plain(function, positions=torch.tensor([4, 2])))
    assert list(graph.literal_indices.values()) == values
    assert set(graph.literal_indices) == {ref.tensor for _, by in lookups(graph) for ref in by if ref and values}


def test_a_branch_on_activations_is_taken() -> None:
    graph = trace(Plain(lambda x, m: x.exp() if x.sum() > 0 else x.neg()))
    ops = [node.op for node in graph.nodes]
    assert "aten.exp" in ops
    assert "aten.neg" not in ops
    assert graph.shapes[graph.outputs[0]] == (*batch_and_length(graph), 6)


class OddTokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 6)

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> tuple[Tensor, ...]:
        return (self.embed(input_ids[input_ids % 2 == 1]),)


def test_what_depends_on_the_inputs_alone_is_computed() -> None:
    graph = trace(OddTokens())  # the tokens of a trace count up and start again after the last row of the table
    odd = sum(i % 50 % 2 for i in range(prod(batch_and_length(graph))))
    assert graph.shapes[graph.outputs[0]] == (odd, 6)


def each_chosen(x: Tensor, m: Any) -> Tensor:
    """The weights of each unit that any token chooses, each unit's for the tokens that chose it."""
    tokens = x.flatten(0, 1)
    mask = torch.zeros(len(tokens), 5).scatter(-1, (tokens @ m.gate).topk(2, -1).indices, 1.0)
    result = torch.zeros_like(tokens)
    for unit in mask.sum(0).gt(0).nonzero():
        (rows,) = torch.where(mask[:, unit[0]])
        result.index_add_(0, rows, tokens[rows] * m.units[unit[0]])
    return result.view(x.shape)


def test_a_loop_over_what_was_chosen_looks_up_by_number() -> None:
    model = Plain(each_chosen, gate=nn.Parameter(torch.ones(6, 5)), units=nn.Parameter(torch.ones(5, 6)))
    graph = trace(model)
    units = Ref(graph.parameters["units"])
    found = [by for what, by in lookups(graph) if what == units]
    assert len(found) == 2  # the first two are chosen
    made_by = {number: node for node in graph.nodes for number in node.outputs}
    assert all(made_by[ref.tensor].op == "aten.select" for (ref,) in found)
    assert all(graph.shapes[ref.tensor] == () for (ref,) in found)
    assert [node.op for node in graph.nodes if node.outputs == ()] == []


def test_a_number_that_the_code_reads_for_more_than_a_lookup_is_recorded() -> None:
    graph = trace(Plain(lambda x, m: x * x.sum().item() + x[..., x[0, 0].argmax()].unsqueeze(-1)))
    reads = [node for node in graph.nodes if node.op == "aten._local_scalar_dense"]
    made_by = {number: node.op for node in graph.nodes for number in node.outputs}
    assert [made_by[node.arguments["self"].tensor] for node in reads] == ["aten.sum"]
    assert [made_by[ref.tensor] for _, by in lookups(graph) for ref in by if ref] == ["aten.argmax"]


class Searching(nn.Module):
    """Looks for a token in every row."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 6)

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> tuple[Tensor, ...]:
        places = [row.index(47) for row in input_ids.tolist()]
        assert places == [1] * len(places)
        return (self.embed(input_ids)[:, places[0]],)


def test_every_row_begins_with_the_start_tokens() -> None:
    with pytest.raises(DiscoveryError, match=r"it failed in 'the model' with ValueError: 47 is not in list$"):
        trace(Searching())
    graph = trace(Searching(), start_tokens=(3, 47))
    batch, _ = batch_and_length(graph)
    assert graph.shapes[graph.outputs[0]] == (batch, 6)


def test_rows_are_longer_than_their_start_tokens() -> None:
    graph = trace(Searching(), start_tokens=(3, 47, *range(20)))
    assert batch_and_length(graph) == (7, 23)


# --- compiled code ----------------------------------------------------------------------------------------------


def gated(x: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return torch.cat([torch.tanh(low) * high, 0.5 * high * (1.0 + low)], dim=-1)


class Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return gated(x)


COMPILED: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
    "script": lambda: torch.jit.script(gated),
    "trace": lambda: torch.jit.trace(gated, torch.ones(2, 3, 6)),
    "compile": lambda: torch.compile(gated),
    "compile, whole": lambda: torch.compile(gated, fullgraph=True, backend="eager"),
    "autograd": lambda: Gated.apply,
}


def operators(graph: Graph) -> list[str]:
    return [node.op for node in graph.nodes]


@pytest.mark.parametrize("how", COMPILED)
def test_compiled_functions_are_seen_through(how: str) -> None:
    compiled = COMPILED[how]()
    graph = trace(Plain(lambda x, m: compiled(x)))
    assert operators(graph) == operators(trace(Plain(lambda x, m: gated(x))))
    assert "aten.tanh" in operators(graph)


def test_a_scripted_module_is_recorded() -> None:
    model = Plain(lambda x, m: m.linear(x), linear=torch.jit.script(nn.Linear(6, 4)))
    graph = trace(model)
    assert "aten.addmm" in operators(graph)
    weights = {graph.parameters["linear.weight"], graph.parameters["linear.bias"]}
    used = {ref.tensor for node in graph.nodes for ref in node.arguments.values() if isinstance(ref, Ref)}
    assert weights <= used
    assert graph.shapes[graph.outputs[0]] == (*batch_and_length(graph), 4)


# --- what is left alone -----------------------------------------------------------------------------------------


def test_a_model_larger_than_any_memory_is_traced() -> None:
    model = skeleton(tiny(vocab_size=10**6, hidden_size=2**20, intermediate_size=2**22, head_dim=2**18))
    weights = sum(p.numel() for p in model.parameters())
    assert weights > 10**13
    assert trace(model).shapes[0] == (10**6, 2**20)
    assert {p.device.type for p in model.parameters()} == {"meta"}


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_a_model_with_weights_is_neither_run_nor_changed() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(tiny(), attn_implementation="eager").eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tensors = {name: id(p) for name, p in model.named_parameters()}
    graph = trace(model)
    assert [node.op for node in graph.nodes] == [node.op for node in trace(skeleton(tiny())).nodes]
    assert {name: id(p) for name, p in model.named_parameters()} == tensors
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert hooks(model) == 0
    assert model(torch.zeros(1, 3, dtype=torch.long)).logits.isfinite().all()


# --- what cannot be traced --------------------------------------------------------------------------------------


def fails(x: Tensor) -> Tensor:
    raise RuntimeError("sizes do not fit\nand a second line")


def fails_in_a_branch(x: Tensor) -> Tensor:
    return fails(x) if x.sum() > 0 else x


def leaves_torch(x: Tensor) -> Tensor:
    return torch.tensor(x.tolist() and x.numpy())


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (fails, r"Plain: the forward pass could not be traced; it failed in 'blocks\.0' with RuntimeError: sizes do "),
        (
            fails_in_a_branch,
            r"Plain: the forward pass could not be traced; it failed in 'blocks\.0' with RuntimeError: s",
        ),
        (leaves_torch, r"Plain: the forward pass could not be traced; it failed in 'blocks\.0' with RuntimeError: "),
    ],
)
def test_a_forward_pass_that_cannot_be_traced_is_named(function: Callable[[Tensor], Tensor], message: str) -> None:
    model = Plain(lambda x, m: m.blocks[0](x), blocks=nn.ModuleList([Inner(function)]))
    with pytest.raises(DiscoveryError, match=message) as raised:
        trace(model)
    assert len(str(raised.value).splitlines()) == 1
    assert raised.value.__cause__ is not None
    assert hooks(model) == 0


def test_a_failure_outside_every_module_is_the_models() -> None:
    with pytest.raises(
        DiscoveryError, match=r"it failed in 'the model' with RuntimeError: sizes do not fit and a second line$"
    ):
        trace(Plain(lambda x, m: fails(x)))
