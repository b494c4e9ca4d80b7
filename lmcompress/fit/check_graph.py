"""What check.py needs for a graph: reads the file, runs the graph by its runtime alone, computes the metric.

Needs numpy, tokenizers, and openvino or onnxruntime; sacrebleu or rouge-score for their metrics.
"""

import csv
import hashlib
import io
import json
import re
import sys
from contextlib import contextmanager

import numpy as np

BATCH = 8
USUAL = {"regression": "spearman", "multi-label": "micro_f1", "generation": "exact_match"}
LIBRARIES = {"bleu": "sacrebleu", "chrf": "sacrebleu", "roug": "rouge-score"}  # by a metric's first letters
MARKS = ("1", "1.0", "true", "yes")


def again(folder, file, recorded, batch):
    """Return what the graph in `folder` answers to a file.

    "entries" are key and answer of each example, or window of running text, that confirmed; "value" is the
    metric over all `count`, "confirmed" over those.
    """
    if recorded.get("unlike"):
        sys.exit(f"only lmcompress can check this model: it generates by {', '.join(recorded['unlike'])}")
    reader = Reader(folder, recorded, batch)
    with reading(file):
        rows = rows_of(file)
        if recorded["kind"] == "language-modelling":
            return running_text(reader, rows, recorded)
        examples = examples_of(rows, recorded)
    answers = reader.answers(examples)
    keys = [key_of(*example["texts"]) for example in examples]
    sides = [(example["label"], answer) for example, answer in zip(examples, answers)]
    labelled = [side for side in sides if side[0] is not None]
    first = {
        (key, str(sides[i][0])): i for i, key in reversed([*enumerate(keys)]) if key in recorded["answers"]
    }
    confirmed = [sides[i] for i in first.values()]  # a repeat counts once
    outcome = {"entries": [(key, answers[i]) for (key, _), i in first.items()]}
    outcome |= {"count": len(labelled), "confirmed": score(recorded["metric"], confirmed)}
    if (figure := score(recorded["metric"], labelled)) is None and labelled:
        metric = USUAL.get(recorded["kind"], "accuracy")
        needs = LIBRARIES.get(recorded["metric"][:4], "lmcompress")
        return outcome | {
            "value": score(metric, labelled),
            "metric": metric.replace("_", " "),
            "needs": needs,
        }
    return outcome | {"value": figure}


def running_text(reader, rows, recorded):
    """Return the same for running text, whose windows are cut anew of the paragraphs that confirmed."""
    column = columns_of(rows[0], recorded["columns"]["text"])[0]
    documents = [str(row[column]) for row in rows]
    losses, tokens = reader.windows(documents)
    outcome = {"entries": [], "count": len(losses), "confirmed": None}
    outcome["value"] = float(np.exp(losses.sum() / tokens.sum()))
    by_key = {key_of(text): text for document in documents for text in document.split("\n\n")}
    if any(key not in by_key for key, _ in recorded["paragraphs"]):
        return outcome
    paragraphs = {}
    for key, number in recorded["paragraphs"]:
        paragraphs.setdefault(number, []).append(by_key[key])
    losses, tokens = reader.windows(["\n\n".join(texts) for texts in paragraphs.values()])
    outcome["entries"] = [(str(i), float(loss)) for i, loss in enumerate(losses / tokens)]
    return outcome | {"confirmed": float(np.exp(losses.sum() / tokens.sum()))}


# The file


@contextmanager
def reading(file):
    """End with a sentence where a file is not what it should be."""
    try:
        yield
    except (ValueError, LookupError, TypeError, StopIteration, RecursionError, csv.Error) as error:
        sys.exit(f"{file} is empty, cut or no file of its kind ({type(error).__name__}: {error})")


