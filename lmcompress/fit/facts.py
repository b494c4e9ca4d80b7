"""What a search came to, as plain values: what card and proof say, and a result object holds."""

import hashlib
import json
import re
import shlex
from datetime import date
from pathlib import Path

import numpy as np

from lmcompress import device
from lmcompress.fit import power
from lmcompress.fit.candidates import Candidate
from lmcompress.fit.decision import WORTH
from lmcompress.fit.search import Search
from lmcompress.fit.split import CONFIRM
from lmcompress.measure.calls import Shape
from lmcompress.measure.quality import quality
from lmcompress.results.labels import bytes_text, metric_name, number, plural
from lmcompress.stats import CONFIDENCE, LEAST_EXAMPLES, finite
from lmcompress.tasks import Evaluation

CONFIRMED, FAILED, OUT_OF_TIME = "confirmed", "failed confirmation", "no time was left"
ANSWER = f"{CONFIRMED}: the answer"
_OPTIONS = {  # of the command line, by the name in the job
    **{"model": "--model", "task": "--task", "max_loss": "--max-loss", "goal": "--for", "max_mb": "--max-mb"},
    **{"max_ms": "--max-ms", "batch": "--batch", "length": "--length", "runtime": "--runtime"},
    "seed": "--seed",
}


def facts(search: Search, answer: Candidate | None, job: dict, options: dict) -> dict:
    """Return everything that is said of a search; `options`: "task", "split_by" and "settings" as given."""
    names = [line["name"] for line in search.journal.lines if line["event"] in ("made", "failed")]
    names = dict.fromkeys([*names, *search.skipped])
    rows = [_candidate(search, name, answer) for name in names]
    order = search.finalists()
    margin, confirming = search.loss.margin, options["task"]
    if Path(str(options["split_by"])).is_file():
        confirming = options["split_by"]
    content = {
        "job": job,
        "answer": None,
        "dense": {"bytes": search.dense_bytes, "quality": _quality(search, "dense")},
        "confirmation": sorted(
            (row for row in rows if search.journal.find("confirmed", name=row["name"])),
            key=lambda row: order.index(row["name"]),
        ),
        "candidates": sorted(rows, key=lambda row: (row["bytes"] or np.inf, row["label"])),
        "examples": {
            "train": search.parts.trained,
            "search": search.parts.searched,
            "confirm": len(search.parts.confirm.examples),
            "repeats": search.parts.repeats,
        },
        "noun": search.parts.noun,
        "timed": _timed_words(search.shape),
        "confirmed_on": _counted(search),
        "date": date.today().isoformat(),
        "data": _named(options["task"]),
        "confirming": {"name": search.parts.confirm.name} | _named(confirming),
        "machine": {"cpu": device.machine()["cpu"], "threads": job["threads"]},
        "versions": device.versions() | {"code": device.code_version()},
        "licence": _licence(search.loaded.path),
        "metric": search.loss.task.metric,
        "higher_is_better": search.loss.task.higher_is_better,
        "margin": str(margin),
        "amount": margin.amount,
        "scale": margin.points,
        "unit": "%" if margin.relative else "points",
        "command": _command(job, options),
    }
    content["dense"]["peak_bytes"] = search.peak_bytes("dense")
    if answer:
        content["answer"] = next(row for row in rows if row["name"] == answer.name) | {
            "quality": _quality(search, answer.name),
            "recipe": list(answer.steps),
            "batch": search.shape.batch if answer.scaled_per_call else None,
        }
    content["text"] = _sentences(search, content)
    return json.loads(json.dumps(content, default=float))


def metric_title(metric: str) -> str:
    """Return a metric as it begins a sentence: `Accuracy`, `chrF`."""
    name = metric_name(metric)
    return name[0].upper() + name[1:] if name.islower() else name


