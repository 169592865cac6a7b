"""Two models side by side, without a browser: answers in turns, plans, what is shown, and the address."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from recipes import recipe
from secateur.compare import markup
from secateur.compare.answers import END, FAILED, LENGTH, STOPPED, Answer, Writing, answers, prompt_ids
from secateur.compare.compare import Opened, compare
from secateur.compare.cuts import Kept, Stopped, Wish, Workplace, about, by_layer, cuttable, decide, sketch
from secateur.compare.server import bind, check_gradio, url_of
from secateur.compare.sides import Side, load_sides
from secateur.compare.turns import Turns
from secateur.discovery.discover import discover
from secateur.errors import DataError, ModelError, PageError, PlanError
from secateur.evaluation.inference import sample_text
from secateur.models.loading import LoadOptions
from secateur.pipeline.run import plan_model, prune_model
from secateur.planning.options import with_preset
from secateur.planning.plan import plan_from_json
from tiny import tiny_tokenizer, write_tiny

PROMPT = "The for statement is used to iterate over the"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two models of different depth; the first with settings that make answers worse, and with a chat template."""
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
    """What there is in the end."""
    return [*found][-1]


def texts(sides: tuple[Side, ...], **how: Any) -> tuple[str, ...]:
    return tuple(answer.text for answer in last(answers(sides, PROMPT, Writing(**how))))


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("answer")]


def generated(side: Side, **how: Any) -> str:
    """What `generate` itself writes, with its own way of drawing tokens."""
    ids = torch.tensor([side.tokenizer(PROMPT)["input_ids"]])
    model: Any = side.model
    found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **how)
    return str(side.tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True))


# --- loading --------------------------------------------------------------------------------------------------------


def test_sides_know_their_size(sides: tuple[Side, ...]) -> None:
    a, b = (side.size for side in sides)
    assert (a.parameters, a.weight_bytes) == (106_896, 4 * 106_896)
    assert b.parameters < a.parameters
    assert b.macs < a.macs
    assert a.peak_bytes is not None
    assert a.peak_bytes > a.weight_bytes
    assert [side.title.split(":")[0] for side in sides] == ["A", "B"]
    assert sides[0].positions == 256


