"""The tidy frame: one line per recorded row, with all that tables, figures, page and decision ask of it.

`frame(rows)` has these columns; what was not measured is missing (NaN or None):

- which row: key, dense_key (of the dense row of its model and task), notebook, profile, model, task, family,
  seed, machine (on which its times were taken), started, wall_s;
- what was asked: technique, title, label (the technique at its settings, in words), recipe (its steps as
  JSON, equal for all seeds), settings.<name> (dotted), trained (compressing itself trains), recovered
  (fine-tuned while or after);
- what came of it: achieved.<name> (dotted), parameters, nonzero_parameters, size_bytes and size_mb (of the
  written file), size_share (of the dense model in FP32), peak_mb, flops;
- quality: metric, higher_is_better, n, value, low, high, floor, collapsed, secondary.<metric>;
- against dense, paired: delta, delta_low, delta_high (two-sided 95 %), p, p_holm (over the rows given of its
  model and task), verdict, loss, loss_low, loss_high (a gain is negative) in loss_unit, bound_share (upper
  one-sided 95 % bound of the loss as a share of the dense quality; for perplexity, of the ratio),
  noninferior_1 and noninferior_5 (that bound is at most 1 % or 5 %),
  likelihood (metric of how likely the right answers are), likelihood_delta, likelihood_low, likelihood_high;
- on the examples that configurations are chosen on, which are none of those above: selection_value,
  selection_n, selection_delta, selection_low, selection_high, selection_bound_share (as above), chosen_1 and
  chosen_5 (non-inferior there at 1 % or 5 %; None where the task has no such examples): choose by these,
  confirm by noninferior_1 and noninferior_5;
- time: timed (its own times), measured_on (key of the row whose times it has, else None), processes (that it
  was timed in), and per shape, such as `ratio.batch1`: ms, ms_low, ms_high, dense_ms, ratio, ratio_low,
  ratio_high, noise_floor, speed (faster,
  slower, …).

`times(rows)` is the long form for time: a line per row and shape, with `shape`, `shape_name` and those
columns.
"""

from collections.abc import Iterable, Iterator

import pandas

from lmcompress.results import verdicts
from lmcompress.results.labels import label_of, look_of, shape_name
from lmcompress.results.rows import (
    by_model_task,
    chain_steps,
    dense_of,
    is_dense,
    is_recovered,
    is_timed,
    is_trained,
    machine_name,
    machine_of,
    model_task_of,
    shapes_of,
)
from lmcompress.results.store import Row, canonical

MARGINS = {"noninferior_1": 0.01, "noninferior_5": 0.05}  # of the dense quality, fixed beforehand
CHOSEN = {"chosen_1": 0.01, "chosen_5": 0.05}  # the same on the examples to choose on
TIMES = ("ms", "ms_low", "ms_high", "dense_ms", "ratio", "ratio_low", "ratio_high", "noise_floor")
_TIME_FIELDS = {"ms": "median_ms", "ms_low": "low_ms", "ms_high": "high_ms"}
_COLUMNS = """
key dense_key notebook profile model task family technique title label recipe trained recovered seed
parameters nonzero_parameters size_bytes size_mb size_share peak_mb flops
metric higher_is_better n value low high floor collapsed
delta delta_low delta_high p p_holm verdict loss loss_low loss_high loss_unit
bound_share noninferior_1 noninferior_5
selection_value selection_n selection_delta selection_low selection_high selection_bound_share
chosen_1 chosen_5
likelihood likelihood_delta likelihood_low likelihood_high
timed measured_on processes machine started wall_s
"""
COLUMNS = tuple(_COLUMNS.split())


