"""Causal language models with layers of different sizes: a class of transformers, in the shapes that its config lists.

This file lies beside the weights of such a model and needs torch and transformers alone:

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

AutoModel gives the model without its head, in the same shapes; that is what vLLM's transformers backend builds.

`PerLayerX` subclasses the class X of transformers and is made when it is first looked up; `PerLayerXOfY` is for a
model class X with a config class Y that is not its own. The config holds the settings of the dense model and, under
`secateur_per_layer`, what differs from it:

    shapes      of parameters and buffers, by name; never larger than the dense ones
    attributes  sizes that modules hold, by path of the module; never of another type
    configs     settings of modules that read sizes from a config of their own, by path
    skipped     blocks that compute nothing, by path
    padded      matrices whose outputs get zeros, or of whose inputs some are left out, so that the code around them
                sees heads of the dense size, by path

All names are those of the model with its head. `per_layer_config` repeats heads and widths as transformers says them,
for programs that read sizes from a config; the code of the dense model reads the dense ones.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel, configuration_utils

PER_LAYER = "secateur_per_layer"  # the key in config.json, and how the model type begins
CLASS_PREFIX = "PerLayer"
OF_CONFIG = "Of"
GUARD: Any = getattr(configuration_utils, "HeterogeneousConfigMixin", None)  # it guards what differs
SECTIONS = ("shapes", "attributes", "configs", "skipped", "padded")
Settings = Mapping[str, Any]
Parts = tuple[tuple[int, int, int], ...]  # of a dimension: runs, entries that stay at the start of each, all of each


def __getattr__(name: str) -> Any:
    """Look up `PerLayerX`, for a config or model class X of transformers, or `PerLayerXOfY`, for a config class Y."""
    wanted, _, settings = name.removeprefix(CLASS_PREFIX).partition(OF_CONFIG)
    stock = getattr(transformers, wanted, None) if name.startswith(CLASS_PREFIX) else None
    config = getattr(transformers, settings, None) if settings else None
    is_class = isinstance(stock, type) and issubclass(stock, (PreTrainedConfig, PreTrainedModel))
    if not is_class or (settings and not (isinstance(config, type) and issubclass(config, PreTrainedConfig))):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return per_layer_class(stock, config)


def per_layer_class(stock: Any, config: Any = None) -> Any:
    """Make the class of per-layer shapes of a configuration or model class of transformers; the same one every time.

    A model class that is also that of other configs than its own is made anew for each, when given.

    >>> per_layer_class(transformers.OPTConfig).model_type
    'secateur_per_layer_opt'
    """
    own = config is None or issubclass(stock, PreTrainedConfig) or config is stock.config_class
    name = f"{CLASS_PREFIX}{stock.__name__}" + ("" if own else f"{OF_CONFIG}{config.__name__}")
    if name not in globals():
        if issubclass(stock, PreTrainedConfig):
            globals()[name] = _config_class(name, stock)
        else:
            globals()[name] = _model_class(name, stock, stock.config_class if own else config)
    return globals()[name]


def _config_class(name: str, stock: Any) -> type:
    def initialise(self: Any, **settings: Any) -> None:
        per_layer = settings.setdefault(PER_LAYER, {})
        settings["model_type"] = self.__class__.model_type
        stock.__init__(self, **settings)
        setattr(self, PER_LAYER, per_layer)

    def read(self: Any, name: str) -> Any:
        """The dense value where layers differ; transformers would warn of it, or refuse."""
        other = super(GUARD, self).__getattribute__("attribute_map")
        return super(GUARD, self).__getattribute__(other.get(name, name))

    def to_dict(self: Any) -> dict[str, Any]:
        """With the number of layers by its usual name, without which no other config class reads what differs."""
        written: dict[str, Any] = stock.to_dict(self)
        if "per_layer_config" in written:
            written.setdefault("num_hidden_layers", self.num_hidden_layers)
        return written

    members = {
        "__init__": initialise,
        "to_dict": to_dict,
        "__module__": __name__,
        "__doc__": f"The settings of a {stock.__name__} and, in `{PER_LAYER}`, the shapes that differ.",
        "model_type": f"{PER_LAYER}_{stock.model_type}",
        "_auto_class": "AutoConfig",  # a saved config takes this file along
    }
    return type(name, (stock,), members if GUARD is None else members | {"__getattribute__": read})


def _model_class(name: str, stock: Any, config: Any) -> type:
    @functools.wraps(stock.__init__)  # with its signature, which vLLM compares with what it passes
    def initialise(self: Any, config: PreTrainedConfig, *args: Any, **options: Any) -> None:
        stock.__init__(self, config, *args, **options)
        apply_in_place(self, _sections_of(self, config, stock))

    def followed(method: Any) -> Any:
        def set_implementation(self: Any, *args: Any, **options: Any) -> None:
            method(self, *args, **options)
            _follow_in_place(self, stock)

        return set_implementation

    members: dict[str, Any] = {
        "__init__": initialise,
        "__module__": __name__,
        "__doc__": f"A {stock.__name__} in the shapes that its config lists.",
        "config_class": per_layer_class(config),
        # a saved model takes this file along
        "_auto_class": "AutoModelForCausalLM" if issubclass(stock, GenerationMixin) else "AutoModel",
        "_keys_to_ignore_on_load_unexpected": None,  # no file of ours has such; vLLM applies the patterns to all names
        # The code is transformers' own, so what it computes when weights are loaded is computed as for a stock class.
        "is_custom_code": classmethod(lambda cls: False),
    }
    for setter in ("set_attn_implementation", "set_experts_implementation"):
        if hasattr(stock, setter):
            members[setter] = followed(getattr(stock, setter))
    return type(name, (stock,), members)


def _sections_of(model: Any, config: Any, stock: type) -> Settings:
    """What differs in a model, by its own names: those of the model without a head lack the first piece."""
    per_layer = _mapping(getattr(config, PER_LAYER, {}), "its value")
    prefix = model.base_model_prefix
    if stock.__name__ == per_layer.get("architecture") or not prefix:
        return per_layer
    inside = {name: _mapping(per_layer[name], name) for name in SECTIONS if name in per_layer}
    return {
        section: {
            name[len(prefix) + 1 :]: value for name, value in values.items() if f"{name}.".startswith(f"{prefix}.")
        }
        for section, values in inside.items()
    }


def apply_in_place(model: nn.Module, per_layer: Settings) -> None:
    """Give a dense model the shapes and attributes listed; parameters that are one stay one.

    Raises ValueError for anything that the model does not have, or not in that form.

    >>> layer = nn.Linear(4, 3)
    >>> apply_in_place(layer, {"shapes": {"weight": [2, 4], "bias": [2]}, "attributes": {"": {"out_features": 2}}})
    >>> layer
    Linear(in_features=4, out_features=2, bias=True)
    """
    skip_in_place(model, _section(per_layer, "skipped"))
    pad_in_place(model, _dense_sized(model, _section(per_layer, "padded")))
    _reshape_in_place(model, _section(per_layer, "shapes"))
    for path, values in _section(per_layer, "attributes").items():
        module = _module(model, path, "attributes")
        for name, value in _mapping(values, f"attributes of {path}").items():
            setattr(module, name, _attribute(module, path, name, value))
    for path, values in _section(per_layer, "configs").items():
        module = _module(model, path, "configs")
        module.config = _own_config(getattr(module, "config", None), path, _mapping(values, f"configs of {path}"))


class Skipped(nn.Module):
    """A block that reads hidden states and gives zeros, or its last bias; other parameters only lie in it.

    >>> block = Skipped(nn.ModuleDict({"out": nn.Linear(2, 2)}), outputs=2, kept=["out.bias"], bias="out.bias")
    >>> block(torch.ones(1, 3, 2))[0].shape, [name for name, _ in block.named_parameters()]
    (torch.Size([1, 3, 2]), ['out.bias'])
    """

    def __init__(self, block: nn.Module, *, outputs: int, kept: Sequence[str], bias: str | None) -> None:
        super().__init__()
        self.outputs, self.kept, self.bias = outputs, tuple(kept), bias
        for name in kept:
            *holders, last = name.split(".")
            holder: nn.Module = self
            for piece in holders:
                if piece not in dict(holder.named_children()):
                    holder.add_module(piece, nn.Module())
                holder = holder.get_submodule(piece)
            holder.register_parameter(last, block.get_parameter(name))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Zeros like the hidden states, or the bias; `outputs` things, of which the others are None."""
        hidden = torch.zeros_like(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])
        if self.bias is not None:
            hidden = hidden + attrgetter(self.bias)(self)
        return (hidden, *[None] * (self.outputs - 1)) if self.outputs else hidden


