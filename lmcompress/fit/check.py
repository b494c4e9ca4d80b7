"""Check the model in this folder on a file: `python check.py reviews.csv`; needs its runtime and the file.

Prints the metric, and how many answers differ from the dense model's, recorded when this folder was made.
"""

import argparse
import csv
import hashlib
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
BATCH = 8


def rows_of(file, fields, columns):
    """Return the texts `(n, fields)` and labels of a .csv, .tsv, .jsonl or .json file."""
    suffix = file.suffix.lower()
    if suffix in (".csv", ".tsv"):
        with open(file, newline="", encoding="utf-8-sig") as lines:
            rows = list(csv.DictReader(lines, delimiter="\t" if suffix == ".tsv" else ","))
    elif suffix == ".jsonl":
        rows = [
            json.loads(line) for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()
        ]
    elif suffix == ".json":
        rows = json.loads(file.read_text(encoding="utf-8-sig"))
    else:
        sys.exit(f"{file}: give a .csv, .tsv, .jsonl or .json file")
    names = [columns[field] for field in fields if columns.get(field)]
    if missing := [name for name in (*names, columns["label"]) if rows and name not in rows[0]]:
        sys.exit(f"{file} lacks the columns {missing}; it has {list(rows[0])}")
    return [[str(row[name]) for name in names] for row in rows], [str(row[columns["label"]]) for row in rows]


def key_of(texts, count):
    """Return the hash of an example's texts, blind to case and white space."""
    texts = [" ".join(text.casefold().split()) for text in texts] + [""] * (count - len(texts))
    return hashlib.blake2b("\x1f".join(texts).encode(), digest_size=12).digest().hex()


def torch_answers():
    """Return a function of texts that gives the outputs of the model, run by torch."""
    import torch

    import lmcompress

    model, tokenizer = lmcompress.load_compressed(HERE)

    @torch.no_grad()
    def answer(texts):
        pairs = [row[1] for row in texts] if len(texts[0]) > 1 else None
        limit = min(
            512, tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", 512) or 512
        )
        inputs = tokenizer(
            [row[0] for row in texts],
            pairs,
            truncation=True,
            max_length=limit,
            padding=True,
            return_tensors="pt",
        )
        inputs = {k: v for k, v in inputs.items() if k in ("input_ids", "attention_mask", "token_type_ids")}
        return model(**inputs).logits.float().tolist()

    return answer


def main():
    """Print the metric on the file, and how the answers changed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path)
    options = parser.parse_args()
    facts = json.loads((HERE / "fit.json").read_text(encoding="utf-8"))
    recorded = json.loads((HERE / "answers.json").read_text(encoding="utf-8"))
    if not recorded:
        sys.exit("this check is of classifiers; other tasks are checked with lmcompress: see proof.md")
    fields = recorded["fields"]
    texts, labels = rows_of(options.file, fields, facts["columns"])
    answer, predicted = torch_answers(), []
    order = sorted(range(len(texts)), key=lambda i: -sum(map(len, texts[i])))
    batch = facts["job"]["batch"] if facts["answer"]["scaled_per_call"] else BATCH
    outputs = {}
    for start in range(0, len(order), batch):
        few = order[start : start + batch]
        for i, logits in zip(few, answer([texts[i] for i in few])):
            outputs[i] = max(range(len(logits)), key=logits.__getitem__)
    predicted = [outputs[i] for i in range(len(texts))]
    names = recorded["names"]
    right = [
        recorded["outputs"].get(label) == p or label == names.get(str(p))
        for p, label in zip(predicted, labels)
    ]
    print(f"accuracy {100 * sum(right) / len(right):.2f} % on {len(right)} examples of {options.file}")
    lost = gained = changed = as_recorded = n = 0
    for text, now in zip(texts, predicted):
        if entry := recorded["answers"].get(key_of(text, len(fields))):
            label, dense, before = entry
            n += 1
            changed += now != dense
            lost += dense == label != now
            gained += now == label != dense
            as_recorded += now == before
    print(
        f"{n} of them confirmed this model: {changed} answers differ from the dense model's, {lost} turned "
        f"wrong and {gained} right"
    )
    print(f"{as_recorded} of {n} are as recorded then")


if __name__ == "__main__":
    main()