def rows_of(file):
    """Return the rows of a file by column, every value as it is written."""
    suffix = file.suffix.lower()
    if suffix == ".parquet":
        try:
            import pyarrow.parquet
        except ImportError:
            sys.exit("a .parquet file needs pyarrow (pip install pyarrow); or save it as .csv")
        return pyarrow.parquet.read_table(file).flatten().to_pylist()
    text = file.read_bytes().decode("utf-8-sig")
    if suffix == ".txt":
        return [{"text": text.replace("\r\n", "\n")}]
    if suffix in (".csv", ".tsv"):
        csv.field_size_limit(sys.maxsize)
        head = text.partition("\n")[0]
        marks = ["\t"] if suffix == ".tsv" else [mark for mark in ",;\t|" if mark in head] or [","]
        blank = f"{marks[0]} " in head
        lines = csv.reader(io.StringIO(text, newline=""), delimiter=marks[0], skipinitialspace=blank)
        names, rows = [name.strip() for name in next(lines)], []
        for fields in lines:
            if len(fields) != len(names) and "".join(fields).strip():
                count = f"{len(fields)} fields, the header has {len(names)}"
                sys.exit(f"{file}, line {lines.line_num}: {count}; quote a text that holds {marks[0]!r}")
            rows += [dict(zip(names, fields))] if "".join(fields).strip() else []
        return rows
    decoder, text = json.JSONDecoder(parse_int=str, parse_float=str, parse_constant=str), text.strip()
    rows, position = [], 0
    while position < len(text):  # a list, an object of columns, or an object a line
        row, position = decoder.raw_decode(text, position)
        rows.append(row)
        position = re.compile(r"\s*").match(text, position).end()
    if len(rows) == 1 and isinstance(rows[0], list):
        [rows] = rows
    elif len(rows) == 1 and all(isinstance(cells, list) for cells in rows[0].values()):
        rows = [dict(zip(rows[0], cells)) for cells in zip(*rows[0].values())]
    return [flat(row) for row in rows]


def flat(cells, name=""):
    """Return the cells of a JSON row by column; those of an object in it are columns, `translation.en`."""
    columns = {}
    for key, cell in cells.items():
        key = f"{name}{key}"
        columns |= flat(cell, f"{key}.") if isinstance(cell, dict) else {key: written(cell)}
    return columns


def written(cell):
    """Return a JSON value as it stands in the file: true, not Python's True."""
    if isinstance(cell, list):
        return [written(element) for element in cell]
    return json.dumps(cell) if isinstance(cell, bool) else cell


def columns_of(row, names):
    """Return the columns that a role has: those of `a,b`, or the first that is there of a list."""
    if isinstance(names, str):
        return [names] if names in row else [name.strip() for name in names.split(",") if name.strip() in row]
    return [name for name in names if name in row][:1]


def listed(cell):
    """Return the texts of a list, or of a cell with semicolons or a JSON list in it."""
    if isinstance(cell, str) and re.fullmatch(r"\s*\[.*\]\s*", cell, re.DOTALL):
        cell = json.loads(cell)
    texts = cell if isinstance(cell, list) else [text.strip() for text in str(cell or "").split(";")]
    return [str(text) for text in texts if str(text)]


def key_of(*texts):
    """Return the hash of an example's texts."""
    return hashlib.blake2b("\x1f".join(texts).encode(), digest_size=12).hexdigest()


def examples_of(rows, recorded):
    """Return the "texts" of each example as the model reads them, and its right "label" (None: not known)."""
    columns = {role: columns_of(rows[0], names) for role, names in recorded["columns"].items()}
    if missing := [role for role in recorded["needs"] if not columns[role]]:
        sys.exit(f"no column of the {', the '.join(missing)}; there are {', '.join(rows[0])}")
    kind, examples, first = recorded["kind"], [], recorded["needs"][0]
    for row in rows:
        cells = {role: [row[name] for name in names] for role, names in columns.items()}
        texts = [str(cells[role][0]) for role in (first, "text_pair") if cells.get(role)]
        if first != "text":
            texts = [(recorded["prompt"] or f"{{{first}}}").replace(f"{{{first}}}", texts[0])]
        example = {"texts": texts}
        if kind == "generation":
            example["label"] = str(cells["target"][0]).strip()
            example["texts"] = [*texts, example["label"]]
        elif kind == "multiple-choice":
            choices = cells["choices"]
            example["choices"] = list(map(str, choices)) if len(choices) > 1 else listed(choices[0])
            example["label"] = str(cells["answer"][0]).strip()
            example["texts"] = [*texts, str(example["choices"])]
        elif kind == "regression":
            example["label"] = float(cells["label"][0])
        elif kind == "classification":
            example["label"] = recorded["outputs"].get(str(cells["label"][0]))
        else:
            marked = [name for name in columns["label"] if str(row[name]).strip().casefold() in MARKS]
            labels = marked if len(columns["label"]) > 1 else listed(cells["label"][0])
            example["label"] = sorted({recorded["outputs"].get(label, -1) for label in labels})
        examples.append(example)
    if kind == "multiple-choice":
        number_choices(examples, recorded)
    return examples


