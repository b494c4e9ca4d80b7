"""Tasks that give one or two texts a label or a number: accuracy for labels, correlation for numbers."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from lmcompress.errors import BadSetting, WrongTask
from lmcompress.tasks import metrics as metric_columns
from lmcompress.tasks.base import Columns, Run, Task
from lmcompress.tasks.batching import encode, is_token, positions
from lmcompress.tasks.capabilities import architecture_name, bare, capabilities, is_encoder


@dataclass(eq=False, kw_only=True)
class Classification(Task):
    """Examples `{"text", "label"}`, or `{"text", "pair", "label"}`; label is an index into `labels`.

    Attributes:
        metric: one of ours for classes, or the path or name of any `evaluate` metric of class indices.
        labels_ordered: `labels` are said to be in the order of the model's outputs, whatever their names.
    """

    kind: ClassVar[str] = "classification"
    needs: ClassVar[str] = "classification"
    unit: ClassVar[str] = "fraction"
    further: ClassVar[tuple[str, ...]] = ("accuracy", "macro_f1", "cross_entropy")
    likelihood: ClassVar[str | None] = "cross_entropy"

    metrics: ClassVar[tuple[str, ...]] = ("accuracy", "macro_f1", "matthews")

    metric: str = "accuracy"
    higher_is_better: bool | None = None
    labels_ordered: bool = False

    def identity(self) -> dict:
        """Return the metric, where it is not the usual one."""
        return {} if self.metric == type(self).metric else {"metric": self.metric}

    def metric_inputs(self, columns: Columns, run: Run) -> tuple[np.ndarray, ...] | None:
        """Return indices of the model's outputs."""
        return type(self).reads(columns)

    def check(self, loaded: Any) -> None:
        """Also refuse a head with other classes, and a padding that hides the last token from the head."""
        super().check(loaded)
        self.outputs(bare(loaded).config)
        check_padding(bare(loaded))

    def outputs(self, config: Any) -> list[int]:
        """Return the index of the model's output for each of `labels`.

        Classes are matched by their names in the config; where it has none (LABEL_0 is no name), by their
        numbers or by their order. A model may know classes that do not occur. Raises `WrongTask` if none fit.
        """
        names = class_names(config)
        for fold in (str, str.casefold):
            of_model, of_task = [fold(name) for name in names], [fold(label) for label in self.labels]
            if len(set(of_model)) == len(names) and set(of_task) <= set(of_model):
                return [of_model.index(label) for label in of_task]
        is_unnamed = all(re.fullmatch(r"(LABEL_)?\d*", name) for name in names)
        numbers = [int(label) if label.isdecimal() else len(names) for label in self.labels]
        if is_unnamed and max(numbers) < len(names):
            return numbers
        if len(self.labels) == len(names) and (is_unnamed or self.labels_ordered):
            return list(range(len(names)))
        shown, of_model = ", ".join(self.labels[:12]), "no names" if is_unnamed else ", ".join(names[:12])
        mapping = ",".join(f"{label}=…" for label in self.labels[:3])
        raise WrongTask(
            f"{self.name} has {len(self.labels)} labels ({shown}), the model's head {len(names)} outputs "
            f"({of_model}): which is which is not known. For data of your own give "
            f"labels={{yours: the model's}} (-p labels={mapping}), or labels=[...] with {len(names)} of "
            "yours in the order of the outputs (-p labels=a,b); else set config.id2label, or load it with "
            f"num_labels={len(self.labels)} and train the head."
        )

    def score(self, run: Run) -> tuple[Columns, dict]:
        """Return `label` and `prediction` (-1: not finite) as outputs, `correct`, `cross_entropy`."""
        items, details = _items(self, run)
        logits = np.stack(run.batches(items, lambda batch: _logits(run, batch)))
        label = np.array(self.outputs(run.model.config))[[example["label"] for example in self.examples]]
        finite = np.isfinite(logits).all(axis=1)
        prediction = np.where(finite, logits.argmax(axis=1), -1)
        log_p = torch.log_softmax(torch.from_numpy(logits), dim=-1).numpy()
        columns = {
            "label": label,
            "prediction": prediction,
            "correct": prediction == label,
            "cross_entropy": -log_p[np.arange(len(label)), label],
        }
        return {name: column.astype(np.float64) for name, column in columns.items()}, details

    def check_collapsed(
        self, columns: Columns, value: float, run: Run
    ) -> tuple[float | None, str | None, dict]:
        """Return as accuracy's floor the share of the most frequent label; other metrics have none."""
        label, prediction = columns["label"].astype(int), columns["prediction"].astype(int)
        names = class_names(run.model.config)
        for output, own_name in zip(self.outputs(run.model.config), self.labels):
            names[output] = own_name
        counts = np.bincount(label)
        floor = float(counts.max() / counts.sum())
        accuracy, collapsed = float(np.mean(prediction == label)), None
        if (prediction < 0).any():
            collapsed = f"{(prediction < 0).sum()} of {len(prediction)} outputs are not finite numbers"
        elif len(np.unique(prediction)) == 1:
            collapsed = f"predicts one class ({names[prediction[0]]}) for every example"
        elif accuracy <= floor:
            collapsed = f"accuracy {accuracy:.3f} is not above the majority class's {floor:.3f}"
        if self.metric != "accuracy":
            return None, collapsed, {}
        return floor, collapsed, {"floor": f"majority class: {names[int(counts.argmax())]}"}

    def features(
        self, tokenizer: Any, examples: list[dict], *, length: int | None = None, model=None
    ) -> list[dict]:
        """Return model inputs with the index of the model's output as label."""
        outputs = self.outputs(model.config) if model is not None else range(len(self.labels))
        items, _ = _encoded(tokenizer, examples, length=length, model=model)
        return [{**item, "labels": int(outputs[e["label"]])} for item, e in zip(items, examples)]


