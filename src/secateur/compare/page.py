"""Two sides -> the page, made of gradio's components: what the models cost, a tab to ask both, a tab to plan a cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from secateur.compare.ask_tab import ask_tab
from secateur.compare.models import PROMPT_TOKENS, Side
from secateur.compare.plan_tab import plan_tab
from secateur.compare.plans import Planner
from secateur.report.formatting import format_bytes, format_count, format_macs

SIZES: tuple[tuple[str, str, Callable[[int], str]], ...] = (
    ("parameters", "parameters", format_count),
    ("non-embedding parameters", "non_embedding_parameters", format_count),
    (f"MACs of {PROMPT_TOKENS} tokens", "macs", format_macs),
    ("weights", "weight_bytes", format_bytes),
    (f"KV cache of {PROMPT_TOKENS} tokens", "kv_cache_bytes", format_bytes),
)


def build_page(sides: Sequence[Side], planner: Planner, *, plans: Path) -> Any:
    """The page as gradio's Blocks, not served yet; plans to download are written to the folder `plans`."""
    with gr.Blocks(title="Secateur: compare", analytics_enabled=False) as page:
        gr.Markdown("# Secateur: two models side by side")
        headers = ["size", *(side.title for side in sides), "B / A"]
        gr.Dataframe(size_rows(sides), headers=headers, label="What the models cost")
        with gr.Tab("Compare"):
            ask_tab(sides)
        with gr.Tab("Plan a cut"):
            plan_tab(page, sides, planner, plans)
    return page


def size_rows(sides: Sequence[Side]) -> list[list[str]]:
    """What both models cost, and B's share of A; a row for each number that is known of both."""
    rows = [(label, text, *(getattr(side.costs, name) for side in sides)) for label, name, text in SIZES]
    peaks = [side.costs.speed.peak_bytes if side.costs.speed is not None else None for side in sides]
    rows.append((f"peak memory of {PROMPT_TOKENS} tokens", format_bytes, *peaks))
    return [[label, text(a), text(b), f"{b / a:.2f}"] for label, text, a, b in rows if a and b]
