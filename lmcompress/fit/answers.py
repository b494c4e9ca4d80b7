"""What check.py compares with: how a file becomes a model's inputs, and what was answered then."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lmcompress import formats
from lmcompress.fit.search import Search
from lmcompress.fit.split import CONFIRM
from lmcompress.results.labels import metric_name
from lmcompress.stats import Columns, finite
from lmcompress.tasks import Task, evaluate, load_task
from lmcompress.tasks.batching import max_length, pad_id
from lmcompress.tasks.language_modelling import CONTEXT_TOKENS, start_token
from lmcompress.tasks.own_data import KINDS, ROLES, renamed_labels

NEAR = 0.01  # of their standard deviation: numbers that differ by less are the same answer
_OWN = ("labels", "metric", "higher_is_better", "prompt", *(f"{role}_column" for role in ROLES))
# What a generation's config may ask for, besides greedy search, that check.py does not do
_UNLIKE = ("repetition_penalty", "suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "sequence_bias")
_NEUTRAL = (None, 1.0, [], {})


def answers(search: Search, name: str, settings: dict) -> dict:
    """Return the record of what confirmed a search's answer `name`; only its kind where a file has no such.

    `settings` are the task's as given.
    """
    sides = [
        (search.journal.load_scores(side, CONFIRM), search.journal.load_outputs(side))
        for side in ("dense", name)
    ]
    recorded = record(search.parts.confirm, search.loaded.model, search.loaded.tokenizer, settings, *sides)
    return recorded | {"unpack": search.unpack}


def record(
    task: Task,
    model: Any,
    tokenizer: Any,
    settings: Mapping[str, Any],
    dense: tuple[Columns, list[str]],
    compressed: tuple[Columns, list[str]],
) -> dict:
    """Return how examples become inputs, and label, dense and compressed answer to each by its key.

    `dense` and `compressed` are columns and generated texts. An answer is the index of an output or a list
    of them, a number, or a text; of running text the loss per token of each window.
    """
    content: dict[str, Any] = {"kind": task.kind, "metric": task.metric, "columns": {}, "answers": {}}
    if task.kind not in KINDS:
        return content
    sides = [outputs(task, *side) for side in (dense, compressed)]
    content["metric_name"] = metric_name(task.metric)
    content["answers"] = dict(
        zip(keys(task, len(sides[0])), zip(labels(task, dense[0]), *sides, strict=True), strict=True)
    )
    if isinstance(sides[0][0], float):
        content["tolerance"] = NEAR * float(np.std(np.array(sides[1], dtype=np.float64)))
    content["settings"] = {name: setting for name, setting in settings.items() if name in _OWN}
    content["settings"] |= {"kind": task.kind} | _lengths(task)
    kind = KINDS[task.kind]
    for role in (*kind.roles, *kind.may_have):
        named = settings.get(f"{role}_column") or ROLES[role]
        # Names in a text are all of them to be there, those in a list tried in turn.
        content["columns"][role] = named if isinstance(named, (str, tuple)) else ",".join(named)
    content["needs"] = list(kind.roles)
    content |= {"side": getattr(tokenizer, "truncation_side", "right"), "pad": pad_id(tokenizer, model)}
    content |= {"tokens": max_length(tokenizer, model), "prompt": settings.get("prompt")}
    if task.kind in ("classification", "multi-label"):
        content["outputs"] = _output_of(task, model.config, settings)
    if task.needs in ("language modelling", "writing"):
        content |= {"start": start_token(tokenizer), "end": tokenizer.eos_token_id}
        content["context"] = max_length(tokenizer, model, cap=CONTEXT_TOKENS)
    if task.kind == "language-modelling":
        content["paragraphs"] = [[key_of(e["text"]), e["document"]] for e in task.examples]
    if task.kind == "generation":
        content |= _writing(task, model, tokenizer)
    return content


def again(folder: Path, file: Path, recorded: dict, batch: int | None) -> dict:
    """Return what the model in `folder` answers to a file: what check.py has of a graph, of one run by torch.

    "entries" are key and answer of each example, or window of running text, that confirmed; "value" is the
    metric over all `count`, "confirmed" over those.
    """
    model, tokenizer = formats.load(folder, unpack=recorded.get("unpack", "auto"))
    task = load_task(str(file), model=model, **recorded["settings"])
    if task.kind == "generation":
        task.source_tokens = recorded["source_tokens"]
    whole = evaluate(model, tokenizer, task, batch_size=batch)
    scored, columns = task, whole.columns
    if task.kind == "language-modelling":
        by_key = {key_of(example["text"]): example["text"] for example in task.examples}
        if any(key not in by_key for key, _ in recorded["paragraphs"]):
            return {"entries": [], "count": len(columns["nll"]), "value": whole.value, "confirmed": None}
        examples = [{"text": by_key[key], "document": number} for key, number in recorded["paragraphs"]]
        scored = dataclasses.replace(task, examples=examples)
        columns = evaluate(model, tokenizer, scored, batch_size=batch).columns
    answered = outputs(scored, columns, whole.outputs)
    named = zip(keys(scored, len(answered)), map(str, labels(scored, columns)), strict=True)
    first = {
        (key, label): i for i, (key, label) in reversed([*enumerate(named)]) if key in recorded["answers"]
    }
    entries = {i: (key, answered[i]) for (key, _), i in reversed(first.items())}  # a repeat counts once
    confirmed = {name: column[[*entries]] for name, column in columns.items()}
    return {
        "entries": [*entries.values()],
        "count": len(next(iter(whole.columns.values()))),
        "value": whole.value,
        "confirmed": task.statistic(confirmed) if entries else None,
    }


def outputs(task: Task, columns: Columns, texts: Sequence[str]) -> list:
    """Return a model's answer to each example, or to each window of running text."""
    if task.kind == "generation":
        return list(texts)
    if task.kind == "language-modelling":
        return [finite(loss) for loss in columns["nll"] / columns["tokens"]]
    if task.kind == "regression":
        return [finite(score) for score in columns["score"]]
    return _indices(columns, "prediction")


