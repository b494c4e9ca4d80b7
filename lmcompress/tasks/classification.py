"""Tasks that give a text, or a pair of texts, a label or a number: accuracy for labels, correlation for numbers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from lmcompress.errors import BadSetting, WrongTask
from lmcompress.tasks import metrics
from lmcompress.tasks.base import Columns, Run, Statistic, Task
from lmcompress.tasks.batching import max_length
from lmcompress.tasks.capabilities import architecture_name, bare, is_encoder


@dataclass(eq=False, kw_only=True)
class Classification(Task):
    """Examples `{"text", "label"}`, or `{"text", "pair", "label"}`; label is an index into `labels`.

    Attributes:
        metric: one of ours for classes, or the path or name of any `evaluate` metric of class indices.
    """

    kind: ClassVar[str] = "classification"
    needs: ClassVar[str] = "classification"
    unit: ClassVar[str] = "fraction"
    further: ClassVar[tuple[str, ...]] = ("accuracy", "macro_f1", "cross_entropy")
    likelihood: ClassVar[str | None] = "cross_entropy"

    metric: str = "accuracy"
    higher_is_better: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._recomputed = (
            None if self.metric in ("accuracy", "macro_f1") else metrics.EvaluateMetric(self.metric)
        )
        if self._recomputed:
            self.metric = self._recomputed.name

    @property
    def statistic(self) -> Statistic:
        """The metric: by default the share of examples whose most likely label is the right one."""
        return self._recomputed or super().statistic

    def identity(self) -> dict:
        """The metric, where it is not the usual one."""
        return {} if self.metric == "accuracy" else {"metric": self.metric}

    def metric_inputs(self, columns: Columns, run: Run) -> tuple[np.ndarray, np.ndarray]:
        """Class indices."""
        return columns["prediction"].astype(int), columns["label"].astype(int)

    def reported(self, columns: Columns, run: Run) -> float:
        """Return the metric over all examples; a foreign `evaluate` metric is its own statistic."""
        return self._recomputed(columns) if self._recomputed else super().reported(columns, run)

    def check(self, loaded: Any) -> None:
        """Also refuse a head with other labels than the task's, or in another order."""
        super().check(loaded)
        config = bare(loaded).config
        if config.num_labels != len(self.labels):
            raise WrongTask(
                f"{self.name} has {len(self.labels)} labels ({', '.join(self.labels[:12])}), the model's head "
                f"{config.num_labels}. Load it with num_labels={len(self.labels)} and train the head."
            )
        model_labels = [str(config.id2label.get(i, "")).lower() for i in range(config.num_labels)]
        task_labels = [label.lower() for label in self.labels]
        if set(model_labels) == set(task_labels) and model_labels != task_labels:
            raise WrongTask(
                f"{self.name} orders its labels {task_labels}, the model's config {model_labels}: every prediction would count "
                "for another label. Give load_task the model's order (labels=[...], for a file of your own)."
            )
        if config.pad_token_id is None and not is_encoder(bare(loaded)):
            raise BadSetting(
                f"{type(bare(loaded)).__name__} finds the last token by config.pad_token_id, which is not set: "
                "set model.config.pad_token_id = tokenizer.eos_token_id (or its pad token) first."
            )

    def score(self, run: Run) -> tuple[Columns, dict]:
        """Columns `label`, `prediction` (-1 where the outputs are not finite), `correct`, `cross_entropy`."""
        items = _items(self, run)
        logits = np.stack(run.batches(items, lambda batch: _logits(run, batch)))
        label = np.array([example["label"] for example in self.examples])
        finite = np.isfinite(logits).all(axis=1)
        prediction = np.where(finite, logits.argmax(axis=1), -1)
        log_p = torch.log_softmax(torch.from_numpy(logits), dim=-1).numpy()
        columns = {
            "label": label,
            "prediction": prediction,
            "correct": prediction == label,
            "cross_entropy": -log_p[np.arange(len(label)), label],
        }
        return {name: column.astype(np.float64) for name, column in columns.items()}, {}

    def check_collapsed(
        self, columns: Columns, value: float, run: Run
    ) -> tuple[float | None, str | None, dict]:
        """The floor of accuracy is the share of the most frequent label; other metrics have none."""
        label, prediction = columns["label"].astype(int), columns["prediction"].astype(int)
        counts = np.bincount(label, minlength=len(self.labels))
        floor = float(counts.max() / counts.sum())
        accuracy, collapsed = float(np.mean(prediction == label)), None
        if (prediction < 0).any():
            collapsed = f"{(prediction < 0).sum()} of {len(prediction)} outputs are not finite numbers"
        elif len(np.unique(prediction)) == 1:
            collapsed = f"predicts one class ({self.labels[prediction[0]]}) for every example"
        elif accuracy <= floor:
            collapsed = f"accuracy {accuracy:.3f} is not above the majority class's {floor:.3f}"
        if self.metric != "accuracy":
            return None, collapsed, {}
        return floor, collapsed, {"floor": f"majority class: {self.labels[int(counts.argmax())]}"}

    def features(self, tokenizer: Any, examples: list[dict], *, length: int | None) -> list[dict]:
        """Model inputs with an integer label each."""
        items = encode(tokenizer, examples, length=length or max_length(tokenizer))
        return [{**item, "labels": int(example["label"])} for item, example in zip(items, examples)]


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
        """Scores and ratings."""
        return columns["score"], columns["label"]

    def score(self, run: Run) -> tuple[Columns, dict]:
        """Columns `score` and `label`."""
        regression = (
            "SequenceClassification" in architecture_name(run.model) and run.model.config.num_labels == 1
        )
        if regression:
            rows = run.batches(_items(self, run), lambda batch: _logits(run, batch))
            scores = np.stack(rows)[:, 0]
        else:
            vectors = self._embeddings(run)
            scores = np.array([vectors[e["text"]] @ vectors[e["pair"]] for e in self.examples])
        label = np.array([example["label"] for example in self.examples], dtype=np.float64)
        score = "regression head" if regression else "cosine of mean-pooled last hidden states"
        return {"score": scores.astype(np.float64), "label": label}, {"score": score}

    def check_collapsed(
        self, columns: Columns, value: float, run: Run
    ) -> tuple[float | None, str | None, dict]:
        """There is no floor; a correlation that is not a number is a collapse."""
        if np.isfinite(value):
            return None, None, {}
        why = "the same" if np.isfinite(columns["score"]).all() else "not finite"
        return None, f"the correlation is NaN: the scores are {why}", {}

    def features(self, tokenizer: Any, examples: list[dict], *, length: int | None) -> list[dict]:
        """Pairs with the rating as a float, for a regression head."""
        items = encode(tokenizer, examples, length=length or max_length(tokenizer))
        return [{**item, "labels": float(example["label"])} for item, example in zip(items, examples)]

    def _embeddings(self, run: Run) -> dict[str, np.ndarray]:
        """Unit vectors `(hidden,)` by sentence; each distinct sentence is run once."""
        sentences = list(dict.fromkeys(e[side] for e in self.examples for side in ("text", "pair")))
        length = max_length(run.tokenizer, run.model)
        make = lambda: encode(run.tokenizer, [{"text": s} for s in sentences], length=length)  # noqa: E731
        items = self.cached(run.tokenizer, ("sentences", length), make)
        encoder = getattr(run.model, "base_model", run.model)

        def pooled(batch: dict) -> np.ndarray:
            hidden = encoder(**batch).last_hidden_state.float()
            weight = batch["attention_mask"][..., None].to(hidden.dtype)
            mean = (hidden * weight).sum(1) / weight.sum(1)
            return torch.nn.functional.normalize(mean, dim=-1).cpu().numpy()

        return dict(zip(sentences, run.batches(items, pooled)))


def encode(tokenizer: Any, examples: Sequence[dict], *, length: int) -> list[dict]:
    """Token ids of each text or pair, truncated to `length`; segment ids only where a pair has them."""
    texts = [example["text"] for example in examples]
    pairs = [example["pair"] for example in examples] if "pair" in examples[0] else None
    encoded = tokenizer(texts, pairs, truncation=True, max_length=length, return_attention_mask=False)
    names = ["input_ids"]
    if any(any(row) for row in encoded.get("token_type_ids", [])):
        names.append("token_type_ids")
    return [dict(zip(names, values)) for values in zip(*(encoded[name] for name in names))]


def _items(task: Task, run: Run) -> list[dict]:
    length = max_length(run.tokenizer, run.model)
    make = lambda: encode(run.tokenizer, task.examples, length=length)  # noqa: E731
    return task.cached(run.tokenizer, ("items", length), make)


def _logits(run: Run, batch: dict) -> np.ndarray:
    return run.model(**batch).logits.float().cpu().numpy()
