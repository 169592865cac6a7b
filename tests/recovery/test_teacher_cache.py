"""What is read back from the disk is what the teacher computes; files that exist are not made again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from teachers import random_rows, top_tokens
from transformers import PreTrainedModel

from secateur.data.rows import IGNORED, collate, pack_rows
from secateur.errors import TrainingError
from secateur.recovery.teacher_cache import SHARD_ROWS, TeacherCache, TeacherOutputs, save_teacher_outputs
from tiny import tiny_model


@pytest.fixture(scope="module")
def teacher() -> PreTrainedModel:
    return tiny_model(3)


@pytest.mark.parametrize("packing", [False, True])
def test_what_is_read_back_is_what_the_teacher_computes(
    packing: bool, teacher: PreTrainedModel, tmp_path: Path
) -> None:
    rows = random_rows(SHARD_ROWS + 20)
    rows = pack_rows(rows, 24) if packing else rows
    save_teacher_outputs(lambda: teacher, rows, tmp_path, TeacherOutputs(5, 2.0))
    cache = TeacherCache(tmp_path, rows)
    for numbers in ([len(rows) - 1, 0, 3], [7], list(range(10))):
        batch = collate(rows, numbers, pad=0)
        mask_BT = batch.pop("labels") != IGNORED
        with torch.no_grad():
            logits_BTV = teacher(**batch, use_cache=False).logits
        expected = top_tokens(logits_BTV[mask_BT], 5, 2.0)
        found = cache.read(numbers)
        assert len(found["rest"]) == int(mask_BT.sum())
        assert torch.allclose(found["logp"], expected["logp"], atol=5e-3)
        assert torch.allclose(found["rest"], expected["rest"], atol=1e-5)
        same = (found["tokens"] == expected["tokens"]).float().mean()
        assert float(same) > 0.99  # two that are equally likely may change places


def test_files_that_exist_are_not_made_again(teacher: PreTrainedModel, tmp_path: Path) -> None:
    rows = random_rows(2 * SHARD_ROWS + 1)
    loads: list[int] = []

    def load() -> PreTrainedModel:
        loads.append(1)
        return teacher

    progress: list[tuple[int, int]] = []
    outputs = TeacherOutputs(2)
    save_teacher_outputs(load, rows, tmp_path, outputs, progress=lambda done, total: progress.append((done, total)))
    assert (loads, progress) == ([1], [(1, 3), (2, 3), (3, 3)])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    save_teacher_outputs(load, rows, tmp_path, outputs)
    assert loads == [1]
    (tmp_path / "teacher-00001.safetensors").write_bytes(b"half")
    save_teacher_outputs(load, rows, tmp_path, outputs)
    assert loads == [1, 1]
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_teacher_that_gives_nan(tmp_path: Path) -> None:
    broken = tiny_model(3)
    with torch.no_grad():
        broken.get_output_embeddings().weight[5] = float("nan")
    with pytest.raises(TrainingError, match=r"the teacher \w+ gives logits with NaN or Inf"):
        save_teacher_outputs(lambda: broken, random_rows(3), tmp_path, TeacherOutputs(2))
    assert list(tmp_path.iterdir()) == []
