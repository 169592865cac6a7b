"""Layers of different sizes: a folder that transformers reads with the file of code in it, and we without running it.

A process in which nothing of ours can be imported (`stranger`) reads the folders; what it finds is compared with the
models in memory.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel

from contract import uneven
from every_type import tiny_type_model
from families import family_config, family_model
from launching import launch
from secateur import CutOptions, discover, plan, profile, prune, save, score
from secateur.checkpoint.formats import check_saveable
from secateur.checkpoint.per_layer import as_per_layer, differences, is_per_layer
from secateur.cli.main import run
from secateur.errors import CheckpointError, ModelError, PlanError
from secateur.evaluation.options import ProfileOptions
from secateur.models.config import load_config, register
from secateur.models.loading import load, skeleton
from secateur.models.manifest import MANIFEST_FILE
from secateur.models.modeling_per_layer import PER_LAYER, apply_in_place, per_layer_class
from secateur.models.silence import quiet
from secateur.models.tokenizer import load_tokenizer
from secateur.models.trust import runs_remote_code
from secateur.planning.plan import Plan, PlannedGroup
from stranger import NEW_TOKENS, stranger
from tiny import names, tiny_model, tiny_tokenizer, write_tiny

MLP, HEADS, BOTH = ("mlp", "expert_mlp", "shared_mlp"), ("attention",), ("attention", "mlp", "expert_mlp")
IDS = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
ANYBODYS = shutil.ignore_patterns(MANIFEST_FILE)  # a copy in which nothing is compared with what was written
CODE = Path(str(sys.modules[per_layer_class.__module__].__file__))


def _family(family: str) -> PreTrainedModel:
    return family_model(family_config(family))


def tolerance(name: str) -> float:
    """Between a model in memory and as loaded: what a cast left in rotary tables and scales, or the order of sums."""
    return 0.5 if name == "bfloat16" else 1e-4 if name.startswith("gemma") else 1e-9


CASES: dict[str, tuple[Callable[[], PreTrainedModel], tuple[str, ...]]] = {  # (`test_every_folder` has all types)
    "llama-both": (partial(_family, "llama"), BOTH),
    "llama-query": (partial(_family, "llama"), ("query",)),
    "llama-values": (partial(_family, "llama"), ("attention", "head_dim")),  # narrower than keys: padded
    "gpt2-head_dim": (partial(_family, "gpt2"), ("head_dim",)),  # Conv1D, biases
    "gemma-both": (partial(_family, "gemma"), BOTH),  # tied, and embeddings scaled by a buffer
    "phi3-both": (partial(_family, "phi3"), BOTH),  # fused projections
    "exaone-both": (lambda: tiny_type_model("exaone"), BOTH),  # another family's model class takes its config
    "falcon_h1-mlp": (lambda: tiny_type_model("falcon_h1"), MLP),  # computes a buffer of layers in the module around
    "mixtral-expert": (lambda: tiny_type_model("mixtral"), ("expert",)),
    "bfloat16": (lambda: family_model(family_config("llama", tie_word_embeddings=True), dtype=torch.bfloat16), BOTH),
}


@dataclass(frozen=True)
class Written:
    """A pruned model in memory, its plan and where it lies."""

    model: PreTrainedModel
    plan: Plan
    folder: Path


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Written]:
    parent = tmp_path_factory.mktemp("free")
    found = {}
    for name, (make, kinds) in CASES.items():
        with quiet():
            dense = make()
        decided = uneven(dense, kinds)
        pruned = prune(dense, decided)
        pruned.set_attn_implementation("eager")
        found[name] = Written(pruned, decided, save(pruned, parent / name, plan=decided, tokenizer=tiny_tokenizer()))
    return found


@torch.no_grad()
def logits_of(model: PreTrainedModel, input_ids: Tensor = IDS, **options: Any) -> Tensor:
    logits: Tensor = model(input_ids, **options).logits
    return logits.clone()


@pytest.mark.parametrize("name", CASES)
class TestFolder:
    def test_a_stranger_reads_generates_and_trains_the_same_model(self, written: dict[str, Written], name: str) -> None:
        model = written[name].model
        seen = stranger().use(written[name].folder, IDS, thorough=True)
        assert seen.logits.dtype == model.dtype
        torch.testing.assert_close(seen.logits, logits_of(model), atol=tolerance(name), rtol=0)
        ids, end = IDS[:1], model.generation_config.eos_token_id
        for _ in range(NEW_TOKENS):
            logits = logits_of(model, input_ids=ids, use_cache=False)[:, -1]
            logits[:, [] if end is None else end] = -torch.inf
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
        assert name == "bfloat16" or torch.equal(seen.tokens, ids[:, IDS.shape[1] :])  # rounding may turn a tie

    def test_we_read_the_same_without_running_it(self, written: dict[str, Written], name: str) -> None:
        before = set(sys.modules)
        loaded = load(str(written[name].folder), device="cpu")
        assert not any(module.startswith("transformers_modules") for module in set(sys.modules) - before)
        assert type(loaded).__module__ == per_layer_class.__module__
        assert not runs_remote_code(loaded)
        loaded.set_attn_implementation("eager")
        if getattr(loaded.config, "_experts_implementation", None) == "grouped_mm":  # chosen or not by what ran before
            loaded.set_experts_implementation("eager")  # the other knows no float64
        torch.testing.assert_close(logits_of(loaded), logits_of(written[name].model), atol=tolerance(name), rtol=0)
        state = loaded.state_dict()
        for key, value in written[name].model.state_dict().items():
            assert torch.equal(state[key], value), key

    def test_discovery_finds_what_was_left(self, written: dict[str, Written], name: str) -> None:
        found = discover(str(written[name].folder))
        for group in written[name].plan.groups:
            if group.kept > 1:  # a single unit is none
                assert found.group(group.name).units == group.kept

    def test_files(self, written: dict[str, Written], name: str) -> None:
        folder = written[name].folder
        assert (folder / CODE.name).read_bytes() == CODE.read_bytes()
        config = json.loads((folder / "config.json").read_text())
        stock: Any = type(written[name].model)
        settings = type(written[name].model.config)
        assert config["model_type"] == f"{PER_LAYER}_{settings.model_type}"
        own = "" if settings is stock.config_class else f"Of{settings.__name__}"
        assert config["auto_map"]["AutoModelForCausalLM"] == f"{CODE.stem}.PerLayer{stock.__name__}{own}"
        assert ("AutoModel" in config["auto_map"]) == (name != "mixtral-expert")
        assert config[PER_LAYER]["architecture"] == stock.__name__
        shapes = config[PER_LAYER]["shapes"]
        tensors = {**dict(written[name].model.named_parameters()), **dict(written[name].model.named_buffers())}
        assert all(list(tensors[key].shape) == shape for key, shape in shapes.items())
        assert sum(len(attributes) for attributes in config[PER_LAYER]["attributes"].values()) > 0


class TestModel:
    """One folder for all that can be done with it; copied where it is changed."""

    @pytest.fixture
    def folder(self, written: dict[str, Written], tmp_path: Path) -> Path:
        shutil.copytree(written["llama-both"].folder, tmp_path / "free", ignore=ANYBODYS)
        return tmp_path / "free"

    def test_the_files_code_is_never_run(self, folder: Path) -> None:
        (folder / CODE.name).write_text("raise SystemExit('run')")
        for trust in (False, True):
            load(str(folder), device="cpu", trust_remote_code=trust)
            assert load_config(str(folder), trust_remote_code=trust).model_type == f"{PER_LAYER}_llama"
            assert discover(str(folder), trust_remote_code=trust).depth == 3
        load_tokenizer(str(folder))

    def test_it_is_measured_as_it_is(self, folder: Path) -> None:
        loaded = load(str(folder), device="cpu")
        (row,) = profile({"free": loaded}, ProfileOptions(seq_lens=(4,), new_tokens=1))
        assert row.parameters == sum(parameter.numel() for parameter in loaded.parameters())

    def test_cut_again(self, folder: Path, tmp_path: Path) -> None:
        once = load(str(folder), device="cpu")
        decided = uneven(once, BOTH)
        twice = prune(once, decided)
        reloaded = load(str(save(twice, tmp_path / "twice", plan=decided)), device="cpu")
        torch.testing.assert_close(logits_of(reloaded), logits_of(twice), atol=1e-9, rtol=0)
        assert reloaded.get_parameter("model.layers.2.mlp.up_proj.weight").shape == (84 - 17 - 17, 48)
        assert type(reloaded) is type(once)
        # a width for all layers that no setting can say any more
        scores = score(once, name="l2")
        options = CutOptions(ratio=0.2, of="units", axes=("mlp",), score="l2")
        same = plan(discover(once), options, config=once.config, scores=scores)
        assert same.settings is None
        save(prune(once, same), tmp_path / "again", plan=same)

    def test_layers_cannot_leave_it(self, folder: Path) -> None:
        once = load(str(folder), device="cpu")
        options = CutOptions(ratio=0.4, of="units", axes=("layers",), score="l2")
        decided = plan(discover(once), options, config=once.config, scores=score(once, name="l2"))
        with pytest.raises(CheckpointError, match=r"no folder can hold what the plan leaves: .*Drop other layers"):
            check_saveable(decided)

    def test_a_random_one(self, folder: Path) -> None:
        config = load_config(str(folder))
        made = type(load(str(folder), device="cpu"))._from_config(config)
        assert {name: tensor.shape for name, tensor in made.named_parameters()} == {
            name: tensor.shape for name, tensor in skeleton(config).named_parameters()
        }
        assert all(0 < weight.std() < 1 for weight in made.parameters() if weight.dim() == 2)

    def test_what_is_missing_is_refused(self, folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        del weights["model.layers.1.mlp.up_proj.weight"]
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(ModelError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight"):
            load(str(folder), device="cpu")


def test_a_uniform_plan_without_a_config(tmp_path: Path) -> None:
    dense = tiny_model()
    decided = plan(discover(dense), CutOptions(ratio=0.3, of="units", axes=("mlp",)), scores=score(dense, name="l2"))
    assert decided.settings is None
    pruned = prune(dense, decided)
    loaded = load(str(save(pruned, tmp_path / "out", plan=decided)), device="cpu")
    torch.testing.assert_close(logits_of(loaded), logits_of(pruned), atol=1e-5, rtol=0)


def test_what_is_computed_otherwise_is_refused(tmp_path: Path) -> None:
    """The scale of embeddings is computed when a model is loaded, from a width that the one in memory has not."""
    dense = family_model(family_config("gemma"))
    keep = tuple(range(41))
    decided = Plan(
        "m",
        CutOptions(ratio=0.1, scope="local", shape="uniform"),
        (PlannedGroup("hidden", "hidden", None, 48, 41, keep),),
        {},
        {},
    )
    pruned = prune(dense, decided)
    scale: Any = pruned.get_input_embeddings()
    scale.embed_scale.fill_(1.0)
    with pytest.raises(CheckpointError, match=r"model\.embed_tokens\.embed_scale is computed when it is loaded"):
        save(pruned, tmp_path / "out", plan=decided)
    assert names(tmp_path) == []


def test_what_no_config_can_say_is_refused() -> None:
    class Own(type(tiny_model())):  # type: ignore[misc]
        """Code of one's own."""

    with pytest.raises(CheckpointError, match="Own with a LlamaConfig is no class of transformers' own"):
        as_per_layer(Own(tiny_model().config))
    other = tiny_model()
    other.lm_head.extra = nn.Parameter(torch.zeros(2))
    with pytest.raises(CheckpointError, match=r"describes one with other weights \(lm_head\.extra\)"):
        as_per_layer(other)


