"""The page: two tabs over two sides, made of gradio's components. What it does is done elsewhere; this lays it out."""

# No `from __future__ import annotations`: gradio reads the annotations of handlers, and `gr` is no global name.
import queue
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from secateur.compare import markup
from secateur.compare.answers import Writing, answers
from secateur.compare.cuts import SHARES_OF, Stopped, Wish, Workplace, about, by_layer, cuttable, decide, sketch
from secateur.compare.sides import Side
from secateur.errors import SecateurError
from secateur.files import write_json
from secateur.planning.options import PRESETS
from secateur.planning.plan import Plan
from secateur.scoring.registry import SCORES

EVERY = 0.05  # seconds between two states of an answer that are sent to a browser
LONGEST = 1024  # tokens of an answer that the slider goes up to
AT_ONCE = 4  # answers; more wait in the queue
PRESETS_OWN = ("as the preset says", "")
SCORED_BEFORE = (
    "Which units stay follows from scores that are kept. Choose the units, to get the plan with the settings of the "
    "config."
)
SIZES_FIRST = "Choose the units, to get a plan that `secateur prune` takes."

HOW_MEASURED = (
    "The two models take turns, a token of A, then a token of B, and so do people who ask at the same time: only one "
    "model computes at any moment, so the speed of each is its own. Speed counts the tokens after the first; the first "
    "one includes reading the prompt. Memory is the weights and what the model keeps of the text that it has read and "
    "written (keys and values, or states)."
)


class _Running:
    """What each browser tab has going on, so that its stop button stops that and nothing else. Final."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._events: dict[str, threading.Event] = {}

    def begin(self, session: str) -> None:
        """Something new: what went on before is stopped."""
        with self._guard:
            if session in self._events:
                self._events[session].set()
            self._events[session] = threading.Event()

    def event(self, session: str) -> threading.Event:
        """That of what is going on."""
        with self._guard:
            return self._events.setdefault(session, threading.Event())

    def stop(self, session: str) -> None:
        """Stop it."""
        self.event(session).set()


def build_page(sides: Sequence[Side], place: Workplace, *, folder: Path, seed: int = 0) -> Any:
    """The page as gradio's Blocks, not served yet; plans to download are written to `folder`."""
    import gradio as gr

    with gr.Blocks(title="Secateur: compare", analytics_enabled=False) as page:
        gr.Markdown("# Secateur: two models side by side")
        gr.HTML(markup.headline(sides), elem_classes="piece", elem_id="headline", padding=False)
        with gr.Tabs():
            with gr.Tab("Compare", id="compare", elem_id="compare-tab"):
                _compare_tab(sides, seed=seed)
            with gr.Tab("Plan a cut", id="plan", elem_id="plan-tab"):
                _plan_tab(page, sides, place, folder=folder)
    return page


