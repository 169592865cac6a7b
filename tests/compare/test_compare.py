"""Two models side by side, without a browser: answers in turns, plans, and the address of the page."""

from __future__ import annotations

import copy
import dataclasses
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, LogitsProcessorList

from secateur.compare.answers import Answer, Sampling, answers, prompt_ids
from secateur.compare.compare import Opened, compare, free_port
from secateur.compare.models import Side, load_sides
from secateur.compare.page import SIZES, outcome, speed
from secateur.compare.plan_tab import Planner, _Handlers, layer_rows
from secateur.discovery.discover import discover
from secateur.errors import DataError, ModelError, PageError, PlanError, ScoreError
from secateur.evaluation.inference import decode_steps, sample_text
from secateur.models.options import LoadOptions
from secateur.pipeline.recipe import prune_recipe
from secateur.pipeline.run import plan_model, prune_model
from secateur.planning.plan import plan_from_json
from secateur.report.tables.plan import size_rows
from secateur.report.tables.profile import cost_rows
from small_runs import never
from tiny import tiny_tokenizer, write_tiny

PROMPT = "The for statement is used to iterate over the"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two models of different depth; the first with a chat template and generation settings that must not count."""
    shelf = tmp_path_factory.mktemp("compare")
    write_tiny(shelf / "a", seed=3)
    write_tiny(shelf / "b", seed=4, num_hidden_layers=2)
    settings = json.loads((shelf / "a" / "generation_config.json").read_text())
    settings |= {"repetition_penalty": 9.0, "do_sample": True, "temperature": 5.0, "min_new_tokens": 3}
    (shelf / "a" / "generation_config.json").write_text(json.dumps(settings))
    (shelf / "a" / "chat_template.jinja").write_text(
        "{% for m in messages %}Q: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
    )
    return str(shelf / "a"), str(shelf / "b")


@pytest.fixture(scope="module")
def sides(folders: tuple[str, str]) -> tuple[Side, ...]:
    return load_sides(folders)


def last(found: Iterator[tuple[Answer, ...]]) -> tuple[Answer, ...]:
    return [*found][-1]


def texts(sides: tuple[Side, ...], **how: Any) -> tuple[str, ...]:
    return tuple(answer.text for answer in last(answers(sides, PROMPT, Sampling(**how))))


class TestLoading:
    def test_sides_are_profiled_beside_each_other(self, sides: tuple[Side, ...]) -> None:
        a, b = (side.costs for side in sides)
        assert (a.model, a.parameters, a.weight_bytes) == (sides[0].name, 106_896, 4 * 106_896)
        assert b.macs < a.macs
        assert a.speed is not None
        assert a.speed.peak_bytes > a.weight_bytes
        assert [row[0] for row in cost_rows([side.costs for side in sides], SIZES)][0::5] == [
            "parameters",
            "peak memory of 64 tokens",
        ]
        opened = json.loads(json.dumps(Opened("http://127.0.0.1:1", sides).to_json()))
        assert [row["model"] for row in opened["results"]] == [side.name for side in sides]
        assert {"parameters", "macs", "weight_bytes", "peak_bytes"} <= opened["results"][0].keys()

    def test_a_missing_model_is_refused_before_the_other_is_loaded(
        self, folders: tuple[str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("secateur.compare.models.load", lambda *_, **__: pytest.fail("loaded"))
        with pytest.raises(ModelError, match=r"'\./nothing': no such file or folder"):
            load_sides([folders[0], "./nothing"])

    def test_models_that_do_not_fit_into_memory_are_not_measured(
        self, folders: tuple[str, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr("secateur.compare.models.MEMORY_SHARE", 0.0)
        monkeypatch.setattr("secateur.compare.models.profile", lambda *_, **__: pytest.fail("measured"))
        loaded = load_sides(folders)
        assert "read from the disk while models answer" in caplog.text
        assert "peak memory" not in str(cost_rows([side.costs for side in loaded], SIZES))


class TestAnswers:
    def test_greedy_answers_are_those_of_another_implementation(self, sides: tuple[Side, ...]) -> None:
        expected = tuple(sample_text(side.model, side.tokenizer, PROMPT, new_tokens=24) for side in sides)
        assert texts(sides, new_tokens=24) == expected
        assert texts(sides, new_tokens=24, temperature=1.5, top_k=1) == expected
        assert texts(sides, new_tokens=24, temperature=1.5, top_p=1e-6) == expected

    @pytest.mark.parametrize("how", [{"temperature": 0.3, "top_k": 7}, {"temperature": 1.7, "top_p": 0.6}])
    def test_drawn_answers_are_those_of_generate(self, sides: tuple[Side, ...], how: dict[str, Any]) -> None:
        side = sides[1]
        ids = torch.tensor([side.tokenizer(PROMPT)["input_ids"]])
        torch.manual_seed(11)
        model: Any = side.model
        every = {"top_p": 1.0, "top_k": 0, "do_sample": True, "max_new_tokens": 20, **how}
        found = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), logits_processor=LogitsProcessorList(), **every
        )
        written = side.tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)
        assert texts((side,), new_tokens=20, seed=11, **how) == (written,)

    def test_a_seed_draws_the_same_answer_again(self, sides: tuple[Side, ...]) -> None:
        drawn = texts(sides, temperature=1.5, seed=1)
        assert texts(sides, temperature=1.5, seed=1) == drawn
        assert texts(sides, temperature=1.5, seed=2) != drawn

    @pytest.mark.parametrize("length", [1, 2, 17])
    def test_an_answer_has_the_length_asked_for(self, sides: tuple[Side, ...], length: int) -> None:
        found = last(answers(sides, PROMPT, Sampling(new_tokens=length)))
        assert [(answer.tokens, answer.ended) for answer in found] == [(length, "length")] * 2
        assert all((answer.tokens_per_second is None) == (length == 1) for answer in found)

    def test_an_answer_ends_where_the_model_says_so(
        self, sides: tuple[Side, ...], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        side = sides[1]
        with torch.inference_mode():
            steps = decode_steps(side.model, prompt_ids(side, PROMPT, Sampling()))
            written = [int(next(steps)) for _ in range(5)]
        monkeypatch.setattr(side.model.generation_config, "eos_token_id", [written[4]])
        [answer] = last(answers([side], PROMPT, Sampling(new_tokens=30)))
        assert (answer.tokens, answer.ended) == (written.index(written[4]) + 1, "end of text")
        assert answer.text == side.tokenizer.decode(written[: answer.tokens - 1])

    def test_models_write_in_turns_and_only_while_someone_reads(self, sides: tuple[Side, ...]) -> None:
        order: list[str] = []
        hooks = [side.model.register_forward_pre_hook(lambda *_, s=side.letter: order.append(s)) for side in sides]
        stream = answers(sides, PROMPT, Sampling(new_tokens=200))
        states = [next(stream) for _ in range(5)]
        stream.close()  # type: ignore[attr-defined]  # a generator
        for hook in hooks:
            hook.remove()
        assert "".join(order) == "AB" * 5
        assert [tuple(answer.tokens for answer in state) for state in states] == [(n, n) for n in range(1, 6)]
        assert states[-1][0].text.startswith(states[2][0].text)

    def test_a_model_that_fails_does_not_stop_the_other(self, sides: tuple[Side, ...]) -> None:
        def fail(_: Any, inputs: Any, arguments: dict[str, Any]) -> None:
            if arguments["input_ids"].shape[1] == 1:
                raise torch.OutOfMemoryError("no more\nmemory")

        hook = sides[1].model.register_forward_pre_hook(fail, with_kwargs=True)
        a, b = last(answers(sides, PROMPT, Sampling(new_tokens=6)))
        hook.remove()
        assert (a.ended, a.tokens) == ("length", 6)
        assert (b.ended, b.tokens) == ("failed: OutOfMemoryError: no more memory", 1)

    def test_nan_logits_are_an_error_that_names_a_remedy(self, sides: tuple[Side, ...]) -> None:
        def spoil(_: Any, __: Any, outputs: Any) -> Any:
            outputs.logits[:] = float("nan")
            return outputs

        hook = sides[0].model.register_forward_hook(spoil)
        a, _ = last(answers(sides, PROMPT, Sampling(new_tokens=3)))
        hook.remove()
        assert "logits hold NaN; float16 often overflows: try --dtype bfloat16" in str(a.ended)

    def test_speeds_are_compared_in_characters_where_tokens_differ(self, sides: tuple[Side, ...]) -> None:
        a = Answer("x" * 40, 4, tokens=11, first_seconds=0.5, other_seconds=0.5, ended="length")
        b = dataclasses.replace(a, text="x" * 10, other_seconds=0.25)
        assert outcome(sides, (a, b)) == (
            "A ended: length; B ended: length. B wrote 2.00 times as many tokens per second as A."
        )
        tokenizer = copy.deepcopy(tiny_tokenizer())
        tokenizer.add_tokens("secateurs")
        other = dataclasses.replace(sides[1], tokenizer=tokenizer)
        assert "0.50 times as many characters (their tokens differ)" in outcome((sides[0], other), (a, b))
        assert speed(a) == "**20.0 tokens/s**, first token after 0.50 s, 4 tokens read, 11 written"


class TestPrompts:
    @pytest.mark.parametrize(
        ("prompt", "match"),
        [
            (" \n\t", "the prompt is empty: type some text"),
            ("word " * 400, r"A: .* reads 256 tokens at most, and the prompt has [\d,]+ and .* 64: shorten the prompt"),
            ("x" * 1_000_001, r"the prompt has 1,000,001 characters: shorten it to 1,000,000"),
        ],
    )
    def test_a_prompt_that_cannot_be_answered_is_refused(
        self, sides: tuple[Side, ...], prompt: str, match: str
    ) -> None:
        with pytest.raises(DataError, match=match):
            next(answers(sides, prompt, Sampling()))

    def test_prompt_and_answer_may_fill_all_positions(self, sides: tuple[Side, ...]) -> None:
        room = 256 - prompt_ids(sides[0], PROMPT, Sampling(new_tokens=1)).shape[1]
        [answer] = last(answers(sides[:1], PROMPT, Sampling(new_tokens=room)))
        assert answer.tokens == room
        with pytest.raises(DataError, match=f"the answer up to {room + 1}"):
            prompt_ids(sides[0], PROMPT, Sampling(new_tokens=room + 1))

    def test_the_chat_template_is_used_where_there_is_one(
        self, sides: tuple[Side, ...], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        a, b = sides
        chat = Sampling(chat=True)
        assert a.tokenizer.decode(prompt_ids(a, "Why?", chat)[0]) == "Q: Why?\nA:"
        assert a.tokenizer.decode(prompt_ids(a, "Why?", Sampling())[0]) == "Why?"
        assert b.tokenizer.decode(prompt_ids(b, "Why?", chat)[0]) == "Why?"
        monkeypatch.setattr(a.tokenizer, "chat_template", "{{ raise_exception('no users here') }}")
        with pytest.raises(DataError, match=r"its chat template refuses the prompt \(.*no users here\): switch the"):
            prompt_ids(a, "Why?", chat)

    def test_a_tokenizer_of_another_model_is_refused(self, sides: tuple[Side, ...]) -> None:
        tokenizer = copy.deepcopy(tiny_tokenizer())
        tokenizer.add_tokens("secateurs")
        wider = dataclasses.replace(sides[0], tokenizer=tokenizer)
        with pytest.raises(DataError, match=r"gives token 300, and the model has 300: it is of another model"):
            prompt_ids(wider, "secateurs", Sampling())


@pytest.fixture(scope="module")
def large(sides: tuple[Side, ...]) -> Side:
    """A side with the sizes of the 7B model, and no weights of it."""
    return dataclasses.replace(sides[0], discovery=discover(AutoConfig.for_model("llama")))


@pytest.fixture
def planner(tmp_path: Path) -> Planner:
    return Planner(tmp_path / "run", LoadOptions(), {"samples": 4, "length": 32})


class TestPlans:
    def test_sizes_are_those_of_the_command(self, sides: tuple[Side, ...], planner: Planner) -> None:
        cut = {"ratio": 0.3, "score": "l2", "shape": "uniform", "axes": ("mlp",)}
        drawn = planner.sizes(sides[0], "best", cut)
        planned = plan_model(prune_recipe(sides[0].name, cut=cut), sizes_only=True)
        assert (drawn.groups, drawn.parameters, drawn.macs) == (planned.groups, planned.parameters, planned.macs)
        assert float(size_rows(drawn)[1][3].rstrip("%")) == pytest.approx(30, abs=0.5)  # of non-embedding parameters
        assert layer_rows(sides[0], drawn)["headers"] == ["", "mlp"]

    @pytest.mark.parametrize("preset", ["best", "llm-pruner"])
    def test_sizes_of_a_large_model_need_no_trace_and_no_weights(
        self, preset: str, large: Side, planner: Planner, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for place in ("discovery.discover.trace", "pipeline.pipeline.load", "pipeline.pipeline.discover"):
            monkeypatch.setattr(f"secateur.{place}", never(place))
        drawn = planner.sizes(large, preset, {"ratio": 0.25})
        rows = [size_rows(drawn), layer_rows(large, drawn)["data"]]
        assert "6.74 B" in rows[0][0]
        assert len(rows[1]) == 32

    def test_a_plan_is_one_that_prune_takes(self, sides: tuple[Side, ...], planner: Planner, tmp_path: Path) -> None:
        cut = {"ratio": 0.3, "score": "param_first", "shape": "uniform"}
        planned = planner.units(sides[0], "fast", cut)
        assert planned.decided
        assert planned == plan_model(planner.recipe(sides[0], "fast", cut))
        given = plan_from_json(json.loads(json.dumps(planned.to_json())))
        pruned = prune_model(planner.recipe(sides[0], "fast", cut), tmp_path / "out", plan=given)
        assert pruned.plan.parameters["pruned"] == planned.parameters["pruned"]

    @pytest.mark.parametrize(
        ("preset", "cut", "match"),
        [
            ("best", {"ratio": 0.94}, r"ratio=0\.94 leaves"),
            ("best", {"axes": ("hidden", "mlp")}, "hidden and layers are cut alone"),
            ("worst", {}, "'worst'"),
            ("best", {"axes": ("experts",)}, "has no group of that kind"),
        ],
    )
    def test_a_cut_that_cannot_be_made_is_refused(
        self, sides: tuple[Side, ...], planner: Planner, preset: str, cut: dict[str, Any], match: str
    ) -> None:
        with pytest.raises((PlanError, ScoreError), match=match):
            planner.sizes(sides[0], preset, cut)

    def test_axes_are_those_that_the_model_has(self, sides: tuple[Side, ...], planner: Planner) -> None:
        assert _Handlers({"A": sides[0]}, planner, planner.run).axes("A") == [
            "attention",
            "query",
            "head_dim",
            "mlp",
            "hidden",
            "layers",
        ]


class TestAddress:
    def test_a_taken_port_is_an_error_before_a_model_is_loaded(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            with pytest.raises(PageError, match=rf"--port {port} cannot be listened at .* Any free port: --port 0"):
                compare(["no-such-model", "demo"], port=port)

    def test_an_address_that_others_reach_is_a_warning(self, caplog: pytest.LogCaptureFixture) -> None:
        free_port("127.0.0.1", 0)
        assert not caplog.records
        free_port("0.0.0.0", 0)
        assert "whoever reaches 0.0.0.0 can use the page" in caplog.text

    @pytest.mark.parametrize("host", ["no-such-host.invalid", "203.0.113.9"])
    def test_an_address_of_another_machine_is_refused(self, host: str) -> None:
        with pytest.raises(PageError, match=f"--host {host}"):
            free_port(host, 0)

    def test_gradio_is_asked_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
        with pytest.raises(PageError, match=r"pip install 'secateur\[compare\]'"):
            compare(["a", "b"])
