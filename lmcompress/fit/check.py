"""Check the model in this folder on a file: `python check.py FILE`; needs the model's runtime and the file.

Prints the metric, how many examples of the file confirmed this model, how many of its answers to those differ
from the original (dense) model's, and how many are as they were recorded then.
"""

import argparse
import difflib
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def answered(file, recorded, facts):
    """Return the answers of now: by lmcompress for a model of torch's, else by the graph's runtime alone."""
    batch = facts["answer"]["batch"]
    if facts["answer"]["runtime"] == "torch":
        from lmcompress.errors import StudyError
        from lmcompress.fit.answers import again

        try:
            return again(HERE, file, recorded, batch)
        except StudyError as error:
            sys.exit(f"error: {error}")
    import check_graph  # beside this file

    return check_graph.again(HERE, file, recorded, batch)


def differences(pairs, tolerance):
    """Return how many of the pairs of answers differ, numbers by more than the tolerance."""
    if tolerance is None:
        return sum(first != second for first, second in pairs)
    return sum(None in sides or abs(sides[0] - sides[1]) > tolerance for sides in pairs)


def alike(first, second):
    """Return the share of characters that two texts have in common, in order."""
    return difflib.SequenceMatcher(None, first, second, autojunk=False).ratio()


def compared(now, recorded):
    """Return the lines that compare the answers of now with the recorded ones."""
    kind, tolerance = recorded["kind"], recorded.get("tolerance")
    entries = [(*recorded["answers"][key], answer) for key, answer in now["entries"]]
    dense, before = (differences([(entry[i], entry[3]) for entry in entries], tolerance) for i in (1, 2))
    words = {"regression": "scores", "language-modelling": "losses per token", "generation": "texts"}
    text = f"{dense} {words.get(kind, 'answers')} differ from the dense model's"
    if tolerance is None:
        lost = sum(dense == label != answer for label, dense, _, answer in entries)
        gained = sum(answer == label != dense for label, dense, _, answer in entries)
        text += f", {lost} turned wrong and {gained} right"
    else:
        text += f" by more than {tolerance:.2g}"
    source = "windows of it" if kind == "language-modelling" else "of them"
    same = f"{len(entries) - before} of {len(entries)} are as recorded then"
    if kind == "generation":
        share = sum(alike(before, answer) for *_, before, answer in entries) / len(entries)
        same += f"; {100 * share:.1f} % of the characters are the same"
    return [f"{len(entries)} {source} confirmed this model: {text}", same]


def main():
    """Print the metric on the file, and how the answers changed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", type=Path, help=".csv, .tsv, .jsonl, .json, .parquet or .txt")
    file = parser.parse_args().file
    if not file.is_file():
        sys.exit(f"there is no file {file}")
    try:
        facts = json.loads((HERE / "fit.json").read_text(encoding="utf-8"))
        recorded = json.loads((HERE / "answers.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        sys.exit(f"fit.json or answers.json beside check.py is not whole ({error}): copy the folder again")
    if not (count := len(recorded["answers"])):
        sys.exit(f"{recorded['kind']} is no task of a file: measure it with lmcompress, as README.md says")
    try:
        now = answered(file, recorded, facts)
    except ImportError as error:
        sys.exit(f"{error.name} is missing: install what README.md says that this check needs")
    metric = now.get("metric", recorded["metric_name"])

    def shown(score):
        return f"{100 * score:.2f} %" if metric == "accuracy" else f"{score:.4g}"

    if now["value"] is not None:
        unit = "examples" if recorded["kind"] != "language-modelling" else "windows of tokens"
        print(f"{metric} {shown(now['value'])} on {now['count']} {unit} of {file.name}")
    if "needs" in now:
        print(f"(the model was confirmed by {recorded['metric_name']}, which needs {now['needs']})")
    if not now["entries"]:
        sys.exit(f"no example of {file.name} is among the {count} that confirmed this model")
    first, last = compared(now, recorded)
    print(first)
    if len(now["entries"]) >= count and now["confirmed"] is not None and "needs" not in now:
        then, dense = (shown(facts[side]["quality"]["value"]) for side in ("answer", "dense"))
        print(f"{metric} on these {shown(now['confirmed'])}; then {then}, the dense model {dense}")
    print(last)


if __name__ == "__main__":
    main()
