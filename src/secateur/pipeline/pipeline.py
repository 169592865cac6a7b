"""The pipeline: one model on its way through the stages, from discovery to the folder.

Every command that cuts walks along it: `plan` stops after stage 6, `prune` goes on to the end, and `sweep` comes back
with other options. A stage that an earlier run has finished is read from the cache. Started as several processes (by
`accelerate launch`), all score, each its share of the windows, and the first prunes.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from secateur import processes
from secateur.checkpoint.formats import check_saveable
from secateur.checkpoint.record import make_record
from secateur.checkpoint.save import save_updated
from secateur.checkpoint.tensor_accounting import account_for_tensors
from secateur.data.calibration import recorded_options
from secateur.data.generated import generate_windows
from secateur.data.pairs import holds_pairs
from secateur.data.windows import digest, scored, unscored
from secateur.discovery.counting import count_parameters
from secateur.discovery.discover import discover
from secateur.discovery.groups import Discovery, Group
from secateur.errors import DataError, PlanError
from secateur.evaluation.latency import latency_table
from secateur.evaluation.memory import weight_bytes
from secateur.files import PLAN_FILE
from secateur.models.classes import config_of
from secateur.models.config import is_custom, load_config
from secateur.models.loading import load, unplaced_in
from secateur.models.precision import half_products, matmul_precision
from secateur.models.streaming import check_in_place
from secateur.models.tensors import check_finite
from secateur.models.tokenizer import load_tokenizer, text_files
from secateur.models.trust import runs_remote_code
from secateur.pipeline.cache import Cache, Iteration, StatisticsFolder
from secateur.pipeline.options import RunOptions
from secateur.pipeline.reader import WindowReader
from secateur.pipeline.recipe import PruneRecipe, write_recipe
from secateur.planning.iterations import as_of_dense, composed, options_of_iteration, sizes_after_iteration
from secateur.planning.latency import LatencyTable
from secateur.planning.options import TOKENS, CutOptions, settled, with_repair
from secateur.planning.plan import Plan, check_score, plan, settings_of
from secateur.planning.selection import columns_fitted, groups_to_cut
from secateur.progress import Clock, Progress
from secateur.pruning.closed_form import REPAIRS
from secateur.pruning.held_out import checked_reconstruction, checked_repair, repair_rejected
from secateur.pruning.prune import fitted_plan, prune
from secateur.pruning.repair import repair
from secateur.pruning.rotation import rotated
from secateur.scoring.measured import kept_factors, measured_factors, scaled, with_factors
from secateur.scoring.registry import SCORES
from secateur.scoring.scores import Scores, scores_from, statistics_for
from secateur.scoring.unit_scores import covers
from secateur.vocabulary.calibrated import rank_by_text
from secateur.vocabulary.lost_scripts import lost_scripts
from secateur.vocabulary.ranking import NATS, TokenRanking
from secateur.vocabulary.tokenizer import cut_tokenizer

logger = logging.getLogger(__name__)

CACHE_LAYERS_FROM = 2**30  # bytes of weights: of larger models each scored layer is kept, for a run that resumes
JUDGE_LAYERS = 32  # held-out windows, for trained layers: of 8 the loss is off by as much as these gain
HELD_OUT_LOSS = "held_out_loss"  # in what a plan was scored with
IN_MEMORY = 0.25  # of the free memory: a model that takes more is pruned into a file


@dataclass(frozen=True, slots=True)
class Position:
    """Where a pruning iteration starts: the model by then, and what the iteration is to cut."""

    number: int
    options: CutOptions
    discovery: Discovery
    fixed_sizes: Mapping[str, int] | None = None
    model: PreTrainedModel | None = None  # None: the dense model, which is loaded when a stage needs it

    @property
    def groups(self) -> list[Group]:
        """The groups that the options cut."""
        return [group for each in groups_to_cut(self.discovery, self.options).values() for group in each]


class Pipeline:
    """A model, its discovery, its calibration windows, the cache and the clock, and the stages between them.

    `given` is a plan that was made before: scoring and planning are left out. What the caller has already (the model,
    its tokenizer, its discovery, windows of int64 samples x length) is not loaded again. Raises `SecateurError` for
    what can be refused before weights are read.

    >>> from transformers import AutoConfig, AutoModelForCausalLM
    >>> config = AutoConfig.for_model("opt", hidden_size=12, num_attention_heads=2, ffn_dim=24, num_hidden_layers=1)
    >>> options = CutOptions(ratio=0.5, of="units", axes=("mlp",), score="l2", repair="none")
    >>> recipe = PruneRecipe("tiny", cut=options)
    >>> smaller, decided = Pipeline(recipe, model=AutoModelForCausalLM.from_config(config)).cut()
    >>> smaller.config.ffn_dim, [group.kept for group in decided.groups]
    (12, [12])
    """

    def __init__(
        self,
        recipe: PruneRecipe,
        *,
        given: Plan | None = None,
        model: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        discovery: Discovery | None = None,
        windows: Tensor | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.name, self.loading = recipe.model, recipe.loading
        self.clock, self.cache = clock or Clock(), Cache(None)
        self.trust = recipe.loading.trust_remote_code or (model is not None and runs_remote_code(model))
        self.statistics: StatisticsFolder | None = None
        self._model, self._tokenizer, self._windows = model, tokenizer, windows
        self._rotated: PreTrainedModel | None = None
        self._table: LatencyTable | None = None
        self._tokens: TokenRanking | None = None
        self.config: PreTrainedConfig = (
            config_of(model) if model is not None else load_config(self.name, trust_remote_code=self.trust)
        )
        options, calibration = recipe.cut, recipe.calibration
        if given is not None:
            calibration = recorded_options(given.scored) or calibration
        # 1. Discovery: which weight dimensions shrink together. Needs no weights.
        if discovery is None:
            with self.clock.stage("discover"):
                discovery = discover(
                    model if model is not None else self.name,
                    start_tokens=calibration.start_tokens,
                    trust_remote_code=self.trust,
                )
        self.discovery = discovery
        if given is not None:
            given = fitted_plan(given, discovery, self.config, trust_remote_code=self.trust)
            options = given.options
        else:
            if options.shape == "per-layer" and is_custom(self.config):  # only what its config can say
                options = replace(options, shape="uniform")
            check_score(options)
            if options.iterations > 1:
                options_of_iteration(options, discovery, 1)  # refuses budgets that cannot be cut in iterations
        columns, pairs = columns_fitted(self.discovery, options), any(map(holds_pairs, calibration.names))
        size = count_parameters(self.discovery, {}, embeddings=False)
        small = windows is None and not pairs and calibration.takes_more_time(size)
        self._settled_repair, options = options.repair == "auto", with_repair(options, small=small)
        self.given, self.options = given, options
        self.calibration = settled(calibration, options, columns=columns, parameters=size, pairs=pairs)
        self.reader = WindowReader(
            self.name,
            self.config,
            self.calibration,
            lambda: self.tokenizer,
            needed=self.discovery.start_tokens,
            trust_remote_code=self.trust,
        )
        if given is None and TOKENS in options.axes:
            self._rank_tokens()
        self.recipe = replace(recipe, cut=options, calibration=self.calibration)

    @property
    def model(self) -> PreTrainedModel:
        """2. The dense model, loaded when a stage first needs it."""
        if self._model is None:
            with self.clock.stage("load"):
                options = self.loading
                self._model = load(self.name, dtype=options.dtype, device=options.device, trust_remote_code=self.trust)
                check_finite(self._model)
        return self._model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.name, trust_remote_code=self.trust)
        return self._tokenizer

    def _rank_tokens(self) -> None:
        """How often the calibration text uses each token, before any weight is read; those that it needs stay."""
        group, *others = groups_to_cut(self.discovery, self.options)[TOKENS]
        if others:
            raise PlanError(
                f"axes=vocabulary: {self.discovery.model} has {1 + len(others)} vocabularies, and one tokenizer is "
                "rewritten. Cut other axes, for example axes=attention,mlp"
            )
        with self.clock.stage("count tokens"):
            self._tokens = rank_by_text(self.tokenizer, group.units, self.calibration, keep=self.options.keep_text)
        groups = [replace(each, least=self._tokens.least) if each == group else each for each in self.discovery.groups]
        self.discovery = replace(self.discovery, groups=tuple(groups))

    def windows(self) -> Tensor:
        """3. Calibration windows, int64 (samples, length): from the text, or written by the model itself."""
        if self._windows is None:
            self.reader.begin()
            self._windows = self.cache.load_windows() if self.calibration.generated else self.reader.windows()
        if self._windows is None:
            model = self.model
            with self.clock.stage("write") as progress:
                tokens = self.discovery.start_tokens
                written = generate_windows(model, self.calibration, start_tokens=tokens, progress=progress)
            self._windows = processes.from_first(written)
            self.cache.save_windows(self._windows)
        return self._windows

    def start(self) -> Position:
        """The first iteration: the dense model, and its share of the cut."""
        return self._position(1, self.discovery, None)

    def _position(self, number: int, discovery: Discovery, model: PreTrainedModel | None) -> Position:
        if self.given is not None or self.options.iterations == 1:
            return Position(number, self.options, discovery, None, model)
        options = options_of_iteration(self.options, self.discovery, number)
        return Position(number, options, discovery, sizes_after_iteration(self.options, self.discovery, number), model)

    def _next(self, number: int, smaller: PreTrainedModel) -> Position:
        """The iteration after one that has left this model."""
        return self._position(number + 1, discover(smaller, start_tokens=self.discovery.start_tokens), smaller)

    @property
    def rotates(self) -> bool:
        """Whether channels of values are cut, which are first rotated to their principal axes."""
        return "head_dim" in self.options.axes

    def _model_at(self, at: Position) -> PreTrainedModel:
        """The model that an iteration scores and cuts: the first one the dense model, its values rotated if need be."""
        if at.model is not None or not self.rotates:
            return at.model or self.model
        if self._rotated is None:
            model, windows = self.model, self.windows()
            with self.clock.stage("rotate") as progress, half_products(model):
                self._rotated = rotated(model, self.discovery, windows, progress=progress)
        return self._rotated

    @contextmanager
    def _stage(self, name: str, at: Position | None = None) -> Iterator[Progress | None]:
        """A stage that reads the model, with the fastest products of the machine unless float32 was asked for."""
        title = name if at is None or self.options.iterations == 1 else f"{name}, iteration {at.number}"
        exact, model = self.loading.dtype == "float32", self.model if at is None else self._model_at(at)
        with self.clock.stage(title) as progress, matmul_precision(exact=exact), half_products(model):
            yield progress

    def latency(self, at: Position) -> LatencyTable | None:
        """4. What sizes take on this machine, where the budget is of time."""
        if at.options.of == "latency" and self._table is None and self.given is None:
            model = self.model
            with self.clock.stage("measure") as progress:
                self._table = latency_table(model, at.discovery, at.groups, progress=progress)
        return self._table

    def scores(self, at: Position) -> Scores:
        """5. One score per unit: from the cache, from kept statistics, or from a pass over the model."""
        found = self.cache.load_scores(at.number)
        if found is not None:
            return found
        groups = [group for group in at.groups if group.kind != TOKENS]
        tokens = {} if self._tokens is None else {TOKENS: self._tokens.scores(NATS)}
        if not groups:
            return Scores(at.options.score, at.options.reduce, tokens)
        first = at.model is None and not self.rotates
        statistics = self.statistics.load() if self.statistics is not None and first else None
        if statistics is None or not covers(statistics, at.options.score, at.discovery, groups):
            windows = self.windows() if SCORES[at.options.score].needs != "weights" else None
            model = self._model_at(at)
            in_parts = processes.count() == 1 and weight_bytes(model) >= CACHE_LAYERS_FROM
            with self._stage("score", at) as progress:
                new = statistics_for(
                    at.options.score,
                    model,
                    at.discovery,
                    None if windows is None else self.reader.behind_needed(scored(windows, self.calibration)),
                    groups=groups,
                    layer_cache=self.cache.layers(at.number) if in_parts else None,
                    progress=progress,
                )
            statistics = new if statistics is None else statistics.joined(new)
            if self.statistics is not None and first:
                self.statistics.save(statistics)
        reduce = None if at.options.reduce == "auto" else at.options.reduce
        name, text = at.options.score, self.calibration
        found = scores_from(at.discovery, statistics, groups=groups, name=name, reduce=reduce, options=text)
        found = replace(found, units={**found.units, **tokens})
        if self.statistics is not None and first:
            self.statistics.save_scores(found)
        if at.options.prices == "measured":
            factors = kept_factors(statistics, found)
            if factors is None:
                unseen = self.reader.behind_needed(unscored(self.windows(), self.calibration))
                model = self._model_at(at)
                with self._stage("price", at) as progress:
                    factors = measured_factors(model, at.discovery, found, unseen, progress=progress)
                if self.statistics is not None and first:
                    self.statistics.save(with_factors(statistics, found, factors))
            found = scaled(found, factors)
        self.cache.save_scores(at.number, found)
        return found

    def sizes(self, at: Position) -> Plan:
        """What the cut leaves, before anything is scored: how many units, not which."""
        return self.given or self._planned(at)

    def check_folder(self, decided: Plan) -> None:
        """Raise `CheckpointError` or `PlanError` for sizes that no folder can hold."""
        check_saveable(decided, config=self.config, discovery=self.discovery, trust_remote_code=self.trust)

    def plan(self, at: Position) -> Plan:
        """6. Which units stay, by scores and budget."""
        return self.given or self._planned(at, self.scores(at))

    def _planned(self, at: Position, scores: Scores | None = None) -> Plan:
        found = plan(
            at.discovery,
            at.options,
            config=self.config if at.model is None else config_of(at.model),
            scores=scores,
            latency=self.latency(at),
            fixed_sizes=at.fixed_sizes,
            trust_remote_code=self.trust,
        )
        if found.kept_tokens is None or self._tokens is None:
            return found
        about = {
            "nats_per_token": NATS * self._tokens.growth(len(found.kept_tokens)),
            "lost_scripts": [asdict(lost) for lost in lost_scripts(self.tokenizer, found.kept_tokens)],
        }
        return replace(found, scored={**found.scored, TOKENS: about})

    @functools.cached_property
    def _held_out(self) -> Tensor | None:
        """Windows that no repair sees, of texts that are read here; None where they have no more."""
        if self.reader.start is None or self.calibration.generated:
            return None
        count, judging = self.calibration.held_out, JUDGE_LAYERS if self._trains_layers else 0
        if judging > count:
            with suppress(DataError):
                return self.reader.held_out(judging)
        try:
            return self.reader.held_out(count)
        except DataError as error:
            logger.warning("repair is not checked on held-out windows, for no text is left: %s", error)
            return None

    def repair(self, at: Position, decided: Plan, room: Path | None = None) -> tuple[Plan, Mapping[str, Tensor]]:
        """7. Weights that make up for what goes; the choice within groups may change, so the plan comes back, too."""
        if not at.options.repairs or repair_rejected(_losses(decided)):
            return decided, {}
        if decided.kept_tokens is not None:  # repair reads the text as the dense model does
            rest = decided.without_vocabulary()
            if not rest.groups:
                return decided, {}
            if rest.settings is not None:
                settings = settings_of(rest, self.config, at.discovery, trust_remote_code=self.trust)
                rest = replace(rest, settings=settings)
            repaired, weights = self.repair(at, rest, room)
            tokens = [group for group in decided.groups if group.kind == TOKENS]
            return replace(repaired, groups=(*repaired.groups, *tokens), settings=decided.settings), weights
        found = self.cache.load_repair(decided)
        if found is None:
            model, windows = self._model_at(at), self.windows()
            about = {"calibration": digest(windows), "calibration_options": self.calibration.to_json()}
            inputs = model, decided, at.discovery, self.reader.as_served(windows)
            with self._stage("repair", at) as progress:
                more = None if _losses(decided) else self._held_out  # else it was compared when it was made
                room = self._room(model, room)
                if more is None:
                    found = repair(*inputs, method=at.options.repair, room=room, progress=progress)
                else:
                    found, about[HELD_OUT_LOSS] = checked_repair(*inputs, more, room=room, progress=progress)
            found = replace(found, plan=replace(found.plan, scored={**found.plan.scored, **about}))
            self.cache.save_repair(decided, found)
        return found.plan, found.weights

    def prune(
        self, at: Position, decided: Plan, weights: Mapping[str, Tensor], room: Path | None = None
    ) -> PreTrainedModel:
        """8. The smaller model; one that is large beside the free memory is cut into a file in the folder `room`."""
        model = self._model_at(at)
        with self._stage("cut", at):
            return prune(model, decided, discovery=at.discovery, weights=weights, room=self._room(model, room))

    def _room(self, model: PreTrainedModel, room: Path | None) -> Path | None:
        """The folder for the smaller model, if it is large beside the free memory."""
        return room if weight_bytes(model) > IN_MEMORY * psutil.virtual_memory().available else None

    @property
    def iterations(self) -> int:
        """How often stages 4 to 8 run."""
        return 1 if self.given is not None else self.options.iterations

    def decide(self) -> Decision:
        """Everything up to the last plan; of several processes, all take part."""
        if self._trains_layers:
            self.windows()  # text that cannot be read is said before weights are read
            with self._least_squares_otherwise():
                check_in_place(self.model, "repair=reconstruct", "--repair least-squares")
        at, before = self._resumed()
        while at.number < self.iterations:
            smaller, before = self._step(at, self.plan(at), before)
            self.cache.save_iteration(self.options, Iteration(at.number, before, dict(smaller.named_parameters())))
            at = self._next(at.number, smaller)
        return Decision(at, self.plan(at), before)

    def apply(self, decision: Decision, *, room: Path | None = None) -> tuple[PreTrainedModel, Plan]:
        """Repair and prune as decided: the smaller model, and the plan of the dense model that leads to it."""
        smaller, whole = self._step(decision.at, decision.plan, decision.before, room)
        if self._trains_layers:
            # 9. Reconstruction: each layer is trained to give what the dense one gives.
            windows, found = self.reader.as_served(self.windows()), dict[str, float]()
            inputs = self.model, smaller, self.discovery, windows, self._held_out
            with self._least_squares_otherwise(), self._stage("reconstruct") as progress:
                if self._held_out is None and self._settled_repair:
                    raise PlanError("no text is left to check by whether that helps; give more text")
                found = checked_reconstruction(*inputs, progress=progress)
            losses = {**whole.scored.get(HELD_OUT_LOSS, {}), **found}
            scored = {**whole.scored, HELD_OUT_LOSS: losses} if losses else whole.scored
            whole = replace(whole, options=replace(whole.options, repair=self.options.repair), scored=scored)
        return smaller, whole

    @property
    def _trains_layers(self) -> bool:
        return REPAIRS[self.options.repair].trains_layers

    @contextmanager
    def _least_squares_otherwise(self) -> Iterator[None]:
        """Layers that cannot be trained are an error only where somebody asked for it."""
        try:
            yield
        except PlanError as error:
            if not self._settled_repair:
                raise
            logger.warning("the layers of this small model are not trained: %s", error)
            self.options = replace(self.options, repair="least-squares")
            self.recipe = replace(self.recipe, cut=self.options)

    def cut(self) -> tuple[PreTrainedModel, Plan]:
        """The smaller model in memory, and the plan that leads to it; the dense model stays as it is."""
        return self.apply(self.decide())

    def _step(
        self, at: Position, decided: Plan, before: Plan | None, room: Path | None = None
    ) -> tuple[PreTrainedModel, Plan]:
        decided, weights = self.repair(at, decided, room)
        smaller = self.prune(at, decided, weights, room)
        if self.iterations == 1:
            return smaller, decided
        whole = decided if before is None else composed(before, decided, self.discovery)
        return smaller, as_of_dense(whole, self.options, self.discovery, self.model)

    def _resumed(self) -> tuple[Position, Plan | None]:
        """Where to start: behind the last iteration that the cache has."""
        kept = self.cache.load_iteration(self.options) if self.iterations > 1 else None
        if kept is None:
            return self.start(), None
        smaller = prune(self.model, kept.plan, discovery=self.discovery)
        for name, parameter in smaller.named_parameters():
            parameter.data = kept.weights[name].to(parameter.device)
        return self._next(kept.number, smaller), kept.plan

    def save(self, pruned: PreTrainedModel, decided: Plan, out: Path, run: RunOptions) -> None:
        """10. The folder: weights, config and tokenizer, with the plan, the record and the recipe beside them."""
        keep = decided.kept_tokens
        with self.clock.stage("save"):
            unplaced, seed = unplaced_in(self.name, self.loading), self.calibration.seed
            fates = account_for_tensors(self.model, pruned, decided, self.discovery, unplaced=unplaced)
            record = make_record(
                self.model, name=self.name, scored=decided.scored, seed=seed, command=run.command, tensors=fates
            )
            with save_updated(
                pruned,
                out,
                plan=decided,
                tokenizer=self.tokenizer if keep is None else cut_tokenizer(self.tokenizer, keep),
                record=record,
                files=text_files(self.name, self.tokenizer, tokenizer_too=keep is None),
                overwrite=run.overwrite,
            ) as folder:
                recipe = replace(self.recipe, plan=None if self.given is None else PLAN_FILE)  # which lies beside it
                write_recipe(folder, "prune", recipe)


@dataclass(frozen=True, slots=True)
class Decision:
    """The last plan of a run, where it starts from, and the plan of the iterations before it."""

    at: Position
    plan: Plan
    before: Plan | None


def _losses(given: Plan) -> Mapping[str, float] | None:
    """The losses on held-out windows by which the repair of a whole plan was taken or left out, if any were."""
    return given.scored.get(HELD_OUT_LOSS) if given.options.iterations == 1 else None
