"""A pruned folder is trained and becomes one ordinary folder; runs that are killed go on; what cannot be is refused."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from launching import launch
from recipes import recipe
from secateur import CalibrationOptions, DataOptions, RecoverOptions, SecateurError, recover
from secateur.checkpoint.record import read_record
from secateur.data.text import demo_texts
from secateur.errors import CheckpointError, DataError, ModelError, TrainingError
from secateur.evaluation.perplexity import perplexity
from secateur.evaluation.protocols import Protocol
from secateur.evaluation.texts import encode, read_evaluation_text
from secateur.models.loading import LoadOptions, load
from secateur.models.silence import quiet
from secateur.models.tokenizer import load_tokenizer
from secateur.pipeline.run import prune_model
from secateur.planning.plan import read_plan
from secateur.recovery.callbacks import Steady
from secateur.recovery.checkpoints import last_checkpoint
from secateur.recovery.lora import LoraOptions, with_adapter
from secateur.recovery.options import PRESETS, Method, options_for
from secateur.recovery.result import Recovered
from tiny import names, write_tiny

ONCE = sys.modules["secateur.recovery.recover"]  # `secateur.recovery` is the function
TEXT = "a cat and a dog and a bird sat on a log and sang\n" * 60
HELD_OUT = demo_texts()[1][:3000]
EXACT = LoadOptions(dtype="float32", device="cpu")
FILES = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
OURS = ["secateur_curves.json", "secateur_manifest.json", "secateur_plan.json", "secateur_record.json"]
ROWS = [{"instruction": f"Count to {i}.", "output": " ".join(map(str, range(i)))} for i in range(2, 42)]


# Forks a run from one process that has imported everything, and kills it, so often; then lets it end. It is killed a
# moment after the beginning of one of its first steps, and every second time, if that is sooner, within so many seconds
# of its start: what it gets done before depends on the steps, and on the speed of the machine hardly.
KILLING = """
import os, random, signal, sys, threading
import peft, secateur.cli.main
from secateur.recovery.callbacks import Steady
kills, early, arguments = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]
chooser, begin, killed = random.Random(0), Steady.on_step_begin, 0
def kill_after(seconds):
    timer = threading.Timer(seconds, lambda: os.kill(os.getpid(), signal.SIGKILL))
    timer.daemon = True
    timer.start()
while True:
    steps, moment, start = chooser.randint(1, 4), chooser.uniform(0, 0.1), chooser.uniform(0, early)
    child = os.fork()
    if child == 0:
        begun = []
        def on_step_begin(self, args, state, control, **others):
            begun.append(state.global_step)
            if killed < kills and len(begun) == steps:
                kill_after(moment)
            begin(self, args, state, control, **others)
        Steady.on_step_begin = on_step_begin
        if killed < kills and killed % 2:
            kill_after(start)
        os._exit(secateur.cli.main.run([*arguments, *(["--resume"] if killed else [])]))
    status = os.waitpid(child, 0)[1]
    if os.WIFEXITED(status):
        print(killed)
        sys.exit(os.WEXITSTATUS(status))
    killed += 1
"""
# Stops all processes as a step begins. accelerate shards weights over GPUs alone; told that CPUs are some, it does.
STOPPING = """
import os, signal, sys
from accelerate.state import DistributedType, PartialState
config, stop, arguments = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
made = PartialState.__init__
def initialise(self, *given, **options):
    made(self, *given, **options)
    if config == "fsdp2" and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU
PartialState.__init__ = initialise
import secateur.cli.main
from secateur import processes
from secateur.recovery.callbacks import Steady
from secateur.recovery.loop import RecoveryTrainer
from torch.distributed.tensor import DTensor
begin, save = Steady.on_step_begin, RecoveryTrainer._save_checkpoint
def on_step_begin(self, args, state, control, **others):
    if state.global_step == stop:
        os.kill(os.getpid(), signal.SIGKILL)
    begin(self, args, state, control, **others)
