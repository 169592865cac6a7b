"""A dense model is cut and trained in turns: the sizes are those of one cut, and a killed run goes on where it was."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_recover import HELD_OUT, KILLING, ROWS, TEXT, farthest, interrupt

from launching import launch
from recipes import recipe
from secateur import CalibrationOptions, DataOptions, RecoverOptions, SecateurError, load, recover, verify
from secateur.checkpoint.record import read_record
from secateur.errors import CheckpointError, ModelError, PlanError, TrainingError
from secateur.models.loading import LoadOptions
from secateur.pipeline.run import prune_model
from secateur.planning.plan import read_plan
from secateur.recovery.callbacks import Steady
from secateur.recovery.result import Recovered
from secateur.recovery.rounds import prune_and_recover
from tiny import names, write_tiny

ROUNDS = sys.modules["secateur.recovery.rounds"]
TEXTS = CalibrationOptions("text.txt", 4, 16)
EXACT = LoadOptions(dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model, text, and rows to train on."""
    folder = tmp_path_factory.mktemp("shelf")
    write_tiny(folder / "dense")
    (folder / "text.txt").write_text(TEXT)
    (folder / "held.txt").write_text(HELD_OUT)
    (folder / "rows.json").write_text(json.dumps(ROWS))
    return folder


@pytest.fixture
def place(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, with all that in reach under short names."""
    for path in shelf.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path / "here"


DATA = DataOptions(("rows.json",), max_length=128)


def options(**given: Any) -> RecoverOptions:
    return RecoverOptions(**{"max_steps": 4, "global_batch_size": 8, "learning_rate": 3e-3, "eval_steps": 2, **given})


def in_turns(
    out: str = "here/out",
    *,
    steps: int = 3,
    cut: dict[str, Any] | None = None,
    model: str = "dense",
    plot: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    calibration: CalibrationOptions = TEXTS,
    **given: Any,
) -> Recovered:
    """Three rounds of four steps unless other options are given."""
    return prune_and_recover(
        recipe(model, cut={"ratio": 0.3} if cut is None else cut, calibration=calibration, loading=EXACT),
        out,
        rounds=steps,
        data=DATA,
        options=options(**given),
        plot=plot,
        resume=resume,
        overwrite=overwrite,
    )


def stopping(count: int) -> Callable[..., None]:
    """Ctrl-C as that many steps of all rounds have begun."""
    real, left = Steady.on_step_begin, [count]

    def stop(self: Any, *args: Any, **others: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        real(self, *args, **others)

    return stop


class TestResult:
    @pytest.mark.parametrize("shape", ["uniform", "free"])
    @pytest.mark.slow
    @pytest.mark.parametrize("method", ["lora", "distill"])
    def test_one_round_is_to_prune_and_then_to_recover(self, shape: str, method: str, place: Path) -> None:
        cut = {"ratio": 0.3, "shape": shape}
        found = in_turns(steps=1, cut=cut, method=method)
        prune_model(recipe("dense", cut=cut, calibration=TEXTS, loading=EXACT), "here/pruned")
        expected = recover("here/pruned", "here/expected", data=DATA, options=options(method=method), loading=EXACT)
        assert farthest("here/out", "here/expected") == 0
        assert read_plan(place / "out/secateur_plan.json") == read_plan(place / "expected/secateur_plan.json")
        assert (found.loss, found.tokens, found.best_step) == (expected.loss, expected.tokens, expected.best_step)
        assert names(place / "out") == names(place / "expected")
        records = [read_record(place / name) for name in ("out", "expected")]
        assert records[0] is not None
        assert records[1] is not None
        for key in ("model", "weights", "calibration", "calibration_options", "seed", "dtype"):
            assert getattr(records[0], key) == getattr(records[1], key)

    @pytest.mark.parametrize(("shape", "ratio"), [("uniform", 0.3), ("free", 0.5)])
    def test_the_end_has_the_size_of_one_cut(self, shape: str, ratio: float, place: Path) -> None:
        found = in_turns(cut={"ratio": ratio, "shape": shape}, method="full")
        plan = read_plan(place / "out/secateur_plan.json")
        dense, pruned = (plan.parameters[f"{which}_non_embedding"] for which in ("dense", "pruned"))
        assert pruned == pytest.approx((1 - ratio) * dense, rel=0.01)
        assert (plan.options.ratio, plan.options.iterations, plan.model) == (ratio, 3, "dense")
        assert plan.decided
        model = load("here/out", device="cpu")
        assert model.num_parameters() == plan.parameters["pruned"] == found.rounds[-1]["parameters"]
        assert verify("here/out").problems == ()
        sizes = [each["non_embedding_parameters"] for each in found.rounds]
        for number, size in enumerate(sizes, start=1):
            assert size == pytest.approx(dense * (1 - ratio * number / 3), rel=0.02)

    @pytest.mark.slow
    def test_shares_of_units_are_those_of_one_cut(self, place: Path) -> None:
        cut = {"ratio": 0.4, "of": "units"}  # 84 channels: 28, 25 and 21 after shares that are rounded up every time
        in_turns(cut=cut, max_steps=1, method="lora")
        prune_model(recipe("dense", cut=cut, calibration=TEXTS, loading=EXACT), "here/pruned")
        kept = [
            {group.name: group.kept for group in read_plan(place / name / "secateur_plan.json").groups}
            for name in ("out", "pruned")
        ]
        assert kept[0] == kept[1]

    @pytest.mark.slow
    @pytest.mark.parametrize("axes", ["hidden", "layers"])
    def test_other_axes(self, axes: str, place: Path) -> None:
        ratio = 0.4 if axes == "hidden" else 0.67
        in_turns(
            cut={"ratio": ratio, "axes": (axes,), "of": "units"}, steps=2, method="distill", hidden_states_weight=0.5
        )
        model = load("here/out", device="cpu")
        assert model.get_parameter("model.embed_tokens.weight").shape[1] == (29 if axes == "hidden" else 48)
        assert model.config.num_hidden_layers == (1 if axes == "layers" else 3)
        assert verify("here/out").problems == ()

    def test_steps_are_counted_through(self, place: Path) -> None:
        found = in_turns(method="full", plot=True)
        assert [step for step, _ in found.loss] == list(range(1, 13))
        assert [(entry["round"], entry["step"]) for entry in found.evaluation] == [
            (number, 4 * (number - 1) + step) for number in (1, 2, 3) for step in (0, 2, 4)
        ]
        assert found.best_step == 8 + found.rounds[-1]["best_step"]
        assert found.steps == sum(each["steps"] for each in found.rounds) == 12
        curves = json.loads((place / "out/secateur_curves.json").read_text())
        assert [step for step, _ in curves["loss"]] == list(range(1, 13))
        assert (place / "out/secateur_curves.png").read_bytes().startswith(b"\x89PNG")
        assert {"prune, round 1", "train, round 3", "save"} <= found.seconds.keys()

    def test_the_record_has_all_rounds_and_the_dense_model(self, place: Path) -> None:
        in_turns(method="distill")
        record = read_record(place / "out")
        assert record is not None
        assert record.model == "dense"
        assert record.tensors is not None
        assert record.tensors["model.layers.0.mlp.up_proj.weight"].startswith("cut float32 [84, 48] -> [")
        recovery: Any = record.recovery
        for number in (3, 2, 1):
            assert (recovery["round"], recovery["teacher"], recovery["method"]) == (number, "dense", "distill")
            assert recovery["options"]["seed"] == number - 1
            recovery = recovery["before"]
        assert recovery is None

    @pytest.mark.slow
    def test_the_teacher_reads_the_rows_once(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import secateur.recovery.distillation

        real, read = secateur.recovery.distillation._likeliest, []

        def counted(*args: Any) -> Any:
            read.append(args[0].num_parameters())
            return real(*args)

        monkeypatch.setattr(secateur.recovery.distillation, "_likeliest", counted)
        in_turns(method="lora+distill")
        assert read == [load("dense", device="cpu").num_parameters()] * 2  # rows to train on, and those that judge

    @pytest.mark.slow
    def test_what_is_left_can_be_cut_and_trained_on(self, place: Path) -> None:
        in_turns(max_steps=1, method="full")
        in_turns("here/again", model="here/out", cut={"ratio": 0.2}, steps=2, max_steps=1, method="full")
        assert verify("here/again").problems == ()
        sizes = [load(f"here/{name}", device="cpu").num_parameters() for name in ("out", "again")]
        assert sizes[1] < sizes[0]


@pytest.fixture(scope="module")
def whole(shelf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an undisturbed run gives."""
    out = tmp_path_factory.mktemp("whole") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(shelf)
        in_turns(str(out), method="lora+distill")
    return out


class TestResume:
    @pytest.mark.parametrize("begun", [0, 3, 5, 11])
    def test_stopped_in_a_training(self, begun: int, whole: Path, place: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("secateur.recovery.callbacks.Steady.on_step_begin", stopping(begun))
            with pytest.raises(KeyboardInterrupt):
                in_turns(method="lora+distill")
        done = begun // 4
        assert sorted(path.name for path in Path("here/.out.secateur").glob("round-*.json")) == [
            f"round-{number + 1}.json" for number in range(done)
        ]
        begun_again: list[int] = []
        real = Steady.on_step_begin

        def count(self: Any, args: Any, state: Any, *rest: Any, **others: Any) -> None:
            begun_again.append(state.global_step)
            real(self, args, state, *rest, **others)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("secateur.recovery.callbacks.Steady.on_step_begin", count)
            resumed = in_turns(method="lora+distill", resume=True)
        assert len(begun_again) == 12 - begun // 2 * 2  # evaluations, which are checkpoints, come every second step
        assert resumed.resumed
        assert farthest("here/out", whole) == 0
        assert read_plan(place / "out/secateur_plan.json") == read_plan(whole / "secateur_plan.json")
        assert [name for name in names(place) if "/" not in name] == ["out"]

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("where", "calls"),
        [
            ("prune_model", 1),
            ("prune_model", 2),
            ("write_json", 1),
            ("write_json", 3),
            ("shutil.rmtree", 3),
            ("_save", 1),
        ],
    )
    def test_stopped_between_them(self, where: str, calls: int, whole: Path, place: Path) -> None:
        owner, _, name = where.rpartition(".")
        target = getattr(ROUNDS, owner) if owner else ROUNDS
        real, left = getattr(target, name), [calls]

        def stop(*args: Any, **given: Any) -> Any:
            left[0] -= 1
            return interrupt() if left[0] == 0 else real(*args, **given)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(target, name, stop)
            with pytest.raises(KeyboardInterrupt):
                in_turns(method="lora+distill")
        in_turns(method="lora+distill", resume=True)
        assert farthest("here/out", whole) == 0
        assert [name for name in names(place) if "/" not in name] == ["out"]

    @pytest.mark.slow
    def test_with_other_options_it_starts_anew(self, whole: Path, place: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("secateur.recovery.callbacks.Steady.on_step_begin", stopping(5))
            with pytest.raises(KeyboardInterrupt):
                in_turns(method="lora+distill", learning_rate=1e-3)
        assert not in_turns(method="lora+distill", resume=True).resumed
        assert farthest("here/out", whole) == 0

    @pytest.mark.slow
    def test_killed_at_random_moments(self, place: Path) -> None:
        arguments = "recover dense here/out --data rows.json --method lora+distill --max-length 128 --max-steps 12"
        arguments += (
            " --eval-steps 3 --learning-rate 3e-3 --dropout 0.1 --dtype float32 --device cpu --patience 50 --quiet"
        )
        arguments += " --global-batch-size 8 --eval reference=held.txt --steps 3 --ratio 0.4"
        cut = ["--cut", "--calibration text.txt --samples 4 --length 16 --shuffled 0"]
        begin = time.monotonic()
        whole = [*arguments.replace("here/out", "here/whole").split(), *cut]
        subprocess.run([sys.executable, "-c", KILLING, "0", "1", *whole], check=True, capture_output=True)
        early = (time.monotonic() - begin) / 4
        done = subprocess.run(
            [sys.executable, "-c", KILLING, "20", str(early), *arguments.split(), *cut],
            check=False,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert int(done.stdout) >= 10
        assert farthest("here/out", "here/whole") <= 1e-6
        assert [name for name in names(place) if "/" not in name] == ["out", "whole"]


class TestProcesses:
    @pytest.mark.slow
    def test_two_do_as_one_does(self, place: Path) -> None:
        arguments = "recover dense here/out --data rows.json --method distill --max-length 128 --max-steps 4"
        arguments += " --global-batch-size 8 --eval-steps 2 --learning-rate 3e-3 --dtype float32 --device cpu"
        arguments += " --steps 2 --ratio 0.3 --json here.json"
        cut = ["--cut", "--calibration text.txt --samples 4 --length 16 --shuffled 0"]
        done = launch("-m", "secateur", *arguments.split(), *cut)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("wrote here/out") == 1
        alone = in_turns("here/alone", steps=2, method="distill")
        data = json.loads(Path("here.json").read_text())
        assert [loss for _, loss in data["loss"]] == pytest.approx([loss for _, loss in alone.loss], rel=1e-3)
        first, second = (load_file(place / name / "model.safetensors") for name in ("out", "alone"))
        assert {name: weight.shape for name, weight in first.items()} == {n: w.shape for n, w in second.items()}
        assert all(torch.allclose(first[name], second[name], atol=1e-3) for name in first)


class TestRefused:
    @pytest.mark.parametrize(
        ("given", "error", "match"),
        [
            ({"steps": 0}, PlanError, "steps=0 cuts nothing"),
            ({"cut": {"ratio": 0.99}}, PlanError, r"round 3 of 3: target=\S+ leaves .* at most ratio="),
            ({"cut": {"ratio": 0.001}, "steps": 2}, PlanError, "round 1 of 2: .* removes no unit"),
            ({"cut": {"ratio": 0.3, "of": "latency"}}, PlanError, "steps with a budget of latency"),
            ({"cut": {"ratio": 0.3, "axes": ("nose",)}}, PlanError, "axes='nose' cannot be cut"),
            ({"model": "dense/config.json"}, ModelError, "has a config and no weights to cut and train"),
            ({"out": "dense", "overwrite": True}, CheckpointError, "holds the MODEL itself"),
            ({"method": "lora", "hidden_states_weight": 1.0}, TrainingError, "method='lora' has no teacher"),
        ],
    )
    def test_before_any_work(self, given: dict[str, Any], error: type[SecateurError], match: str, place: Path) -> None:
        with pytest.raises(error, match=match):
            in_turns(**given)
        assert names(place) == []

    def test_a_loss_that_becomes_nan(self, place: Path) -> None:
        with pytest.raises(TrainingError, match=r"the (loss|gradient) is (nan|inf) at step"):
            in_turns(method="full", learning_rate=1e30, max_steps=20)
        assert names(place) == []
