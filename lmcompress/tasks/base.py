"""What a task is, and the one function that runs a model on it.

A task turns a model into per-example columns, of which every number is a statistic. Training text comes from
the task, too, so that one place keeps it apart from what is scored.
"""

import hashlib
import inspect
import json
import time
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from lmcompress.errors import BadData, BadSetting, NoSuchSplit, WrongTask
from lmcompress.stats import Columns, Statistic
from lmcompress.tasks.batching import Item, batches_by_length, pad_batch, pad_id
from lmcompress.tasks.capabilities import NEEDS, bare, capabilities, describe, reads_ahead
from lmcompress.tasks.metrics import LOWER_IS_BETTER, STATISTICS, EvaluateMetric, class_indices, load_metric

OVERLAP_TOLERATED = 0.1  # stray duplicates are left out of training; more than this is the same data twice
HELD_OUT_EVERY = 20  # examples of a training split


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What a model scored: `columns` are `(n,)` float64 in the order of the task's examples or windows.

    `floor` is what a model that learned nothing would score (majority class, chance, unigram), `collapsed`
    the sentence that says so if this one is no better, `seconds` the wall time of scoring, `outputs` texts
    that it generated.
    """

    task: "Task"
    columns: Columns
    metric: str
    value: float
    secondary: dict[str, float]
    floor: float | None
    collapsed: str | None
    seconds: float
    details: dict[str, Any]
    outputs: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Run:
    """A model under evaluation and how to feed it; `outputs` are its generated texts, in examples' order."""

    model: nn.Module
    tokenizer: Any
    batch_tokens: int = 8192
    progress: bool = False
    outputs: list[str] = field(default_factory=list)
    batch_size: int | None = None  # examples of a batch, where that is fixed

    @cached_property
    def _ignored_inputs(self) -> set[str]:
        accepted = inspect.signature(self.model.forward).parameters
        open_ended = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
        return set() if open_ended or "token_type_ids" in accepted else {"token_type_ids"}

    def batches(
        self,
        items: Sequence[Item],
        function: Callable,
        *,
        batch_tokens: int | None = None,
        left: bool = False,
    ) -> list:
        """Call `function` on batches of `items`, padded on the right or `left`; return a result per item."""
        first = next(self.model.parameters(), None)
        device = getattr(self.model, "device", "cpu") if first is None else first.device
        usable = [{k: v for k, v in item.items() if k not in self._ignored_inputs} for item in items]
        tokens = batch_tokens or self.batch_tokens
        groups = batches_by_length([len(i["input_ids"]) for i in usable], tokens, self.batch_size)
        padding, results = pad_id(self.tokenizer, self.model), [None] * len(items)
        for indices in tqdm(groups, disable=not self.progress, leave=False, unit="batch"):
            batch = pad_batch([usable[i] for i in indices], pad_id=padding, device=device, left=left)
            for index, result in zip(indices, function(batch), strict=True):
                results[index] = result
        return results


