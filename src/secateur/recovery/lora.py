"""A model -> the same with a small trainable adapter (LoRA) at every matrix of its layers; and back again."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from secateur.errors import TrainingError, one_line
from secateur.models.silence import quiet

EVERYWHERE = "all-linear"  # peft's word for every linear layer but the one that gives the logits
FOLDER = "adapter"  # in a model's folder, where the adapter is kept


@dataclass(frozen=True, slots=True)
class LoraOptions:
    """The size of an adapter: W becomes W + alpha / rank * B A, of which A has `rank` rows (LoRA, arXiv 2106.09685).

    >>> LoraOptions(rank=0)
    Traceback (most recent call last):
    secateur.errors.TrainingError: rank=0 is too small. Expected at least 1: --rank 8
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise TrainingError(f"rank={self.rank} is too small. Expected at least 1: --rank 8")
        if self.alpha <= 0:
            raise TrainingError(f"alpha={self.alpha} gives the adapter no weight. Expected more than 0: --alpha 16")
        if not 0 <= self.dropout < 1:
            raise TrainingError(f"dropout={self.dropout} is no share. Expected 0 up to 1: --dropout 0.05")


def check_peft() -> None:
    """Raise `TrainingError` where peft is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise TrainingError("LoRA needs the package peft. Run: pip install 'secateur[recover]'")


def with_adapter(model: PreTrainedModel, options: LoraOptions) -> Any:
    """Give the model an adapter, which starts as nothing; its own weights are frozen. Returns peft's model around it.

    Stacked experts get one, too; peft has no dropout for these, so there is none in such a model.

    >>> from transformers import AutoConfig, AutoModelForCausalLM
    >>> config = AutoConfig.for_model("opt", hidden_size=12, num_attention_heads=2, ffn_dim=24, num_hidden_layers=1)
    >>> adapted = with_adapter(AutoModelForCausalLM.from_config(config), LoraOptions(rank=2))
    >>> sorted({name.split(".")[-4] for name, p in adapted.named_parameters() if p.requires_grad})
    ['fc1', 'fc2', 'k_proj', 'out_proj', 'q_proj', 'v_proj']
    """
    check_peft()
    import peft

    alpha: Any = options.alpha  # declared as a whole number, of which only a quotient is used
    stacked = stacked_weights(model)
    settings = peft.LoraConfig(
        r=options.rank,
        lora_alpha=alpha,
        lora_dropout=0.0 if stacked else options.dropout,
        target_modules=EVERYWHERE,
        target_parameters=stacked or None,
        task_type=peft.TaskType.CAUSAL_LM,
    )
    with _unwarned():
        try:
            return peft.get_peft_model(model, settings)
        except ValueError as error:
            raise TrainingError(
                f"{type(model).__name__} takes no LoRA ({one_line(error)}). Train all weights: --method full or distill"
            ) from error


def stacked_weights(model: nn.Module) -> list[str]:
    """The weights that are a matrix for each of several experts, in one stack: no linear layers, but adapted as such.

    >>> stacked_weights(nn.Conv1d(4, 4, 3))
    []
    """
    return [
        f"{path}.{name}"
        for path, module in model.named_modules()
        if not type(module).__module__.startswith("torch.")  # whose weights of three dimensions are of convolutions
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3 and min(parameter.shape) > 1
    ]


def merged(adapted: Any) -> PreTrainedModel:
    """The ordinary model that computes what model and adapter compute together; its weights are changed in place.

    Raises `TrainingError` where a weight would be NaN or Inf.

    >>> from transformers import AutoConfig, AutoModelForCausalLM
    >>> config = AutoConfig.for_model("opt", hidden_size=12, num_attention_heads=2, ffn_dim=24, num_hidden_layers=1)
    >>> model = AutoModelForCausalLM.from_config(config)
    >>> type(merged(with_adapter(model, LoraOptions(rank=2)))).__name__
    'OPTForCausalLM'
    """
    with _unwarned():
        try:
            model: PreTrainedModel = adapted.merge_and_unload(safe_merge=True)
        except ValueError as error:
            raise TrainingError(
                f"the adapter cannot be merged ({one_line(error)}). Train with a smaller learning rate: "
                "--learning-rate 1e-4"
            ) from error
    return model


def loaded_adapter(model: PreTrainedModel, folder: Path, weights: Mapping[str, Tensor]) -> tuple[Any, list[str]]:
    """Peft's model around a model, with the adapter of a folder; and what of its weights has no place, or is missing.

    `weights` are what the folder's file holds. Raises `TrainingError` for an adapter that the model does not take.
    """
    import peft

    with _unwarned(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of keys that are missing: they are returned
        try:
            adapted: Any = peft.PeftModel.from_pretrained(model, str(folder))
            held = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
        except (ValueError, RuntimeError, TypeError, KeyError) as error:
            raise TrainingError(
                f"{type(model).__name__} does not take the adapter {folder} ({one_line(error)}). Name the model that "
                "it was trained for: secateur export MODEL OUT --adapter FOLDER"
            ) from error
    return adapted, sorted(held.keys() ^ weights.keys())


def write_adapter(adapted: Any, folder: Path, *, base: str) -> None:
    """Write the adapter alone, as peft reads it; `base` names the model that it belongs to."""
    for settings in adapted.peft_config.values():
        settings.base_model_name_or_path = base
    with _unwarned():
        adapted.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # a form to be filled in


@contextmanager
def _unwarned() -> Iterator[None]:
    # peft asks models for attributes by names that newer versions of transformers have given up.
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        # Of patterns that peft itself has made, for weights that have no name of a module.
        warnings.filterwarnings("ignore", r"The following (rank|alpha)_pattern keys", RuntimeWarning)
        yield
