"""Two MODEL arguments -> the two sides of a comparison: each model with its tokenizer, groups and costs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import psutil
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.discovery.discover import discover
from secateur.discovery.groups import Discovery
from secateur.errors import ModelError
from secateur.evaluation.costs import Profile, model_costs
from secateur.evaluation.memory import weight_bytes
from secateur.evaluation.options import ProfileOptions
from secateur.evaluation.profile import profile
from secateur.models.config import check_writes_text, load_config, max_positions
from secateur.models.loading import load
from secateur.models.options import LoadOptions
from secateur.models.tensors import check_finite
from secateur.models.tokenizer import load_tokenizer

logger = logging.getLogger(__name__)

MEMORY_SHARE = 0.8  # of the free memory: larger weights stay mapped from their files
PROMPT_TOKENS = 64


@dataclass(frozen=True, slots=True, eq=False)
class Side:
    """One of the two models, with all that answering and planning need."""

    letter: str  # A or B
    name: str  # the MODEL argument
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    discovery: Discovery
    costs: Profile

    @property
    def title(self) -> str:
        """What the page calls it."""
        return f"{self.letter}: {self.name}"

    @property
    def positions(self) -> int | None:
        """The longest text that the model reads, in tokens; None where its config names no limit."""
        return max_positions(self.model.config)


def load_sides(models: Sequence[str], *, loading: LoadOptions | None = None) -> tuple[Side, ...]:
    """Load two models, and profile them side by side, which also warms them up.

    Raises `ModelError` for a model that cannot be loaded, or that has no tokenizer.
    """
    if len(models) != 2:
        raise ModelError(f"{len(models)} models to compare; expected two: secateur compare demo pruned")
    loading = loading or LoadOptions()
    trust = loading.trust_remote_code
    for name in models:  # all configs before any weights
        check_writes_text(load_config(name, trust_remote_code=trust), name=name, doing="compare")
    loaded = {}
    for letter, name in zip("AB", models, strict=True):
        loaded[letter] = load(name, dtype=loading.dtype, device=loading.device, trust_remote_code=trust)
        check_finite(loaded[letter])
    tokenizers = [load_tokenizer(name, trust_remote_code=trust) for name in models]
    discoveries = [discover(model, name=name) for name, model in zip(models, loaded.values(), strict=True)]
    parts = zip(loaded.items(), models, tokenizers, discoveries, _costs(loaded, discoveries), strict=True)
    return tuple(
        Side(letter, name, model, tokenizer, discovery, replace(costs, model=name, first_model=models[0]))
        for (letter, model), name, tokenizer, discovery, costs in parts
    )


def _costs(models: dict[str, PreTrainedModel], discoveries: Sequence[Discovery]) -> list[Profile]:
    """Profiles of both models; counted and not measured where their weights do not fit into memory together."""
    longest = min([PROMPT_TOKENS + 1, *(limit for model in models.values() if (limit := max_positions(model.config)))])
    options = ProfileOptions(seq_lens=(max(1, longest - 1),), new_tokens=1, repeats=1)
    weights = sum(weight_bytes(model) for model in models.values() if model.device.type == "cpu")
    free = psutil.virtual_memory().available
    if weights <= MEMORY_SHARE * free:
        return profile(models, options)
    logger.warning(
        "the weights take %.1f GiB and %.1f GiB of memory are free: they are read from the disk while models answer, "
        "which is slow and makes speeds hard to compare; --dtype bfloat16 may make them fit",
        weights / 2**30,
        free / 2**30,
    )
    pairs = zip(models, models.values(), discoveries, strict=True)
    return [model_costs(model, discovery, name=name, options=options) for name, model, discovery in pairs]
