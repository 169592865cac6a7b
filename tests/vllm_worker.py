"""Runs where vLLM is installed: reads one request per line, JSON, serves its folder and answers with greedy tokens.

Every folder gets a fork of this process, because vLLM leaves state behind; most of the time goes into importing it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from typing import Any

from line_process import ANSWER

MOST_SECONDS = 300  # for one folder


def served(order: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Greedy tokens of one folder, or the error."""
    from vllm import LLM, SamplingParams

    try:
        options = {
            "enforce_eager": True,
            "dtype": "float32",
            "skip_tokenizer_init": True,
            **options,
            **order["options"],
        }
        engine = LLM(order["folder"], **options)
        greedy = SamplingParams(temperature=0, max_tokens=order["new_tokens"], ignore_eos=True, detokenize=False)
        prompts = [{"prompt_token_ids": prompt} for prompt in order["prompts"]]
        found = engine.generate(prompts, greedy, use_tqdm=False)
    except Exception as error:  # whatever fails is the answer
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}
    return {"tokens": [list(each.outputs[0].token_ids) for each in found]}


def main(how: str) -> None:
    """Answer every line."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the fork is the engine
    options: dict[str, Any] = {"max_model_len": 64}
    if how == "backend":
        sys.modules["secateur"] = None  # type: ignore[assignment]  # importing it fails from now on
        options |= {"model_impl": "transformers", "trust_remote_code": True}
    from vllm import LLM  # noqa: F401 - before the forks

    for line in sys.stdin:
        if child := os.fork():
            status = os.waitpid(child, 0)[1]
            if status:
                say({"error": f"vLLM ended with the status {os.waitstatus_to_exitcode(status)}"})
            continue
        signal.alarm(MOST_SECONDS)  # a model that waits for ever ends with a status
        say(served(json.loads(line), options))
        os._exit(0)


def say(answer: dict[str, Any]) -> None:
    """One line; libraries print others."""
    sys.stdout.write(f"{ANSWER}{json.dumps(answer)}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1])