@dataclass(eq=False, kw_only=True)
class Task:
    """Examples, a metric, and how a model is run on them. Subclasses say the how.

    Attributes:
        metrics: names of ours that may be the metric, none where there is no choice; `reads` makes of columns
            what any other of `evaluate` is given.
        further: names of the secondary metrics.
        likelihood: the secondary metric that is the negative log-likelihood of the right answers, if there is
            one: it moves before an accuracy or a BLEU does, and is compared with the dense model's in pairs.
        cluster: the column that numbers what is drawn whole by a bootstrap, each of as many examples; of one
            that is None, examples are drawn, `block` in a row.
        examples: the evaluation examples, in a fixed order; `source` is where they came from.
        training: split name -> examples of that split, from `training_source`; None where there are none.
        training_is_own: they are a user's, who may change them, and not a published data set's own split.
        selecting: makes the same task on the split that configurations are chosen on.
        labels: class names, by label index.
        text_fields: whose texts say what counts as the same example; of them `split_fields` (None: all) what
            stays together when a data set is split.
        block: how many consecutive examples the bootstrap keeps together.
    """

    kind: ClassVar[str]
    needs: ClassVar[str]
    text_fields: ClassVar[tuple[str, ...]] = ("text", "pair")
    split_fields: ClassVar[tuple[str, ...] | None] = None
    metric: ClassVar[str]
    metrics: ClassVar[tuple[str, ...]] = ()
    reads: ClassVar[Callable[[Columns], tuple]] = class_indices
    further: ClassVar[tuple[str, ...]] = ()
    higher_is_better: ClassVar[bool] = True
    unit: ClassVar[str] = ""
    likelihood: ClassVar[str | None] = None
    cluster: ClassVar[str | None] = None

    name: str
    split: str
    examples: list[dict] = field(repr=False)
    source: str
    training: Callable[[str], list[dict]] | None = None
    training_source: str = ""
    training_is_own: bool = False
    selecting: Callable[[], "Task"] | None = None
    labels: list[str] | None = None
    block: int = 1
    _cache: dict = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        self.training_source = self.training_source or (self.source if self.training else "")
        self._foreign = None
        if self.metrics and self.metric not in self.metrics:
            self._foreign = EvaluateMetric(self.metric, type(self).reads)
        if self.metrics and self.metric in STATISTICS:
            self.higher_is_better = self.metric not in LOWER_IS_BETTER
        if self.higher_is_better is None:
            raise BadSetting(
                f"{self.metric} is none of the metrics {', '.join(self.metrics)}, so which of two values is "
                "better is not known: give -p higher_is_better=true, or false for an error or a loss (in "
                "Python an argument)."
            )
        self.metric = self._foreign.name if self._foreign else self.metric
        if not self.examples:
            raise BadData(f"{self.name}: the split {self.split!r} of {self.source} holds no usable example.")

    @classmethod
    def reading(cls, read: Callable[[str], list[dict]], *, split: str, limit: int | None, **fields) -> "Task":
        """Make a task whose evaluated and training splits `read` returns; `limit` takes the first."""
        return cls(split=split, examples=read(split)[:limit], training=read, **fields)

    def score(self, run: Run) -> tuple[Columns, dict]:
        """Return per-example columns, and details worth recording."""
        raise NotImplementedError

    def metric_inputs(self, columns: Columns, run: Run) -> tuple[Sequence, Sequence] | None:
        """Return predictions and references, as the metric's `evaluate` module takes them, if any."""
        return None

    def features(
        self, tokenizer: Any, examples: list[dict], *, length: int | None = None, model=None
    ) -> list[dict]:
        """Return model inputs with labels, as lists of integers, for training `model`.

        A text has at most `length` tokens, by default what tokenizer and model allow.
        """
        raise NotImplementedError

    def check_collapsed(
        self, columns: Columns, value: float, run: Run
    ) -> tuple[float | None, str | None, dict]:
        """Return the floor, the sentence that the model fell to it (or None), and details of the floor."""
        return None, None, {}

    def identity(self) -> dict:
        """Return the settings that change what is computed; part of `data_hash`."""
        return {}

    def selection(self) -> "Task | None":
        """Return this task on the split that configurations are chosen on; None where there is none."""
        if self.selecting is not None and "selection" not in self._cache:
            self._cache["selection"] = self.selecting()
        return self._cache.get("selection")

    def parts(self, fractions: Mapping[str, float], *, seed: int = 0) -> dict[str, "Task"]:
        """Return this task on disjoint parts of its examples, by name; the others train on those of "train".

        An example's part follows from `seed` and the hash of its texts, blind to case and white space, so
        that equal texts are in one part, in whatever order or file they stand. Each other part is a task,
        whose split has the part's name; without "train" in `fractions` it keeps the training text it has.

        Args:
            fractions: name -> share (0-1) of the examples; what is left at a sum below 1 is in no part.

        Raises:
            BadSetting: the shares are not positive, or more than 1 in all.
            BadData: too few different texts, so that a part would be empty.
        """
        shares, count = np.array([*fractions.values()], dtype=float), len(self.examples)
        if not (shares > 0).all() or shares.sum() > 1 + 1e-9:
            raise BadSetting(f"parts {dict(fractions)}: each is a share above 0, and all are at most 1.")
        groups: dict[bytes, list[dict]] = {}
        for unit in self.units():
            texts = [self.text_key(example, self.split_fields) for example in unit]
            digest = hashlib.blake2b(b"".join([str(seed).encode(), *texts]), digest_size=16).digest()
            groups.setdefault(digest, []).extend(unit)
        members: dict[str, list[dict]] = {name: [] for name in fractions}
        ends, before = np.cumsum(shares) * count, 0
        for digest in sorted(groups):
            number = int(np.searchsorted(ends, before + len(groups[digest]) / 2))
            if number < len(ends):
                members[list(fractions)[number]] += groups[digest]
            before += len(groups[digest])
        if empty := [name for name, examples in members.items() if not examples]:
            raise BadData(
                f"{self.name}: {count} examples with {len(groups)} different texts are too few for the parts "
                f"{dict(fractions)}: {', '.join(empty)} would be empty."
            )
        fields: dict[str, Any] = {"selecting": None}
        if (train := members.pop("train", None)) is not None:
            scored = {self.text_key(example) for examples in members.values() for example in examples}
            train = [example for example in train if self.text_key(example) not in scored]
            fields |= {"training": partial(_only_train, train, self.name), "training_is_own": True}
            fields |= {"training_source": self.source}
        return {name: self._on(name, examples, **fields) for name, examples in members.items()}

    def units(self) -> list[list[dict]]:
        """Return the examples, grouped into what is never split: each alone, or a cluster's."""
        clusters: dict[Any, list[dict]] = {}
        for number, example in enumerate(self.examples):
            clusters.setdefault(example[self.cluster] if self.cluster else number, []).append(example)
        return list(clusters.values())

    def _on(self, split: str, examples: list[dict], **fields) -> "Task":
        """Return this task with other examples and `fields`."""
        task = copy(self)
        for computed in ("data_hash", "training_hash"):
            vars(task).pop(computed, None)
        vars(task).update(fields, split=split, examples=examples, _cache={})
        return task

    @property
    def statistic(self) -> Statistic:
        """The metric as a function of (a resample of) the columns: its interval comes from it."""
        return self._foreign or STATISTICS[self.metric]

    @property
    def secondary(self) -> dict[str, Statistic]:
        """Further statistics of the same columns, by name."""
        return {name: STATISTICS[name] for name in self.further if name != self.metric}

    def reported(self, columns: Columns, run: Run) -> float:
        """Return the metric over all examples, computed by its `evaluate` module where it has one."""
        inputs = self.metric_inputs(columns, run)
        if self._foreign or inputs is None:
            return float(self.statistic(columns))
        predictions, references = inputs
        return load_metric(self.metric).compute(predictions=predictions, references=references)[self.metric]

    @cached_property
    def data_hash(self) -> str:
        """16 hex digits over the examples in order and every setting that changes what is computed."""
        identity = self.identity()
        if not self.higher_is_better and self.metric not in STATISTICS:
            identity["higher_is_better"] = False
        content = [self.name, self.kind, self.split, identity, self.labels, self.examples]
        text = json.dumps(content, sort_keys=True, ensure_ascii=False, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @cached_property
    def training_hash(self) -> str | None:
        """Return 16 hex digits over a user's own training text; None if there is none, or a data set's."""
        if not self.training_is_own or not self.has_training():
            return None
        text = json.dumps(self._kept_apart("train"), sort_keys=True, ensure_ascii=False, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def check(self, loaded: Any) -> None:
        """Refuse a model, or a `models.LoadedModel`, that cannot do this task.

        Raises:
            WrongTask: says what the task needs and what this model can do.
        """
        model = bare(loaded)
        able = capabilities(model)
        if self.needs not in able:
            raise WrongTask(f"{self.name} ({self.metric}) needs {NEEDS[self.needs]}. {describe(model)}")
        is_causal = self.needs == "language modelling" or (
            self.needs == "writing" and "generation" not in able
        )
        if is_causal and reads_ahead(model):
            raise WrongTask(
                f"{self.name} ({self.metric}) needs {NEEDS[self.needs]}. {type(model).__name__} lets a token "
                "change the logits before it, so it sees what it is to predict. If it was made to be a "
                "decoder, its config lacks is_decoder or is_causal."
            )

    def training_examples(
        self, *, split: str = "train", limit: int | None = None, seed: int = 0, subset: str = "all"
    ) -> list[dict]:
        """Return examples to train or calibrate on, shuffled by `seed`, none of which is evaluated.

        Args:
            subset: "held-out": every 20th, the same whatever the seed; "rest": the others; or "all".

        Raises:
            BadData: the split is the evaluated one, is not there, or repeats the evaluated examples.
        """
        examples = subset_of(self._kept_apart(split), subset)
        order = np.random.default_rng(seed).permutation(len(examples))[:limit]
        return [examples[i] for i in order]

    def training_features(
        self, tokenizer: Any, *, length: int | None = None, model=None, **which
    ) -> list[dict]:
        """Return the `features` of `training_examples`; `which` are the arguments of that."""
        return self.features(tokenizer, self.training_examples(**which), length=length, model=model)

    def has_training(self) -> bool:
        """Return whether there is a training split.

        Raises:
            BadData: there is one that is damaged, empty or repeats the evaluated examples: nothing may stand
                in for it.
        """
        try:
            self._kept_apart("train")
        except NoSuchSplit:
            return False
        return True

    def _kept_apart(self, split: str) -> list[dict]:
        """Return a training split without the examples that are reported or chosen on."""
        if self.training is None:
            raise NoSuchSplit(
                f"{self.name} has no training split: {self.source} is evaluated as a whole. Give other "
                'examples to train on: train_path="train.csv", for data of your own.'
            )
        scored = [task for task in (self, self.selection()) if task]
        if any(split.partition("/")[0] == task.split.partition("/")[0] for task in scored):
            raise NoSuchSplit(f"{self.name} is evaluated on {split!r}, so nothing may be trained on it.")
        if split not in self._cache:
            examples = self.training(split)
            evaluated = {self.text_key(example) for task in scored for example in task.examples}
            unseen = [example for example in examples if self.text_key(example) not in evaluated]
            repeats = len(examples) - len(unseen)
            if not examples:
                raise BadData(f"{self.name}: its {split} split ({self.training_source}) holds no example.")
            if repeats > OVERLAP_TOLERATED * len(examples):
                raise BadData(
                    f"{self.name}: {repeats} of {len(examples)} training examples ({self.training_source} "
                    f"{split}) are evaluation examples. Give it separate data."
                )
            self._cache[split] = unseen
        return self._cache[split]

    def text_key(self, example: dict, fields: Sequence[str] | None = None) -> bytes:
        """Return a hash of an example's texts, blind to case and white space: what counts as the same."""
        fields = self.text_fields if fields is None else fields
        texts = [" ".join(str(example.get(name, "")).casefold().split()) for name in fields]
        return hashlib.blake2b("\x1f".join(texts).encode(), digest_size=12).digest()

    def cached(self, tokenizer: Any, key: tuple, make: Callable[[], Any]) -> Any:
        """Return `make()`, called once per tokenizer and key: variants of one model are tokenized once."""
        slot = (id(tokenizer), *key)
        if slot not in self._cache:
            self._cache[slot] = (tokenizer, make())  # the tokenizer is kept so that its id stays its own
        return self._cache[slot][1]


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    task: Task,
    *,
    batch_tokens: int = 8192,
    batch_size: int | None = None,
    progress: bool = False,
) -> Evaluation:
    """Run `model` over the task's examples.

    Args:
        batch_tokens: most tokens, padding included, in one batch; lower it if memory runs out.
        batch_size: so many examples in a batch instead, for a model whose answers depend on it.

    Raises:
        WrongTask: the model cannot do this task.
    """
    task.check(model)
    started = time.perf_counter()
    run = Run(model, tokenizer, batch_tokens, progress, batch_size=batch_size)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():  # not inference_mode: some quantized tensors refuse it
            columns, details = task.score(run)
            seconds = time.perf_counter() - started
            value = task.reported(columns, run)
            floor, collapsed, about_floor = task.check_collapsed(columns, value, run)
    finally:
        model.train(was_training)
    return Evaluation(
        task=task,
        columns={name: np.asarray(column, dtype=np.float64) for name, column in columns.items()},
        metric=task.metric,
        value=value,
        secondary={name: statistic(columns) for name, statistic in task.secondary.items()},
        floor=floor,
        collapsed=collapsed,
        seconds=seconds,
        details=details | about_floor,
        outputs=run.outputs,
    )


def subset_of(examples: list, subset: str) -> list:
    """Return a training split, the part of it that is held out for validation while training, or the rest."""
    if subset == "held-out":
        return examples[::HELD_OUT_EVERY]
    return [example for i, example in enumerate(examples) if subset == "all" or i % HELD_OUT_EVERY]


def _only_train(examples: list[dict], name: str, split: str) -> list[dict]:
    """Return the training part of a task, which has no other split to train on."""
    if split != "train":
        raise NoSuchSplit(f'{name} was split into parts and is trained on "train" alone, not on {split!r}.')
    return examples