def labels(task: Task, columns: Columns) -> list:
    """Return the right answer to each example as `outputs` has it, None where there is none."""
    if task.kind == "generation":
        return [example["target"] for example in task.examples]
    if task.kind == "language-modelling":
        return [None] * len(columns["nll"])
    return columns["label"].tolist() if task.kind == "regression" else _indices(columns, "label")


def keys(task: Task, count: int) -> list[str]:
    """Return what each example is found again by: its texts' hash; of running text the window's number."""
    if task.kind == "language-modelling":
        return list(map(str, range(count)))
    sides = [[example[name] for name in task.text_fields if name in example] for example in task.examples]
    return [key_of(*map(str, texts)) for texts in sides]


def key_of(*texts: str) -> str:
    """Return the hash of texts as they stand in a file, letter by letter."""
    return hashlib.blake2b("\x1f".join(texts).encode(), digest_size=12).hexdigest()


def _indices(columns: Columns, name: str) -> list:
    """Return the index of the output in the column `name`, or those of the columns `name_0` … that are 1."""
    if name in columns:
        return columns[name].astype(int).tolist()
    sides = np.stack([columns[f"{name}_{i}"] for i in range(sum(n.startswith(f"{name}_") for n in columns))])
    return [np.flatnonzero(row > 0).tolist() for row in sides.T]


def _output_of(task: Task, config: Any, settings: Mapping[str, Any]) -> dict[str, int]:
    """Return the index of the model's output by each text that may stand for it in a file.

    Those are the number that a data set has for a declared class, the class, and the user's name for it.
    """
    indices = dict(zip(task.labels, map(int, task.outputs(config)), strict=True))
    numbered = {str(number): index for number, index in enumerate(indices.values())}
    renamed = renamed_labels(settings.get("labels"))
    renamed = renamed if isinstance(renamed, Mapping) else {}
    return numbered | indices | {label: indices[name] for label, name in renamed.items() if name in indices}


def _lengths(task: Task) -> dict[str, int]:
    names = {"language-modelling": ("window", "stride"), "generation": ("max_new_tokens",)}
    return {name: getattr(task, name) for name in names.get(task.kind, ())}


def _writing(task: Task, model: Any, tokenizer: Any) -> dict:
    """Return what greedy search needs to know of a model: which token begins, which end, which are forced."""
    config = getattr(model, "generation_config", None) or model.config
    ends = getattr(config, "eos_token_id", None)
    is_pair = getattr(model.config, "is_encoder_decoder", False)
    ends = tokenizer.eos_token_id if ends is None and not is_pair else ends
    first = [getattr(side, "decoder_start_token_id", None) for side in (config, model.config)]
    forced = {0: "forced_bos_token_id", task.max_new_tokens - 1: "forced_eos_token_id"} if is_pair else {}
    forced = {str(step): getattr(config, name, None) for step, name in forced.items()}
    return {
        "source_tokens": max_length(tokenizer, model, cap=task.source_tokens),
        "first": next((token for token in first if token is not None), None),
        "ends": [] if ends is None else ends if isinstance(ends, list) else [ends],
        "forced": {step: token for step, token in forced.items() if token is not None},
        "unlike": [name for name in _UNLIKE if getattr(config, name, None) not in _NEUTRAL],
    }