def skip_in_place(model: nn.Module, skipped: Settings) -> None:
    """Replace blocks by such as compute nothing: by path, how many `outputs` (0 for a bare one), `kept` and `bias`."""
    for path, about in skipped.items():
        block = _module(model, path, "skipped")
        about = _mapping(about, f"skipped, {path}")
        outputs, kept, bias = about.get("outputs"), about.get("kept"), about.get("bias")
        known = {name for name, _ in block.named_parameters()}
        if not path or type(outputs) is not int or not isinstance(kept, Sequence) or not known.issuperset(kept):
            raise ValueError(f"{PER_LAYER}, skipped: {path!r} cannot be {about!r:.80}")
        if bias is not None and bias not in kept:
            raise ValueError(f"{PER_LAYER}, skipped: {path} has no {bias!r:.60} to add")
        holder, _, name = path.rpartition(".")
        setattr(model.get_submodule(holder), name, Skipped(block, outputs=outputs, kept=kept, bias=bias))


@dataclass(frozen=True)
class Spread:
    """A hook that lays the outputs of a matrix out as the dense one does, with zeros where its rows are gone.

    >>> Spread(((2, 1, 3),))(None, (), torch.tensor([[1.0, 2.0]]))
    tensor([[1., 0., 0., 2., 0., 0.]])
    """

    parts: Parts

    def __call__(self, _: Any, __: Any, output: Tensor) -> Tensor:
        """The outputs, as wide as the dense matrix gives them."""
        pieces = _pieces(output, [n * kept for n, kept, _ in self.parts])
        return _joined(
            functional.pad(piece.unflatten(-1, (-1, kept)), (0, whole - kept)).flatten(-2) if kept < whole else piece
            for piece, (_, kept, whole) in zip(pieces, self.parts, strict=True)
        )