@dataclass(eq=False, kw_only=True)
class MultiLabel(Classification):
    """Examples `{"text", "label"}`, or with "pair"; label lists the indices of all that hold, none too.

    A class is said where its sigmoid is above one half, as the head was trained (binary cross-entropy).
    """

    kind: ClassVar[str] = "multi-label"
    needs: ClassVar[str] = "multi-label"
    metrics: ClassVar[tuple[str, ...]] = ("micro_f1", "macro_f1", "accuracy")
    further: ClassVar[tuple[str, ...]] = (*metrics, "cross_entropy")
    reads: ClassVar[Callable] = metric_columns.class_sets

    metric: str = "micro_f1"

    def metric_inputs(self, columns: Columns, run: Run) -> None:
        """Return nothing: the statistics are the metrics."""

    def score(self, run: Run) -> tuple[Columns, dict]:
        """Return 0 or 1 in `label_0` … and `prediction_0` … of each output; `correct` if all are right.

        `cross_entropy` is the mean over the outputs; a `prediction_` of -1 is not finite.
        """
        items, details = _items(self, run)
        logits = np.stack(run.batches(items, lambda batch: _logits(run, batch))).astype(np.float64)
        label = self._indicators(self.examples, run.model.config)
        prediction = np.where(np.isfinite(logits).all(axis=1, keepdims=True), logits > 0, -1)
        columns = {"correct": (prediction == label).all(axis=1)}
        columns["cross_entropy"] = (np.logaddexp(0, logits) - label * logits).mean(axis=1)
        for name, side in (("label", label), ("prediction", prediction)):
            columns |= {f"{name}_{output}": column for output, column in enumerate(side.T)}
        return {name: column.astype(np.float64) for name, column in columns.items()}, details

    def check_collapsed(
        self, columns: Columns, value: float, run: Run
    ) -> tuple[float | None, str | None, dict]:
        """Return no floor; the same answer to every example is a collapse."""
        prediction = metric_columns.indicators(columns, "prediction")
        if (broken := (prediction < 0).any(axis=1).sum()) > 0:
            return None, f"{broken} of {len(prediction)} outputs are not finite numbers", {}
        if (prediction == prediction[0]).all():
            said = [name for name, is_said in zip(class_names(run.model.config), prediction[0]) if is_said]
            return None, f"predicts {', '.join(said) or 'no class'} for every example", {}
        return None, None, {}

    def features(
        self, tokenizer: Any, examples: list[dict], *, length: int | None = None, model=None
    ) -> list[dict]:
        """Return model inputs with 1.0 for each of the model's outputs that holds."""
        items, _ = _encoded(tokenizer, examples, length=length, model=model)
        label = self._indicators(examples, getattr(model, "config", None)).astype(float).tolist()
        return [{**item, "labels": row} for item, row in zip(items, label)]

    def _indicators(self, examples: list[dict], config: Any) -> np.ndarray:
        """Return `(n, outputs)` of 0 and 1; the outputs are the model's, or the labels without `config`."""
        outputs = self.outputs(config) if config else list(range(len(self.labels)))
        label = np.zeros((len(examples), config.num_labels if config else len(outputs)), dtype=int)
        for row, example in zip(label, examples):
            row[[outputs[index] for index in example["label"]]] = 1
        return label