def test_nothing_differs_from_itself() -> None:
    model = tiny_model()
    assert differences(model, model) == {"shapes": {}}
    assert not is_per_layer(model)
    assert as_per_layer(model).config.secateur_per_layer == {
        "model_type": "llama",
        "architecture": "LlamaForCausalLM",
        "shapes": {},
    }


def test_classes_are_made_on_demand() -> None:
    module = sys.modules[per_layer_class.__module__]
    made = module.PerLayerOPTForCausalLM
    assert made is module.PerLayerOPTForCausalLM is per_layer_class(transformers.OPTForCausalLM)
    for name in ("PerLayerNothing", "PerLayerAutoConfig", "PerLayerAutoTokenizer", "OPTForCausalLM", "PerLayer"):
        with pytest.raises(AttributeError, match=f"has no attribute '{name}'"):
            getattr(module, name)


def test_commands_write_read_and_cut_such_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiny(tmp_path / "tiny")
    (tmp_path / "text.txt").write_text("the cat sat on the mat and the dog sat on the log\n" * 40)
    monkeypatch.chdir(tmp_path)
    cut = ["--score", "l2", "--layers", "1:3", "--of", "units", "--ratio", "0.4", "--repair", "none"]
    assert run(["prune", "tiny", "out", *cut]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert "no stock folder, but one with a file of code" in " ".join(shown.out.split())
    assert run(["evaluate", "tiny", "out", "--ppl", "cats=text.txt", "--json", "e.json"]) == 0
    perplexity = json.loads(Path("e.json").read_text())["results"][-1]["perplexity"][0]
    assert 1 < perplexity["ppl"] < 1000
    assert run(["prune", "out", "again", *cut]) == 0
    assert load("again", device="cpu").get_parameter("model.layers.2.mlp.up_proj.weight").shape == (30, 48)
    capsys.readouterr()
    assert run(["prune", "out", "fewer", "--score", "l2", "--axes", "layers", "--ratio", "0.4"]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("secateur: error: no folder can hold what the plan leaves")
    assert shown.err.count("\n") == 1


LAYER = "model.layers.1.mlp.up_proj"
HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "absurd shape": (lambda free: free["shapes"].update({f"{LAYER}.weight": [10**12, 48]}), "cannot be .10000000"),
    "empty shape": (lambda free: free["shapes"].update({f"{LAYER}.weight": [0, 48]}), r"cannot be \[0, 48\]"),
    "negative shape": (lambda free: free["shapes"].update({f"{LAYER}.weight": [-1, 48]}), r"cannot be \[-1, 48\]"),
    "shape of text": (lambda free: free["shapes"].update({f"{LAYER}.weight": "ab"}), "cannot be 'ab'"),
    "shape of truth": (lambda free: free["shapes"].update({f"{LAYER}.weight": [True, 48]}), "cannot be .True, 48"),
    "other dimensions": (lambda free: free["shapes"].update({f"{LAYER}.weight": [9]}), "the dense model has .84, 48"),
    "other weights": (lambda free: free["shapes"].update({f"{LAYER}.weight": [9, 48]}), "another shape for model"),
    "unknown weight": (lambda free: free["shapes"].update({"model.nothing": [3]}), "has no 'model.nothing'"),
    "a module": (lambda free: free["shapes"].update({LAYER: [3]}), f"has no '{LAYER}'"),
    "shapes in a list": (lambda free: free.update(shapes=[1]), "shapes: expected a mapping from names"),
    "unknown module": (lambda free: free["attributes"].update({"model.no": {"x": 1}}), "has no module 'model.no'"),
    "dunder module": (lambda free: free["attributes"].update({"__class__": {"x": 1}}), "has no module '__class__'"),
    "dunder": (lambda free: free["attributes"].update({LAYER: {"__class__": 1}}), "has no size '__class__'"),
    "private": (lambda free: free["attributes"].update({LAYER: {"_parameters": 1}}), "has no size '_parameters'"),
    "method": (lambda free: free["attributes"].update({LAYER: {"forward": 1}}), "has no size 'forward'"),
    "new attribute": (lambda free: free["attributes"].update({LAYER: {"evil": 1}}), "has no size 'evil'"),
    "a truth": (lambda free: free["attributes"].update({LAYER: {"training": True}}), "has no size 'training'"),
    "text": (lambda free: free["attributes"].update({LAYER: {"in_features": "48"}}), "could be '48', it is 48"),
    "no attributes": (lambda free: free["attributes"].update({LAYER: 3}), "expected a mapping from names, found 3"),
    "no config": (lambda free: free.update(configs={LAYER: {"x": 1}}), "keeps no config"),
    "config dunder": (lambda free: free.update(configs={"model": {"__dict__": {}}}), "no setting '__dict__'"),
    "config method": (lambda free: free.update(configs={"model": {"to_dict": 1}}), "no setting 'to_dict'"),
    "config path": (lambda free: free.update(configs={"model": {"to_dict.x": 1}}), "no setting 'to_dict.x'"),
    "config type": (lambda free: free.update(configs={"model": {"hidden_size": "x"}}), "no setting 'hidden_size'"),
    "padded widely": (lambda free: free.update(padded={LAYER: {"outputs": [[1, 1, 10**9]]}}), "dense .* has no"),
    "padded beyond": (lambda free: free.update(padded={LAYER: {"outputs": [[2, 9, 8]]}}), "dense .* has no"),
    "padded with text": (lambda free: free.update(padded={LAYER: {"inputs": "abc"}}), "dense .* has no 'abc'"),
    "padded with nothing": (lambda free: free.update(padded={LAYER: {"inputs": []}}), r"dense .* has no \[\]"),
    "padded elsewhere": (lambda free: free.update(padded={LAYER: {"forward": [[1, 1, 2]]}}), "cannot have 'forward'"),
    "padded nowhere": (lambda free: free.update(padded={"model.no": {}}), "has no module 'model.no'"),
    "padded container": (lambda free: free.update(padded={"model": {"inputs": [[1, 1, 2]]}}), "dense model has no"),
    "architecture": (lambda free: free.update(architecture="GPT2LMHeadModel"), "is no model class of transformers"),
    "auto class": (lambda free: free.update(architecture="AutoModel"), "is no model class of transformers"),
    "no architecture": (lambda free: free.pop("architecture"), "architecture: None is no model class"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_folder_is_refused(name: str, written: dict[str, Written], tmp_path: Path) -> None:
    change, match = HOSTILE[name]
    shutil.copytree(written["llama-both"].folder, tmp_path / "free", ignore=ANYBODYS)
    config = json.loads((tmp_path / "free" / "config.json").read_text())
    change(config[PER_LAYER])
    (tmp_path / "free" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=match) as caught:
        load(str(tmp_path / "free"), device="cpu")
    assert "\n" not in str(caught.value)
    if name != "other weights":  # which the config alone cannot tell
        with pytest.raises(ModelError, match=match):
            discover(str(tmp_path / "free"))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({PER_LAYER: [1]}, "architecture: None is no model class"),
        ({PER_LAYER: None}, "architecture: None is no model class"),
        ({"model_type": f"{PER_LAYER}_unheard"}, "of the model type 'unheard', which transformers does not know"),
        ({"model_type": f"{PER_LAYER}_opt"}, "'LlamaForCausalLM' is no model class of transformers for it"),
        ({"num_hidden_layers": 2}, r"keys must be integer layer indices in the range \[0, 2\)"),
        ({"intermediate_size": 70}, r"cannot be \[48, 77\], the dense model has \[48, 70\]"),
    ],
)
def test_a_damaged_config_is_refused(
    change: dict[str, Any], match: str, written: dict[str, Written], tmp_path: Path
) -> None:
    shutil.copytree(written["llama-both"].folder, tmp_path / "free", ignore=ANYBODYS)
    config = json.loads((tmp_path / "free" / "config.json").read_text())
    (tmp_path / "free" / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ModelError, match=match):
        load(str(tmp_path / "free"), device="cpu")


def test_parameters_that_are_one_stay_one() -> None:
    pair = nn.ModuleList([nn.Linear(3, 2, bias=False), nn.Linear(3, 2, bias=False)])
    pair[1].weight = pair[0].weight
    apply_in_place(pair, {"shapes": {"0.weight": [1, 3]}})
    assert pair[1].weight is pair[0].weight
    assert pair[1].weight.shape == (1, 3)


REGISTERED = """
import sys
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from secateur.models.config import register

register(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], attn_implementation="eager")
assert type(model).__module__ == "secateur.models.modeling_per_layer", type(model)
assert type(AutoConfig.from_pretrained(sys.argv[1])) is type(model.config)
assert not any(name.startswith("transformers_modules") for name in sys.modules)
ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
base = AutoModel.from_pretrained(sys.argv[1], attn_implementation="eager")
with torch.no_grad():
    torch.testing.assert_close(base(ids).last_hidden_state, model.base_model(ids).last_hidden_state)
    save_file({"logits": model(ids).logits.contiguous()}, sys.argv[2])
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["exaone-both"])
def test_registered_the_auto_classes_need_no_flag(written: dict[str, Written], name: str, tmp_path: Path) -> None:
    script = tmp_path / "registered.py"
    script.write_text(REGISTERED)
    done = launch(str(script), str(written[name].folder), str(tmp_path / "logits.safetensors"), processes=1)
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "logits.safetensors")["logits"]
    torch.testing.assert_close(found, logits_of(written[name].model), atol=tolerance(name), rtol=0)


def test_what_needs_no_registering_is_told(tmp_path: Path) -> None:
    write_tiny(tmp_path / "stock")
    with pytest.raises(ModelError, match=r"has a stock config: from_pretrained reads it as it is"):
        register(str(tmp_path / "stock"))


def test_a_folder_needs_the_flag_elsewhere(written: dict[str, Written], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CONFIG_MAPPING, "_extra_content", {})  # our plug-in for vLLM may be tested in this process, too
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        AutoModelForCausalLM.from_pretrained(written["llama-both"].folder, trust_remote_code=False)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        AutoConfig.from_pretrained(written["llama-both"].folder, trust_remote_code=False)


def test_plans_of_another_model(written: dict[str, Written]) -> None:
    dense = tiny_model()
    with pytest.raises(PlanError, match=r"it is of another model|the model has"):
        prune(dense, written["mixtral-expert"].plan)