def _compare_tab(sides: Sequence[Side], *, seed: int) -> None:
    import gradio as gr

    running = _Running()
    templates = [side.letter for side in sides if side.tokenizer.chat_template is not None]
    characters = _tokens_differ(sides)
    longest = min([LONGEST, *(side.positions - 1 for side in sides if side.positions)])

    prompt = gr.Textbox(
        label="Prompt", lines=3, max_lines=12, placeholder="A pruning saw cuts", elem_id="prompt", autofocus=True
    )
    with gr.Row():
        ask = gr.Button("Ask both", variant="primary", elem_id="ask")
        stop = gr.Button("Stop", variant="secondary", interactive=False, elem_id="stop")
    with gr.Accordion("How they write", open=True):
        with gr.Row():
            temperature = gr.Slider(
                0,
                2,
                value=0,
                step=0.05,
                label="Temperature",
                info="0 takes the most likely token.",
                elem_id="temperature",
            )
            top_p = gr.Slider(
                0.05,
                1,
                value=1,
                step=0.05,
                label="Top-p",
                info="Likely tokens of this probability together; 1: all.",
                elem_id="top-p",
            )
            top_k = gr.Slider(
                0,
                200,
                value=0,
                step=1,
                label="Top-k",
                info="So many of the likeliest tokens; 0: all.",
                elem_id="top-k",
            )
        with gr.Row():
            length = gr.Slider(
                1,
                longest,
                value=min(64, longest),
                step=1,
                label="Length",
                info="Tokens of an answer, at most.",
                elem_id="length",
            )
            seeded = gr.Number(
                value=seed,
                precision=0,
                minimum=0,
                label="Seed",
                info="The same seed draws the same answers.",
                elem_id="seed",
            )
            chat = gr.Checkbox(
                value=len(templates) == len(sides),
                visible=bool(templates),
                label="Chat template",
                info="The prompt as a message to an assistant"
                + ("." if len(templates) == len(sides) else f"; only {templates[0] if templates else ''} has one."),
                elem_id="chat",
            )
    status = gr.HTML(markup.note(""), elem_classes="piece", elem_id="status", padding=False)
    boxes: list[Any] = []
    with gr.Row():
        for side in sides:
            with gr.Column(min_width=300):
                boxes.append(
                    gr.Textbox(
                        label=side.title,
                        lines=8,
                        max_lines=24,
                        interactive=False,
                        buttons=["copy"],
                        elem_id=f"answer-{side.letter.lower()}",
                    )
                )
                boxes.append(
                    gr.HTML(
                        markup.numbers(side, None, characters=characters),
                        elem_classes="piece",
                        elem_id=f"numbers-{side.letter.lower()}",
                        padding=False,
                    )
                )
    gr.HTML(markup.note(HOW_MEASURED), elem_classes="piece", padding=False)

    def begin(request: gr.Request) -> Any:
        running.begin(str(request.session_hash))
        return gr.Button(interactive=False), gr.Button(interactive=True), markup.note("Waiting for a turn.")

    def write(
        text: str, temperature: float, top_p: float, top_k: int, length: int, seed: int, chat: bool, request: gr.Request
    ) -> Iterator[list[Any]]:
        event = running.event(str(request.session_hash))
        try:
            writing = Writing(
                temperature=temperature, top_p=top_p, top_k=top_k, length=length, seed=seed or 0, chat=chat
            )
            for found in answers(sides, text or "", writing, stopped=event.is_set, every=EVERY):
                shown: list[Any] = []
                for side, answer in zip(sides, found, strict=True):
                    shown += [answer.text, markup.numbers(side, answer, characters=characters)]
                yield [*shown, markup.note(markup.outcome(sides, found, characters=characters))]
        except SecateurError as error:
            empty = [x for side in sides for x in ("", markup.numbers(side, None, characters=characters))]
            yield [*empty, markup.refusal(f"{error}.")]

    def end() -> Any:
        return gr.Button(interactive=True), gr.Button(interactive=False)

    asked = gr.on([ask.click, prompt.submit], begin, None, [ask, stop, status], queue=False, api_visibility="private")
    written = asked.then(
        write,
        [prompt, temperature, top_p, top_k, length, seeded, chat],
        [*boxes, status],
        concurrency_limit=AT_ONCE,
        show_progress="minimal",
        show_progress_on=[status],
        api_visibility="private",
    )
    written.then(end, None, [ask, stop], queue=False, api_visibility="private")

    def halt(request: gr.Request) -> None:
        running.stop(str(request.session_hash))

    stop.click(halt, None, None, queue=False, api_visibility="private")


def _tokens_differ(sides: Sequence[Side]) -> bool:
    """Whether a token of one model is another piece of text than one of the other."""
    a, b = (side.tokenizer.get_vocab() for side in sides)
    return bool(a != b)


