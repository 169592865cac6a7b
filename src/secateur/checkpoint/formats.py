"""Pruned model and plan -> the format of the folder that holds it.

A stock folder is for what the model's own config can say. Any other sizes go into a per-layer folder, in which the
config lists the shapes and a file of code builds the stock class in them (`models.modeling_per_layer`).
"""

from __future__ import annotations

from transformers import PreTrainedConfig, PreTrainedModel

from secateur.checkpoint.per_layer import is_per_layer
from secateur.discovery.groups import Discovery
from secateur.discovery.padding import module_changes
from secateur.errors import CheckpointError, DiscoveryError
from secateur.models.config import is_custom
from secateur.planning.plan import Plan


def needs_per_layer(model: PreTrainedModel, plan: Plan | None) -> bool:
    """Whether a model that this plan has cut, or without a plan one as it was loaded, needs a per-layer folder."""
    return is_per_layer(model) or (plan is not None and plan.settings is None)


def check_saveable(
    plan: Plan,
    *,
    config: PreTrainedConfig | None = None,
    discovery: Discovery | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Raise `CheckpointError` when no folder can hold what the plan leaves, with the reason.

    With the config and the discovery of the dense model it is also checked that such a model can be made.
    """
    if plan.settings is not None:
        return
    reason = (plan.refusal or "it was planned without the model's config").rstrip(".")
    if plan.sizes.dropped_layers:
        raise CheckpointError(
            f"no folder can hold what the plan leaves: {reason}. Drop other layers, or cut other axes instead"
        )
    if config is None or discovery is None:
        return
    if is_custom(config):
        raise CheckpointError(
            f"no folder can hold what the plan leaves: {reason}, and of a model with custom code only a cut that its "
            "config can say is saved. Cut all layers alike (leave out --layers), or use the pruned model in memory "
            "(secateur.pruning.prune, or `secateur evaluate MODEL --plan plan.json`)"
        )
    try:
        module_changes(config, discovery, plan.sizes.without_emptied(), trust_remote_code=trust_remote_code)
    except DiscoveryError as error:
        raise CheckpointError(
            f"no model can be made of what the plan leaves: {reason}, and {str(error).rstrip('.')}. Cut all layers "
            "alike (--shape uniform), or fewer kinds of units, for example MLPs alone (--axes mlp)"
        ) from error
