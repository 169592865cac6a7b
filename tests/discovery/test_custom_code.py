"""A model whose code lies beside its weights: refused until it is trusted, then the same as any other.

The model is that of `custom_code`. What transformers keeps of such code goes into a folder of the test run.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, processors
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PreTrainedModel

from contract import masked, with_constants_of
from custom_code.configuration_glm_like import GlmLikeConfig
from custom_code.modeling_glm_like import GlmLikeForCausalLM
from custom_code.tokenization_glm_like import GlmLikeTokenizer
from recipes import recipe
from secateur import CutOptions, discover, plan, prune
from secateur.checkpoint.save import save
from secateur.cli.main import run
from secateur.data.calibration import CalibrationOptions
from secateur.data.generated import generate_windows
from secateur.data.windows import behind
from secateur.discovery.config_settings import _shallow, stock_settings
from secateur.discovery.groups import Discovery
from secateur.discovery.sizes import PrunedSizes
from secateur.errors import DataError, DiscoveryError, ModelError, PlanError
from secateur.models.config import load_config
from secateur.models.loading import load, skeleton
from secateur.models.options import LoadOptions
from secateur.models.silence import quiet
from secateur.models.tokenizer import load_tokenizer
from secateur.models.trust import runs_remote_code
from secateur.pipeline.run import plan_model, prune_model
from secateur.planning.plan import Plan, PlannedGroup
from secateur.pruning.reconstruct import reconstruct_in_place
from secateur.scoring.scores import score
from tiny import tiny_tokenizer, write_tiny

CODE = Path(__file__).parents[1] / "custom_code"
FILES = ("configuration_glm_like.py", "modeling_glm_like.py", "tokenization_glm_like.py")
AUTO_MAP = {
    "AutoConfig": "configuration_glm_like.GlmLikeConfig",
    "AutoModelForCausalLM": "modeling_glm_like.GlmLikeForCausalLM",
}
TRUSTED = LoadOptions(device="cpu", trust_remote_code=True)
HEADS, INNER, HIDDEN, LAYERS = 6, 84, 48, 3
TOLERANCE = 1e-8
MASK, BEGIN = 300, 301  # its code looks for both in every row
IDS = torch.randint(3, 101, (2, 9), generator=torch.Generator().manual_seed(1))
IDS[0, [2, 5]] = torch.tensor([MASK, BEGIN])
IDS[1, [6, 7]] = torch.tensor([MASK, BEGIN])
# What anyone has: transformers, and none of us.
STRANGER = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, found = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto").eval()
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
ids = tokenizer("the cat sat on the mat", return_tensors="pt").input_ids
with torch.no_grad():
    logits = model(ids).logits
tokens = model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False)
assert "secateur" not in sys.modules
torch.save({"ids": ids, "logits": logits, "tokens": tokens}, found)
"""


