"""Per-layer folders of every model type, used by a process that cannot import us: logits, tokens, LoRA.

For each type, a cut that leaves every layer other sizes is saved. The stranger loads it with `trust_remote_code`, gives
the same logits and the same tokens with its cache, trains LoRA for two steps, merges, saves and loads again, where it
can do so with the dense model; and `load` reads it without running its code. (Stock folders need nothing of ours to be
read: `contract` holds every type to those.) What fails is listed in known_folder_failures.json, which can only shrink.
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

from contract import DISCOVER, Report, Subject, said, subject, uneven
from every_type import tiny_type_model
from known import BUILT, check_reasons, verdict
from secateur.checkpoint.save import save
from secateur.models.loading import load
from secateur.models.silence import quiet
from secateur.planning.plan import Plan
from secateur.pruning.prune import prune
from stranger import NEW_TOKENS, Stranger, stranger

if find_spec("peft") is None:  # a package of its own that is missing is a failure
    pytest.skip("LoRA on pruned folders needs peft", allow_module_level=True)

KNOWN = Path(__file__).parents[1] / "known_folder_failures.json"  # check -> [{"reason": ..., "types": [...]}]
QUICK = ("llama", "gpt2", "mixtral")
KINDS = {"mlp": ("mlp", "expert_mlp", "shared_mlp"), "attention": ("attention",), "expert": ("expert",)}
ELSE = {"state": ("state",)}  # of types that have nothing of the others
FOLDER, OURS, LORA = "per-layer folder", "read without remote code", "lora"


def check_type(model_type: str, folder: Path) -> Report:
    """All that a folder of the type is held to."""
    report = Report(model_type)
    try:
        tested = subject(model_type)
        with quiet():
            dense = tiny_type_model(model_type, dtype=torch.float32)
    except Exception as error:  # whatever fails is the finding
        report.checks[DISCOVER] = said(error)
        return report

    def hold(name: str, check: Callable[[], Any]) -> Any:
        try:
            with quiet():
                found = check()
        except Exception as error:  # whatever fails is the finding
            report.checks[name] = said(error)
            return None
        report.checks[name] = None
        return found

    def cut(name: str, kinds: Iterable[str]) -> PreTrainedModel | None:
        plan = uneven(dense, tuple(kinds), discovery=tested.discovery)
        return hold(name, partial(written, dense, plan, tested, folder / name)) if plan.groups else None

    present = {group.kind for group in tested.discovery.groups}
    each = KINDS if present & {kind for kinds in KINDS.values() for kind in kinds} else ELSE
    pruned = cut(FOLDER, itertools.chain(*each.values()))
    if report.checks.get(FOLDER) is not None:  # which of the kinds is it
        passing = [kinds for name, kinds in each.items() if cut(f"per-layer {name}", kinds) is not None]
        del report.checks[FOLDER]
        pruned = cut(FOLDER, itertools.chain(*passing))
    if pruned is not None:
        hold(FOLDER, partial(check_stranger, tested, pruned, folder / FOLDER, report))
        hold(OURS, partial(check_ours, tested, pruned, folder / FOLDER))
    return report


def written(dense: PreTrainedModel, plan: Plan, tested: Subject, folder: Path) -> PreTrainedModel:
    """The pruned model, which lies in the folder too."""
    pruned = prune(dense, plan, discovery=tested.discovery)
    save(pruned, folder, plan=plan)
    return pruned


def check_stranger(tested: Subject, pruned: PreTrainedModel, folder: Path, report: Report) -> None:
    """Anyone loads the folder and finds the model that was saved."""
    ids = tested.inputs["input_ids"]
    seen = stranger().use(folder, ids, lora=True)
    failed = seen.failed.get("lora")
    report.checks[LORA] = failed if failed is not None and tunable(tested) else None
    assert_near(seen.logits, logits(pruned, ids))
    settings: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    tokens = pruned.generate(input_ids=ids[:1], attention_mask=torch.ones_like(ids[:1]), **settings)  # type: ignore[operator]
    assert torch.equal(seen.tokens, tokens[:, ids.shape[1] :]), "other tokens"


def tunable(tested: Subject) -> bool:
    """Whether the stranger's LoRA takes the dense model: peft refuses some modules, and some code reads past it."""
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_type_model(tested.model_type, dtype=torch.float32)
        model.save_pretrained(Path(folder) / "dense")
        # A text model inside another has no name of its own for the auto class.
        named = type(model.config) in MODEL_FOR_CAUSAL_LM_MAPPING
        loader = "AutoModelForCausalLM" if named else type(model).__name__
        return not stranger().use(Path(folder) / "dense", tested.inputs["input_ids"], loader=loader, lora=True).failed


def check_ours(tested: Subject, pruned: PreTrainedModel, folder: Path) -> None:
    """We load the folder without running the code that lies in it."""
    before = set(sys.modules)
    loaded = load(str(folder), device="cpu")
    assert not any(module.startswith("transformers_modules") for module in set(sys.modules) - before)
    loaded.set_attn_implementation("eager")
    assert_near(logits(loaded, tested.inputs["input_ids"]), logits(pruned, tested.inputs["input_ids"]))


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    found: Tensor = model(input_ids=ids).logits
    return found.clone()


def assert_near(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape, f"logits {tuple(found.shape)} instead of {tuple(expected.shape)}"
    off = float((found - expected).abs().max() / expected.abs().max().clamp_min(1))
    assert off < 1e-4, f"logits are off by {off:.1e}"


def check(model_type: str, folder: Path) -> None:
    problems = verdict(check_type(model_type, folder), KNOWN)
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("model_type", QUICK)
def test_folders_of_some_types(model_type: str, tmp_path: Path) -> None:
    check(model_type, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [model_type for model_type in BUILT if model_type not in QUICK])
def test_folders_of_every_type(model_type: str, tmp_path: Path) -> None:
    check(model_type, tmp_path)


def test_the_stranger_cannot_import_us_and_tells_what_fails(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="ValueError: Unrecognized model"):
        stranger().use(tmp_path, torch.zeros(1, 2, dtype=torch.long))
    (tmp_path / "config.json").write_text(
        json.dumps({"auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}, "model_type": "x"})
    )
    (tmp_path / "code.py").write_text("import secateur")
    with pytest.raises(AssertionError, match="secateur"):
        stranger().use(tmp_path, torch.zeros(1, 2, dtype=torch.long))


def test_a_stranger_that_ends_is_told() -> None:
    other = Stranger()
    other.process.kill()
    with pytest.raises((AssertionError, BrokenPipeError)):
        other.use(Path("nowhere"), torch.zeros(1, 2, dtype=torch.long))
    other.end()


def test_every_known_failure_names_types_and_a_reason() -> None:
    check_reasons(KNOWN)
