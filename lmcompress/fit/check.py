"""Check the model in this folder on a file: `python check.py reviews.csv`; needs its runtime and the file.

Prints the accuracy, and how many answers differ from the dense model's, recorded when this folder was made.
"""

import argparse
import csv
import hashlib
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
BATCH = 8


def rows_of(file):
    """Return the rows of a .csv, .tsv, .jsonl or .json file by column."""
    suffix = file.suffix.lower()
    if suffix in (".csv", ".tsv"):
        with open(file, newline="", encoding="utf-8-sig") as lines:
            return list(csv.DictReader(lines, delimiter="\t" if suffix == ".tsv" else ","))
    text = file.read_text(encoding="utf-8-sig")
    if suffix == ".jsonl":
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    return json.loads(text)


def column_of(row, names):
    """Return the first of the names that is a column."""
    names = [names] if isinstance(names, str) else names
    if not (present := [name for name in names if name in row]):
        sys.exit(f"no column {' or '.join(names)}; there are {', '.join(row)}")
    return present[0]


def key_of(texts, count):
    """Return the hash of an example's texts, blind to case and white space."""
    texts = [" ".join(text.casefold().split()) for text in texts] + [""] * (count - len(texts))
    return hashlib.blake2b("\x1f".join(texts).encode(), digest_size=12).digest().hex()


def torch_logits(recorded):
    """Return a function from rows of texts to logits `(n, outputs)`, run by torch."""
    import torch

    import lmcompress

    model, tokenizer = lmcompress.load_compressed(HERE)

    @torch.no_grad()
    def logits(texts):
        cut = {"truncation": True, "max_length": recorded["tokens"], "padding": True, "return_tensors": "pt"}
        inputs = tokenizer(*([list(side) for side in zip(*texts)]), **cut)
        names = ("input_ids", "attention_mask", "token_type_ids")
        return model(**{name: inputs[name] for name in names if name in inputs}).logits.float().numpy()

    return logits


def graph_logits(recorded):
    """Return the same of a graph, run by OpenVINO or ONNX Runtime alone."""
    import numpy as np
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(HERE / "tokenizer.json"))
    tokenizer.enable_truncation(recorded["tokens"])
    tokenizer.enable_padding(pad_id=recorded["pad"])
    if (HERE / "openvino_model.xml").is_file():
        import openvino

        compiled = openvino.compile_model(HERE / "openvino_model.xml", "CPU", {"PERFORMANCE_HINT": "LATENCY"})
        names = [port.any_name for port in compiled.inputs]
        run = lambda inputs: compiled(inputs)["logits"]  # noqa: E731
    else:
        import onnxruntime

        session = onnxruntime.InferenceSession(str(HERE / "model.onnx"), providers=["CPUExecutionProvider"])
        names = [port.name for port in session.get_inputs()]
        run = lambda inputs: session.run(["logits"], inputs)[0]  # noqa: E731

    def logits(texts):
        encoded = tokenizer.encode_batch([tuple(row) if len(row) > 1 else row[0] for row in texts])
        fields = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
        inputs = {
            name: [getattr(e, field) for e in encoded] for name, field in fields.items() if name in names
        }
        return run({name: np.array(rows, dtype=np.int64) for name, rows in inputs.items()})

    return logits


def main():
    """Print the accuracy on the file, and how the answers changed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path, help=".csv, .tsv, .jsonl or .json")
    file = parser.parse_args().file
    facts = json.loads((HERE / "fit.json").read_text(encoding="utf-8"))
    recorded = json.loads((HERE / "answers.json").read_text(encoding="utf-8"))
    if not recorded:
        sys.exit("this check is of classifiers; measure other tasks with lmcompress, as README.md says")
    rows = rows_of(file)
    columns = {role: column_of(rows[0], names) for role, names in recorded["columns"].items()}
    texts = [[str(row[columns[role]]) for role in columns if role != "label"] for row in rows]
    labels = [str(row[columns["label"]]) for row in rows]
    logits = (torch_logits if facts["answer"]["runtime"] == "torch" else graph_logits)(recorded)
    batch = facts["answer"]["batch"] or BATCH
    order = sorted(range(len(texts)), key=lambda i: sum(map(len, texts[i])))
    predicted = [0] * len(texts)
    for start in range(0, len(order), batch):
        few = order[start : start + batch]
        for i, row in zip(few, logits([texts[i] for i in few])):
            predicted[i] = int(row.argmax())
    index_of = {label: index for index, label in enumerate(recorded["names"].values())} | recorded["outputs"]
    right = [index_of[label] == index for label, index in zip(labels, predicted) if label in index_of]
    if right:
        print(f"accuracy {100 * sum(right) / len(right):.2f} % on {len(right)} examples of {file}")
    entries = [recorded["answers"].get(key_of(row, len(recorded["fields"]))) for row in texts]
    seen = [(*entry, now) for entry, now in zip(entries, predicted) if entry]
    lost = sum(dense == label != now for label, dense, _, now in seen)
    gained = sum(now == label != dense for label, dense, _, now in seen)
    changed = sum(now != dense for _, dense, _, now in seen)
    print(
        f"{len(seen)} of them confirmed this model: {changed} answers differ from the dense model's, {lost} "
        f"turned wrong and {gained} right"
    )
    print(f"{sum(now == before for *_, before, now in seen)} of {len(seen)} are as recorded then")


if __name__ == "__main__":
    main()