@dataclass(eq=False, kw_only=True)
class Similarity(Task):
    """Examples `{"text", "pair", "label"}` with a human rating of how alike the two mean.

    An encoder is used as it is: the cosine of mean-pooled last hidden states of each sentence by itself. One
    with a regression head reads the pair and its output is the score.
    """

    kind: ClassVar[str] = "regression"
    needs: ClassVar[str] = "similarity"
    metric: ClassVar[str] = "spearman"
    further: ClassVar[tuple[str, ...]] = ("pearson",)

    def metric_inputs(self, columns: Columns, run: Run) -> tuple[np.ndarray, np.ndarray]:
        """Return scores and ratings."""
        return columns["score"], columns["label"]

    def score(self, run: Run) -> tuple[Columns, dict]:
        """Return columns `score` and `label`."""
        label = np.array([example["label"] for example in self.examples], dtype=np.float64)
        if "SequenceClassification" in architecture_name(run.model) and run.model.config.num_labels == 1:
            items, details = _items(self, run)
            scores = np.stack(run.batches(items, lambda batch: _logits(run, batch)))[:, 0]
            details = {"score": "regression head", **details}
        else:
            vectors, details = self._embeddings(run), {"score": "cosine of mean-pooled last hidden states"}
            scores = np.array([vectors[e["text"]] @ vectors[e["pair"]] for e in self.examples])
        return {"score": scores.astype(np.float64), "label": label}, details

    def check_collapsed(
        self, columns: Columns, value: float, run: Run
    ) -> tuple[float | None, str | None, dict]:
        """Return no floor; a correlation that is not a number is a collapse."""
        if np.isfinite(value):
            return None, None, {}
        why = "the same" if np.isfinite(columns["score"]).all() else "not finite"
        return None, f"the correlation is NaN: the scores are {why}", {}

    def features(
        self, tokenizer: Any, examples: list[dict], *, length: int | None = None, model=None
    ) -> list[dict]:
        """Return pairs with the rating as a float, for a regression head."""
        items, _ = _encoded(tokenizer, examples, length=length, model=model)
        return [{**item, "labels": float(example["label"])} for item, example in zip(items, examples)]

    def _embeddings(self, run: Run) -> dict[str, np.ndarray]:
        """Return unit vectors `(hidden,)` by sentence; each distinct sentence is run once."""
        sentences = list(dict.fromkeys(e[side] for e in self.examples for side in ("text", "pair")))
        make = lambda: encode(run.tokenizer, sentences, model=run.model)  # noqa: E731
        items, _ = self.cached(run.tokenizer, ("sentences", positions(run.model)), make)
        encoder = getattr(run.model, "base_model", run.model)

        def pooled(batch: dict) -> np.ndarray:
            hidden = encoder(**batch).last_hidden_state.float()
            weight = batch["attention_mask"][..., None].to(hidden.dtype)
            mean = (hidden * weight).sum(1) / weight.sum(1)
            return torch.nn.functional.normalize(mean, dim=-1).cpu().numpy()

        return dict(zip(sentences, run.batches(items, pooled)))