def number_choices(examples, recorded):
    """Turn the right choices into indices; a file gives them as text, letter, or number from 0 or 1."""
    forms = [
        lambda answer, choices: choices.index(answer) if answer in choices else -1,
        lambda answer, _: "ABCDEFGHIJKLMNOPQRSTUVWXYZ".find(answer.upper()) if len(answer) == 1 else -1,
        lambda answer, _: int(answer) if answer.isdecimal() else -1,
        lambda answer, _: int(answer) - 1 if answer.isdecimal() else -1,
    ]
    expected = [recorded["answers"].get(key_of(*example["texts"]), [None])[0] for example in examples]
    indices = [[form(example["label"], example["choices"]) for example in examples] for form in forms]
    best = max(
        indices,
        key=lambda form: (
            sum(index == label for index, label in zip(form, expected)),
            sum(0 <= index < len(example["choices"]) for index, example in zip(form, examples)),
        ),
    )
    for example, index in zip(examples, best):
        example["label"] = index if 0 <= index < len(example["choices"]) else None


# The model


class Graph:
    """A file of the model as a function of arrays by name; keys and values stay from call to call."""

    def __init__(self, folder, stem):
        self.session, self.past = None, {}
        if (file := folder / f"openvino_{stem}.xml").is_file():
            import openvino

            compiled = openvino.compile_model(file, "CPU", {"PERFORMANCE_HINT": "LATENCY"})
            self.request = compiled.create_infer_request()
            self.ports = {port.any_name: None for port in compiled.inputs}
        else:
            import onnxruntime

            file = str(folder / f"{stem}.onnx")
            self.session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
            self.ports = {port.name: port.shape for port in self.session.get_inputs()}

    def __call__(self, inputs, fresh=True):
        """Return the outputs by name; `fresh`: nothing was read before."""
        batch, length = inputs["input_ids"].shape
        usual = {"position_ids": np.tile(np.arange(length), (batch, 1))}
        usual |= {"token_type_ids": np.zeros((batch, length), np.int64)}
        inputs = usual | {"beam_idx": np.arange(batch, dtype=np.int32)} | inputs
        if self.session is None:
            if fresh:
                self.request.reset_state()
            outputs = self.request.infer({name: inputs[name] for name in self.ports})
            return {port.any_name: array for port, array in outputs.items()}
        if fresh:
            pasts = [name for name in self.ports if name.startswith("past") and ".encoder." not in name]
            shapes = {name: (batch, self.ports[name][1], 0, self.ports[name][3]) for name in pasts}
            self.past = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
        inputs |= self.past
        names = [port.name for port in self.session.get_outputs()]
        outputs = dict(zip(names, self.session.run(names, {name: inputs[name] for name in self.ports})))
        self.past = {name: outputs[name.replace("past_key_values", "present")] for name in self.past}
        return outputs


