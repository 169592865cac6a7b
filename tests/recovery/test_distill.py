"""The loss that learns from a teacher, and the teacher's logits on the disk."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from families import family_config, family_model
from secateur.data.rows import IGNORED, Rows, collate, packed
from secateur.errors import ModelError, TrainingError
from secateur.recovery.distillation import (
    SHARD_ROWS,
    KeptTeacher,
    check_packing,
    check_teacher,
    keep_teacher,
    learning_loss,
)
from tiny import VOCABULARY, tiny_model, tiny_tokenizer


def some_rows(count: int, *, seed: int = 0) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 12, (count,), generator=generator)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    ids = torch.randint(0, VOCABULARY, (int(starts[-1]),), generator=generator, dtype=torch.int32)
    learned = torch.rand(len(ids), generator=generator) < 0.6
    learned[starts[:-1]] = False
    return Rows(ids, learned, starts, torch.zeros(count, dtype=torch.int32))


def kept_of(logits_MV: Tensor, top_k: int, temperature: float = 1.0) -> dict[str, Tensor]:
    logp_MK, kept_MK = (logits_MV / temperature).log_softmax(-1).topk(top_k, dim=-1)
    return {"kept": kept_MK, "logp": logp_MK, "rest": 1 - logp_MK.exp().sum(-1)}


@pytest.fixture(scope="module")
def teacher() -> PreTrainedModel:
    return tiny_model(3)


class TestLoss:
    @pytest.mark.parametrize("temperature", [1.0, 2.0])
    def test_with_all_tokens_kept_it_is_the_divergence(self, temperature: float) -> None:
        student, teacher = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0)).unbind()
        labels = torch.arange(15).reshape(3, 5) % 7
        expected = functional.kl_div(
            (student / temperature).log_softmax(-1),
            (teacher / temperature).log_softmax(-1),
            log_target=True,
            reduction="sum",
        )
        kept = kept_of(teacher.reshape(-1, 7), 7, temperature)
        found = learning_loss(student, labels, kept, temperature=temperature)
        assert float(found) == pytest.approx(float(expected) * temperature**2, rel=1e-4)

    @settings(max_examples=30)
    @given(st.integers(0, 2**31), st.integers(1, 6))
    def test_kept_tokens_never_say_more_than_all(self, seed: int, top_k: int) -> None:
        student, teacher = torch.randn(2, 1, 4, 7, generator=torch.Generator().manual_seed(seed)).unbind()
        labels = torch.zeros(1, 4, dtype=torch.int64)
        losses = [float(learning_loss(student, labels, kept_of(teacher[0], k))) for k in (top_k, 7)]
        assert -1e-5 <= losses[0] <= losses[1] + 1e-4

    def test_the_gradient_is_the_true_one(self) -> None:
        student = torch.randn(1, 2, 5, dtype=torch.float32, generator=torch.Generator().manual_seed(1))
        teacher = torch.randn(2, 5, generator=torch.Generator().manual_seed(2))
        labels, kept = torch.tensor([[1, 2]]), kept_of(teacher, 2)

        def loss(logits: Tensor) -> Tensor:
            return learning_loss(logits, labels, kept, share=0.7, temperature=1.5)

        wanted = torch.zeros_like(student)
        for place in range(student.numel()):
            step = torch.zeros(student.numel())
            step[place] = 1e-2
            step = step.reshape(student.shape)
            wanted.view(-1)[place] = (loss(student + step) - loss(student - step)) / 2e-2
        own = student.clone().requires_grad_()
        loss(own).backward()
        assert own.grad is not None
        assert torch.allclose(own.grad, wanted, atol=1e-3)

    def test_a_share_of_it_is_that_of_the_labels(self) -> None:
        student, teacher = torch.randn(2, 1, 3, 7, generator=torch.Generator().manual_seed(3)).unbind()
        labels = torch.tensor([[4, 1, 0]])
        kept = kept_of(teacher[0], 3)
        nll = functional.cross_entropy(student[0], labels[0], reduction="sum")
        assert float(learning_loss(student, labels)) == pytest.approx(float(nll), rel=1e-5)
        for temperature in (1.0, 3.0):
            whole = learning_loss(student, labels, kept, temperature=temperature)
            some = learning_loss(student, labels, kept, share=0.25, temperature=temperature)
            assert float(some) == pytest.approx(0.25 * float(whole) + 0.75 * float(nll), rel=1e-5)

    def test_places_without_a_label_count_nothing(self) -> None:
        student, teacher = torch.randn(2, 2, 3, 7, generator=torch.Generator().manual_seed(4)).unbind()
        labels = torch.tensor([[4, IGNORED, 0], [IGNORED, IGNORED, 1]])
        places = labels != IGNORED
        kept = kept_of(teacher[places], 3)
        alone = learning_loss(student[places][None], labels[places][None], kept)
        assert float(learning_loss(student, labels, kept)) == pytest.approx(float(alone), rel=1e-5)


class TestKept:
    @pytest.mark.parametrize("packing", [False, True])
    def test_what_is_read_back_is_what_the_teacher_gives(
        self, packing: bool, teacher: PreTrainedModel, tmp_path: Path
    ) -> None:
        rows = some_rows(SHARD_ROWS + 20)
        rows = packed(rows, 24) if packing else rows
        keep_teacher(lambda: teacher, rows, tmp_path, top_k=5, temperature=2.0)
        kept = KeptTeacher(tmp_path, rows)
        for numbers in ([len(rows) - 1, 0, 3], [7], list(range(10))):
            batch = collate(rows, numbers, pad=0)
            labels = batch.pop("labels")
            with torch.no_grad():
                logits = teacher(**batch, use_cache=False).logits[labels != IGNORED]
            expected = kept_of(logits, 5, 2.0)
            found = kept.of(numbers)
            assert len(found["rest"]) == int((labels != IGNORED).sum())
            assert torch.allclose(found["logp"], expected["logp"], atol=5e-3)
            assert torch.allclose(found["rest"], expected["rest"], atol=1e-5)
            same = (found["kept"] == expected["kept"]).float().mean()
            assert float(same) > 0.99  # two that are equally likely may change places

    def test_what_is_there_is_not_made_again(self, teacher: PreTrainedModel, tmp_path: Path) -> None:
        rows = some_rows(2 * SHARD_ROWS + 1)
        loads: list[int] = []

        def load() -> PreTrainedModel:
            loads.append(1)
            return teacher

        told: list[tuple[int, int]] = []
        keep_teacher(load, rows, tmp_path, top_k=2, progress=lambda done, total: told.append((done, total)))
        assert (loads, told) == ([1], [(1, 3), (2, 3), (3, 3)])
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        keep_teacher(load, rows, tmp_path, top_k=2)
        assert loads == [1]
        (tmp_path / "teacher-00001.safetensors").write_bytes(b"half")
        keep_teacher(load, rows, tmp_path, top_k=2)
        assert loads == [1, 1]
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

    def test_packed_texts_do_not_see_each_other(self, teacher: PreTrainedModel) -> None:
        rows = some_rows(6)
        one = packed(rows, 100)
        batch = collate(one, [0], pad=0)
        assert one.positions_T is not None
        batch.pop("labels")
        with torch.no_grad():
            together = teacher(**batch, use_cache=False).logits[0]
            begins = [*torch.nonzero(one.positions_T == 0).flatten().tolist(), len(one.ids_T)]
            for first, last in itertools.pairwise(begins):
                alone = teacher(input_ids=one.ids_T[None, first:last].long(), use_cache=False).logits[0]
                assert torch.allclose(together[first:last], alone, atol=1e-5)

    @pytest.mark.parametrize(("family", "apart"), [("gemma2", True), ("gpt_neox", True), ("opt", False)])
    def test_whether_a_model_keeps_packed_texts_apart_is_tried(self, family: str, apart: bool) -> None:
        rows = some_rows(6)
        rows = replace(rows, ids_T=rows.ids_T % 100)
        model = family_model(family_config(family), dtype=torch.float32)
        check_packing(model, rows)
        with nullcontext() if apart else pytest.raises(TrainingError, match="packing: OPTForCausalLM lets the texts"):
            check_packing(model, packed(rows, 60))

    def test_a_teacher_that_gives_nan(self, tmp_path: Path) -> None:
        broken = tiny_model(3)
        with torch.no_grad():
            broken.get_output_embeddings().weight[5] = float("nan")
        with pytest.raises(TrainingError, match=r"the teacher \w+ gives logits with NaN or Inf"):
            keep_teacher(lambda: broken, some_rows(3), tmp_path, top_k=2)
        assert list(tmp_path.iterdir()) == []


class TestVocabulary:
    def test_the_same(self) -> None:
        tokenizer = tiny_tokenizer()
        check_teacher(("a", tokenizer, 300), ("b", tokenizer, 300))

    def test_another_size(self) -> None:
        tokenizer = tiny_tokenizer()
        with pytest.raises(ModelError, match="teacher 'b' has a vocabulary of 310 tokens, and 'a' one of 300"):
            check_teacher(("a", tokenizer, 300), ("b", tokenizer, 310))

    def test_another_tokenizer(self) -> None:
        class Other:
            """The same words under other numbers."""

            @staticmethod
            def get_vocab() -> dict[str, int]:
                return {word: (number + 1) % 300 for word, number in tiny_tokenizer().get_vocab().items()}

        with pytest.raises(ModelError, match=r"has another tokenizer than 'a': '.+' is token \d+ there and \d+ here"):
            check_teacher(("a", tiny_tokenizer(), 300), ("b", Other, 300))  # type: ignore[arg-type]
