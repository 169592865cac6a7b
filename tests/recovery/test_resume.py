"""A training that was stopped or killed resumes to the same weights; two processes train as one does."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from trainings import (
    KILLING,
    copy_work,
    counted_steps,
    distance,
    interrupt,
    interrupted_at,
    place_fixture,  # noqa: F401 - the fixture `place`
    shelf,
    train,
)

from launching import launch
from secateur.errors import CheckpointError
from secateur.pipeline.options import RunOptions
from secateur.recovery.checkpoints import last_checkpoint
from secateur.recovery.options import LoraOptions
from secateur.recovery.result import RecoverResult
from tiny import names, write_tiny

HEADS: dict[str, Any] = {"num_attention_heads": 10, "num_key_value_heads": 10, "head_dim": 64}
SHARD = "shard-00001-model-00001-of-00001.safetensors"
RESUME = RunOptions(resume=True)
TAUGHT: dict[str, Any] = {
    "method": "lora+distill",
    "eval_texts": ("reference=held.txt",),
    "lora": LoraOptions(rank=4, dropout=0.1),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RecoverResult:
    """A training that nothing stops."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(shelf())
        return train(out=tmp_path_factory.mktemp("whole") / "out", **TAUGHT)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a training that was stopped after its third step, and checkpoint 2; there is none yet."""
    out = tmp_path_factory.mktemp("stopped") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(shelf())
        with interrupted_at(3):
            train(out=out, **TAUGHT)
    return out


class TestStopped:
    def test_it_goes_on_to_the_same_weights_and_the_teacher_reads_nothing_again(
        self, whole: RecoverResult, stopped: Path, place: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        copy_work(stopped, place / "out")
        checkpoint = last_checkpoint(place / ".out.secateur" / "training")
        assert checkpoint is not None
        assert checkpoint.name == "checkpoint-2"
        files = [name for folder in ("optimizer", "trained") for name in (folder, f"{folder}/{SHARD}")]
        assert names(checkpoint) == sorted([*files, "optimizer.json", "trainer_state.json"])
        for name in ("torch.save", "torch.load", "pickle.dump", "pickle.load"):
            monkeypatch.setattr(name, lambda *_, **__: pytest.fail("a pickle"))
        monkeypatch.setattr(
            "secateur.recovery.teacher_cache._teacher_outputs", lambda *_: pytest.fail("the teacher read again")
        )
        with counted_steps() as steps:
            resumed = train(run=RESUME, **TAUGHT)
        assert steps == [2, 3]
        assert (whole.resumed, resumed.resumed) == (False, True)
        assert distance("here/out", whole.out) == 0
        assert (resumed.loss, resumed.evaluation, resumed.best_step) == (whole.loss, whole.evaluation, whole.best_step)
        assert [name for name in names(place) if "/" not in name] == ["out"]

    def test_all_weights_go_on_to_the_same(self, place: Path) -> None:
        train(out="here/whole", method="full")
        with interrupted_at(3):
            train(method="full")
        assert train(method="full", run=RESUME).resumed
        assert distance("here/out", "here/whole") == 0

    @pytest.mark.parametrize("given", [{"learning_rate": 1e-3, "run": RESUME}, {}], ids=["other options", "no resume"])
    def test_another_training_starts_anew(self, given: dict[str, Any], stopped: Path, place: Path) -> None:
        copy_work(stopped, place / "out")
        assert not train(**{**TAUGHT, **given}).resumed

    def test_a_checkpoint_without_a_state_is_passed_over(self, stopped: Path, place: Path) -> None:
        copy_work(stopped, place / "out")
        (place / ".out.secateur" / "training" / "checkpoint-3").mkdir()
        assert train(run=RESUME, **TAUGHT).resumed

    def test_a_damaged_checkpoint_is_named_and_removed(self, stopped: Path, place: Path) -> None:
        copy_work(stopped, place / "out")
        (place / ".out.secateur" / "training" / "checkpoint-2" / "trained" / SHARD).write_bytes(b"half")
        with pytest.raises(CheckpointError, match=r"checkpoint-2/trained cannot be read .*start without --resume"):
            train(run=RESUME, **TAUGHT)
        assert names(place) == []

    @pytest.mark.parametrize("patience", [None, 1])
    def test_a_training_that_was_over_does_not_train_again(
        self, patience: int | None, place: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        given: dict[str, Any] = {"method": "full", "eval_texts": ("reference=held.txt",), "patience": patience}
        if patience is not None:  # it stops early
            given |= {"learning_rate": 0.3, "max_steps": 60, "eval_steps": 1}
        with monkeypatch.context() as patch:
            patch.setattr("secateur.recovery.training._save", interrupt)
            with pytest.raises(KeyboardInterrupt):
                train(**given)
        monkeypatch.setattr("secateur.recovery.trainer.RecoveryTrainer", lambda *_: pytest.fail("trained again"))
        steps = train(run=RESUME, **given).steps
        assert steps == 4 if patience is None else steps < 60


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_at_the_same_weights(place: Path) -> None:
    arguments = "recover per-layer here/out --data rows.json --method lora+distill --max-length 128 --max-steps 16"
    arguments += " --eval-steps 2 --learning-rate 3e-3 --dropout 0.1 --dtype float32 --device cpu --patience 50"
    arguments += " --eval reference=held.txt --quiet --global-batch-size 8 --micro-batch-size 8"
    whole = arguments.replace("here/out", "here/whole").split()
    start = time.monotonic()
    subprocess.run([sys.executable, "-c", KILLING, "0", "1", *whole], check=True, capture_output=True)
    early = (time.monotonic() - start) / 6
    command = [sys.executable, "-c", KILLING, "10", str(early), *arguments.split()]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 8
    assert distance("here/out", "here/whole") <= 1e-6
    assert [name for name in names(place) if "/" not in name] == ["out", "whole"]


# Kills one of the processes as a step begins; the launcher stops the other.
STOPPING = """
import os, signal, sys
stop, arguments = int(sys.argv[1]), sys.argv[2:]
import secateur.cli.main
from secateur import processes
from secateur.recovery.callbacks import Checkpoints, SeedSteps
from torch.distributed.tensor import DTensor
begin, save = SeedSteps.on_step_begin, Checkpoints._save
def on_step_begin(self, args, state, control, **others):
    if state.global_step == stop and processes.rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    begin(self, args, state, control, **others)
