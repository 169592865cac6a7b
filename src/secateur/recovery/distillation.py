"""Dense model -> its logits on the rows to train on, kept on the disk; and the loss that learns from them.

The teacher reads every row once, before the training. Of its distribution at each place that is learned, the `top_k`
likeliest tokens are kept with their log-probabilities, and what all others have together; so it need not be in memory
while the smaller model trains, and rows that are read again cost nothing. Hidden states of a few layers go along where
they are asked for.

Tensor names end in their axes: M place that is learned, K kept token, V vocabulary, B row of a batch, T token, L layer
that is compared, D channel.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur import processes
from secateur.data.rows import IGNORED, Rows, collate
from secateur.errors import CheckpointError, ModelError, TrainingError
from secateur.evaluation.inference import LOGITS_BYTES, evaluation_mode, input_device, vocabulary_size
from secateur.files import write_tensors
from secateur.models.tensors import all_finite
from secateur.recovery.hidden_states import Counterparts, gathered, states_at

SHARD_ROWS = 256  # of a file; a run that was killed goes on after the last whole one
PACKED_NEAR = 0.02  # by what share of the largest logit a text may differ from itself alone: rounding in bfloat16
LEAST_REST = 1e-6  # of the mass of a bucket, in which float32 cannot tell it from 0


def learning_loss(
    logits_BTV: Tensor,
    labels_BT: Tensor,
    teacher: Mapping[str, Tensor] | None = None,
    *,
    share: float = 1.0,
    temperature: float = 1.0,
) -> Tensor:
    r"""Sum what is to be brought down over the places that have a label; float32, nats.

    Without a teacher it is the negative log-likelihood of the labels, with `label[t]` the token that `logits[t]` are to
    predict. With one it is

        (1 - share) * nll + share * temperature^2 * KL,
        KL = sum over kept tokens of p log(p / q) + p_rest log(p_rest / q_rest)

    p and q being the softmax of the teacher's and the student's logits over `temperature` (Hinton, Vinyals and Dean,
    arXiv 1503.02531), and p_rest = 1 - sum of p, q_rest = 1 - sum of q over the kept tokens, which are the teacher's
    likeliest. This is the divergence of the two distributions after all other tokens were put into one bucket, so it is
    never more than that of the whole, and 0 where the student agrees on the kept tokens.

    `teacher` holds `kept` (M, K: token ids), `logp` (M, K: the teacher's log-probabilities of these) and `rest` (M),
    the places being those with a label, row by row.

    >>> logits = torch.tensor([[[2.0, 1.0, 0.0, -1.0], [0.0, 0.0, 0.0, 0.0]]])
    >>> labels = torch.tensor([[1, IGNORED]])
    >>> round(float(learning_loss(logits, labels)), 4)
    1.4402
    >>> best = logits[0, :1].log_softmax(-1).topk(2)
    >>> same = {"kept": best.indices, "logp": best.values, "rest": 1 - best.values.exp().sum(-1)}
    >>> abs(float(learning_loss(logits, labels, same))) < 1e-6
    True
    """
    if teacher is None:
        flat_NV = logits_BTV.reshape(-1, logits_BTV.shape[-1]).float()
        return functional.cross_entropy(flat_NV, labels_BT.reshape(-1), ignore_index=IGNORED, reduction="sum")
    flat_NV = logits_BTV.reshape(-1, logits_BTV.shape[-1]).float()
    places_M = torch.nonzero(labels_BT.reshape(-1) != IGNORED).flatten()
    scaled_NV = flat_NV if temperature == 1.0 else flat_NV / temperature
    # One pass over the vocabulary for all that follows; the rest looks at few of its entries.
    whole_M = scaled_NV.logsumexp(dim=-1)[places_M]
    logq_MK = scaled_NV[places_M[:, None], teacher["kept"].long()] - whole_M[:, None]
    rest_M = teacher["rest"].float().clamp(min=0.0)
    p_MK = teacher["logp"].float().exp()
    p_MK = p_MK * ((1.0 - rest_M) / p_MK.sum(dim=-1).clamp(min=LEAST_REST))[:, None]  # rounded when it was written
    logq_rest_M = torch.log(-torch.expm1(logq_MK.logsumexp(dim=-1).clamp(max=-LEAST_REST)))
    divergence = (torch.xlogy(p_MK, p_MK) - p_MK * logq_MK).sum()
    divergence = divergence + (torch.xlogy(rest_M, rest_M) - rest_M * logq_rest_M).sum()
    loss = share * temperature**2 * divergence
    if share < 1:
        if temperature != 1.0:
            whole_M = flat_NV.logsumexp(dim=-1)[places_M]
        labels_M = labels_BT.reshape(-1)[places_M]
        loss = loss + (1 - share) * (whole_M - flat_NV[places_M, labels_M]).sum()
    return loss


def check_teacher(
    student: tuple[str, PreTrainedTokenizerBase, int], teacher: tuple[str, PreTrainedTokenizerBase, int]
) -> None:
    """Raise `ModelError` unless both have the same vocabulary; of each the name, the tokenizer and the size.

    >>> class Words:
    ...     get_vocab = staticmethod(lambda: {"a": 0})
    >>> check_teacher(("small", Words, 8), ("large", Words, 9))
    Traceback (most recent call last):
    secateur.errors.ModelError: teacher 'large' has a vocabulary of 9 tokens, and 'small' one of 8. ...
    """
    (name, tokenizer, size), (teacher_name, teacher_tokenizer, teacher_size) = student, teacher
    remedy = "Expected the model that it was cut from, or another with its tokenizer; or learn without a teacher: lora"
    if size != teacher_size:
        raise ModelError(
            f"teacher {teacher_name!r} has a vocabulary of {teacher_size} tokens, and {name!r} one of {size}. {remedy}"
        )
    words, teacher_words = tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
    if words != teacher_words:
        odd = sorted(dict(words.items() ^ teacher_words.items()))[0]
        raise ModelError(
            f"teacher {teacher_name!r} has another tokenizer than {name!r}: {odd!r} is token "
            f"{teacher_words.get(odd)} there and {words.get(odd)} here. {remedy}"
        )


@torch.no_grad()
def check_packing(model: nn.Module, rows: Rows) -> None:
    """Raise `TrainingError` where texts in one row see each other, or do not count their positions anew.

    Whether they do is up to the model's code, so it is tried: the second text of a row must give what it gives alone.
    Rows that are not packed pass.

    >>> ids = torch.arange(9, dtype=torch.int32)
    >>> check_packing(nn.Identity(), Rows(ids, ids > 0, torch.tensor([0, 9]), torch.zeros(1, dtype=torch.int32)))
    """
    for row in range(len(rows) if rows.positions_T is not None else 0):
        assert rows.positions_T is not None
        place = rows.slice_of(row)
        positions = rows.positions_T[place].long()
        begins = torch.nonzero(positions == 0).flatten().tolist()
        if len(begins) < 2:
            continue
        first, last = begins[1], [*begins, len(positions)][2]
        device = input_device(model)
        ids = rows.ids_T[place].long().to(device)[None]
        try:
            with evaluation_mode(model):
                together = model(input_ids=ids, position_ids=positions.to(device)[None], use_cache=False).logits
                alone = model(input_ids=ids[:, first:last], use_cache=False).logits
            apart = float((together[:, first:last] - alone).abs().max()) <= PACKED_NEAR * float(alone.abs().max())
        except TypeError:
            apart = False  # it takes no positions
        if not apart:
            raise TrainingError(
                f"packing: {type(model).__name__} lets the texts of a row see each other. Leave out --packing; "
                "--group-by-length keeps padding small"
            )
        return


def keep_teacher(
    teacher: Callable[[], PreTrainedModel],
    rows: Rows,
    folder: Path,
    *,
    top_k: int,
    temperature: float = 1.0,
    states: Counterparts | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Let the teacher read the rows, and write what it gives into files in the folder.

    A file that is there is not made again, and where all are there, the teacher is not loaded. Several processes share
    the files among them. `states` says of which layers hidden states are kept, too, in bfloat16. `progress` counts
    rows. Raises `TrainingError` where the logits hold NaN, and where the disk has no room for the states.

    >>> import tempfile
    >>> from transformers import AutoConfig, AutoModelForCausalLM
    >>> config = AutoConfig.for_model("opt", hidden_size=12, num_attention_heads=2, ffn_dim=24, num_hidden_layers=1)
    >>> ids = torch.arange(9, dtype=torch.int32)
    >>> rows = Rows(ids, ids % 2 == 1, torch.tensor([0, 4, 9]), torch.zeros(2, dtype=torch.int32))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     keep_teacher(lambda: AutoModelForCausalLM.from_config(config), rows, Path(folder), top_k=3)
    ...     kept = KeptTeacher(Path(folder), rows).of([1, 0])
    >>> {name: tuple(tensor.shape) for name, tensor in kept.items()}
    {'kept': (4, 3), 'logp': (4, 3), 'rest': (4,)}
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards = range(processes.rank(), -(-len(rows) // SHARD_ROWS), processes.count())
    missing = [shard for shard in shards if not _readable(_file(folder, shard))]
    if states is not None:
        all_shards = range(-(-len(rows) // SHARD_ROWS))
        _check_room(folder, rows, [n for n in all_shards if not _file(folder, n).exists()], states)
        processes.wait()  # or the room would be counted while others write
    model = teacher() if missing else None
    if model is not None:
        check_packing(model, rows)
    for done, shard in enumerate(missing):
        assert model is not None
        numbers = range(shard * SHARD_ROWS, min((shard + 1) * SHARD_ROWS, len(rows)))
        write_tensors(_file(folder, shard), _likeliest(model, rows, numbers, top_k, temperature, states))
        if progress is not None:
            progress(done + 1, len(missing))
    processes.wait()


class KeptTeacher:
    """What a teacher has given for rows, read from its files when it is asked for."""

    def __init__(self, folder: Path, rows: Rows) -> None:
        self._folder = folder
        self._files: dict[int, Any] = {}
        learned = torch.cat([torch.zeros(1, dtype=torch.int64), rows.learned_T.long().cumsum(0)])[rows.starts]
        shard = torch.arange(len(rows) + 1) // SHARD_ROWS * SHARD_ROWS
        self._first = (learned - learned[shard]).tolist()  # of the places of each row, within its file
        self._count = learned.diff().tolist()

    def of(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """The likeliest tokens, their log-probabilities, and the rest, at every place of these rows; states if kept."""
        parts = [self._of(row) for row in rows]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _of(self, row: int) -> dict[str, Tensor]:
        shard = row // SHARD_ROWS
        if shard not in self._files:
            try:
                self._files[shard] = safe_open(_file(self._folder, shard), framework="pt")
            except (OSError, SafetensorError) as error:
                raise CheckpointError(
                    f"{_file(self._folder, shard)}: the teacher's logits cannot be read ({error}); start without "
                    "--resume, and they are made anew"
                ) from error
        file, first = self._files[shard], self._first[row]
        places = slice(first, first + self._count[row])
        found = {name: file.get_slice(name)[places] for name in file.keys()}  # noqa: SIM118 - it is no mapping
        return found | {"logp": found["logp"].float()}


@torch.no_grad()
def _likeliest(
    model: PreTrainedModel,
    rows: Rows,
    numbers: Sequence[int],
    top_k: int,
    temperature: float,
    states: Counterparts | None,
) -> dict[str, Tensor]:
    """The teacher's distribution at all places of some rows, in their order; and its hidden states."""
    vocabulary = vocabulary_size(model)
    top_k = min(top_k, vocabulary)
    tokens = max(1, LOGITS_BYTES // (4 * vocabulary))  # of a batch, whose logits are in memory
    device = input_device(model)
    names = ("kept", "logp", "rest", *(("states",) if states is not None else ()))
    paths = states.dense_layers if states is not None else ()
    found: dict[int, list[Tensor]] = {}
    with evaluation_mode(model):
        for some in _of_like_length(rows, numbers, tokens):
            batch = {name: tensor.to(device) for name, tensor in collate(rows, some, pad=0).items()}
            labels = batch.pop("labels")
            with gathered(model, paths) as given:
                logits_MV = model(**batch, use_cache=False).logits[labels != IGNORED].float() / temperature
            if not all_finite(logits_MV):
                raise TrainingError(
                    f"the teacher {type(model).__name__} gives logits with NaN or Inf. Expected finite ones: load it "
                    "with --dtype float32 or bfloat16 (float16 overflows), or name another with --teacher"
                )
            logp_MK, kept_MK = logits_MV.log_softmax(dim=-1).topk(top_k, dim=-1)
            rest_M = 1.0 - logp_MK.exp().sum(dim=-1)
            counts = (labels != IGNORED).sum(dim=1).tolist()
            parts = [kept_MK.int().cpu(), logp_MK.half().cpu(), rest_M.float().cpu()]
            if states is not None:
                states_MLD = states_at(given, paths, labels != IGNORED)
                if states.channels is not None:
                    states_MLD = states_MLD[..., list(states.channels)]
                parts.append(states_MLD.bfloat16().cpu())
            for row, *of_row in zip(some, *(part.split(counts) for part in parts), strict=True):
                found[row] = of_row
    return {name: torch.cat([found[row][i] for row in numbers]) for i, name in enumerate(names)}


def _check_room(folder: Path, rows: Rows, shards: Sequence[int], states: Counterparts) -> None:
    """Raise `TrainingError` where the disk has no room for the hidden states that these files are to hold."""
    starts = [int(rows.starts[min(shard * SHARD_ROWS + end, len(rows))]) for shard in shards for end in (0, SHARD_ROWS)]
    places = sum(int(rows.learned_T[a:b].sum()) for a, b in zip(starts[::2], starts[1::2], strict=True))
    needed, free = states.bytes_for(places), shutil.disk_usage(folder).free
    if needed > free:
        raise TrainingError(
            f"the teacher's hidden states at {places:,} places take {needed / 2**30:.1f} GiB ({len(states.layers)} "
            f"layers, {states.width} channels in bfloat16), and the disk of OUT has {free / 2**30:.1f} GiB free. "
            "Expected room for them: train on fewer rows (--samples), write to another disk, or leave out "
            "--hidden-states-weight"
        )


def _of_like_length(rows: Rows, numbers: Sequence[int], tokens: int) -> list[list[int]]:
    """The rows in batches of at most so many tokens with the padding, or of one row."""
    lengths = rows.lengths.tolist()
    batches: list[list[int]] = []
    for row in sorted(numbers, key=lambda i: -lengths[i]):
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def _file(folder: Path, shard: int) -> Path:
    return folder / f"teacher-{shard:05}.safetensors"


def _readable(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt"):
            return True
    except (OSError, SafetensorError):
        return False  # it is not there, or damaged