def frame(rows: Iterable[Row], *, details: bool = True) -> pandas.DataFrame:
    """Return one line per row, in order, with the columns that the module's docstring lists.

    Without `details` those of `settings.` and `achieved.` are left out, of which many rows have a thousand.
    """
    rows = list(rows)
    scored = by_model_task(rows)
    dense_rows = {model_task: dense_of(group) for model_task, group in scored.items()}
    corrected: dict[str, tuple[float, str]] = {}
    machines = {row["key"]: machine_of(row) for row in rows}
    for group in scored.values():
        corrected |= verdicts.adjusted({row["key"]: row for row in group}.values())
    lines = [
        _identity(row, dense_rows.get(model_task_of(row)), machines)
        | _sizes(row, dense_rows.get(model_task_of(row)))
        | _quality(row)
        | _against_dense(row, dense_rows.get(model_task_of(row)), corrected)
        | {f"{name}.{shape}": value for shape, line in _shapes(row) for name, value in line.items()}
        | (dict(_leaves({name: row[name] for name in ("settings", "achieved")})) if details else {})
        for row in rows
    ]
    table = pandas.DataFrame(lines)
    return table[[*COLUMNS, *table.columns.difference(COLUMNS, sort=False)]] if rows else _empty()


def times(rows: Iterable[Row]) -> pandas.DataFrame:
    """Return one line per row and timed shape: `frame`'s columns, the shape, its times and `speed`."""
    rows = list(rows)
    lines = [
        {"line": number, "shape": shape, "shape_name": shape_name(shape), **line}
        for number, row in enumerate(rows)
        for shape, line in _shapes(row)
    ]
    if not lines:
        return _empty().reindex(columns=[*COLUMNS, "shape", "shape_name", *TIMES, "speed"])
    wide = frame(rows)
    wide = wide[[name for name in wide if name in COLUMNS or name.startswith(("settings.", "achieved."))]]
    return pandas.DataFrame(lines).join(wide, on="line").drop(columns="line")


def distinct_labels(rows: Iterable[Row]) -> list[str]:
    """Return the rows' labels; those that several share, with the settings and seed that tell them apart."""
    rows = list(rows)
    labels = [label_of(row) for row in rows]
    settings = [dict(_leaves(row["settings"])) | {"seed": row["seed"]} for row in rows]
    distinct = []
    for text, mine in zip(labels, settings):
        alike = [other for other, label in zip(settings, labels) if label == text]
        differing = [name for name in mine if any(other.get(name) != mine[name] for other in alike)][:4]
        distinct.append(
            text + f" ({', '.join(f'{name}={mine[name]}' for name in differing)})" * bool(differing)
        )
    return distinct


def _empty() -> pandas.DataFrame:
    return pandas.DataFrame(columns=list(COLUMNS))


def _identity(row: Row, dense_row: Row | None, machines: dict[str, str]) -> dict[str, object]:
    settings, provenance = row["settings"], row["provenance"]
    latency = row["latency"] or {}
    measured_on, timed_on = latency.get("measured_on"), latency.get("machine")
    names = ("key", "notebook", "profile", "model", "task", "family", "technique", "seed")
    return {name: row[name] for name in names} | {
        "dense_key": dense_row["key"] if dense_row else None,
        "title": look_of(row["technique"], settings).title,
        "label": label_of(row) if row["quality"] else row["technique"],
        "recipe": canonical(chain_steps(settings) or [{"technique": row["technique"], **settings}]),
        "trained": is_trained(row),
        "recovered": is_recovered(row),
        "timed": is_timed(row),
        "measured_on": measured_on,
        "processes": latency.get("processes", 1) if latency else 0,
        "machine": machine_name(timed_on) if timed_on else machines.get(measured_on, machine_of(row)),
        "started": provenance["started"],
        "wall_s": provenance["wall_s"],
    }


def _sizes(row: Row, dense_row: Row | None) -> dict[str, object]:
    memory, compute = row["memory"] or {}, row["compute"] or {}
    size, peak = memory.get("file_bytes"), memory.get("peak_bytes")
    in_fp32 = 4 * (((dense_row and dense_row["memory"]) or {}).get("parameters") or 0)
    return {
        "parameters": memory.get("parameters"),
        "nonzero_parameters": memory.get("nonzero_parameters"),
        "size_bytes": size,
        "size_mb": size and size / 1e6,
        "size_share": size / in_fp32 if size and in_fp32 else None,
        "peak_mb": peak and peak / 1e6,
        "flops": compute.get("flops"),
    }


