"""Packed rows -> whether a model keeps the texts of a row apart."""

from __future__ import annotations

import torch
from torch import nn

from secateur.data.rows import Rows
from secateur.errors import TrainingError
from secateur.evaluation.inference import evaluation_mode, input_device

TOLERANCE = 0.02  # of the largest logit: what rounding in bfloat16 changes


@torch.no_grad()
def check_packing(model: nn.Module, rows: Rows) -> None:
    """Raise `TrainingError` where the texts of a row attend to each other, or do not restart their positions.

    That depends on the model's code, so it is tried: the second text of a row must have the logits that it has alone.
    Rows that are not packed pass.
    """
    if rows.positions_T is None:
        return
    for row in range(len(rows)):
        part = rows.slice_of(row)
        positions_T = rows.positions_T[part].long()
        text_starts = torch.nonzero(positions_T == 0).flatten().tolist()
        if len(text_starts) < 2:
            continue
        first, last = text_starts[1], [*text_starts, len(positions_T)][2]
        device = input_device(model)
        ids_BT = rows.ids_T[part].long().to(device)[None]
        try:
            with evaluation_mode(model):
                packed_BTV = model(input_ids=ids_BT, position_ids=positions_T.to(device)[None], use_cache=False).logits
                alone_BTV = model(input_ids=ids_BT[:, first:last], use_cache=False).logits
            difference = float((packed_BTV[:, first:last] - alone_BTV).abs().max())
            apart = difference <= TOLERANCE * float(alone_BTV.abs().max())
        except TypeError:
            apart = False  # the model takes no positions
        if not apart:
            raise TrainingError(
                f"packing: {type(model).__name__} lets the texts of a row see each other. Leave out --packing; "
                "--group-by-length keeps padding small"
            )
        return