def on_save(self, model, trial):
    if processes.is_first() and any(isinstance(weight, DTensor) for weight in model.parameters()):
        print("sharded")
    save(self, model, trial)
Steady.on_step_begin, RecoveryTrainer._save_checkpoint = on_step_begin, on_save
sys.exit(secateur.cli.main.run(arguments))
"""


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model, two cuts of it, and rows to train on."""
    folder = tmp_path_factory.mktemp("shelf")
    dense = str(write_tiny(folder / "dense"))
    (folder / "text.txt").write_text(TEXT)
    for shape in ("uniform", "free"):
        prune_model(
            recipe(
                dense,
                cut={"ratio": 0.3, "shape": shape},
                calibration=CalibrationOptions(str(folder / "text.txt"), 4, 16),
            ),
            folder / shape,
        )
    (folder / "rows.json").write_text(json.dumps(ROWS))
    shutil.copytree(folder / "dense", folder / "sharp")  # one that is surer than random weights make it
    sure = load_file(folder / "sharp" / "model.safetensors")
    sure["lm_head.weight"] *= 8
    save_file(sure, folder / "sharp" / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture
def place(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, with the models and rows in reach under short names."""
    for path in shelf.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path / "here"


def train(
    pruned: str = "free", out: str = "here/out", *, data: dict[str, Any] | None = None, **given: Any
) -> Recovered:
    """A short training: 8 steps of 8 rows unless other options are given."""
    known = {name: given.pop(name) for name in list(given) if name in RecoverOptions.__dataclass_fields__}
    return recover(
        pruned,
        out,
        data=DataOptions(**{"sources": ("rows.json",), "max_length": 128, **(data or {})}),
        options=RecoverOptions(
            **{"max_steps": 8, "global_batch_size": 8, "learning_rate": 3e-3, "eval_steps": 4, **known}
        ),
        **{"loading": EXACT, **given},
    )


def interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def farthest(one: str | Path, other: str | Path) -> float:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    return max(float((first[name].double() - second[name].double()).abs().max()) for name in first)


def digest(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@contextmanager
def stopped_at(step: int) -> Iterator[None]:
    """Ctrl-C as step `step` begins."""
    real = Steady.on_step_begin

    def stop(self: Any, args: Any, state: Any, control: Any, **others: Any) -> None:
        if state.global_step == step:
            raise KeyboardInterrupt
        real(self, args, state, control, **others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("secateur.recovery.callbacks.Steady.on_step_begin", stop)
        with pytest.raises(KeyboardInterrupt):
            yield


class TestResult:
    @pytest.mark.parametrize("method", get_args(Method))
    @pytest.mark.parametrize("shape", ["uniform", "free"])
    def test_one_ordinary_folder(self, method: str, shape: str, place: Path) -> None:
        before = digest(Path(shape).resolve())
        found = train(shape, method=method, texts={"reference": HELD_OUT})
        assert digest(Path(shape).resolve()) == before  # weights mapped from there are not ours to write
        code = ["modeling_per_layer.py"] if shape == "free" else []
        assert sorted(names(place / "out")) == sorted(FILES + OURS + code)
        assert names(place) == sorted(["out", *(f"out/{name}" for name in names(place / "out"))])
        assert read_plan(Path("here/out/secateur_plan.json")) == read_plan(Path(f"{shape}/secateur_plan.json"))
        assert farthest("here/out", shape) > 1e-4
        model = load("here/out", device="cpu")
        found_again = perplexity(
            model, encode(load_tokenizer("here/out"), HELD_OUT), data="reference", protocol=Protocol(128)
        )
        best = next(entry for entry in found.evaluation if entry["step"] == found.best_step)
        assert found_again.ppl == pytest.approx(best["perplexity"]["reference"], rel=1e-5)
        assert best["score"] == min(entry["score"] for entry in found.evaluation[1:])
        assert [step for step, _ in found.loss] == list(range(1, found.steps + 1))
        curves = json.loads(Path("here/out/secateur_curves.json").read_text())
        assert curves["loss"] == [list(pair) for pair in found.loss]

    def test_it_learns(self, place: Path) -> None:
        found = train(method="full", max_steps=40, learning_rate=1e-2, data={"validation": 0.1})
        values = [entry["validation"] for entry in found.evaluation]
        assert found.loss[-1][1] < 0.6 * found.loss[0][1]
        assert min(values) < 0.7 * values[0]

    def test_a_teacher_is_approached(self, place: Path) -> None:
        options: dict[str, Any] = {"max_steps": 40, "eval_steps": 10, "patience": None, "teacher": "sharp"}
        # An adapter does not reach the last matrix, by which alone this teacher is surer.
        for method, left in (("distill", 0.5), ("lora+distill", 0.98)):
            found = train(out=f"here/{method}", method=method, data={"validation": 0.1, "loss_on": "all"}, **options)
            values = [entry["validation"] for entry in found.evaluation]
            assert values[0] > 0.1
            assert values[-1] < left * values[0]

    def test_the_teacher_is_the_model_that_was_cut(self, place: Path) -> None:
        train(method="distill", max_steps=1)
        record = read_record(place / "out")
        assert record is not None
        assert record.recovery is not None
        assert record.recovery["teacher"] == record.model == read_record(Path("free")).model  # type: ignore[union-attr]

    def test_the_record_says_how(self, place: Path) -> None:
        found = train(method="lora", command="secateur recover")
        record, before = read_record(place / "out"), read_record(Path("free"))
        assert record is not None
        assert before is not None
        assert replace(record, recovery=None) == before
        about = record.recovery
        assert about is not None
        assert about["options"] == json.loads(
            json.dumps(asdict(RecoverOptions(**about["options"] | {"lora": LoraOptions(**about["options"]["lora"])})))
        )
        assert (about["steps"], about["best_step"]) == (found.steps, found.best_step)
        assert (about["method"], about["command"], about["before"]) == ("lora", "secateur recover", None)
        train("here/out", "here/again", method="full")
        again = read_record(place / "again")
        assert again is not None
        assert again.recovery is not None
        assert again.recovery["before"] == about

    def test_the_adapter_beside_it_gives_the_same(self, place: Path) -> None:
        train(method="lora", save_adapter=True)
        assert names(place / "out" / "adapter") == ["adapter_config.json", "adapter_model.safetensors"]
        import peft

        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft's
            base: Any = load("free", device="cpu")
            adapted = peft.PeftModel.from_pretrained(base, str(place / "out" / "adapter")).eval()
            merged = load("here/out", device="cpu")
        ids = torch.arange(40)[None]
        with torch.no_grad():
            assert torch.allclose(adapted(input_ids=ids).logits, merged(input_ids=ids).logits, atol=1e-5)

    def test_it_can_be_cut_again(self, place: Path) -> None:
        train("uniform", method="lora")
        prune_model(
            recipe("here/out", cut={"ratio": 0.2}, calibration=CalibrationOptions("text.txt", 4, 16)), "here/smaller"
        )
        assert load("here/smaller", device="cpu").num_parameters() < load("here/out", device="cpu").num_parameters()

    def test_a_stock_folder_needs_nothing_of_ours(self, place: Path) -> None:
        train("uniform", method="lora")
        with quiet():
            stock = AutoModelForCausalLM.from_pretrained("here/out")
        ids = torch.arange(40)[None]
        with torch.no_grad():
            assert torch.equal(stock(input_ids=ids).logits, load("here/out", device="cpu")(input_ids=ids).logits)

    def test_a_model_that_was_never_cut(self, place: Path) -> None:
        train("dense", method="lora")
        assert not (place / "out" / "secateur_plan.json").exists()
        record = read_record(place / "out")
        assert record is not None
        assert record.model == "dense"

    @pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
    def test_the_dtype_of_the_folder_stays(self, dtype: str, place: Path) -> None:
        write_tiny(place / "half", dtype=getattr(torch, dtype))
        for method in ("lora", "full"):
            train("here/half", f"here/{method}", method=method, loading=LoadOptions(device="cpu"))
            assert {str(weight.dtype) for weight in weights(place / method).values()} == {f"torch.{dtype}"}
            assert farthest(place / method, place / "half") > 0

    def test_curves_as_a_picture(self, place: Path) -> None:
        train(method="lora", plot=True, texts={"reference": HELD_OUT})
        assert (place / "out" / "secateur_curves.png").read_bytes().startswith(b"\x89PNG")

    def test_no_pickle_is_written_or_read(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: Any, **__: Any) -> None:
            pytest.fail("a pickle")

        for name in ("torch.save", "torch.load", "pickle.dump", "pickle.load"):
            monkeypatch.setattr(name, refuse)
        with stopped_at(6):
            train(method="full", texts={"reference": HELD_OUT})
        kept = sorted(path.name for path in Path("here/.out.secateur/training/checkpoint-4").iterdir())
        assert kept == ["optimizer.json", "optimizer.safetensors", "trained.safetensors", "trainer_state.json"]
        assert train(method="full", texts={"reference": HELD_OUT}, resume=True).resumed


class TestTraining:
    def test_rows_of_a_step_may_be_computed_in_any_parts(self, place: Path) -> None:
        for micro_batch in (8, 2):
            train(out=f"here/{micro_batch}", method="full", micro_batch_size=micro_batch, max_steps=4)
        assert farthest("here/8", "here/2") < 2e-5

    def test_layers_may_be_computed_again(self, place: Path) -> None:
        for recompute in (False, True):
            train(out=f"here/{recompute}", method="lora", gradient_checkpointing=recompute, max_steps=4)
        assert farthest("here/False", "here/True") < 1e-5

    def test_packed_rows_train(self, place: Path) -> None:
        Path("short.jsonl").write_text(
            "".join(json.dumps({"text": f"It is {i}, is it not?"}) + "\n" for i in range(60))
        )
        found = train(
            method="full", data={"sources": ("short.jsonl",), "packing": True, "max_length": 100}, global_batch_size=4
        )
        assert found.rows < 60 / 3
        assert found.loss[-1][1] < found.loss[0][1]

    def test_it_stops_where_held_out_text_gets_worse(self, place: Path) -> None:
        found = train(
            method="full", max_steps=60, learning_rate=3e-2, eval_steps=2, patience=2, texts={"reference": HELD_OUT}
        )
        assert found.steps < 60
        scores = [entry["score"] for entry in found.evaluation]
        assert found.steps == found.evaluation[-1]["step"]
        assert len(scores) - 1 - scores.index(min(scores)) == 2

    def test_the_paper_s_settings(self) -> None:
        options, data = options_for("llm-pruner", {}, {"sources": ("alpaca.json",)})
        assert (options.lora.rank, options.lora.alpha, options.lora.dropout) == (8, 16.0, 0.05)
        assert (options.global_batch_size, options.micro_batch_size, options.learning_rate, options.warmup_steps) == (
            64,
            4,
            1e-4,
            100,
        )
        assert (options.epochs, options.method, options.lr_scheduler) == (2.0, "lora", "linear")
        assert (data.max_length, data.template, data.loss_on) == (256, "alpaca", "answers")
        assert sorted(PRESETS) == ["default", "llm-pruner"]

    def test_every_linear_layer_but_the_last_has_an_adapter(self) -> None:
        from tiny import tiny_model

        adapted = with_adapter(tiny_model(), LoraOptions(rank=2))
        places = {
            name.split(".lora_")[0].split(".", 4)[-1] for name, p in adapted.named_parameters() if p.requires_grad
        }
        seven = "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj mlp.gate_proj mlp.up_proj"
        assert places == {f"{i}.{name}" for i in range(3) for name in [*seven.split(), "mlp.down_proj"]}

    def test_a_fixed_warm_up_is_shortened_where_it_would_be_all(self, place: Path) -> None:
        found = train(method="lora", warmup_steps=100)
        assert any("warmup takes 0 steps, not 100: of 8 steps" in note for note in found.notes)
        assert not train(out="here/2", method="lora", warmup_steps=2).notes

    def test_what_made_nothing_better_is_said(self, place: Path) -> None:
        found = train(method="full", learning_rate=0.3, texts={"reference": HELD_OUT})
        assert any("no checkpoint is better than the pruned model was" in note for note in found.notes)

    def test_fewer_rows_than_a_step_takes(self, place: Path) -> None:
        found = train(method="lora", global_batch_size=64, data={"samples": 12, "validation": 0.0}, max_steps=2)
        assert any("a step takes 12 of the 12 rows" in note for note in found.notes)
        assert found.evaluation == ()
        assert found.best_step == 2

    def test_it_is_told_how_it_goes(self, place: Path) -> None:
        said: list[tuple[str, int, int, str]] = []

        @contextmanager
        def bars(stage: str) -> Iterator[Any]:
            yield lambda done, total, line="": said.append((stage, done, total, line))

        train(method="lora+distill", texts={"reference": HELD_OUT}, bars=bars)
        assert {stage for stage, *_ in said} == {"teacher", "train"}
        lines = [(done, total, line) for stage, done, total, line in said if stage == "train"]
        assert lines[-1][:2] == (8, 8)
        assert all(word in lines[-1][2] for word in ("loss ", " tokens/s", "reference ", "validation "))

    def test_held_out_text_that_is_in_the_data_is_told(self, place: Path, caplog: pytest.LogCaptureFixture) -> None:
        seen = "\n".join(f"{row['instruction']} {row['output']}" for row in ROWS[20:])
        found = train(texts={"seen": seen, "reference": HELD_OUT}, max_steps=1, data={"max_length": 250})
        told = [note for note in found.notes if "flatters its perplexity" in note]
        assert len(told) == 1
        assert re.match(r"[\d.]+ % of the held-out text seen has 13 words in a row in common with the data;", told[0])
        assert told[0] in caplog.text

    def test_a_tracker_sees_the_training(self, place: Path) -> None:
        pytest.importorskip("tensorboard")
        train(method="lora", track="tensorboard", max_steps=2)
        assert any(place.glob("runs/out/events.*"))


class TestResume:
    @pytest.mark.parametrize("method", ["full", "lora+distill"])
    def test_a_stopped_run_goes_on_to_the_same_weights(
        self, method: str, place: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        options: dict[str, Any] = {
            "method": method,
            "texts": {"reference": HELD_OUT},
            "lora": LoraOptions(rank=4, dropout=0.1),
        }
        whole = train(out="here/whole", **options)
        with stopped_at(6):
            train(**options)
        assert last_checkpoint(Path("here/.out.secateur/training")).name == "checkpoint-4"  # type: ignore[union-attr]
        with monkeypatch.context() as patch:
            patch.setattr("secateur.recovery.distillation._likeliest", lambda *_: pytest.fail("the teacher read again"))
            resumed = train(resume=True, **options)
        assert (whole.resumed, resumed.resumed) == (False, True)
        assert farthest("here/out", "here/whole") == 0
        assert resumed.loss == whole.loss
        assert resumed.evaluation == whole.evaluation
        assert resumed.best_step == whole.best_step
        assert [name for name in names(place) if "/" not in name] == ["out", "whole"]

    def test_a_run_stopped_while_saving_trains_no_more(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(ONCE, "_save", interrupt)
            with pytest.raises(KeyboardInterrupt):
                train()
        monkeypatch.setattr("secateur.recovery.loop.RecoveryTrainer", lambda *_: pytest.fail("trained again"))
        assert train(resume=True).steps == 8

    def test_one_that_stopped_early_is_over(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        options: dict[str, Any] = {
            "method": "full",
            "max_steps": 60,
            "learning_rate": 3e-2,
            "eval_steps": 2,
            "patience": 2,
            "texts": {"reference": HELD_OUT},
        }
        with monkeypatch.context() as patch:
            patch.setattr(ONCE, "_save", interrupt)
            with pytest.raises(KeyboardInterrupt):
                train(**options)
        monkeypatch.setattr("secateur.recovery.loop.RecoveryTrainer", lambda *_: pytest.fail("trained again"))
        assert train(resume=True, **options).steps < 60

    def test_another_training_is_not_gone_on_with(self, place: Path) -> None:
        with stopped_at(6):
            train()
        assert not train(learning_rate=1e-3, resume=True).resumed

    def test_without_resume_it_starts_anew(self, place: Path) -> None:
        with stopped_at(6):
            train()
        assert not train().resumed

    def test_a_half_written_checkpoint_is_passed_over(self, place: Path) -> None:
        with stopped_at(6):
            train()
        (Path("here/.out.secateur/training") / "checkpoint-5").mkdir()
        assert train(resume=True).resumed

    def test_a_damaged_checkpoint(self, place: Path) -> None:
        with stopped_at(6):
            train()
        (Path("here/.out.secateur/training/checkpoint-4") / "trained.safetensors").write_bytes(b"half")
        with pytest.raises(CheckpointError, match=r"trained.safetensors cannot be read .* start without --resume"):
            train(resume=True)
        assert names(place) == []

    @pytest.mark.slow
    def test_killed_at_random_moments_it_ends_at_the_same_weights(self, place: Path) -> None:
        arguments = "recover free here/out --data rows.json --method lora+distill --max-length 128 --max-steps 60"
        arguments += " --eval-steps 3 --learning-rate 3e-3 --dropout 0.1 --dtype float32 --device cpu --patience 50"
        arguments += " --eval reference=held.txt --quiet --global-batch-size 8 --micro-batch-size 8"
        Path("held.txt").write_text(HELD_OUT)
        whole = arguments.replace("here/out", "here/whole").split()
        begin = time.monotonic()
        subprocess.run([sys.executable, "-c", KILLING, "0", "1", *whole], check=True, capture_output=True)
        early = (time.monotonic() - begin) / 6
        done = subprocess.run(
            [sys.executable, "-c", KILLING, "20", str(early), *arguments.split()],
            check=False,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert int(done.stdout) >= 10
        assert farthest("here/out", "here/whole") <= 1e-6
        assert [name for name in names(place) if "/" not in name] == ["out", "whole"]


class TestProcesses:
    """Two real processes that speak gloo."""

    COMMAND = (
        "recover free here/out --data rows.json --max-length 128 --max-steps 6 --global-batch-size 8 "
        "--learning-rate 3e-3 --eval-steps 2"
    )

    def train_alone(self, method: str) -> Recovered:
        Path("held.txt").write_text(HELD_OUT)
        texts = {"reference": read_evaluation_text("held.txt")}
        return train(out="here/alone", method=method, max_steps=6, eval_steps=2, texts=texts)

    def command(self, method: str) -> list[str]:
        Path("held.txt").write_text(HELD_OUT)
        options = ["--dtype", "float32", "--eval", "reference=held.txt", "--json", "here.json"]
        return [*self.COMMAND.split(), "--method", method, *options]

    def check(self, alone: Recovered) -> None:
        data = json.loads(Path("here.json").read_text())
        assert [step for step, _ in data["loss"]] == [step for step, _ in alone.loss]
        for (_, one), (_, other) in zip(data["loss"], alone.loss, strict=True):
            assert one == pytest.approx(other, rel=1e-4)
        for entry, expected in zip(data["evaluation"], alone.evaluation, strict=True):
            assert entry["score"] == pytest.approx(expected["score"], rel=1e-4)
        assert farthest("here/out", "here/alone") < 1e-4

    def test_they_train_as_one_does(self, place: Path) -> None:
        alone = self.train_alone("lora+distill")
        done = launch("-m", "secateur", *self.command("lora+distill"))
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("wrote here/out") == 1
        self.check(alone)

    @pytest.mark.slow
    def test_a_step_that_cannot_be_shared(self, place: Path) -> None:
        done = launch("-m", "secateur", *self.command("lora"), "--global-batch-size", "7")
        assert done.returncode != 0
        assert (
            "a step of 7 rows cannot be shared by 2 processes. Expected a multiple: --global-batch-size 8"
            in done.stderr
        )
        assert names(place) == []

    @pytest.mark.slow
    @pytest.mark.parametrize("config", ["ddp", "fsdp2"])
    @pytest.mark.parametrize("method", ["full", "lora+distill"])
    def test_a_stopped_run_goes_on_with_the_configs_that_we_ship(
        self, config: str, method: str, place: Path, tmp_path: Path
    ) -> None:
        alone = self.train_alone(method)
        (tmp_path / "stopping.py").write_text(STOPPING)
        script = [str(tmp_path / "stopping.py"), config]
        file = Path(__file__).parents[2] / "docs" / "accelerate" / f"{config}.yaml"
        stopped = launch(*script, "5", *self.command(method), config=file)
        assert stopped.returncode != 0
        assert last_checkpoint(Path("here/.out.secateur/training")).name == "checkpoint-4"  # type: ignore[union-attr]
        done = launch(*script, "-1", *self.command(method), "--resume", config=file)
        assert done.returncode == 0, done.stderr
        assert "went on from what was kept" in done.stdout
        assert ("sharded" in done.stdout) == (config == "fsdp2")
        self.check(alone)


class TestRefused:
    """One line, and nothing left behind."""

    @pytest.mark.parametrize(
        ("options", "error", "match"),
        [
            ({"pruned": "nowhere/model/x"}, ModelError, "no such file or folder"),
            ({"data": {"sources": ("nothing.json",)}}, DataError, "no such file"),
            ({"data": {"max_length": 4}}, DataError, "nothing is left of its 40 rows"),
            ({"data": {"max_length": 512}}, DataError, "max_length=512 is longer than the model's 256 positions"),
            ({"loading": LoadOptions(dtype="float16", device="cpu")}, TrainingError, "float16' overflows in training"),
            ({"method": "full", "save_adapter": True}, TrainingError, "method='full' has no adapter to keep"),
            ({"method": "distill", "teacher": "here"}, ModelError, "'here': this folder holds no config.json"),
            ({"method": "distill", "pruned": "dense"}, ModelError, "'dense' has no record .* --teacher MODEL"),
            ({"texts": {"short": "a cat"}}, DataError, r"short: \d tokens are fewer than one window of 128"),
            ({"track": "paper"}, TrainingError, "track='paper' is unknown. Expected tensorboard"),
            ({"out": "nowhere/out"}, CheckpointError, "the folder .*nowhere does not exist"),
            ({"out": "free", "overwrite": True}, CheckpointError, "holds the MODEL itself"),
        ],
    )
    def test_before_any_work(
        self, options: dict[str, Any], error: type[SecateurError], match: str, place: Path
    ) -> None:
        with pytest.raises(error, match=match):
            train(**options)
        assert names(place) == []

    def test_a_teacher_with_another_vocabulary(self, place: Path) -> None:
        write_tiny(place / "wordy", vocab_size=310)
        with pytest.raises(
            ModelError, match="teacher 'here/wordy' has a vocabulary of 310 tokens, and 'free' one of 300"
        ):
            train(method="distill", teacher="here/wordy")
        assert [name for name in names(place) if "/" not in name] == ["wordy"]

    def test_a_teacher_that_gives_nan(self, place: Path) -> None:
        shutil.copytree(Path("dense").resolve(), place / "ill")
        broken = weights(place / "ill")
        broken["lm_head.weight"][3] = 3e38
        save_file(broken, place / "ill" / "model.safetensors", {"format": "pt"})
        with pytest.raises(TrainingError, match="gives logits with NaN or Inf"):
            train(method="distill", teacher="here/ill")
        assert [name for name in names(place) if "/" not in name] == ["ill"]

    @pytest.mark.parametrize("method", ["full", "lora"])
    def test_a_loss_that_becomes_nan(self, method: str, place: Path) -> None:
        with pytest.raises(TrainingError, match=r"the (loss|gradient) is (nan|inf) at step \d+\. .* smaller rate"):
            train(method=method, learning_rate=1e30, max_steps=20, eval_steps=50, data={"validation": 0.0})
        assert names(place) == []

    @pytest.mark.parametrize(
        ("variable", "value", "match"),
        [
            ("ACCELERATE_USE_DEEPSPEED", "true", "DeepSpeed keeps its state in pickles"),
            ("ACCELERATE_MIXED_PRECISION", "fp16", "accelerate is told to compute in fp16, which overflows"),
        ],
    )
    def test_what_a_launcher_says(
        self, variable: str, value: str, match: str, place: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv(variable, value)
        with pytest.raises(TrainingError, match=match):
            train()
        assert names(place) == []

    def test_a_launcher_has_no_say_in_the_precision(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        train(out="here/alone", max_steps=3)
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
        train(max_steps=3)
        assert farthest("here/out", "here/alone") == 0

    def test_a_missing_package(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import importlib.util

        real = importlib.util.find_spec
        missing = {"peft", "matplotlib", "wandb"}
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, *rest: None if name in missing else real(name, *rest)
        )
        with pytest.raises(TrainingError, match=r"LoRA needs the package peft. Run: pip install 'secateur\[recover\]'"):
            train()
        with pytest.raises(TrainingError, match=r"plot needs .*matplotlib. Run: pip install 'secateur\[plot\]'"):
            train(method="full", plot=True)
        with pytest.raises(TrainingError, match=r"track='wandb' needs the package wandb. Run: pip install wandb"):
            train(method="full", track="wandb")
        assert names(place) == []

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"method": "magic"}, "method='magic' is unknown. Expected lora, full, distill or lora"),
            ({"lr_scheduler": "step"}, "lr_scheduler='step' is unknown"),
            ({"epochs": 0}, "epochs=0 trains nothing"),
            ({"learning_rate": float("inf")}, "learning_rate=inf trains nothing"),
            ({"temperature": 0}, "temperature=0 trains nothing"),
            ({"max_steps": 0}, "max_steps=0 is too small. Expected at least 1: --max-steps 1"),
            ({"global_batch_size": 0}, "global_batch_size=0 is too small"),
            ({"top_k": 0}, "top_k=0 is too small"),
            ({"eval_tokens": 64}, "eval_tokens=64 is too small. Expected at least 128"),
            ({"patience": 0}, "patience=0 is too small"),
            ({"teacher_weight": 1.5}, "teacher_weight=1.5 is no fraction of the loss"),
        ],
    )
    def test_odd_options(self, options: dict[str, Any], match: str) -> None:
        with pytest.raises(TrainingError, match=match):
            RecoverOptions(**options)

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"rank": 0}, "rank=0 is too small"),
            ({"alpha": 0}, "alpha=0 gives the adapter no weight"),
            ({"dropout": 1.0}, "dropout=1.0 is no share"),
        ],
    )
    def test_odd_adapters(self, options: dict[str, Any], match: str) -> None:
        with pytest.raises(TrainingError, match=match):
            LoraOptions(**options)

    def test_an_unknown_preset(self) -> None:
        with pytest.raises(TrainingError, match=r"preset='best' is unknown. Expected default or llm-pruner"):
            options_for("best", {}, {"sources": ("a.json",)})