class StatisticsOverKept(TorchDispatchMode):
    """Means and layer norms across a dimension of `size` look at the kept indices only."""

    def __init__(self, size: int, keep: Sequence[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.size, self.keep = size, torch.tensor(keep)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.mean.dim and args[0].shape[args[1][0]] == self.size:
            return func(args[0].index_select(args[1][0], self.keep), *args[1:], **(kwargs or {}))
        if func is torch.ops.aten.native_layer_norm.default and args[0].shape[-1] == self.size:
            x, _, weight, bias, eps = args
            normed, *statistics = func(x[..., self.keep], [len(self.keep)], weight[self.keep], bias[self.keep], eps)
            full = torch.zeros_like(x)
            full[..., self.keep] = normed
            return full, *statistics
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module", autouse=True)
def modules_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where transformers copies custom code to and imports it from; nothing of it outlives the tests.

    Nor does it remember a custom class: it would then build it unasked, and hide a call that does not pass trust on.
    """
    cache = tmp_path_factory.mktemp("modules")
    forget_modules()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(cache)
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(cache))
        patch.setattr(AutoModelForCausalLM, "register", lambda *_, **__: None)
        yield cache
    forget_modules()


def forget_modules() -> None:
    """Take custom code out of the interpreter, where another test may have left some in another folder."""
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
        del sys.modules[name]


def write_custom(folder: Path) -> Path:
    """Write the folder of a small random model with its tokenizer and its code, which leaves a mark when it runs."""
    named = {"bos_token_id": BEGIN, "eos_token_id": 0, "pad_token_id": 0}
    config = GlmLikeConfig(inner_hidden_size=INNER, auto_map=AUTO_MAP, **named)
    model = GlmLikeForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            around = 1.0 if parameter.dim() == 1 else 0.0
            parameter.copy_(around + 0.3 * torch.randn(parameter.shape, generator=generator))
    with quiet():
        model.save_pretrained(folder)
        GlmLikeTokenizer(  # type: ignore[no-untyped-call]
            tokenizer_object=with_mask_and_begin(tiny_tokenizer().backend_tokenizer), bos_token="<sop>"
        ).save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    auto_map = {"AutoTokenizer": [None, "tokenization_glm_like.GlmLikeTokenizer"]}
    file.write_text(json.dumps({**json.loads(file.read_text()), "auto_map": auto_map}))
    mark = f"\nimport pathlib\npathlib.Path({str(mark_of(folder))!r}).touch()\n"
    for name in FILES:
        (folder / name).write_text((CODE / name).read_text(encoding="utf-8") + mark, encoding="utf-8")
    return folder


def with_mask_and_begin(tokenizer: Tokenizer) -> Tokenizer:
    """A copy of a tokenizer that puts both tokens behind a text, where the model is to write."""
    changed = Tokenizer.from_str(tokenizer.to_str())
    changed.add_special_tokens(["[gMASK]", "<sop>"])
    changed.post_processor = processors.TemplateProcessing(
        single="$A [gMASK] <sop>", special_tokens=[("[gMASK]", MASK), ("<sop>", BEGIN)]
    )
    return changed


def mark_of(folder: Path) -> Path:
    """What is there once code of the folder has run."""
    return folder.with_name(f"{folder.name}-ran")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_custom(tmp_path_factory.mktemp("custom") / "glm")


@pytest.fixture(scope="module")
def model(folder: Path) -> PreTrainedModel:
    return load(str(folder), dtype="float64", device="cpu", trust_remote_code=True)


@pytest.fixture(scope="module")
def discovery(folder: Path) -> Discovery:
    return discover(str(folder), trust_remote_code=True)


def planned(model: PreTrainedModel, discovery: Discovery, kind: str, *, layers: range = range(LAYERS)) -> Plan:
    """A plan that keeps random units of every group of a kind (in `layers`)."""
    chooser = random.Random(0)
    groups = []
    for group in discovery.groups:
        if group.kind == kind and (group.layer is None or group.layer in layers):
            kept = group.units * 3 // 4
            keep = tuple(sorted(chooser.sample(range(group.units), kept)))
            groups.append(PlannedGroup(group.name, group.kind, group.layer, group.units, kept, keep))
    made = Plan(discovery.model, CutOptions(ratio=0.25, of="units"), tuple(groups), {}, {})
    try:
        settings = stock_settings(model.config, discovery, made.sizes, trust_remote_code=True)
    except PlanError as error:
        return replace(made, refusal=str(error))
    return replace(made, settings=settings)


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=IDS % model.config.vocab_size, use_cache=False).logits
    return found


class TestUntrusted:
    """Each way in says, in one line, which model it is and what would let it in; and none of its code has run."""

    CALLS: tuple[Callable[[str], Any], ...] = (
        load_config,
        lambda model: load(model, device="cpu"),
        load_tokenizer,
        discover,
        plan_model,
        lambda model: prune_model(model, f"{model}-out"),
    )
    COMMANDS = ("discover MODEL", "plan MODEL", "prune MODEL OUT", "evaluate MODEL", "profile MODEL")

    @pytest.mark.parametrize("call", range(len(CALLS)))
    def test_a_call_is_refused(self, call: int, tmp_path: Path) -> None:
        model = write_custom(tmp_path / "glm")
        with pytest.raises(
            ModelError, match=rf"^'{re.escape(str(model))}': .*custom code.*--trust-remote-code"
        ) as told:
            self.CALLS[call](str(model))
        assert "\n" not in str(told.value)
        assert [path.name for path in tmp_path.iterdir()] == ["glm"]

    @pytest.mark.parametrize("command", COMMANDS)
    def test_a_command_is_refused(self, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        model = write_custom(tmp_path / "glm")
        words = {"MODEL": str(model), "OUT": str(tmp_path / "out")}
        assert run([words.get(word, word) for word in command.split()]) == 2
        shown = capsys.readouterr()
        assert shown.out == ""
        assert re.fullmatch(
            rf"secateur: error: '{re.escape(str(model))}': [^\n]*custom code[^\n]*--trust-remote-code[^\n]*\n",
            shown.err,
        )
        assert [path.name for path in tmp_path.iterdir()] == ["glm"]

    def test_a_config_that_was_trusted_builds_no_model_unless_told_so(self, tmp_path: Path) -> None:
        trusted = load_config(str(write_custom(tmp_path / "glm")), trust_remote_code=True)
        for call in (skeleton, discover):
            with pytest.raises(ModelError, match=r"glm': .*custom code.*--trust-remote-code"):
                call(trusted)


class TestStartTokens:
    """What its code looks for in every row is found, and goes with whatever reads rows."""

    def test_the_tokenizer_says_them(self, discovery: Discovery) -> None:
        assert discovery.start_tokens == (MASK, BEGIN)
        assert discovery.to_json()["start_tokens"] == [MASK, BEGIN]

    def test_without_a_tokenizer_those_of_the_config_that_it_needs(self, folder: Path) -> None:
        found = discover(str(folder / "config.json"), trust_remote_code=True)
        assert found.start_tokens == (302, BEGIN)  # it takes either mask, and no more tokens are kept than it needs

    def test_those_given_are_taken_as_they_are(self, folder: Path, discovery: Discovery) -> None:
        found = discover(str(folder), start_tokens=[7, BEGIN, MASK], trust_remote_code=True)
        assert replace(found, start_tokens=discovery.start_tokens) == discovery
        with pytest.raises(DiscoveryError, match=r"ValueError: 301 is not in list$"):
            discover(str(folder), start_tokens=[7], trust_remote_code=True)

    def test_code_that_takes_none_of_them_says_what_would_help(self, folder: Path, tmp_path: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config["bos_token_id"] = None
        for name in FILES:
            shutil.copy(folder / name, tmp_path / name)
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(DiscoveryError, match=r"None is not in list\. If its code looks for .*: --start-tokens 1,2"):
            discover(str(tmp_path), trust_remote_code=True)

    def test_the_command_line_takes_and_shows_them(
        self, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        command = ["discover", str(folder), "--trust-remote-code"]
        assert run([*command, "--start-tokens", f"{MASK},{BEGIN},9"]) == 0
        assert f"Its code looks for tokens in every row, which therefore begins with {MASK}, {BEGIN}, 9\n" in (
            capsys.readouterr().out
        )
        assert run([*command, "--start-tokens", "sop"]) == 2
        assert "--start-tokens sop: expected token ids with commas between them" in capsys.readouterr().err

    def test_the_model_writes_after_them(self, model: PreTrainedModel) -> None:
        options = CalibrationOptions("self", samples=2, length=4)
        assert generate_windows(model, options, start_tokens=(MASK, BEGIN)).shape == (2, 4)
        with pytest.raises(DataError, match=r"30[012] is not in list"):
            generate_windows(model, options)

    def test_samples_are_scored_apart_though_tokens_come_first(
        self, model: PreTrainedModel, discovery: Discovery
    ) -> None:
        windows = behind(torch.tensor([MASK, BEGIN]), IDS[:, :8])  # hidden states have four rows for each sample
        both, *each = [
            score(model, discovery=discovery, name="param_second", windows=part).units["layers.1.mlp"]
            for part in (windows, windows[:1], windows[1:])
        ]
        assert torch.allclose(both, torch.stack(each).mean(dim=0), rtol=1e-6)

    def test_layers_that_read_tokens_first_are_not_reconstructed(
        self, model: PreTrainedModel, discovery: Discovery
    ) -> None:
        pruned = prune(model, planned(model, discovery, "mlp"))
        windows = behind(torch.tensor([MASK, BEGIN]), IDS)
        with pytest.raises(PlanError, match=r"transformer\.layers\.0 reads hidden states with 9 rows, .* 2 windows\."):
            reconstruct_in_place(model, pruned, discovery, windows)


class TestTrusted:
    def test_the_mark_tells_that_code_has_run(self, folder: Path, model: PreTrainedModel) -> None:
        """Or the tests above could not fail."""
        assert mark_of(folder).exists()
        assert runs_remote_code(model)
        assert not runs_remote_code(model.get_submodule("lm_head"))

    def test_every_group_is_found(self, discovery: Discovery) -> None:
        units = {group.name: (group.kind, group.units) for group in discovery.groups if group.kind != "head_dim"}
        layers = [
            {f"layers.{i}.attention": ("attention", HEADS), f"layers.{i}.mlp": ("mlp", INNER)} for i in range(LAYERS)
        ]
        assert units == {**layers[0], **layers[1], **layers[2], "hidden": ("hidden", HIDDEN)}
        frozen = {(each.weight, each.dim): each.reason for each in discovery.frozen}
        why = "the code computes with the numbers of its positions"  # it looks for tokens by number
        assert frozen == {("transformer.word_embeddings.weight", 0): why, ("lm_head.weight", 0): why}

    def test_layers_that_do_not_add_to_their_input_are_counted_and_not_dropped(self, discovery: Discovery) -> None:
        """A layer carries its norm on, not its input: without it, the rest would get something else."""
        assert "layers" not in discovery.names
        assert discovery.depth == LAYERS
        chosen = plan(discovery, CutOptions(ratio=0.3, of="units", layers=(1, 3)))
        assert {group.layer for group in chosen.groups} == {1, 2}
        with pytest.raises(PlanError, match="has no group of that kind"):
            plan(discovery, CutOptions(ratio=0.3, of="units", axes=("layers",)))

    @pytest.mark.parametrize(
        ("kind", "layers"),
        [("attention", LAYERS), ("mlp", LAYERS), ("hidden", LAYERS), ("attention", 1), ("mlp", 1)],
    )
    def test_cut_equals_mask(self, model: PreTrainedModel, discovery: Discovery, kind: str, layers: int) -> None:
        made = planned(model, discovery, kind, layers=range(layers))
        assert (made.settings is not None) == (layers == LAYERS)
        pruned = prune(model, made)
        reference = masked(model, made, discovery)
        with_constants_of(pruned, reference)
        with StatisticsOverKept(HIDDEN, made.groups[0].keep or ()) if kind == "hidden" else nullcontext():
            expected = logits(reference)
        assert (logits(pruned) - expected).abs().max() < TOLERANCE
        assert (expected - logits(model)).abs().max() > 1e-2  # the mask does something

    def test_the_settings_are_the_models_own(self, model: PreTrainedModel, discovery: Discovery) -> None:
        found = {kind: planned(model, discovery, kind).settings for kind in ("attention", "mlp", "hidden")}
        assert found == {
            "attention": {"num_attention_heads": 4, "attention_head_size": 8},
            "mlp": {"inner_hidden_size": 63},
            "hidden": {"hidden_size": 36, "attention_head_size": 8},
        }

    def test_a_width_that_its_config_refuses(self, model: PreTrainedModel, discovery: Discovery) -> None:
        options = CutOptions(ratio=0.3, of="units", axes=("hidden",))
        refusal = plan(discovery, options, config=model.config, trust_remote_code=True).refusal or ""
        assert "the config refuses: hidden_size=34: hidden_size=34 is not a multiple of 4. The nearest" in refusal
        assert "widths that it accepts are 32 and 36" in refusal

    def test_the_settings_are_searched_on_one_layer(self, model: PreTrainedModel, discovery: Discovery) -> None:
        widths = PrunedSizes({group.name: group.units - 1 for group in discovery.groups if group.kind == "mlp"})
        assert _shallow(model.config, discovery, widths, trust_remote_code=True).num_layers == 1

    @pytest.mark.slow
    def test_a_saved_folder_needs_neither_us_nor_the_original(self, tmp_path: Path) -> None:
        original = write_custom(tmp_path / "glm")
        dense = load(str(original), device="cpu", trust_remote_code=True)
        discovery = discover(dense)
        options = CutOptions(ratio=0.3, scope="local", shape="uniform")
        scores = score(dense, discovery=discovery, name="l2")
        decided = plan(discovery, options, config=dense.config, scores=scores, trust_remote_code=True)
        pruned = prune(dense, decided)
        tokenizer = load_tokenizer(str(original), trust_remote_code=True)
        out = save(pruned, tmp_path / "out", plan=decided, tokenizer=tokenizer)
        shutil.rmtree(original)
        assert {*FILES} < {path.name for path in out.iterdir()}
        assert json.loads((out / "config.json").read_text())["auto_map"] == AUTO_MAP
        found = as_a_stranger(out, tmp_path)
        with torch.no_grad():
            assert (pruned(found["ids"]).logits - found["logits"]).abs().max() < 1e-6
        tokens = pruned.generate(found["ids"], max_new_tokens=6, min_new_tokens=6, do_sample=False)  # type: ignore[operator]
        assert torch.equal(tokens, found["tokens"])

    def test_the_command_line_from_end_to_end(
        self, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out, text, planned = tmp_path / "out", tmp_path / "text.txt", tmp_path / "plan.json"
        text.write_text("the cat sat on the mat and the dog sat on the log\n" * 20)
        how = ["--trust-remote-code", "--quiet"]
        few: list[str | Path] = ["--samples", "2", "--length", "16", "--calibration", text]

        def command(*words: str | Path) -> None:
            assert run([*map(str, words), *how]) == 0, capsys.readouterr().err

        command("discover", folder, "--json", tmp_path / "discovery.json")
        command("plan", folder, "--out", planned, "--ratio", "0.3", "--device", "cpu", *few)
        command("prune", folder, out, "--plan", planned)
        config = json.loads((out / "config.json").read_text())
        assert config["num_attention_heads"] < HEADS
        assert config["inner_hidden_size"] < INNER

        def perplexities(*words: str | Path) -> list[float]:
            result = tmp_path / "evaluation.json"
            command("evaluate", *words, "--ppl", f"cat={text}", "--json", result)
            return [row["perplexity"][0]["ppl"] for row in json.loads(result.read_text())["results"]]

        dense, cut_in_memory = perplexities(folder, "--plan", planned)
        assert perplexities(out) == [pytest.approx(cut_in_memory)]
        assert dense != pytest.approx(cut_in_memory)
        command("profile", folder, out, "--seq-len", "8", "--new-tokens", "2")
        command("prune", out, tmp_path / "again", "--ratio", "0.2", *few)


def test_custom_code_for_a_model_type_that_transformers_knows(tmp_path: Path) -> None:
    """Without trust it is the model that transformers has; with trust its own code runs, in every copy of it."""
    original = write_tiny(tmp_path / "tiny")
    (original / "own_model.py").write_text(
        "from transformers import LlamaForCausalLM\nfrom .own_scale import SCALE\n"
        "class OwnModel(LlamaForCausalLM):\n"
        "    def forward(self, *args, **others):\n"
        "        outputs = super().forward(*args, **others)\n"
        "        outputs.logits = outputs.logits * SCALE\n"
        "        return outputs\n"
    )
    (original / "own_scale.py").write_text("SCALE = 3\n")
    settings = json.loads((original / "config.json").read_text())
    (original / "config.json").write_text(
        json.dumps({**settings, "auto_map": {"AutoModelForCausalLM": "own_model.OwnModel"}})
    )
    known, own = (load(str(original), device="cpu", trust_remote_code=trust) for trust in (False, True))
    assert (runs_remote_code(known), runs_remote_code(own)) == (False, True)
    assert torch.equal(logits(own), 3 * logits(known))
    assert discover(own).model == "OwnModel"
    done = prune_model(
        recipe(str(original), cut={"ratio": 0.3, "score": "l2", "repair": "none"}, loading=TRUSTED), tmp_path / "out"
    )
    pruned = prune(own, done.plan)
    assert discover(pruned).model == "OwnModel"
    assert {"own_model.py", "own_scale.py"} < {path.name for path in done.out.iterdir()}
    shutil.rmtree(original)
    again = load(str(done.out), device="cpu", trust_remote_code=True)
    assert torch.equal(logits(again), logits(pruned))
    assert torch.equal(logits(again), 3 * logits(load(str(done.out), device="cpu")))


def as_a_stranger(folder: Path, tmp_path: Path) -> dict[str, torch.Tensor]:
    """The logits and tokens that transformers alone gets from a folder, in a process of its own."""
    found = tmp_path / "found.pt"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, str(folder), str(found)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    tensors: dict[str, torch.Tensor] = torch.load(found)
    return tensors