def batches(rows, size):
    """Return the indices of each batch, the longest rows first."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    return [order[start : start + size] for start in range(0, len(order), size)]


def padded(rows, fill, on_left=False):
    """Return rows of integers as an array `(batch, seq)`."""
    blanks = [[fill] * (max(map(len, rows)) - len(row)) for row in rows]
    rows = [blank + row if on_left else row + blank for blank, row in zip(blanks, rows)]
    return np.array(rows, dtype=np.int64)


class Reader:
    """The graph with its tokenizer: what it answers to examples that are read as `recorded` says."""

    def __init__(self, folder, recorded, batch):
        from tokenizers import Tokenizer

        if not (folder / "tokenizer.json").is_file():
            sys.exit("only lmcompress can check this model: its tokenizer has no tokenizer.json")
        self.tokenizer, self.recorded = Tokenizer.from_file(str(folder / "tokenizer.json")), recorded
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.is_pair, self.batch = any(folder.glob("*encoder_model.*")), batch
        self.encoder = Graph(folder, "encoder_model") if self.is_pair else None
        self.graph = Graph(folder, "decoder_model" if self.is_pair else "model")

    def answers(self, examples):
        """Return the answer to each example."""
        if self.recorded["kind"] == "generation":
            return self.written(examples)
        return self.choices(examples) if self.recorded["kind"] == "multiple-choice" else self.heads(examples)

    def run(self, rows, types=None, size=BATCH):
        """Yield of each row of ids its index, its outputs by name, and its mask `(seq,)`."""
        for few in batches(rows, self.batch or size):
            mask = padded([[1] * len(rows[i]) for i in few], 0)
            inputs = {
                "input_ids": padded([rows[i] for i in few], self.recorded["pad"]),
                "attention_mask": mask,
            }
            inputs |= {"token_type_ids": padded([types[i] for i in few], 0)} if types else {}
            outputs = self.graph(inputs)
            for number, index in enumerate(few):
                yield index, {name: array[number] for name, array in outputs.items()}, mask[number]

    def heads(self, examples):
        """Return the class, list of classes or score of each example."""
        self.tokenizer.enable_truncation(self.recorded["tokens"], direction=self.recorded["side"])
        texts = [tuple(e["texts"]) if len(e["texts"]) > 1 else e["texts"][0] for e in examples]
        encoded, answers = self.tokenizer.encode_batch(texts), [None] * len(examples)
        for index, outputs, _ in self.run([e.ids for e in encoded], [e.type_ids for e in encoded]):
            if "logits" not in outputs:
                return self.cosines(texts)
            logits = outputs["logits"]
            if self.recorded["kind"] == "regression":
                answers[index] = float(logits[0])
            elif self.recorded["kind"] == "multi-label":
                answers[index] = np.flatnonzero(logits > 0).tolist()
            else:
                answers[index] = int(logits.argmax()) if np.isfinite(logits).all() else -1
        return answers

    def cosines(self, pairs):
        """Return the cosine of the mean states of each pair of texts, of a model without a head."""
        texts, vectors = list(dict.fromkeys(text for sentences in pairs for text in sentences)), {}
        for index, outputs, mask in self.run([e.ids for e in self.tokenizer.encode_batch(texts)]):
            mean = outputs["last_hidden_state"][mask > 0].mean(axis=0)
            vectors[texts[index]] = mean / np.linalg.norm(mean)
        return [float(vectors[first] @ vectors[second]) for first, second in pairs]

    def losses(self, items, size=BATCH):
        """Return the loss, nats, of the labels (-100: none) of each pair of ids and labels, summed."""
        losses = np.zeros(len(items))
        for index, outputs, _ in self.run([ids for ids, _ in items], size=size):
            labels = np.array(items[index][1])
            logits = outputs["logits"][: len(labels)][labels >= 0].astype(np.float64)
            logits -= logits.max(axis=1, keepdims=True)
            likelihoods = logits[np.arange(len(logits)), labels[labels >= 0]]
            losses[index] = (np.log(np.exp(logits).sum(axis=1)) - likelihoods).sum()
        return losses

    def windows(self, documents):
        """Return the loss of each window of the documents, nats, and how many tokens it predicts."""
        settings, ids, items = self.recorded["settings"], [self.recorded["start"]], []
        for number, text in enumerate(documents):
            ids += [self.recorded["end"]] if number else []
            ids += self.tokenizer.encode(text, add_special_tokens=False).ids
        for first in range(0, len(ids) - 1, settings["stride"]):
            last = min(first + settings["stride"], len(ids) - 1)
            begin = max(0, last - settings["window"])
            items.append((ids[begin:last], [-100] * (first - begin) + ids[first + 1 : last + 1]))
        tokens = np.array([sum(label >= 0 for label in labels) for _, labels in items])
        return self.losses(items, size=1), tokens

    def continued(self, text, target, end=()):
        """Return ids and labels of a text and what follows it, the text cut at its beginning if need be."""
        blank = "" if not text or text[-1:].isspace() or target[:1].isspace() else " "
        encoded = self.tokenizer.encode(text + blank + target, add_special_tokens=False)
        labels = [*encoded.ids[sum(stop <= len(text) for _, stop in encoded.offsets) :], *end]
        ids, start = [*encoded.ids, *end], [self.recorded["start"]]
        over = max(0, len(ids) - self.recorded["context"])
        labels = [-100] * (len(ids) - len(labels)) + labels
        return start + ids[over:-1], labels[over:]

    def choices(self, examples):
        """Return the index of each example's likeliest choice."""
        items = [self.continued(e["texts"][0], choice) for e in examples for choice in e["choices"]]
        losses, answers = self.losses(items), []
        for example in examples:
            count = len(example["choices"])
            answers.append(int(losses[:count].argmin()) if np.isfinite(losses[:count]).all() else -1)
            losses = losses[count:]
        return answers

    def written(self, examples):
        """Return what the model writes after each example's text, by greedy search."""
        recorded, answers = self.recorded, [None] * len(examples)
        texts = [example["texts"] for example in examples]
        if self.is_pair:
            self.tokenizer.enable_truncation(recorded["source_tokens"], direction=recorded["side"])
            prompts = [encoded.ids for encoded in self.tokenizer.encode_batch([text for text, _ in texts])]
        else:
            room = recorded["context"] - recorded["settings"]["max_new_tokens"]
            items = [self.continued(text, target, [recorded["end"]]) for text, target in texts]
            prompts = [ids[: sum(label < 0 for label in labels) + 1] for ids, labels in items]
            prompts = [ids[:1] + ids[1:][-(room - 1) :] for ids in prompts]
        for few in batches(prompts, self.batch or BATCH):
            rows = self.greedy([prompts[i] for i in few])
            for index, row in zip(few, rows):
                answers[index] = self.tokenizer.decode(row, skip_special_tokens=True).strip()
        return answers

    def greedy(self, prompts):
        """Return the ids written after each of a batch of prompts, padded."""
        recorded, further = self.recorded, {}
        ids = padded(prompts, recorded["pad"], on_left=not self.is_pair)
        mask = padded([[1] * len(prompt) for prompt in prompts], 0, on_left=not self.is_pair)
        if self.is_pair:
            states = self.encoder({"input_ids": ids, "attention_mask": mask})
            further = {name.replace("present", "past_key_values"): array for name, array in states.items()}
            further["encoder_attention_mask"] = mask
            ids = np.full((len(prompts), 1), recorded["first"])
        tokens, is_ended = [], np.zeros(len(prompts), dtype=bool)
        for step in range(recorded["settings"]["max_new_tokens"]):
            if not self.is_pair:
                positions = np.maximum(mask.cumsum(axis=1) - 1, 0)[:, -ids.shape[1] :]
                further = {"attention_mask": mask, "position_ids": positions}
            logits = self.graph({"input_ids": ids} | further, fresh=not step)["logits"][:, -1]
            likeliest = recorded["forced"].get(str(step), logits.argmax(axis=1))
            tokens.append(np.where(is_ended, recorded["pad"], likeliest))
            is_ended |= np.isin(tokens[-1], recorded["ends"])
            if is_ended.all():
                break
            ids, mask = tokens[-1][:, None], np.hstack([mask, np.ones((len(mask), 1), np.int64)])
        return np.stack(tokens, axis=1).tolist()


