"""The loss that learns from a teacher, and which teachers fit a student."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from teachers import top_tokens
from torch import Tensor
from torch.nn import functional

from secateur.data.rows import IGNORED
from secateur.errors import ModelError
from secateur.recovery.distillation import check_teacher, distillation_loss, nll_loss
from tiny import tiny_tokenizer


class TestLoss:
    @pytest.mark.parametrize("temperature", [1.0, 2.0])
    def test_with_all_tokens_it_is_the_divergence(self, temperature: float) -> None:
        student, teacher = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0)).unbind()
        labels = torch.arange(15).reshape(3, 5) % 7
        expected = functional.kl_div(
            (student / temperature).log_softmax(-1),
            (teacher / temperature).log_softmax(-1),
            log_target=True,
            reduction="sum",
        )
        top = top_tokens(teacher.reshape(-1, 7), 7, temperature)
        found = distillation_loss(student, labels, top, temperature=temperature)
        assert float(found) == pytest.approx(float(expected) * temperature**2, rel=1e-4)

    @settings(max_examples=30)
    @given(st.integers(0, 2**31), st.integers(1, 6))
    def test_fewer_top_tokens_give_no_larger_divergence(self, seed: int, top_k: int) -> None:
        student, teacher = torch.randn(2, 1, 4, 7, generator=torch.Generator().manual_seed(seed)).unbind()
        labels = torch.zeros(1, 4, dtype=torch.int64)
        losses = [float(distillation_loss(student, labels, top_tokens(teacher[0], k))) for k in (top_k, 7)]
        assert -1e-5 <= losses[0] <= losses[1] + 1e-4

    def test_the_gradient_is_the_true_one(self) -> None:
        student = torch.randn(1, 2, 5, dtype=torch.float32, generator=torch.Generator().manual_seed(1))
        teacher = torch.randn(2, 5, generator=torch.Generator().manual_seed(2))
        labels, top = torch.tensor([[1, 2]]), top_tokens(teacher, 2)

        def loss(logits: Tensor) -> Tensor:
            return distillation_loss(logits, labels, top, teacher_weight=0.7, temperature=1.5)

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

    @pytest.mark.parametrize(("weight", "temperature"), [(1.0, 1.0), (0.5, 1.0), (0.0, 1.0), (1.0, 3.0), (0.3, 2.0)])
    def test_loss_and_gradient_are_those_of_autograd_however_many_positions_at_once(
        self, weight: float, temperature: float, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        generator = torch.Generator().manual_seed(5)
        student = (3 * torch.randn(2, 6, 50, generator=generator)).requires_grad_()
        labels = torch.randint(0, 50, (2, 6), generator=generator)
        labels[0, 2] = labels[1, 5] = IGNORED
        at = labels != IGNORED
        top = top_tokens(3 * torch.randn(10, 50, generator=generator), 5, temperature)
        top["logp"][0] -= top["logp"][0].logsumexp(-1)  # and nothing is left for the others
        top["rest"][0] = 0.0
        logq = (student[at] / temperature).log_softmax(-1)
        logq_top = logq.gather(1, top["tokens"])
        logq_rest = (1 - logq_top.exp().sum(-1)).log()
        p, rest = top["logp"].exp(), top["rest"]
        divergence = (p * (top["logp"] - logq_top)).sum() + (torch.xlogy(rest, rest) - rest * logq_rest).sum()
        nll = functional.cross_entropy(student[at], labels[at], reduction="sum")
        expected = weight * temperature**2 * divergence + (1 - weight) * nll
        [wanted] = torch.autograd.grad(expected, student)
        for at_once in (1, 150, 10_000):
            monkeypatch.setattr("secateur.recovery.distillation.CPU_LOGITS", at_once)
            found = distillation_loss(student, labels, top, teacher_weight=weight, temperature=temperature)
            assert found.item() == pytest.approx(expected.item(), rel=1e-5)
            [gradient] = torch.autograd.grad(2 * found, student)
            assert torch.allclose(gradient, 2 * wanted, atol=1e-5)

    def test_the_labels_have_the_rest_of_the_weight(self) -> None:
        student, teacher = torch.randn(2, 1, 3, 7, generator=torch.Generator().manual_seed(3)).unbind()
        labels = torch.tensor([[4, 1, 0]])
        top = top_tokens(teacher[0], 3)
        nll = functional.cross_entropy(student[0], labels[0], reduction="sum")
        assert float(nll_loss(student, labels)) == pytest.approx(float(nll), rel=1e-5)
        for temperature in (1.0, 3.0):
            whole = distillation_loss(student, labels, top, temperature=temperature)
            some = distillation_loss(student, labels, top, teacher_weight=0.25, temperature=temperature)
            assert float(some) == pytest.approx(0.25 * float(whole) + 0.75 * float(nll), rel=1e-5)

    def test_positions_without_a_label_count_nothing(self) -> None:
        student, teacher = torch.randn(2, 2, 3, 7, generator=torch.Generator().manual_seed(4)).unbind()
        labels = torch.tensor([[4, IGNORED, 0], [IGNORED, IGNORED, 1]])
        positions = labels != IGNORED
        top = top_tokens(teacher[positions], 3)
        alone = distillation_loss(student[positions][None], labels[positions][None], top)
        assert float(distillation_loss(student, labels, top)) == pytest.approx(float(alone), rel=1e-5)


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