def _quality(row: Row) -> dict[str, object]:
    quality = row["quality"] or {}
    names = ("metric", "higher_is_better", "n", "value", "low", "high", "floor", "collapsed")
    secondary = (quality.get("secondary") or {}).items()
    return {name: quality.get(name) for name in names} | {
        f"secondary.{metric}": interval["value"] for metric, interval in secondary
    }


def _against_dense(
    row: Row, dense_row: Row | None, corrected: dict[str, tuple[float, str]]
) -> dict[str, object]:
    line = dict.fromkeys(COLUMNS[COLUMNS.index("delta") : COLUMNS.index("timed")])
    if not row["quality"]:
        return line
    line |= _selection(row, dense_row)
    line["loss_unit"] = verdicts.loss_scale(row["quality"]["metric"])[1]
    if is_dense(row):
        return line | {"verdict": verdicts.BASELINE, "loss": 0.0, "loss_low": 0.0, "loss_high": 0.0}
    if difference := row["quality"]["difference"]:
        line |= {
            "delta": difference["value"],
            "delta_low": difference["low"],
            "delta_high": difference["high"],
        }
        line |= zip(("loss", "loss_low", "loss_high"), verdicts.loss_of(row), strict=True)
        line["p"] = difference["p"]
        line["p_holm"], line["verdict"] = corrected[row["key"]]
        bound = verdicts.relative_loss_bound(row, dense_row) if dense_row else None
        line |= {"bound_share": bound} | _within(bound, MARGINS)
    if row["quality"]["collapsed"]:
        line |= {"verdict": verdicts.COLLAPSED, **dict.fromkeys(MARGINS, False)}
    if likelihood := verdicts.likelihood_of(row):
        line["likelihood"] = likelihood[0]
        change = likelihood[1]["difference"] or dict.fromkeys(("value", "low", "high"))
        line |= {"likelihood_delta": change["value"]}
        line |= {"likelihood_low": change["low"], "likelihood_high": change["high"]}
    return line


def _selection(row: Row, dense_row: Row | None) -> dict[str, object]:
    """Return the columns of the examples that configurations are chosen on; none where there are none."""
    selection = row.get("selection")
    if not selection:
        return {}
    difference = selection["difference"] or dict.fromkeys(("value", "low", "high"))
    compared_with = None if is_dense(row) else dense_row
    bound = compared_with and verdicts.relative_loss_bound(row, compared_with, "selection")
    is_broken = selection["collapsed"] and not is_dense(row)
    chosen = dict.fromkeys(CHOSEN, False) if is_broken else _within(bound, CHOSEN)
    return chosen | {
        "selection_value": selection["value"],
        "selection_n": selection["n"],
        "selection_delta": difference["value"],
        "selection_low": difference["low"],
        "selection_high": difference["high"],
        "selection_bound_share": bound,
    }


def _within(bound: float | None, margins: dict[str, float]) -> dict[str, bool | None]:
    return {name: None if bound is None else bound <= margin for name, margin in margins.items()}


def _shapes(row: Row) -> Iterator[tuple[str, dict[str, object]]]:
    """Yield per timed shape its name and times; the dense model takes as long as itself, ratio 1."""
    speeds = (row["verdict"] or {}).get("latency") or {}
    for shape, timing in shapes_of(row).items():
        line = {name: timing[_TIME_FIELDS.get(name, name)] for name in TIMES}
        if is_dense(row):
            line |= dict.fromkeys(("ratio", "ratio_low", "ratio_high"), 1.0)
        yield shape, line | {"speed": speeds.get(shape)}


def _leaves(settings: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