def _candidate(search: Search, name: str, answer: Candidate | None) -> dict:
    """Return one candidate's line: what it is, how far it came, what was measured (None: not finite, too)."""
    events = ("made", "failed", "dropped", "timed", "confirmed")
    lines = {event: search.journal.find(event, name=name) for event in events}
    record, timed = lines["made"], lines["timed"]
    candidate = search.all[name]
    short = record and search.journal.find("time", signature=record["signature"])
    row = {"name": name, "label": candidate.label, "runtime": candidate.runtime}
    row |= {key: record and record[key] for key in ("bytes", "divergence", "flipped", "backend")}
    row["size_share"] = record and record["bytes"] / search.dense_bytes
    row["peak_bytes"] = record and search.peak_bytes(record["signature"])
    row["ratio"] = timed["ratio"] if timed else short and short["ratio"]
    row |= {key: timed and timed[key] for key in ("ratio_low", "ratio_high", "dense_ms", "noise_floor")}
    row["ms"] = timed and timed["median_ms"]
    row |= {"examples": 0, **dict.fromkeys(("search_loss", "search_low", "search_high"))}
    if scored := search.scored(name, confirmed=False):
        columns, dense, examples = scored
        low, high = search.loss.bounds(columns, dense)
        row |= {"examples": examples, "search_loss": search.loss.value(columns, dense)}
        row |= {"search_low": low, "search_high": high}
    row |= {key: (lines["confirmed"] or {}).get(key) for key in ("loss", "low", "bound")}
    row = {key: finite(figure) for key, figure in row.items()}
    return row | {"state": _state(search, name, lines, answer)}


def _state(search: Search, name: str, lines: dict, answer: Candidate | None) -> str:
    """Return how far a candidate came, in words."""
    if lines["failed"]:
        return f"not possible here: {lines['failed']['error']}"
    if lines["confirmed"]:
        passed = ANSWER if answer and name == answer.name else CONFIRMED
        return passed if lines["confirmed"]["passed"] else FAILED
    if name in search.finalists():
        stopped = search.journal.find("confirmed", passed=False)
        return f"not tested: {'one before it failed' if stopped else OUT_OF_TIME}"
    if lines["dropped"]:
        return f"misses the margin on {lines['dropped']['examples']} examples of the search"
    if name in search.skipped:
        return f"not {search.skipped[name]}: {OUT_OF_TIME}"
    costs = {contender.name: contender.cost for contender in search.contenders()}
    if name not in costs:
        return "over a limit"
    if costs[name] > WORTH:
        return "no better than dense"
    in_front = name in {contender.name for contender in search.in_front()}
    return "those tested promised more" if in_front else "another is better, and nearer to dense"


def _quality(search: Search, name: str) -> dict | None:
    """Return the quality of a model on the examples that confirm; None if it was not scored there."""
    journal, task = search.journal, search.parts.confirm
    if not (line := journal.find("scored", name=name, chunk=CONFIRM)):
        return None
    value = np.nan if line["value"] is None else line["value"]
    columns = journal.load_scores(name, CONFIRM)
    blank = {"secondary": {}, "floor": None, "collapsed": None, "seconds": 0.0, "details": {}}
    evaluation = Evaluation(task=task, columns=columns, metric=task.metric, value=value, **blank)
    measured = quality(evaluation)
    return {key: measured[key] for key in ("metric", "value", "low", "high", "n")}


def _licence(path: Path) -> str | None:
    """Return the licence that the base model's card names."""
    card = path / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    stated = re.search(r"^licen[sc]e:\s*(\S+)", text, re.M)
    return stated and stated[1]


def _command(job: dict, options: dict) -> str:
    """Return the command that searches for this one recipe again."""
    words = ["python", "-m", "lmcompress.fit"]
    for name, option in _OPTIONS.items():
        if job[name] is not None:
            words += [option, str(options.get(name, job[name]))]
    words += ["--split", str(options["split_by"])] if options["split_by"] else []
    words += ["--finetune"] if job.get("finetune") else []
    for name, setting in options["settings"].items():
        words += ["-p", f"{name}={setting}"]
    return shlex.join([*words, "--candidates", "recipe.yaml", "--no-train", "--save", "again"])