@dataclass(frozen=True)
class Narrow:
    """A hook before a matrix that passes on the inputs of which it has columns.

    >>> Narrow(((2, 1, 3),))(None, (torch.arange(6.0),))
    (tensor([0., 3.]),)
    """

    parts: Parts

    def __call__(self, _: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The arguments of the matrix, the first of them narrower."""
        pieces = _pieces(args[0], [n * whole for n, _, whole in self.parts])
        read = _joined(
            piece.unflatten(-1, (-1, whole))[..., :kept].flatten(-2) if kept < whole else piece
            for piece, (_, kept, whole) in zip(pieces, self.parts, strict=True)
        )
        return (read, *args[1:])


def _pieces(x: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
    """The parts; a single one of any size, so that a pass tells what becomes of it when heads go."""
    return x.split(sizes, -1) if len(sizes) > 1 else [x]


def _joined(pieces: Iterable[Tensor]) -> Tensor:
    several = list(pieces)
    return several[0] if len(several) == 1 else torch.cat(several, -1)


def pad_in_place(model: nn.Module, padded: Settings) -> None:
    """Let matrices keep the dense layout towards the code around them: by path, the parts of `outputs` and `inputs`.

    >>> layer = nn.Linear(2, 1)
    >>> pad_in_place(layer, {"": {"outputs": [[1, 1, 3]]}})
    >>> layer(torch.ones(2)).shape
    torch.Size([3])
    """
    for path, sides in padded.items():
        module = _module(model, path, "padded")
        for side, parts in _mapping(sides, f"padded, {path}").items():
            weight = getattr(module, "weight", None)
            if side not in ("outputs", "inputs") or not isinstance(weight, Tensor) or not _are_parts(parts):
                raise ValueError(f"{PER_LAYER}, padded: {path} cannot have {side!r:.40} of {parts!r:.80}")
            frozen = tuple((n, kept, whole) for n, kept, whole in parts)
            if side == "outputs":
                module.register_forward_hook(Spread(frozen))
            else:
                module.register_forward_pre_hook(Narrow(frozen))


def padded_in(model: nn.Module, *, remove: bool = False) -> dict[str, dict[str, list[list[int]]]]:
    """The matrices of a model that keep the dense layout, as its config lists them; with `remove`, no longer."""
    found: dict[str, dict[str, list[list[int]]]] = {}
    for path, module in model.named_modules():
        for side, hooks in (("outputs", module._forward_hooks), ("inputs", module._forward_pre_hooks)):
            for key, hook in list(hooks.items()):
                if type(hook).__name__ in ("Spread", "Narrow"):  # of this file, or of a folder's copy of it
                    found.setdefault(path, {})[side] = [list(part) for part in hook.parts]
                    if remove:
                        del hooks[key]
    return found


def _dense_sized(model: nn.Module, padded: Settings) -> Settings:
    """The section as it is, where the layout of every matrix is one that the dense model has."""
    for path, sides in padded.items():
        weight = getattr(_module(model, path, "padded"), "weight", None)
        largest = max(weight.shape, default=0) if isinstance(weight, Tensor) else 0
        for parts in _mapping(sides, f"padded, {path}").values():
            if not _are_parts(parts) or sum(n * whole for n, _, whole in parts) > largest:
                raise ValueError(f"{PER_LAYER}, padded: the dense {path} has no {parts!r:.80}")
    return padded


def _are_parts(parts: Any) -> bool:
    """Whether this is a list of such runs, as JSON has it."""
    if not isinstance(parts, Sequence) or not all(isinstance(part, Sequence) and len(part) == 3 for part in parts):
        return False
    sizes = all(type(n) is int and n > 0 for part in parts for n in part)
    return len(parts) > 0 and sizes and all(kept <= whole for _, kept, whole in parts)


def _reshape_in_place(model: nn.Module, shapes: Settings) -> None:
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tensors |= model.named_buffers(remove_duplicate=False)
    smaller: dict[int, Tensor] = {}
    for name, shape in shapes.items():
        if name not in tensors:
            raise ValueError(f"{PER_LAYER}, shapes: the dense model has no {name!r}")
        smaller[id(tensors[name])] = _smaller(name, tensors[name], shape)
    for name, tensor in tensors.items():  # every name of a tied parameter
        if id(tensor) in smaller:
            path, _, last = name.rpartition(".")
            setattr(model.get_submodule(path), last, smaller[id(tensor)])


def _smaller(name: str, tensor: Tensor, shape: Any) -> Tensor:
    """The first corner of a tensor: as random as the whole, where no weights are loaded into it."""
    dense = list(tensor.shape)
    fits = isinstance(shape, Sequence) and len(shape) == len(dense)
    if not fits or not all(type(n) is int and 0 < n <= size for n, size in zip(shape, dense, strict=True)):
        raise ValueError(f"{PER_LAYER}, shapes: {name} cannot be {shape!r:.60}, the dense model has {dense}")
    corner = tensor.detach()[tuple(slice(n) for n in shape)].clone()
    if not isinstance(tensor, nn.Parameter):
        return corner
    parameter = nn.Parameter(corner, requires_grad=tensor.requires_grad)
    parameter.__dict__.update(tensor.__dict__)  # marks such as "no weight decay"
    return parameter


def _attribute(module: nn.Module, path: str, name: str, value: Any) -> Any:
    """The value for a plain attribute; JSON knows no tuples."""
    now = None if name.startswith("_") else vars(module).get(name)
    if isinstance(now, tuple) and isinstance(value, (list, tuple)) and all(type(item) is int for item in value):
        if len(value) == len(now):
            return tuple(value)
    elif type(now) in (int, float) and type(value) is type(now):
        return value
    raise ValueError(
        f"{PER_LAYER}, attributes: {path} has no size {name!r:.60} that could be {value!r:.60}"
        + (f", it is {now!r:.60}" if now is not None else "")
    )


def _own_config(config: Any, path: str, settings: Settings) -> PreTrainedConfig:
    """A copy of a module's config with other settings; "text_config.hidden_size" reaches into a sub-config."""
    if not isinstance(config, PreTrainedConfig):
        raise ValueError(f"{PER_LAYER}, configs: {path!r} keeps no config")
    own = copy.deepcopy(config)
    for name, value in settings.items():
        *holders, last = name.split(".")
        holder: Any = own
        for key in holders:
            holder = getattr(holder, key, None) if isinstance(holder, PreTrainedConfig) else None
        known = isinstance(holder, PreTrainedConfig) and not last.startswith("_") and last in holder.to_dict()
        now = getattr(holder, last) if known else None
        if not known or (now is not None and type(value) is not type(now)):
            raise ValueError(
                f"{PER_LAYER}, configs: that of {path} has no setting {name!r:.60} that could be {value!r:.60}"
            )
        setattr(holder, last, value)
    return own


def _follow_in_place(model: Any, stock: type) -> None:
    """Let modules with a config of their own follow the one of the model, where that says how to compute."""
    leading = model.config.get_text_config()
    for path in _section(_sections_of(model, model.config, stock), "configs"):
        config = _module(model, path, "configs").config
        for name in ("_attn_implementation_internal", "_experts_implementation_internal"):
            if hasattr(leading, name):
                setattr(config, name, getattr(leading, name))


def _section(per_layer: Any, name: str) -> Settings:
    return _mapping(_mapping(per_layer, "its value").get(name, {}), name)


def _mapping(value: Any, what: str) -> Settings:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{PER_LAYER}, {what}: expected a mapping from names, found {value!r:.60}")
    return value


def _module(model: nn.Module, path: str, section: str) -> Any:
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise ValueError(f"{PER_LAYER}, {section}: the dense model has no module {path!r}") from None
