"""Model -> its latency table: each kind of group is cut to a few shares in all layers and timed beside the dense model.

A table is measured once for a model, a machine and a length, and lies in the user's cache folder.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median_high

import torch
from transformers import PreTrainedModel

from secateur import __version__
from secateur.decoding import decode
from secateur.discovery.groups import Discovery, Group
from secateur.errors import CheckpointError
from secateur.evaluation.options import ProfileOptions
from secateur.evaluation.speed import measure_speed
from secateur.files import cache_folder, make_folder, read_json, write_json
from secateur.planning.latency import LatencyTable
from secateur.planning.options import CutOptions
from secateur.planning.plan import Plan, PlannedGroup
from secateur.progress import Progress
from secateur.pruning.prune import prune

TIMED_SHARES = (0.25, 0.5, 0.75)  # of a group's units


def latency_table(
    model: PreTrainedModel,
    discovery: Discovery,
    groups: Sequence[Group],
    *,
    seq_len: int = 64,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> LatencyTable:
    """The table for these groups' kinds, from the cache if it was measured before, else measured now.

    Measured is the prefill of one window of `seq_len` tokens; every cut is timed in turns with the dense model, so what
    slows the machine slows both, and the share that a cut saves is recorded. `cache` is a folder, by default
    `~/.cache/secateur`. Raises `DiskError` when the table cannot be written there.
    """
    kinds: dict[str, list[Group]] = {}
    for group in groups:
        kinds.setdefault(group.kind, []).append(group)
    path = (cache or cache_folder()) / f"latency-{_key(model, kinds, seq_len)[:24]}.json"
    try:
        known: LatencyTable = decode(LatencyTable, read_json(path))
        return known
    except (CheckpointError, ValueError):
        pass  # there is none yet, or it is damaged
    table = _measure(model, discovery, kinds, seq_len, progress)
    make_folder(path.parent)
    write_json(path, asdict(table))
    return table


def _measure(
    model: PreTrainedModel,
    discovery: Discovery,
    kinds: Mapping[str, Sequence[Group]],
    seq_len: int,
    progress: Progress | None,
) -> LatencyTable:
    options = ProfileOptions(seq_lens=(seq_len,), new_tokens=1, repeats=9)
    gives_most = {kind: max(members, key=lambda group: group.units - group.least) for kind, members in kinds.items()}
    work = [(kind, kept) for kind, group in gives_most.items() for kept in _timed_shares(group)]
    dense_seconds: list[float] = []
    saved: dict[str, list[tuple[float, float]]] = {}  # kind -> share kept, and that of the time saved for each unit
    for done, (kind, kept) in enumerate(work, start=1):
        cut = prune(model, _plan(discovery, kinds[kind], kept), discovery=discovery)
        [speeds] = measure_speed({"dense": model, "cut": cut}, options)
        dense_seconds.append(speeds["dense"].prefill_seconds)
        share = 1 - speeds["cut"].prefill_seconds / speeds["dense"].prefill_seconds
        saved.setdefault(kind, []).append((kept, share / sum(group.units for group in kinds[kind])))
        if progress is not None:
            progress(done, len(work))
    whole = median_high(dense_seconds)
    per_unit = {
        kind: (*((kept, share * whole) for kept, share in points), (1.0, 0.0)) for kind, points in saved.items()
    }
    return LatencyTable(_device(model), seq_len, whole, per_unit)


def _timed_shares(group: Group) -> list[float]:
    """The shares to time, ascending; of few units, those of all sizes."""
    if group.units <= len(TIMED_SHARES) + 1:
        return [size / group.units for size in range(group.least, group.units)]
    return sorted({max(group.least / group.units, share) for share in TIMED_SHARES})


def _plan(discovery: Discovery, members: Sequence[Group], share: float) -> Plan:
    """A plan that keeps this share of the units of each group, the first ones."""
    sizes = [max(group.least, round(group.units * share)) for group in members]
    groups = tuple(
        PlannedGroup(group.name, group.kind, group.layer, group.units, size, tuple(range(size)))
        for group, size in zip(members, sizes, strict=True)
    )
    return Plan(discovery.model, CutOptions(ratio=0.0), groups, {}, {})


def _device(model: PreTrainedModel) -> str:
    return torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else platform.processor() or "cpu"


def _key(model: PreTrainedModel, kinds: Mapping[str, Sequence[Group]], seq_len: int) -> str:
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