def _counted(search: Search) -> str:
    """Return what a bound is drawn over: `453 examples`, of running text `198 windows of 256 tokens`."""
    task = search.parts.confirm
    if hasattr(task, "window") and search.journal.find("scored", name="dense", chunk=CONFIRM):
        count = len(search.journal.load_scores("dense", CONFIRM)["nll"])
        return plural(count, f"window of {task.window} tokens", f"windows of {task.window} tokens")
    return plural(len(task.examples), search.parts.noun)


def _timed_words(shape: Shape) -> str:
    """Return the call that is timed: `a token after 128 tokens, batch 1`."""
    words = {
        "forward": "a call of",
        "prefill": "a prompt of",
        "encode": "a source of",
        "decode": "a token after",
    }
    return f"{words[shape.part]} {shape.length} tokens, batch {shape.batch}"


def _named(source: object) -> dict:
    """Return the name of a file and its SHA-256; None of a data set."""
    file = Path(str(source))
    digest = hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None
    return {"file": str(source), "sha256": digest}


def _sentences(search: Search, content: dict) -> str:
    """Return the result in sentences."""
    text, metric, n = search.loss.margin.text, content["metric"], content["confirmed_on"]
    skipped = sum(row["state"].endswith(OUT_OF_TIME) for row in content["candidates"])
    unreached = f" Not reached in the time given: {plural(skipped, 'candidate')}." if skipped else ""
    if answer := content["answer"]:
        value, dense_value = (number(side["quality"]["value"], metric) for side in (answer, content["dense"]))
        share = f"{100 * answer['size_share']:.0f} % of the original (dense) model"
        gains = [bytes_text(answer["bytes"]), share]
        if answer["ratio"] is not None:
            gains.append(f"{100 * answer['ratio']:.0f} % of its time ({content['timed']})")
        if peak := answer["peak_bytes"]:
            share = peak / content["dense"]["peak_bytes"]
            gains.append(f"{bytes_text(peak)} of memory beyond the libraries ({100 * share:.0f} % of dense)")
        if (limit := content["job"]["max_ms"]) and answer["ms"] is None:
            unreached = (
                f" That it keeps to {limit:g} ms was seen in a short run alone: no time was left to time it "
                f"as it is served.{unreached}"
            )
        loss, bound = (text(answer[name]).removeprefix("+") for name in ("loss", "bound"))
        return (
            f"{', '.join(gains)}, by {answer['label']}. {metric_title(metric)} {value}, dense "
            f"{dense_value}: a loss of {loss}, at most {bound} "
            f"(upper one-sided {100 * CONFIDENCE:g} % bound), measured on {n} that nothing was chosen by."
            f"{unreached}"
        )
    if not content["confirmation"]:
        unreached += " Give it more minutes." if skipped else ""
        return f"Nothing better than dense came to be tested for a loss of {content['margin']}.{unreached}"
    nearest = min(content["confirmation"], key=lambda row: np.inf if row["bound"] is None else row["bound"])
    needed = _needed(search, nearest["name"])
    advice = f"about {needed:,} {content['noun']}s would decide" if needed else "more would not change that"
    if nearest["bound"] is None:
        above = " and a dense value well above 0" if search.loss.margin.relative else ""
        advice = f"a bound needs at least {LEAST_EXAMPLES} of them, or windows of a text{above}: bring more"
    return (
        f"Nothing is sure to lose at most {content['margin']}. Nearest came {nearest['label']} "
        f"({bytes_text(nearest['bytes'])}): a loss of {text(nearest['loss'])}, at most "
        f"{text(nearest['bound'])} on {n}; {advice}.{unreached}"
    )


def _needed(search: Search, name: str) -> int | None:
    """Return how many examples would certify a candidate as it looks now, with the usual power."""
    columns, dense, scored = search.scored(name)
    value, error = search.loss.estimate(columns, dense)
    margin = search.loss.margin
    if search.loss.is_proportion and not margin.relative:
        lost, gained, n, _ = search.loss.changes(columns, dense)
        return power.examples_needed(margin.amount, changed=max(lost + gained, 1) / n, loss=value)
    return power.examples_by_error(value, error, margin.amount, scored=scored)