@dataclass(eq=False, kw_only=True)
class Regression(Similarity):
    """Examples `{"text", "label"}`, or with "pair"; label is a number.

    A single text needs a regression head; of pairs an encoder gives the cosine, too.
    """

    metrics: ClassVar[tuple[str, ...]] = ("spearman", "pearson", "mae", "rmse")
    further: ClassVar[tuple[str, ...]] = metrics
    reads: ClassVar[Callable] = metric_columns.numbers

    metric: str = "spearman"
    higher_is_better: bool | None = None

    @property
    def needs(self) -> str:
        """The capability: a head for single texts."""
        return "similarity" if "pair" in self.examples[0] else "regression"

    def check(self, loaded: Any) -> None:
        """Also refuse a padding that hides the last token from the head."""
        super().check(loaded)
        if "regression" in capabilities(bare(loaded)):
            check_padding(bare(loaded))

    def identity(self) -> dict:
        """Return the metric, where it is not the usual one."""
        return {} if self.metric == type(self).metric else {"metric": self.metric}

    def score(self, run: Run) -> tuple[Columns, dict]:
        """Return columns `score` and `label`, and their `absolute_error` and `squared_error`."""
        columns, details = super().score(run)
        error = np.abs(columns["score"] - columns["label"])
        return columns | {"absolute_error": error, "squared_error": error**2}, details

    def check_collapsed(
        self, columns: Columns, value: float, run: Run
    ) -> tuple[float | None, str | None, dict]:
        """Return as the floor of an error that of the best constant; correlations have none."""
        if self.metric not in metric_columns.LOWER_IS_BETTER:
            return super().check_collapsed(columns, value, run)
        label, collapsed = columns["label"], None
        constant = np.median(label) if self.metric == "mae" else label.mean()
        best = {"absolute_error": np.abs(label - constant), "squared_error": (label - constant) ** 2}
        floor = float(self.statistic(best))
        if not value < floor:
            collapsed = f"{self.metric} {value:.4g} is not below {floor:.4g}, that of always {constant:.4g}"
        return floor, collapsed, {"floor": f"always {constant:.4g}"}


def check_padding(model: nn.Module) -> None:
    """Refuse a classifier or regression that cannot find the last token of a text padded on its right."""
    if getattr(model.config, "summary_type", None) == "last":
        raise BadSetting(
            f"{type(model).__name__} reads the last position (summary_type in its config), which of the "
            "shorter texts of a batch is padding here. Models of that kind are not supported."
        )
    pad = model.config.pad_token_id
    if not is_encoder(model) and not is_token(pad, model.config):
        raise BadSetting(
            f"{type(model).__name__} finds the last token of a text by config.pad_token_id, which is "
            f"{pad} and no token of its table: set it to tokenizer.eos_token_id (or a pad token's id), "
            "in the model or in its config.json."
        )


def class_names(config: Any) -> list[str]:
    """Return the names of a model's outputs, "" where it has none."""
    names = getattr(config, "id2label", None) or {}
    return [str(names.get(index, "")) for index in range(config.num_labels)]


def _encoded(tokenizer: Any, examples: list[dict], **limits) -> tuple[list[dict], dict]:
    pairs = [example["pair"] for example in examples] if "pair" in examples[0] else None
    return encode(tokenizer, [example["text"] for example in examples], pairs, **limits)


def _items(task: Task, run: Run) -> tuple[list[dict], dict]:
    make = lambda: _encoded(run.tokenizer, task.examples, model=run.model)  # noqa: E731
    return task.cached(run.tokenizer, ("items", positions(run.model)), make)


def _logits(run: Run, batch: dict) -> np.ndarray:
    return run.model(**batch).logits.float().cpu().numpy()
