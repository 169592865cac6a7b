"""Whether a model keeps packed texts apart is tried."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from teachers import random_rows

from families import family_config, family_model
from secateur.data.rows import collate, pack_rows
from secateur.errors import TrainingError
from secateur.recovery.packing import check_packing
from tiny import tiny_model


def test_packed_texts_have_the_logits_that_they_have_alone() -> None:
    model = tiny_model(3)
    one = pack_rows(random_rows(6), 100)
    batch = collate(one, [0], pad=0)
    assert one.positions_T is not None
    batch.pop("labels")
    with torch.no_grad():
        together = model(**batch, use_cache=False).logits[0]
        starts = [*torch.nonzero(one.positions_T == 0).flatten().tolist(), len(one.ids_T)]
        for first, last in itertools.pairwise(starts):
            alone = model(input_ids=one.ids_T[None, first:last].long(), use_cache=False).logits[0]
            assert torch.allclose(together[first:last], alone, atol=1e-5)


@pytest.mark.parametrize(("family", "apart"), [("gemma2", True), ("gpt_neox", True), ("opt", False)])
def test_a_model_that_lets_packed_texts_see_each_other_is_refused(family: str, apart: bool) -> None:
    rows = random_rows(6)
    rows = replace(rows, ids_T=rows.ids_T % 100)
    model = family_model(family_config(family), dtype=torch.float32)
    check_packing(model, rows)
    with nullcontext() if apart else pytest.raises(TrainingError, match="packing: OPTForCausalLM lets the texts"):
        check_packing(model, pack_rows(rows, 60))
