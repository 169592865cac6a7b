"""Which weights of a model nothing but a linear product uses, and the folder in which they are packed.

One short forward pass shows which they are, whatever the model's code calls its modules.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from secateur.checkpoint.card import write_card
from secateur.discovery.sizes import shapes_of
from secateur.errors import CheckpointError, ModelError, SecateurError, one_line
from secateur.evaluation.inference import evaluation_mode, input_device, vocabulary_size
from secateur.export.options import ExportRecipe
from secateur.files import PLAN_FILE, RECORD_FILE, atomic_folder, copy_in
from secateur.models.loading import skeleton
from secateur.models.manifest import write_manifest
from secateur.models.modeling_per_layer import padded_in
from secateur.models.trust import runs_remote_code
from secateur.pipeline.recipe import write_recipe

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOKENS = 8  # of the forward passes that show how weights are used, and that the written model computes


@dataclass(frozen=True, slots=True)
class PackedResult:
    """A folder with packed weights: which layers have them, which matrices have not and why, and the bytes."""

    out: Path
    scheme: str  # weight-only or dynamic (int8 by torchao), w8a8, w4a16 or fp8 (by llmcompressor)
    layers: tuple[str, ...]  # modules with packed weights
    left: Mapping[str, str]  # weights of two and more dimensions that keep their dtype -> why
    weight_bytes: Mapping[str, int]  # "before" and "after"; a tied weight counts once
    file_bytes: int  # of the safetensors in the folder
    group_size: int | None = None  # columns of a weight that share a scale; None: whole rows do
    unaligned: tuple[str, ...] = ()  # layers with sizes that are no multiples of 8, which CUDA has no int8 product for

    def to_json(self) -> dict[str, Any]:
        """Plain data, as `secateur export --json` writes it."""
        return dataclasses.asdict(self) | {"out": str(self.out)}


@contextmanager
def packed_folder(
    out: Path,
    *,
    source: str | Path | None,
    files: Mapping[str, Path] | None,
    recipe: ExportRecipe | None,
    overwrite: bool,
) -> Iterator[Path]:
    """Give a folder to write packed weights into; it gets its name with the plan, record and files of the source."""
    with atomic_folder(out, overwrite=overwrite) as folder:
        yield folder
        beside = {} if source is None else {name: Path(source) / name for name in (PLAN_FILE, RECORD_FILE)}
        copy_in(folder, {**(files or {}), **{name: path for name, path in beside.items() if path.is_file()}})
        if recipe is not None:
            write_recipe(folder, "export", recipe)
        made_from = str(source) if source is not None else recipe.model if recipe is not None else None
        write_card(folder, made_from)
        write_manifest(folder)


def file_bytes(folder: Path) -> int:
    """Of the weights."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def check_holdable(model: PreTrainedModel) -> None:
    """Raise `ModelError` for a dtype that is not packed, and `CheckpointError` for sizes that the config lacks."""
    if model.dtype not in DTYPES:
        raise ModelError(
            f"weights of {str(model.dtype).removeprefix('torch.')} are not packed; expected float32, bfloat16, "
            "float16: load the model with --dtype float32"
        )
    if shapes_of(model) != shapes_of(skeleton(model.config, trust_remote_code=runs_remote_code(model))):
        raise CheckpointError(
            f"{type(model).__name__}: its config does not have its sizes, since it was cut in memory. Write the folder "
            "first (secateur.save), and quantize what is loaded from it"
        )


def choose_layers(model: PreTrainedModel) -> tuple[list[str], dict[str, str]]:
    """The layers whose weights can be packed, and why every other weight of two and more dimensions cannot.

    Raises `ModelError` where there is no such layer.
    """
    names: dict[int, list[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(weight), []).append(name)
    head, used_elsewhere, padded = model.get_output_embeddings(), _used_elsewhere(model), padded_in(model)
    layers, left = [], {}
    for name, weight in model.named_parameters():
        if weight.dim() < 2:
            continue
        path, _, last = name.rpartition(".")
        module = model.get_submodule(path)
        others = [other for other in names[id(weight)] if other != name]
        if others:
            left[name] = f"it is {others[0]}, too"
        elif module is head:
            left[name] = "it gives the logits"
        elif not isinstance(module, nn.Linear) or last != "weight":
            left[name] = f"{type(module).__name__} is no linear layer"
        elif any(f".{kept}." in f".{name}." for kept in model._keep_in_fp32_modules or ()):
            left[name] = "the model's code keeps it in float32"
        elif path in padded:
            left[name] = "its values are narrower than the code around it sees them"
        elif id(weight) in used_elsewhere:
            left[name] = "more than a linear product is computed with it"
        else:
            layers.append(path)
    if not layers:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(left.items())[:3])
        raise ModelError(f"{type(model).__name__}: only weights of linear layers can be packed, none is ({reasons})")
    return layers, left


class _OtherUses(TorchFunctionMode):
    """Collects the ids of weights that enter anything but a linear product. Final."""

    def __init__(self, weights: Iterable[Tensor]) -> None:
        super().__init__()
        self.weights = {id(weight) for weight in weights}
        self.found: set[int] = set()

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):  # sizes and dtypes may be asked for
            inputs = {id(leaf) for leaf in tree_leaves((args, kwargs))}
            if func is functional.linear:
                inputs -= {id(kwargs["weight"] if "weight" in kwargs else args[1])}
            self.found |= inputs & self.weights
        return result


def _used_elsewhere(model: PreTrainedModel) -> set[int]:
    """Ids of the weights that anything but a linear product uses, in a forward pass over a few tokens."""
    uses = _OtherUses(model.parameters())
    try:
        with uses:
            first_logits(model)
    except SecateurError:
        raise
    except Exception as error:  # the code of models raises anything
        raise ModelError(
            f"{type(model).__name__}: a forward pass over tokens alone shows how weights are used, and it fails; "
            f"{one_line(error)}"
        ) from error
    return uses.found


def first_logits(model: PreTrainedModel) -> Tensor:
    """Logits of the first few token ids, BTX."""
    ids_BT = torch.arange(TOKENS, device=input_device(model))[None] % vocabulary_size(model)
    with evaluation_mode(model), torch.no_grad():
        logits: Tensor = model(input_ids=ids_BT, use_cache=False).logits
    return logits
