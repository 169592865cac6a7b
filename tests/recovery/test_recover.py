"""A pruned folder is trained and becomes one ordinary folder."""

from __future__ import annotations

import functools
import hashlib
import json
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from trainings import distance, place_fixture, shelf, train, weights  # noqa: F401 - the fixture `place`
from transformers import AutoModelForCausalLM

from recipes import recipe
from secateur import CalibrationOptions, RecoverOptions, prune_model
from secateur.checkpoint.record import Record, read_record
from secateur.checkpoint.verification import verify
from secateur.evaluation.perplexity import perplexity
from secateur.evaluation.protocols import Protocol
from secateur.evaluation.texts import encode, read_evaluation_text
from secateur.models.loading import load
from secateur.models.options import LoadOptions
from secateur.models.silence import quiet
from secateur.models.tokenizer import load_tokenizer
from secateur.pipeline.options import RunOptions
from secateur.planning.plan import read_plan
from secateur.recovery.options import LoraOptions
from secateur.recovery.result import RecoverResult
from tiny import names, write_tiny

FILES = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
OURS = ["README.md", "recipe.yaml", *(f"secateur_{name}.json" for name in ("curves", "manifest", "plan", "record"))]
SHAPES = {
    "lora": "uniform",
    "full": "per-layer",
    "distill": "uniform",
    "lora+distill": "per-layer",
}  # of the cut, by method
IDS = torch.arange(40)[None]
temporary = functools.cache(tempfile.TemporaryDirectory)  # until the end of all tests


@dataclass(frozen=True)
class Run:
    """One training with everything that a training can write beside its weights."""

    method: str
    source: Path
    out: Path
    result: RecoverResult
    progress: list[tuple[str, int, int, str]]

    @property
    def record(self) -> Record:
        record = read_record(self.out)
        assert record is not None
        return record


@functools.cache
def run_of(method: str) -> Run:
    """A training by this method, shared by all tests that only look at it; pickles are refused meanwhile."""
    progress: list[tuple[str, int, int, str]] = []

    @contextmanager
    def bars(stage: str) -> Iterator[Any]:
        yield lambda done, total, line="": progress.append((stage, done, total, line))

    def refuse(*_: Any, **__: Any) -> None:
        pytest.fail("a pickle")

    out = Path(temporary().name) / method
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(shelf())
        for name in ("torch.save", "torch.load", "pickle.dump", "pickle.load"):
            patch.setattr(name, refuse)
        result = train(
            SHAPES[method],
            out,
            method=method,
            save_adapter=method == "lora",
            plot=method == "lora",
            eval_texts=("reference=held.txt",),
            lora=LoraOptions(rank=4),
            run=RunOptions(command=f"secateur recover --method {method}", bars=bars),
        )
    return Run(method, shelf() / SHAPES[method], out, result, progress)


@functools.cache
def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.fixture(params=SHAPES, scope="module")
def run(request: pytest.FixtureRequest) -> Run:
    for shape in set(SHAPES.values()):
        digests(shelf() / shape)
    return run_of(request.param)