def _plan_tab(page: Any, sides: Sequence[Side], place: Workplace, *, folder: Path) -> None:
    import gradio as gr

    running = _Running()
    by_title = {side.title: side for side in sides}

    gr.HTML(
        markup.note(
            "Sizes follow at once, from the shapes alone. Which units stay is known when they have been scored; the "
            "plan can then be downloaded, and `secateur prune MODEL OUT --plan plan.json` cuts what it says."
        ),
        elem_classes="piece",
        padding=False,
    )
    with gr.Row():
        which = gr.Dropdown(list(by_title), value=sides[0].title, label="Model", elem_id="plan-model")
        preset = gr.Dropdown(list(PRESETS), value="best", label="Preset", elem_id="plan-preset")
    with gr.Row():
        ratio = gr.Slider(
            0.01, 0.95, value=0.2, step=0.01, label="Ratio", info="The share to remove.", elem_id="plan-ratio", scale=2
        )
        of = gr.Dropdown([PRESETS_OWN, *SHARES_OF], value="", label="Of", elem_id="plan-of")
    with gr.Row():
        score = gr.Dropdown([PRESETS_OWN, *SCORES], value="", label="Score", elem_id="plan-score")
        shape = gr.Dropdown(
            [PRESETS_OWN, "uniform", "per-layer"],
            value="",
            label="Shape",
            info="uniform: layers alike; free: each its own.",
            elem_id="plan-shape",
        )
        axes = gr.CheckboxGroup(
            cuttable(sides[0].discovery),
            value=[],
            label="Axes",
            info="None: as the preset says. hidden and layers are cut alone.",
            elem_id="plan-axes",
        )
    status = gr.HTML(markup.note(""), elem_classes="piece", elem_id="plan-status", padding=False)
    with gr.Row():
        choose = gr.Button("Choose the units", variant="primary", elem_id="choose")
        stop = gr.Button("Stop", interactive=False, elem_id="plan-stop")
        download = gr.DownloadButton("Download plan.json", interactive=False, elem_id="download")
    with gr.Row():
        with gr.Column(min_width=280):
            sizes = gr.HTML(elem_classes="piece", elem_id="plan-sizes", padding=False)
        with gr.Column(min_width=280):
            layers = gr.HTML(elem_classes="piece", elem_id="plan-layers", padding=False)

    wishes: list[Any] = [which, preset, ratio, of, axes, score, shape]
    shown = [sizes, layers, status, download]

    def wish(preset: str, ratio: float, of: str, axes: list[str], score: str, shape: str) -> Wish:
        return Wish(preset, ratio, of or None, tuple(axes), score or None, shape or None)

    def draw(title: str, *asked: Any) -> list[Any]:
        side = by_title[title]
        off = gr.DownloadButton(value=None, interactive=False)
        try:
            planned = sketch(side, wish(*asked), place)
        except SecateurError as error:
            return ["", "", markup.refusal(f"{error}."), off]
        told = f"{about(side, planned)} {SIZES_FIRST}" if not planned.decided else SCORED_BEFORE
        return [markup.plan_sizes(planned), markup.layer_sizes(by_layer(side, planned)), markup.note(told), off]

    def begin(request: gr.Request) -> Any:
        running.begin(str(request.session_hash))
        return gr.Button(interactive=False), gr.Button(interactive=True), markup.note("Waiting for a turn.")

    def make(request: gr.Request, title: str, *asked: Any) -> Iterator[list[Any]]:
        """Score in a thread, and say how far it is; a page that is closed stops it."""
        side, event = by_title[title], running.event(str(request.session_hash))
        told: queue.SimpleQueue[str] = queue.SimpleQueue()
        made: list[Plan | SecateurError] = []

        def said(stage: str, share: float | None) -> None:
            if event.is_set():
                raise Stopped("stopped; nothing was written")
            told.put(stage if share is None else f"{stage}, {share:.0%}")

        def work() -> None:
            try:
                made.append(decide(side, wish(*asked), place, said=said))
            except SecateurError as error:
                made.append(error)

        working = threading.Thread(target=work, name="plan", daemon=True)
        working.start()
        try:
            while working.is_alive() or not told.empty():
                with suppress(queue.Empty):
                    said_last = told.get(timeout=EVERY)
                    while not told.empty():
                        said_last = told.get()
                    yield [gr.skip(), gr.skip(), markup.note(f"Working: {said_last}."), gr.skip()]
        finally:
            event.set()
        found = made[0] if made else SecateurError("planning failed; the terminal says why")
        if isinstance(found, SecateurError):
            off = gr.DownloadButton(value=None, interactive=False)
            yield [gr.skip(), gr.skip(), markup.refusal(f"{found}."), off]
            return
        file = Path(tempfile.mkdtemp(dir=folder)) / "plan.json"
        write_json(file, found.to_json())
        yield [
            markup.plan_sizes(found),
            markup.layer_sizes(by_layer(side, found)),
            markup.note(about(side, found)),
            gr.DownloadButton(value=str(file), interactive=True),
        ]

    def axes_of(title: str) -> Any:
        return gr.CheckboxGroup(cuttable(by_title[title].discovery), value=[])

    def end() -> Any:
        return gr.Button(interactive=True), gr.Button(interactive=False)

    def halt(request: gr.Request) -> None:
        running.stop(str(request.session_hash))

    page.load(draw, wishes, shown, show_progress="hidden", api_visibility="private")
    which.change(axes_of, which, axes, queue=False, show_progress="hidden", api_visibility="private")
    gr.on(
        [control.change for control in wishes],
        draw,
        wishes,
        shown,
        trigger_mode="always_last",
        concurrency_limit=AT_ONCE,
        show_progress="hidden",
        api_visibility="private",
    )
    begun = choose.click(begin, None, [choose, stop, status], queue=False, api_visibility="private")
    made = begun.then(make, wishes, shown, concurrency_limit=1, show_progress="hidden", api_visibility="private")
    made.then(end, None, [choose, stop], queue=False, api_visibility="private")
    stop.click(halt, None, None, queue=False, api_visibility="private")
