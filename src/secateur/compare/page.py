"""Two sides -> the page, made of gradio's components: what the models cost, a tab to ask both, a tab to plan a cut."""

# No `from __future__ import annotations`: gradio reads the annotations of handlers.
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from secateur.compare.answers import Answer, Sampling, answers
from secateur.compare.models import Side
from secateur.compare.plan_tab import MODELS, Planner, errors_shown, plan_tab
from secateur.report.tables.profile import cost_rows

SIZES = "parameters non_embedding_parameters macs weight_bytes kv_cache_bytes peak_bytes"  # where known of both


def build_page(sides: Sequence[Side], planner: Planner, *, plans: Path) -> Any:
    """The page as gradio's Blocks, not served yet; plans to download are written to the folder `plans`."""
    with gr.Blocks(title="Secateur: compare", analytics_enabled=False) as page:
        gr.Markdown("# Secateur: two models side by side")
        headers = ["size", *(side.title for side in sides), "B / A"]
        gr.Dataframe(cost_rows([side.costs for side in sides], SIZES), headers=headers, label="What the models cost")
        with gr.Tab("Compare"):
            ask_tab(sides)
        with gr.Tab("Plan a cut"):
            plan_tab(page, sides, planner, plans)
    return page


UPDATE_SECONDS = 0.05  # between two states of an answer that are sent to a browser
LONGEST_ANSWER = 1024  # tokens
NOTE = (
    "The models take turns, a token of A, then a token of B, so the speed of each is its own. It is that of the tokens "
    "after the first; the first one includes reading the prompt."
)


def ask_tab(sides: Sequence[Side]) -> None:
    """Lay out the tab, within an open page."""
    prompt = gr.Textbox(label="Prompt", lines=3, placeholder="A pruning saw cuts", elem_id="prompt")
    with gr.Row():
        ask = gr.Button("Ask both", variant="primary", elem_id="ask")
        stop = gr.Button("Stop", elem_id="stop")
    with gr.Accordion("Sampling"), gr.Row():
        settings = _settings(sides)
    status = gr.Markdown(elem_id="status")
    outputs: list[Any] = [status]
    with gr.Row():
        for side in sides:
            with gr.Column(min_width=300):
                name = f"answer-{side.letter.lower()}"
                outputs.append(gr.Textbox(label=side.title, lines=8, max_lines=24, buttons=["copy"], elem_id=name))
                outputs.append(gr.Markdown(elem_id=f"speed-{side.letter.lower()}"))
    gr.Markdown(NOTE)

    stopped: set[str | None] = set()  # sessions; gradio's `cancels` fails on a generator that is computing

    def write(request: gr.Request, text: str, *settings: Any) -> Iterator[list[Any]]:
        stopped.discard(request.session_hash)
        shown = 0.0
        with errors_shown():
            for current in answers(sides, text, Sampling(*settings)):
                if request.session_hash in stopped:
                    yield ["Stopped.", *(gr.skip() for _ in outputs[1:])]
                    return
                if all(answer.ended for answer in current) or time.monotonic() - shown > UPDATE_SECONDS:
                    shown = time.monotonic()
                    texts = [part for answer in current for part in (answer.text, speed(answer))]
                    yield [outcome(sides, current), *texts]

    events, inputs = [ask.click, prompt.submit], [prompt, *settings]
    gr.on(events, write, inputs, outputs, concurrency_id=MODELS, concurrency_limit=1, show_progress_on=[status])

    def halt(request: gr.Request) -> None:  # gradio gives it by its annotation
        stopped.add(request.session_hash)

    stop.click(halt, queue=False)


def _settings(sides: Sequence[Side]) -> list[Any]:
    """A component for each field of `Sampling`."""
    templates = [side.letter for side in sides if side.tokenizer.chat_template is not None]
    longest = min([LONGEST_ANSWER, *(side.positions - 1 for side in sides if side.positions)])
    all_chat, label = len(templates) == len(sides), f"Chat template ({' and '.join(templates)})"
    return [
        gr.Slider(0, 2, 0, step=0.05, label="Temperature", info="0: the most likely token", elem_id="temperature"),
        gr.Slider(0.05, 1, 1, step=0.05, label="Top-p", info="1: all tokens", elem_id="top-p"),
        gr.Slider(0, 200, 0, step=1, label="Top-k", info="0: all tokens", elem_id="top-k"),
        gr.Slider(1, longest, min(64, longest), step=1, label="Length", info="in tokens", elem_id="length"),
        gr.Number(0, precision=0, minimum=0, label="Seed", elem_id="seed"),
        gr.Checkbox(all_chat, label=label, visible=bool(templates), elem_id="chat"),
    ]


def speed(answer: Answer) -> str:
    """How fast an answer was written, as Markdown."""
    parts = [f"**{answer.tokens_per_second:.1f} tokens/s**"] if answer.tokens_per_second is not None else []
    parts.append(f"first token after {answer.first_seconds:.2f} s")
    return ", ".join([*parts, f"{answer.prompt_tokens:,} tokens read, {answer.tokens:,} written"])


def outcome(sides: Sequence[Side], current: Sequence[Answer]) -> str:
    """What goes on, or how it ended and how much faster B was; in characters, where the tokens differ."""
    if any(answer.ended is None for answer in current):
        return "The models write, one token of each in turns."
    ends = "; ".join(f"{side.letter} ended: {answer.ended}" for side, answer in zip(sides, current, strict=True))
    same = sides[0].tokenizer.get_vocab() == sides[1].tokenizer.get_vocab()
    a, b = (answer.tokens_per_second if same else answer.characters_per_second for answer in current)
    unit = "tokens" if same else "characters (their tokens differ)"
    return f"{ends}." + (f" B wrote {b / a:.2f} times as many {unit} per second as A." if a and b else "")