class TestEveryMethod:
    def test_writes_an_ordinary_folder(self, run: Run) -> None:
        code = ["modeling_per_layer.py"] if SHAPES[run.method] == "per-layer" else []
        extras = ["adapter", "secateur_curves.png"] if run.method == "lora" else []
        assert sorted(path.name for path in run.out.iterdir()) == sorted(FILES + OURS + code + extras)
        assert not run.out.with_name(f".{run.out.name}.secateur").exists()
        assert read_plan(run.out / "secateur_plan.json") == read_plan(run.source / "secateur_plan.json")

    def test_changes_the_weights_and_not_their_source(self, run: Run) -> None:
        before = digests(run.source)
        digests.cache_clear()
        assert digests(run.source) == before  # weights that are mapped from there are not to be written to
        assert distance(run.out, run.source) > 1e-4

    def test_keeps_the_checkpoint_with_the_lowest_perplexity(self, run: Run) -> None:
        best = next(entry for entry in run.result.evaluation if entry["step"] == run.result.best_step)
        assert best["score"] == min(entry["score"] for entry in run.result.evaluation[1:])
        ids = encode(load_tokenizer(str(run.out)), read_evaluation_text(shelf() / "held.txt"))
        again = perplexity(load(str(run.out), device="cpu"), ids, data="reference", protocol=Protocol(128))
        assert again.ppl == pytest.approx(best["perplexity"]["reference"], rel=1e-5)

    def test_writes_the_curves(self, run: Run) -> None:
        assert [step for step, _ in run.result.loss] == list(range(1, run.result.steps + 1))
        curves = json.loads((run.out / "secateur_curves.json").read_text())
        assert curves["loss"] == [list(pair) for pair in run.result.loss]
        assert curves["evaluation"] == [dict(entry) for entry in run.result.evaluation]

    def test_records_how_it_was_trained(self, run: Run) -> None:
        before = read_record(run.source)
        assert before is not None
        assert replace(run.record, recovery=None) == before
        recovery = run.record.recovery
        assert recovery is not None
        options = RecoverOptions(**{**recovery["options"], "lora": LoraOptions(**recovery["options"]["lora"])})
        assert recovery["options"] == json.loads(json.dumps(asdict(options)))
        assert (recovery["steps"], recovery["best_step"]) == (run.result.steps, run.result.best_step)
        assert (recovery["method"], recovery["before"]) == (run.method, None)
        assert recovery["command"] == f"secateur recover --method {run.method}"
        assert recovery["teacher"] == (run.record.model if "distill" in run.method else None)
        assert recovery["bf16"] in (True, False)  # as the machine is

    def test_reports_progress(self, run: Run) -> None:
        stages = ["teacher"] if "distill" in run.method else []
        assert {stage for stage, *_ in run.progress} == {*stages, "train"}
        _, done, total, line = run.progress[-1]
        assert (done, total) == (4, 4)
        assert all(word in line for word in ("loss ", " tokens/s", "reference ", "validation "))


class TestOutput:
    def test_an_adapter_gives_the_logits_of_the_merged_model(self) -> None:
        run = run_of("lora")
        assert names(run.out / "adapter") == ["adapter_config.json", "adapter_model.safetensors"]
        import peft

        with quiet(), warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore", FutureWarning)  # peft's
            base: Any = load(str(run.source), device="cpu")
            adapted = peft.PeftModel.from_pretrained(base, str(run.out / "adapter")).eval()
            merged = load(str(run.out), device="cpu")
            assert torch.allclose(adapted(input_ids=IDS).logits, merged(input_ids=IDS).logits, atol=1e-5)

    def test_a_uniform_folder_loads_without_secateur(self) -> None:
        run = run_of("lora")
        with quiet(), torch.no_grad():
            stock = AutoModelForCausalLM.from_pretrained(run.out)
            assert torch.equal(stock(input_ids=IDS).logits, load(str(run.out), device="cpu")(input_ids=IDS).logits)

    def test_a_plot_is_written(self) -> None:
        assert (run_of("lora").out / "secateur_curves.png").read_bytes().startswith(b"\x89PNG")

    def test_a_tracker_sees_the_training(self, place: Path) -> None:
        pytest.importorskip("tensorboard")
        train(method="full", track="tensorboard", max_steps=1)
        assert any(place.glob("runs/out/events.*"))

    def test_it_can_be_cut_and_trained_again(self, place: Path) -> None:
        first = run_of("lora")
        text = CalibrationOptions("text.txt", 4, 16)
        prune_model(
            recipe(first.out, cut={"ratio": 0.2, "score": "l2", "repair": "none"}, calibration=text), "here/smaller"
        )
        train("here/smaller", "here/again", method="full", max_steps=1)
        assert weights("here/again").keys() == weights(first.out).keys()
        assert load("here/again", device="cpu").num_parameters() < load(str(first.out), device="cpu").num_parameters()

    def test_a_model_that_was_never_cut_is_trained_and_again(self, place: Path) -> None:
        train("dense", max_steps=1, method="full")
        assert not (place / "out" / "secateur_plan.json").exists()
        assert verify(place / "out").problems == ()
        record = read_record(place / "out")
        assert record is not None
        assert record.model == "dense"
        train("here/out", "here/again", method="full", max_steps=1)
        again = read_record(place / "again")
        assert again is not None
        assert again.recovery is not None
        assert again.recovery["before"] == record.recovery

    @pytest.mark.parametrize(
        ("dtype", "method"), [("bfloat16", "full"), pytest.param("float16", "lora", marks=pytest.mark.slow)]
    )
    def test_the_dtype_of_the_folder_stays(self, dtype: str, method: str, place: Path) -> None:
        write_tiny(place / "half", dtype=getattr(torch, dtype))
        train("here/half", method=method, loading=LoadOptions(device="cpu"))
        assert {str(weight.dtype) for weight in weights(place / "out").values()} == {f"torch.{dtype}"}
        assert distance(place / "out", place / "half") > 0
