"""Model -> its latency table: each kind of group is cut to a few sizes in all layers, and timed beside the dense model.

A table is measured once for a model, a machine and a length, and kept in the user's cache folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from secateur import __version__
from secateur.discovery.groups import Discovery, Group
from secateur.errors import CheckpointError
from secateur.evaluation.profile import measure_speed
from secateur.files import make_folder, read_json, write_json
from secateur.planning.latency import LatencyTable, table_from_json
from secateur.planning.options import CutOptions
from secateur.planning.plan import Plan, PlannedGroup
from secateur.progress import Progress
from secateur.pruning.prune import prune

SHARES = (0.25, 0.5, 0.75)  # of a group's units, at which it is timed
REPEATS = 9
SEQ_LEN = 64


def latency_table(
    model: PreTrainedModel,
    discovery: Discovery,
    groups: Sequence[Group],
    *,
    seq_len: int = SEQ_LEN,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> LatencyTable:
    """The table for these groups' kinds, from the cache if it was measured before, else measured now.

    Measured is the prefill of one window of `seq_len` tokens; every cut is timed in turns with the dense model, so what
    slows the machine slows both, and the share that a cut saves is kept. `cache` is a folder, by default
    `~/.cache/secateur`.

    >>> import tempfile
    >>> from secateur.discovery.discover import discover
    >>> from transformers import AutoConfig, AutoModelForCausalLM
    >>> config = AutoConfig.for_model("opt", hidden_size=12, num_attention_heads=2, ffn_dim=24, num_hidden_layers=1)
    >>> model, discovery = AutoModelForCausalLM.from_config(config), discover(config)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     table = latency_table(model, discovery, [discovery.group("layers.0.mlp")], seq_len=8, cache=Path(folder))
    ...     again = latency_table(model, discovery, [discovery.group("layers.0.mlp")], seq_len=8, cache=Path(folder))
    >>> [units for units, _ in table.savings["mlp"]], table == again
    ([6, 12, 18, 24], True)
    """
    kinds: dict[str, list[Group]] = {}
    for group in groups:
        kinds.setdefault(group.kind, []).append(group)
    path = _folder(cache) / f"latency-{_key(model, kinds, seq_len)[:24]}.json"
    try:
        return table_from_json(read_json(path))
    except (CheckpointError, ValueError, KeyError, TypeError, AttributeError):
        pass  # there is none yet, or it is damaged
    table = _measured(model, discovery, kinds, seq_len, progress)
    make_folder(path.parent)
    write_json(path, table.to_json())
    return table


def _measured(
    model: PreTrainedModel,
    discovery: Discovery,
    kinds: dict[str, list[Group]],
    seq_len: int,
    progress: Progress | None,
) -> LatencyTable:
    sizes = {kind: _sizes(members[0]) for kind, members in kinds.items()}
    total, done = sum(len(found) for found in sizes.values()), 0
    dense: list[float] = []
    shares: dict[str, list[tuple[int, float]]] = {}
    for kind, members in kinds.items():
        for kept in sizes[kind]:
            cut = prune(model, _cut_to(discovery, members, kept), discovery=discovery)
            speeds = measure_speed({"dense": model, "cut": cut}, seq_len=seq_len, new_tokens=1, repeats=REPEATS)
            dense.append(speeds["dense"].prefill_seconds)
            share = 1 - speeds["cut"].prefill_seconds / speeds["dense"].prefill_seconds
            shares.setdefault(kind, []).append((kept, share / len(members)))
            done += 1
            if progress is not None:
                progress(done, total)
    whole = sorted(dense)[len(dense) // 2]
    savings = {
        kind: (*((kept, share * whole) for kept, share in found), (kinds[kind][0].units, 0.0))
        for kind, found in shares.items()
    }
    return LatencyTable(_device(model), seq_len, whole, savings)


def _sizes(group: Group) -> list[int]:
    """The sizes to time, ascending; of few units, all."""
    if group.units <= len(SHARES) + 1:
        return [*range(group.least, group.units)]
    return sorted({max(group.least, round(group.units * share)) for share in SHARES})


def _cut_to(discovery: Discovery, members: Sequence[Group], kept: int) -> Plan:
    groups = tuple(
        PlannedGroup(group.name, group.kind, group.layer, group.units, kept, tuple(range(kept))) for group in members
    )
    return Plan(discovery.model, CutOptions(ratio=0.0), groups, {}, {})


def _folder(cache: Path | None) -> Path:
    return cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "secateur"


def _device(model: PreTrainedModel) -> str:
    return torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else platform.processor() or "cpu"


def _key(model: PreTrainedModel, kinds: dict[str, list[Group]], seq_len: int) -> str:
    """What the times depend on, as a hash."""
    about = [
        [(name, list(parameter.shape), str(parameter.dtype)) for name, parameter in model.named_parameters()],
        {kind: [group.name for group in members] for kind, members in kinds.items()},
        seq_len,
        _device(model),
        platform.node(),
        torch.get_num_threads(),
        torch.__version__,
        __version__,
    ]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()
