"""What was written -> the files of a folder that was verified, quantized, exported or merged."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from secateur.checkpoint.verification import Verified
from secateur.export.formats import ExportResult
from secateur.export.gguf_file import GgufResult
from secateur.export.linear_layers import PackedResult
from secateur.export.merge import MergeResult
from secateur.export.push import Pushed
from secateur.report.formatting import format_bytes, format_count
from secateur.report.tables.layout import make_table, titled

SCHEME_IN_WORDS = {
    "weight-only": "products in the model's dtype",
    "dynamic": "products in int8, activations quantized per token",
    "w8a8": "products in int8, activations quantized per token",
    "w4a16": "products in the model's dtype",
    "fp8": "products in one-byte floats, activations quantized per token",
}
SMALL_TYPE = {"w4a16": "int4", "fp8": "fp8"}  # of the weights; int8 in the others


def verify_tables(found: Verified) -> Iterator[RenderableType]:
    """A row for every file, and the problems that no single file shows."""
    table = make_table(("file", "bytes", "sha256", "as written"), text=("file", "sha256", "as written"))
    for file in found.files:
        digest = "" if file.sha256 is None else file.sha256[:12]
        table.add_row(file.name, f"{file.bytes:,}", digest, "yes" if file.problem is None else f"no: {file.problem}")
    yield from titled(found.folder, table)
    between = [problem for problem in found.problems if not any(problem.startswith(f"{f.name} ") for f in found.files)]
    yield from (Text(problem) for problem in between)
    if not found.problems:
        built = "and the model of its config has these tensors and the plan's sizes"
        unbuilt = "no model was built of its config: the weights are packed, or custom code needs --trust-remote-code"
        yield Text(f"whole: {found.tensors:,} tensors in {len(found.files)} files, {built if found.built else unbuilt}")


def export_tables(written: ExportResult) -> Iterator[RenderableType]:
    """What was written, in any format."""
    match written:
        case GgufResult():
            yield from gguf_tables(written)
        case PackedResult():
            yield from packed_tables(written)
        case MergeResult():
            yield from merge_lines(written)


def push_lines(pushed: Pushed) -> Iterator[RenderableType]:
    """What was uploaded, and where it is."""
    yield Text(f"pushed {pushed.folder} ({pushed.files} files, {format_bytes(pushed.bytes)}): {pushed.url}")


def packed_tables(done: PackedResult) -> Iterator[RenderableType]:
    """The layers with packed weights, what kept its dtype and why, and the bytes before and after."""
    table = make_table(("weights", "tensors", "why"), text=("weights", "why"))
    small = SMALL_TYPE.get(done.scheme, "int8")
    groups = "" if done.group_size is None else f"; {done.group_size} columns share a scale"
    table.add_row(small, str(len(done.layers)), f"linear layers; {SCHEME_IN_WORDS[done.scheme]}{groups}")
    reasons: dict[str, list[str]] = {}
    for name, why in done.left.items():
        reasons.setdefault(why, []).append(name)
    for why, names in reasons.items():
        table.add_row(names[0] + (" ..." if len(names) > 1 else ""), str(len(names)), f"unchanged: {why}")
    yield from titled(f"What is {small}", table)
    before, after = done.weight_bytes["before"], done.weight_bytes["after"]
    yield (
        f"weights: {format_bytes(before)} before, {format_bytes(after)} after ({after / before:.2f}); "
        f"files: {format_bytes(done.file_bytes)} in {done.out}"
    )
    if done.unaligned and done.scheme == "dynamic":
        yield (
            f"{len(done.unaligned)} layers have sizes that are not multiples of 8 ({done.unaligned[0]}): on CUDA, "
            "torchao computes their dynamic products on the CPU. Prune with --round-to 8, or use weight-only"
        )


def gguf_tables(written: GgufResult) -> Iterator[RenderableType]:
    """The GGUF file, and how llama.cpp's tokens and logits compare with torch's."""
    table = Table(show_header=False)
    table.add_row("file", str(written.out))
    table.add_row("architecture", written.architecture)
    size = f"{format_count(written.parameters)} parameters, {format_bytes(written.bytes)}"
    table.add_row("weights", f"{written.dtype}, {size}")
    table.add_row("pre-tokenizer", written.pre)
    checked = written.checked
    if checked is not None:
        table.add_row("compared in", f"llama.cpp {checked.version}")
        table.add_row("texts tokenized alike", f"{checked.texts - len(checked.other_tokens)} of {checked.texts}")
        table.add_row("greedy tokens as torch's", f"{checked.same_tokens} of {checked.new_tokens}")
        rounding = f"({checked.rounding:.2g} from rounding weights alone)"
        table.add_row("logits differ by", f"{checked.difference:.2g} of their spread {rounding}")
    yield from titled("Written", table)
    for note in written.notes:
        yield f"note: {note}"
    if checked is None:
        yield "not compared with torch: pip install 'secateur[gguf]', and export with --check"
    elif checked.other_tokens:
        yield f"note: llama.cpp tokenizes differently: {', '.join(repr(text) for text in checked.other_tokens[:3])}"


def merge_lines(merged: MergeResult) -> Iterator[RenderableType]:
    """What a merged adapter changed."""
    yield f"merged {merged.adapter} (rank {merged.rank}) into {merged.base}"
    yield f"{len(merged.changed)} weights changed, by {100 * merged.largest:.3g} % of their norm at most"
    yield f"wrote {merged.out}"