def on_save(self, state, about):
    if processes.is_first() and any(isinstance(weight, DTensor) for weight in about["model"].parameters()):
        print("sharded")
    save(self, state, about)
SeedSteps.on_step_begin, Checkpoints._save = on_step_begin, on_save
sys.exit(secateur.cli.main.run(arguments))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("config", "method"), [("ddp", "full"), ("fsdp2", "lora+distill")])
def test_two_processes_that_were_killed_go_on_and_train_as_one_does(
    config: str, method: str, place: Path, tmp_path: Path
) -> None:
    """With the configs that we ship; the processes speak gloo."""
    alone = train(out="here/alone", method=method, eval_texts=("reference=held.txt",))
    (tmp_path / "stopping.py").write_text(STOPPING)
    command = "recover per-layer here/out --data rows.json --max-length 128 --max-steps 4 --global-batch-size 8"
    command += " --learning-rate 3e-3 --eval-steps 2 --dtype float32 --eval reference=held.txt --json here.json"
    arguments = [*command.split(), "--method", method]
    file = Path(__file__).parents[2] / "docs" / "accelerate" / f"{config}.yaml"
    stopped = launch(str(tmp_path / "stopping.py"), "3", *arguments, config=file)
    assert stopped.returncode != 0
    assert last_checkpoint(Path("here/.out.secateur/training")).name == "checkpoint-2"  # type: ignore[union-attr]
    done = launch(str(tmp_path / "stopping.py"), "-1", *arguments, "--resume", config=file)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote here/out") == 1
    assert ("sharded" in done.stdout) == (config == "fsdp2")
    result = json.loads(Path("here.json").read_text())
    assert result["resumed"]
    assert [step for step, _ in result["loss"]] == [step for step, _ in alone.loss]
    for (_, one), (_, other) in zip(result["loss"], alone.loss, strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    for entry, expected in zip(result["evaluation"], alone.evaluation, strict=True):
        assert entry["score"] == pytest.approx(expected["score"], rel=1e-4)
    assert distance("here/out", "here/alone") < 1e-4


# Prints the largest memory of its process.
PEAK = """
import sys
import secateur.cli.main
from secateur import processes
from secateur.progress import peak_rss
code = secateur.cli.main.run(sys.argv[1:])
with open(f"peak-{processes.count()}-{processes.rank()}", "w") as file:
    print(peak_rss() // 1024, file=file)
sys.exit(code)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the memory of a process is counted otherwise")
def test_of_two_processes_that_share_a_model_none_holds_it_whole(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """157 M parameters in float32 with their gradients and moments are 2.5 GB; each process has half of them."""
    write_tiny(tmp_path / "big", num_hidden_layers=24, hidden_size=640, intermediate_size=2560, **HEADS)
    (tmp_path / "peak.py").write_text(PEAK)
    command = "recover big here/{} --data rows.json --max-length 128 --max-steps 2 --global-batch-size 2 --method full"
    command += " --micro-batch-size 1 --validation 0 --dtype float32 --device cpu --json {}.json"
    script = str(tmp_path / "peak.py")
    subprocess.run([sys.executable, script, *command.format("one", "one").split()], capture_output=True, check=True)
    config = Path(__file__).parents[2] / "docs" / "accelerate" / "fsdp2.yaml"
    shared = launch(script, *command.format("two", "two").split(), config=config)
    assert shared.returncode == 0, shared.stderr
    whole, *parts = (int(Path(f"peak-{name}").read_text()) / 2**20 for name in ("1-0", "2-0", "2-1"))
    with capsys.disabled():
        sys.stdout.write(f"\npeak memory: one process {whole:.2f} GiB, of two {parts[0]:.2f} and {parts[1]:.2f}\n")
    assert max(parts) < 0.65 * whole
    one, two = (json.loads(Path(f"{name}.json").read_text()) for name in ("one", "two"))
    assert [loss for _, loss in two["loss"]] == pytest.approx([loss for _, loss in one["loss"]], rel=1e-4)
    assert distance("here/two", "here/one") < 1e-4
