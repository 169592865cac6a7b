"""Models are timed in turns on the same prompts, by the timer that their devices need, and medians are reported."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar, cast

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from secateur.errors import DataError, ModelError
from secateur.evaluation import speed as module
from secateur.evaluation.memory import activation_bytes, weight_bytes
from secateur.evaluation.options import ProfileOptions
from secateur.evaluation.speed import Speed, measure_speed
from tiny import tiny_model


def short(**options: Any) -> ProfileOptions:
    return ProfileOptions(**{"seq_lens": (4,), "new_tokens": 1, "repeats": 1, **options})


def test_models_are_timed_in_turns_on_one_prompt() -> None:
    calls: list[tuple[str, list[int]]] = []
    models = {"a": tiny_model(), "b": tiny_model(vocab_size=10)}
    for name, model in models.items():

        def note(_: nn.Module, __: Any, kwargs: dict[str, Any], name: str = name) -> None:
            calls.append((name, kwargs["input_ids"][0].tolist()))

        model.register_forward_pre_hook(note, with_kwargs=True)
    models["a"].train()
    [speeds] = measure_speed(models, ProfileOptions(seq_lens=(6,), new_tokens=2, repeats=3, seed=4))
    prompts = [ids for _, ids in calls if len(ids) > 1]
    turns = [name for name, ids in calls if len(ids) > 1]
    assert turns == ["a", "a", "b", "b"] + ["a", "b"] * 3  # warm-up and memory, then the timed runs
    assert all(ids == prompts[0] for ids in prompts)
    assert len(prompts[0]) == 6
    assert max(prompts[0]) < 10  # of the smaller vocabulary
    assert [len(ids) for _, ids in calls[-6:]] == [6, 1, 1] * 2  # one token a step after the prompt
    assert list(speeds) == ["a", "b"]
    assert all(speed.prefill_seconds > 0 and speed.decode_tokens_per_second > 0 for speed in speeds.values())
    assert models["a"].training
    assert not any(weight.is_inference() for weight in models["a"].parameters())


def test_medians_and_the_sum_of_weights_and_activations_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([[9.0, 9.0, 9.0], [1.0, 0.5, 0.25], [3.0, 0.5, 4.0], [2.0, 0.5, 0.125]])
    monkeypatch.setattr(module, "_time_steps", lambda *_, **__: next(seconds))
    model = tiny_model()
    [speeds] = measure_speed({"m": model}, short(new_tokens=2, repeats=3))
    peak = weight_bytes(model) + activation_bytes(model, torch.zeros(1, 4, dtype=torch.long))
    assert speeds == {"m": Speed(2.0, (1.5, 2.5), 2.0, peak)}


def test_error_of_too_few_positions() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=1, n_positions=16))
    with pytest.raises(DataError, match=r"16 positions, but reads 18 tokens at once\. --seq-len plus --new-tokens"):
        measure_speed({"m": model}, short(seq_lens=(14,), new_tokens=4))


def test_error_of_weights_on_meta() -> None:
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=1))
    with pytest.raises(ModelError, match="its weights are on device='meta'"):
        measure_speed({"m": model}, short())


def on(*devices: str) -> nn.Module:
    """A model with a weight on each device."""
    weights = [SimpleNamespace(device=torch.device(device)) for device in devices]
    return cast(nn.Module, SimpleNamespace(parameters=lambda: iter(weights)))


class FakeEvent:
    """An event of a device whose clock moves by one millisecond with each."""

    log: ClassVar[list[str]] = []
    clock: ClassVar[int] = 0

    def record(self, stream: str) -> None:
        FakeEvent.clock += 1
        self.at = FakeEvent.clock
        FakeEvent.log.append(f"record on {stream}")

    def elapsed_time(self, later: FakeEvent) -> float:
        return float(later.at - self.at)

    def synchronize(self) -> None:
        FakeEvent.log.append("wait for the last")


def test_on_an_accelerator_events_mark_the_steps_and_nothing_waits_between(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeEvent.log.clear()
    monkeypatch.setattr(module, "_event_and_stream", lambda device: (FakeEvent(), f"{device}'s stream"))
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: FakeEvent.log.append(f"wait for {device}"))
    timer = module._Timer(on("cuda:1"))
    monkeypatch.setattr(module, "_Timer", lambda model: timer)
    seconds = module._time_steps(tiny_model(), torch.zeros(1, 4, dtype=torch.long), new_tokens=2)
    assert seconds == [0.001, 0.001, 0.001]
    assert FakeEvent.log == ["wait for cuda:1", *["record on cuda:1's stream"] * 4, "wait for the last"]


@pytest.mark.parametrize(
    ("devices", "timer"),
    [
        (["cpu"], "clock of []"),
        ([], "clock of []"),
        (["cuda:0"], "events of cuda:0"),
        (["mps:0"], "events of mps:0"),
        (["cuda:0", "cuda:1"], "clock of ['cuda:0', 'cuda:1']"),
        (["cuda:0", "cpu"], "clock of ['cuda:0']"),
        (["cuda:0", "meta"], "clock of ['cuda:0']"),  # weights that accelerate moves in
    ],
)
def test_which_timer_a_model_gets(devices: list[str], timer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: None)
    found = module._Timer(on(*devices))
    names = [str(device) for device in found.accelerators]
    assert timer == (f"events of {', '.join(names)}" if found.by_events else f"clock of {names}")


def test_the_clock_waits_for_every_accelerator_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    times = iter([1.0, 3.0, 3.5])

    def tick() -> float:
        log.append("clock")
        return next(times)

    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: log.append(str(device)))
    monkeypatch.setattr("time.perf_counter", tick)
    clock = module._Timer(on("cuda:0", "cuda:1"))
    assert log == ["cuda:0", "cuda:1"]
    log.clear()
    for _ in range(3):
        clock.mark()
    monkeypatch.undo()
    assert clock.seconds() == [2.0, 0.5]
    assert log == ["cuda:0", "cuda:1", "clock"] * 3
