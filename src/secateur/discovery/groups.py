"""What discovery finds, as plain values: groups, axes, frozen axes, weights and operations."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from secateur.discovery.algebra import Concat, Expression, Fixed, Product, Variable, show

# Kinds of groups; within a layer, groups are sorted in this order.
KINDS = (
    *("attention", "query", "head_dim", "latent", "state", "mlp", "expert", "expert_mlp", "shared_mlp", "other"),
    *("hidden", "vocabulary", "layer"),
)

BATCH, SEQUENCE = "batch", "sequence"  # variables of operations beside the groups


@dataclass(frozen=True, slots=True)
class Axis:
    """One dimension of one weight; its expression names the groups whose units it holds."""

    weight: str
    """Its name, such as "model.layers.0.mlp.down_proj.weight"."""
    dim: int
    """Number of the dimension: 0 is the output side of a linear layer, 1 the input side."""
    expression: Expression
    """The dimension over the groups: `layers.0.mlp`, `layers.0.attention·(64)`."""


@dataclass(frozen=True, slots=True)
class Group:
    """Axes that must shrink together: removing unit i removes its slice of every one of them."""

    name: str
    """Unique in the model, such as "layers.3.mlp" or "hidden"."""
    kind: str
    """One of KINDS."""
    layer: int | None
    """The layer that holds all its axes; None where several do, or none."""
    units: int
    """Number of units before the cut."""
    axes: tuple[Axis, ...]
    """Every dimension of a weight that holds its units."""
    normed: bool = False
    """A norm takes its mean or variance across the units, so a cut changes the statistic."""
    chosen: bool = False
    """The model chooses among the units (a router does); after a cut, among those that stay."""
    least: int = 1
    """The fewest units that the model's code runs with."""
    multiple: int = 1
    """The number of units must be a multiple of this, as kernels that read it demand."""

    @property
    def family(self) -> str:
        """The name without its layer, which groups of different layers share.

        >>> Group("layers.3.mlp", "mlp", 3, 24, ()).family, Group("hidden", "hidden", None, 12, ()).family
        ('mlp', 'hidden')
        """
        return self.name.removeprefix(f"layers.{self.layer}.")


@dataclass(frozen=True, slots=True)
class Frozen:
    """An axis, or a factor of one, that cannot be cut."""

    weight: str
    dim: int
    size: int
    """Of the axis, or of its factor."""
    reason: str


@dataclass(frozen=True, slots=True)
class Weight:
    """A parameter or a saved buffer: its dimensions as expressions over groups."""

    name: str
    dims: tuple[Expression, ...]
    layer: int | None
    embedding: bool = False
    """A token or position table, or the output head."""
    parameter: bool = True
    """False for a saved buffer."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes before any cut."""
        return tuple(dim.size for dim in self.dims)


@dataclass(frozen=True, slots=True)
class Operation:
    """Work of one operator: the product of the sizes of `dims` multiply-accumulates."""

    kind: str
    """One of "matmul", "norm", "softmax", "activation" and "rotary"."""
    dims: tuple[Expression, ...]
    module: str = ""
    """The module whose forward does it."""


@dataclass(frozen=True, slots=True)
class Discovery:
    """What can be cut in a model, and everything needed to count what a cut leaves.

    `weights` and `operations` are written over the groups, so sizes after a cut are arithmetic, not another model.
    """

    model: str
    groups: tuple[Group, ...]
    frozen: tuple[Frozen, ...]
    weights: tuple[Weight, ...]
    operations: tuple[Operation, ...]
    layer_lists: tuple[str, ...] = ()
    """The module lists whose items are the layers: "model.layers"."""
    tied: dict[str, str] = field(default_factory=dict)
    """Further name of a tied weight -> its name in `weights`."""
    start_tokens: tuple[int, ...] = ()
    """Token ids that begin every row, where the model's code looks for them and fails without."""

    def group(self, name: str) -> Group:
        """The group of that name; KeyError when there is none."""
        for group in self.groups:
            if group.name == name:
                return group
        raise KeyError(name)

    @property
    def names(self) -> frozenset[str]:
        """The names of all groups."""
        return frozenset(group.name for group in self.groups)

    @property
    def depth(self) -> int:
        """The number of layers, whether or not they can be dropped; 1 where none can be told apart."""
        return 1 + max((weight.layer for weight in self.weights if weight.layer is not None), default=0)

    @property
    def layer_paths(self) -> dict[str, int]:
        """Path of each layer module -> its number; of several lists of layers one may be shorter."""
        return {f"{prefix}.{number}": number for prefix in self.layer_lists for number in range(self.depth)}

    def to_json(self) -> dict[str, Any]:
        """Plain data, as `secateur discover --json` writes it."""
        data: dict[str, Any] = _as_json(self)
        return data


def _as_json(value: Any) -> Any:
    """A dataclass as a dict of its fields, an expression as its text."""
    if isinstance(value, Variable | Fixed | Product | Concat):
        return show(value)
    if is_dataclass(value):
        return {field.name: _as_json(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, tuple):
        return [_as_json(item) for item in value]
    return dict(value) if isinstance(value, dict) else value