def test_what_is_no_model_is_refused_before_the_other_is_loaded(
    folders: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("secateur.compare.sides.load", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ModelError, match=r"'\./nothing': no such file or folder"):
        load_sides([folders[0], "./nothing"])
    with pytest.raises(ModelError, match="3 models to compare; expected two"):
        load_sides([*folders, "demo"])


def test_a_model_that_cannot_generate_is_refused(folders: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secateur.compare.sides.load", lambda *_, **__: torch.nn.Linear(2, 2))
    with pytest.raises(ModelError, match="Linear has no generate, so it cannot answer"):
        load_sides(folders)


def test_models_that_do_not_fit_stay_on_the_disk(
    folders: tuple[str, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("secateur.compare.sides.COPIES", 0.0)
    monkeypatch.setattr("secateur.compare.sides.measure_speed", lambda *_, **__: pytest.fail("measured"))
    loaded = load_sides(folders)
    assert [side.size.peak_bytes for side in loaded] == [None, None]
    assert "read from the disk while models answer" in caplog.text
    assert "peak memory" not in markup.headline(loaded)


# --- answers --------------------------------------------------------------------------------------------------------


def test_greedy_answers_are_those_of_another_implementation(sides: tuple[Side, ...]) -> None:
    expected = tuple(sample_text(side.model, side.tokenizer, PROMPT, new_tokens=24) for side in sides)
    assert texts(sides, length=24) == expected


@pytest.mark.parametrize(
    "how",
    [
        {"temperature": 1.0},
        {"temperature": 0.3, "top_k": 7},
        {"temperature": 1.7, "top_p": 0.6},
        {"temperature": 0.9, "top_p": 0.8, "top_k": 20},
    ],
)
def test_drawn_answers_are_those_of_generate(sides: tuple[Side, ...], how: dict[str, Any]) -> None:
    expected = []
    for side in sides:
        torch.manual_seed(11)
        every = {"top_p": 1.0, "top_k": 0, **how}
        expected.append(generated(side, do_sample=True, max_new_tokens=20, **every))
    assert texts(sides, length=20, seed=11, **how) == tuple(expected)


def test_settings_have_the_effect_they_name(sides: tuple[Side, ...]) -> None:
    greedy = texts(sides, length=20)
    assert texts(sides, length=20, temperature=1.5, top_k=1) == greedy
    assert texts(sides, length=20, temperature=1.5, top_p=1e-6) == greedy
    drawn = texts(sides, length=20, temperature=1.5, seed=1)
    assert drawn != greedy
    assert texts(sides, length=20, temperature=1.5, seed=1) == drawn
    assert texts(sides, length=20, temperature=1.5, seed=2) != drawn


@pytest.mark.parametrize("length", [1, 2, 17])
def test_the_length_is_kept_to(sides: tuple[Side, ...], length: int) -> None:
    found = last(answers(sides, PROMPT, Writing(length=length)))
    assert [(answer.tokens, answer.ended, answer.error) for answer in found] == [(length, LENGTH, None)] * 2
    assert all((answer.tokens_per_second is None) == (length == 1) for answer in found)
    assert all(answer.first_seconds is not None and answer.first_seconds > 0 for answer in found)


def test_an_answer_ends_where_the_model_says_so(sides: tuple[Side, ...]) -> None:
    side = sides[1]
    ids = torch.tensor([side.tokenizer(PROMPT)["input_ids"]])
    model: Any = side.model
    written = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=30, do_sample=False)
    tokens = written[0, ids.shape[1] :].tolist()
    end = tokens[4]
    settings, model.generation_config.eos_token_id = model.generation_config.eos_token_id, end
    try:
        (answer,) = last(answers([side], PROMPT, Writing(length=30)))
    finally:
        model.generation_config.eos_token_id = settings
    assert (answer.tokens, answer.ended) == (tokens.index(end) + 1, END)


def test_memory_counts_keys_and_values(sides: tuple[Side, ...]) -> None:
    found = last(answers(sides, PROMPT, Writing(length=9)))
    for side, answer in zip(sides, found, strict=True):
        layers = side.config.num_hidden_layers
        per_token = layers * 2 * 3 * 16 * 4  # keys and values of 3 heads of 16, float32
        assert answer.state_bytes == per_token * (answer.prompt_tokens + 9 - 1)  # the last token is not read


def test_models_write_in_turns(sides: tuple[Side, ...]) -> None:
    order: list[str] = []
    hooks = [side.model.register_forward_pre_hook(lambda *_, s=side.letter: order.append(s)) for side in sides]
    states = [*answers(sides, PROMPT, Writing(length=5))]
    for hook in hooks:
        hook.remove()
    assert "".join(order) == "AB" * 5
    assert [tuple(answer.tokens for answer in state) for state in states[:4]] == [(0, 0), (1, 1), (2, 2), (3, 3)]
    assert all(later.text.startswith(earlier.text) for (earlier, _), (later, _) in itertools.pairwise(states))


def test_whoever_stops_listening_stops_the_models(sides: tuple[Side, ...]) -> None:
    passes: list[int] = []
    hook = sides[0].model.register_forward_hook(lambda *_: passes.append(1))
    stream = answers(sides, PROMPT, Writing(length=200))
    for _ in range(4):
        next(stream)
    assert len(threads()) == 2
    stream.close()  # type: ignore[attr-defined]
    done = len(passes)
    time.sleep(0.05)
    hook.remove()
    assert (threads(), done, len(passes)) == ([], 3, 3)
    assert not sides[0].model._forward_hooks


def test_the_stop_button_keeps_what_is_written(sides: tuple[Side, ...]) -> None:
    states: list[tuple[Answer, ...]] = []
    for state in answers(sides, PROMPT, Writing(length=200), stopped=lambda: len(states) >= 6):
        states.append(state)
    assert [(answer.ended, answer.tokens) for answer in states[-1]] == [(STOPPED, 5)] * 2
    assert all(answer.text for answer in states[-1])
    assert threads() == []


def test_a_model_that_fails_does_not_stop_the_other(sides: tuple[Side, ...]) -> None:
    def fail(_: Any, inputs: Any, arguments: dict[str, Any]) -> None:
        if arguments["input_ids"].shape[1] == 1:
            raise RuntimeError("no more\nmemory")

    hook = sides[1].model.register_forward_pre_hook(fail, with_kwargs=True)
    a, b = last(answers(sides, PROMPT, Writing(length=6)))
    hook.remove()
    assert (a.ended, a.tokens, a.error) == (LENGTH, 6, None)
    assert (b.ended, b.tokens, b.error) == (FAILED, 1, "RuntimeError: no more memory")
    assert "no more memory" in markup.numbers(sides[1], b, characters=False)
    assert markup.outcome(sides, (a, b), characters=False) == "A has the length asked for, B failed."


def test_logits_that_are_no_numbers_are_said(sides: tuple[Side, ...]) -> None:
    def spoil(_: Any, __: Any, outputs: Any) -> Any:
        outputs.logits[:] = float("nan")
        return outputs

    hook = sides[0].model.register_forward_hook(spoil)
    a, b = last(answers(sides, PROMPT, Writing(length=3)))
    hook.remove()
    assert a.error is not None
    assert a.error.startswith("the model's logits hold NaN")
    assert b.ended == LENGTH


def test_people_at_the_same_time_get_what_they_would_alone(sides: tuple[Side, ...]) -> None:
    asked = [
        (PROMPT, Writing(length=25, temperature=1.2, seed=5)),
        ("An exception", Writing(length=31, temperature=0.8, top_k=30, seed=6)),
        ("Names refer to", Writing(length=12)),
    ]
    alone = [tuple(a.text for a in last(answers(sides, *question))) for question in asked]
    together: dict[int, tuple[str, ...]] = {}

    def ask(number: int) -> None:
        together[number] = tuple(a.text for a in last(answers(sides, *asked[number])))

    people = [threading.Thread(target=ask, args=(number,)) for number in range(len(asked))]
    for person in people:
        person.start()
    for person in people:
        person.join(60)
    assert [together[number] for number in range(len(asked))] == alone


def test_turns_are_given_in_order() -> None:
    turns, order = Turns(), []
    turns.__enter__()

    def take(number: int) -> None:
        with turns:
            order.append(number)

    waiting = []
    for number in range(4):
        thread = threading.Thread(target=take, args=(number,))
        thread.start()
        waiting.append(thread)
        while len(turns._waiting) <= number:
            time.sleep(0.001)
    turns.pass_on()  # all four had theirs before it comes back
    assert order == [0, 1, 2, 3]
    turns.__exit__()
    for thread in waiting:
        thread.join(10)


# --- prompts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "how", "match"),
    [
        ("", {}, "the prompt is empty: type some text"),
        (" \n\t", {}, "the prompt is empty: type some text"),
        (
            "word " * 400,
            {},
            r"A: .* reads 256 tokens at most, and the prompt has [\d,]+ and .* 64: shorten the prompt$",
        ),
        (PROMPT, {"length": 250}, r"the answer up to 250: shorten the prompt, or the answer to \d+ tokens"),
        ("x" * 1_000_001, {}, r"the prompt has 1,000,001 characters: shorten it, 1,000,000 are the most"),
    ],
)
def test_prompts_that_cannot_be_answered(sides: tuple[Side, ...], prompt: str, how: dict[str, Any], match: str) -> None:
    with pytest.raises(DataError, match=match):
        next(answers(sides, prompt, Writing(**how)))
    assert threads() == []


def test_a_prompt_as_long_as_can_be_is_answered(sides: tuple[Side, ...]) -> None:
    room = 256 - prompt_ids(sides[0], PROMPT, Writing(length=1)).shape[1]
    assert [answer.tokens for answer in last(answers(sides, PROMPT, Writing(length=room)))] == [room, room]
    with pytest.raises(DataError, match=f"or the answer to {room} tokens"):
        next(answers(sides, PROMPT, Writing(length=room + 1)))


def test_the_chat_template_is_used_where_there_is_one(sides: tuple[Side, ...]) -> None:
    plain, chat = Writing(), Writing(chat=True)
    a, b = sides
    assert a.tokenizer.decode(prompt_ids(a, "Why?", chat)[0]) == "Q: Why?\nA:"
    assert a.tokenizer.decode(prompt_ids(a, "Why?", plain)[0]) == "Why?"
    assert b.tokenizer.decode(prompt_ids(b, "Why?", chat)[0]) == "Why?"


def test_a_chat_template_that_refuses(sides: tuple[Side, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sides[0].tokenizer, "chat_template", "{{ raise_exception('no users here') }}")
    with pytest.raises(
        DataError, match=r"its chat template refuses the prompt \(\w+: no users here\): switch the chat"
    ):
        prompt_ids(sides[0], "Why?", Writing(chat=True))


def test_a_tokenizer_of_another_model(sides: tuple[Side, ...]) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.add_tokens("secateurs")
    wider = dataclasses.replace(sides[0], tokenizer=tokenizer)
    with pytest.raises(DataError, match=r"the tokenizer gives token 300, and the model has 300: it is of another mod"):
        prompt_ids(wider, "secateurs", Writing())


@pytest.mark.parametrize(
    ("how", "match"),
    [
        ({"temperature": -1}, r"temperature=-1: expected 0, or 0.01 to 100"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": "hot"}, "temperature='hot'"),
        ({"top_p": 0}, "top-p=0: expected a share above 0"),
        ({"top_p": 1.1}, "top-p=1.1"),
        ({"top_k": -3}, "top-k=-3: expected a whole number"),
        ({"top_k": 1.5}, r"top-k=1\.5"),
        ({"length": 0}, "length=0: expected 1 to 4096 tokens"),
        ({"length": True}, "length=True"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": None}, "seed=None"),
    ],
)
def test_settings_that_make_no_sense(how: dict[str, Any], match: str) -> None:
    with pytest.raises(DataError, match=match):
        Writing(**how)


# --- plans ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(sides: tuple[Side, ...]) -> Side:
    """A side with the sizes of the 7B model, and no weights of it."""
    config = AutoConfig.for_model("llama")
    return dataclasses.replace(sides[0], config=config, discovery=discover(config))


@pytest.fixture
def place(tmp_path: Path) -> Workplace:
    return Workplace(tmp_path / "run", LoadOptions(), {"samples": 4, "length": 32})


def test_sizes_are_those_of_the_command(sides: tuple[Side, ...], place: Workplace) -> None:
    wish = Wish(ratio=0.3, score="l2", shape="uniform", axes=("mlp",))
    drawn = sketch(sides[0], wish, place)
    planned = plan_model(recipe(sides[0].name, cut=wish.given), sizes_only=True)
    assert (drawn.groups, drawn.parameters, drawn.macs) == (planned.groups, planned.parameters, planned.macs)
    assert not drawn.decided
    assert drawn.parameters != sketch(sides[0], dataclasses.replace(wish, ratio=0.4), place).parameters
    assert "Sizes only: how many units stay, not which." in about(sides[0], drawn)


@pytest.mark.parametrize("wish", [Wish(), Wish(score="l2", shape="uniform"), Wish("llm-pruner", 0.25), Wish("fast")])
def test_sizes_of_a_large_model_follow_at_once(large: Side, place: Workplace, wish: Wish) -> None:
    start = time.perf_counter()
    drawn = sketch(large, wish, place)
    shown = markup.plan_sizes(drawn) + markup.layer_sizes(by_layer(large, drawn))
    assert time.perf_counter() - start < 0.7
    assert "6.74 B" in shown
    assert all(f">layer {layer}<" in shown for layer in range(32))


def test_a_plan_is_one_that_prune_takes(sides: tuple[Side, ...], place: Workplace, tmp_path: Path) -> None:
    wish = Wish("fast", 0.3, score="param_first", shape="uniform")
    stages: list[str] = []
    planned = decide(sides[0], wish, place, said=lambda stage, _: stages.append(stage))
    assert planned.decided
    assert planned.settings is not None
    assert "score" in stages
    given = plan_from_json(json.loads(json.dumps(planned.to_json())))
    pruned = prune_model(sides[0].name, tmp_path / "out", plan=given)
    assert load_sides([sides[0].name, str(pruned.out)])[1].size.parameters == planned.parameters["pruned"]
    calibration = with_preset("fast", {}, {"samples": 4, "length": 32})[1]
    assert planned == plan_model(recipe(sides[0].name, preset="fast", cut=wish.given, calibration=calibration))
    assert "chosen by the score param_first on 4 windows of 32 tokens (demo)" in about(sides[0], planned)

    # What was scored is kept: units follow at once, for other ratios and for scores that need no more.
    for other in (dataclasses.replace(wish, ratio=0.5), dataclasses.replace(wish, score="vectorize")):
        assert sketch(sides[0], other, place).decided
    assert not sketch(sides[0], dataclasses.replace(wish, score="param_second"), place).decided
    assert not sketch(sides[1], wish, place).decided
    stages.clear()
    decide(sides[0], dataclasses.replace(wish, ratio=0.5), place, said=lambda stage, _: stages.append(stage))
    assert "load" not in stages


def test_a_free_plan_says_what_prune_will_do(sides: tuple[Side, ...], place: Workplace) -> None:
    planned = decide(sides[0], Wish("best", 0.3), place)
    text = about(sides[0], planned)
    assert "optimal brain surgeon may then choose others" in text
    assert f"`secateur prune {sides[0].name} OUT --plan plan.json` cuts the others, and fits by least squares" in text


def test_scoring_can_be_stopped(sides: tuple[Side, ...], place: Workplace) -> None:
    def said(stage: str, share: float | None) -> None:
        if stage == "score" and share:
            raise Stopped("stopped; nothing was written")

    with pytest.raises(Stopped):
        decide(sides[0], Wish("fast"), place, said=said)
    assert [answer.tokens for answer in last(answers(sides, PROMPT, Writing(length=3)))] == [3, 3]  # turns go on
    assert not sketch(sides[0], Wish("fast"), place).decided


def test_models_answer_while_units_are_scored(sides: tuple[Side, ...], place: Workplace) -> None:
    """A question asked while a model is scored gets its tokens in between, and the same ones."""
    expected = texts(sides, length=4)
    begun = threading.Event()
    found: list[tuple[str, ...]] = []
    happened: list[str] = []

    def ask() -> None:
        begun.wait(60)
        found.append(texts(sides, length=4))

    def said(stage: str, share: float | None) -> None:
        happened.append("scored")
        if share:
            begun.set()
            time.sleep(0.02)

    asking = threading.Thread(target=ask)
    slow = dataclasses.replace(place, calibration={"samples": 48, "length": 64})
    scoring = threading.Thread(target=decide, args=(sides[0], Wish("best"), slow), kwargs={"said": said})
    hook = sides[0].model.register_forward_hook(lambda *_: happened.append("token"))
    asking.start()
    scoring.start()
    scoring.join(120)
    asking.join(60)
    hook.remove()
    assert found == [expected]
    assert "scored token scored" in " ".join(happened)


@pytest.mark.parametrize(
    ("wish", "match"),
    [
        (Wish(ratio=0.94), r"ratio=0\.94 leaves"),
        (Wish(axes=("hidden", "mlp")), "hidden and layers are cut alone"),
        (Wish(score="block_influence"), "compares whole layers"),
        (Wish(preset="worst"), "preset='worst' is unknown"),
        (Wish(axes=("experts",)), "has no group of that kind"),
    ],
)
def test_cuts_that_cannot_be_done(sides: tuple[Side, ...], place: Workplace, wish: Wish, match: str) -> None:
    with pytest.raises(PlanError, match=match):
        sketch(sides[0], wish, place)


def test_layers_and_widths_are_shown(sides: tuple[Side, ...], place: Workplace) -> None:
    assert cuttable(sides[0].discovery) == ["attention", "query", "mlp", "hidden", "layers"]
    width = by_layer(sides[0], sketch(sides[0], Wish(axes=("hidden",)), place))
    assert [(row.layer, row.kind, row.units) for row in width] == [(None, "hidden", 48)]
    whole = Wish(ratio=0.4, axes=("layers",), score="l2")
    assert [row.kept for row in by_layer(sides[0], sketch(sides[0], whole, place))] == [2]
    planned = decide(sides[0], whole, place)
    kept = by_layer(sides[0], planned)
    assert [row.layer for row in kept if row.kept] == list(planned.groups[0].keep or ())
    assert len(kept) == 3


# --- what is shown --------------------------------------------------------------------------------------------------


def test_names_and_texts_are_escaped(sides: tuple[Side, ...]) -> None:
    hostile = [dataclasses.replace(side, name="<script>&") for side in sides]
    assert "<script>" not in markup.headline(hostile)
    assert markup.refusal("`<b>` & more") == ('<p class="refusal" role="alert"><code>&lt;b&gt;</code> &amp; more</p>')
    assert "<i>" not in markup.layer_sizes([Kept(0, "<i>", 3, 2)])
    failed = Answer(text="", prompt_tokens=1, error="<img src=x>", ended=FAILED)
    assert "<img" not in markup.numbers(sides[0], failed, characters=True)


def test_speeds_are_compared(sides: tuple[Side, ...]) -> None:
    a = Answer("x" * 40, 4, 10, 0.5, 20.0, 80.0, 1024, LENGTH)
    b = dataclasses.replace(a, tokens_per_second=30.0, characters_per_second=60.0, ended=END)
    told = "A has the length asked for, B came to its end. B wrote {} times as many {} per second as A."
    assert markup.outcome(sides, (a, b), characters=False) == told.format("1.50", "tokens")
    assert markup.outcome(sides, (a, b), characters=True) == told.format("0.75", "characters")
    shown = markup.numbers(sides[0], a, characters=True)
    assert "20.0 tokens/s" in shown
    assert "80.0 /s" in shown
    assert "4 read, 10 written" in shown
    assert "speed in characters" not in markup.numbers(sides[0], a, characters=False)


# --- the address ----------------------------------------------------------------------------------------------------


def test_a_taken_port_is_said_before_a_model_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PageError, match=rf"port {port} of 127\.0\.0\.1 is taken: .* --port {port + 1}, .*--port 0"):
            compare(["no-such-model", "demo"], port=port)


def test_only_this_machine_is_listened_to_unless_asked(caplog: pytest.LogCaptureFixture) -> None:
    with bind(port=0) as taken:
        assert taken.getsockname()[0] == "127.0.0.1"
        assert not caplog.records
    with bind("0.0.0.0", port=0) as taken:
        assert url_of(taken).startswith("http://127.0.0.1:")
    assert "0.0.0.0 is no address of this machine alone" in caplog.text


@pytest.mark.parametrize("host", ["no-such-host.invalid", "256.1.1.1", "203.0.113.9", ""])
def test_addresses_that_are_not_this_machine(host: str) -> None:
    with pytest.raises(PageError, match=f"--host {host}"), bind(host or "no host", 0):
        pass


def test_gradio_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(PageError, match=r"pip install 'secateur\[compare\]'"):
        check_gradio()


def test_what_is_opened_as_json(sides: tuple[Side, ...]) -> None:
    shown = json.loads(json.dumps(Opened("http://127.0.0.1:1", sides).to_json()))
    assert shown["url"] == "http://127.0.0.1:1"
    assert [row["model"] for row in shown["results"]] == [side.name for side in sides]
    assert {"parameters", "macs", "weight_bytes", "peak_bytes"} <= shown["results"][0].keys()