# The metric


def score(metric, pairs):
    """Return a metric of pairs of label and answer; None of one that is not known here, or of no pair."""
    if not pairs:
        return None
    labels, answers = zip(*pairs)
    if metric in ("accuracy", "exact_match"):
        return float(np.mean([label == answer for label, answer in pairs]))
    if metric in ("macro_f1", "micro_f1", "matthews"):
        return of_classes(metric, labels, answers)
    if metric in ("bleu", "chrf", "rouge1", "rouge2", "rougeL"):
        return overlap(metric, labels, answers)
    if metric not in ("mae", "rmse", "pearson", "spearman"):
        return None
    labels, answers = np.array(labels), np.array(answers)
    if metric in ("mae", "rmse"):
        errors = np.abs(labels - answers)
        return float(errors.mean() if metric == "mae" else np.sqrt((errors**2).mean()))
    if metric == "spearman":
        labels, answers = ranks(labels), ranks(answers)
    return float(np.corrcoef(labels, answers)[0, 1])


def of_classes(metric, labels, answers):
    """Return F1 of classes, of each on average or of all decisions together, or Matthews' correlation."""
    sides = [[side if isinstance(side, list) else [side] for side in sides] for sides in (labels, answers)]
    classes = sorted({index for rows in sides for row in rows for index in row})
    right, answered = (np.array([[c in row for c in classes] for row in rows], dtype=float) for rows in sides)
    if metric == "matthews":
        right, answered = (side - side.mean(axis=0) for side in (right, answered))
        return float((right * answered).sum() / np.sqrt((right**2).sum() * (answered**2).sum()))
    hits, counts = (right * answered).sum(axis=0), (right + answered).sum(axis=0)
    return float(2 * hits.sum() / counts.sum() if metric == "micro_f1" else (2 * hits / counts).mean())


def ranks(scores):
    """Return the rank of each value, equal ones sharing theirs."""
    _, places, counts = np.unique(scores, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[places]


def overlap(metric, labels, answers):
    """Return BLEU or chrF of the corpus, or the mean ROUGE; None where the library is not there."""
    try:
        if metric in ("bleu", "chrf"):
            from sacrebleu.metrics import BLEU, CHRF

            return (BLEU() if metric == "bleu" else CHRF()).corpus_score(answers, [labels]).score
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        return None
    scorer = RougeScorer([metric], use_stemmer=True)
    return float(np.mean([scorer.score(*texts)[metric].fmeasure for texts in zip(labels, answers)]))
