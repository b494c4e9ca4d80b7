"""Figures of quantization: quality against bytes, time by backend, and training on rounded weights."""

from functools import partial

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from helpers.figures import core
from helpers.figures.pruning import sensitivity_maps
from lmcompress.results.labels import look_of, shape_name
from lmcompress.results.rows import is_timed, model_task_of

rounding_maps = partial(sensitivity_maps, technique="sensitivity-bits", level_text="one group at {} bits")
LOSSES = {"train": ("training", "#0072B2"), "validation": ("validation", "#D55E00")}


def quantized_rows(rows: list[dict]) -> list[dict]:
    """Return the rows of a model that was scored and is not the dense one as it was given."""
    return [row for row in rows if row["quality"] and row["technique"] != "dense"]


def timed_rows(rows: list[dict]) -> list[dict]:
    """Return the rows whose time was measured itself, and not taken from a row of the same shapes."""
    return [row for row in quantized_rows(rows) if is_timed(row)]


def ratios(row: dict) -> dict[str, dict]:
    """Return the shapes of a row that were timed against the dense model; a backend may lack some."""
    return {
        name: shape
        for name, shape in row["latency"]["shapes"].items()
        if shape and shape["ratio"] is not None
    }


def trained_rows(rows: list[dict]) -> dict[tuple, dict[bool, list[dict]]]:
    """Return the rows with a training curve: (model, task, bits, group) -> aware or not -> row per seed."""
    by_run: dict[tuple, dict[bool, list[dict]]] = {}
    for row in quantized_rows(rows):
        if row["technique"] == "qat" and "curve" in row["achieved"]:
            settings = row["settings"]
            run = (*model_task_of(row), settings.get("bits", 8), settings.get("group_size"))
            by_kind = by_run.setdefault(run, {False: [], True: []})
            by_kind[settings.get("aware", True)].append(row)
    return by_run


def tag(settings: dict) -> str:
    """Return settings in a few characters: `4/32`: 4 bits in groups of 32; `+E`: embeddings too."""
    bits = settings.get("bits", {"bfloat16": "bf16", "float16": "fp16"}.get(settings.get("dtype"), ""))
    bits = "mix" if isinstance(bits, dict) else str(settings.get("weights", bits))
    group = f"/{settings['group_size']}" if settings.get("group_size") else ""
    return bits + group + "+E" * settings.get("embeddings", False)


def quality_by_bytes(rows: list[dict]) -> Figure:
    """Draw the paired difference to dense of every format, the smallest file first."""
    compared = core.scored_frame([row for row in quantized_rows(rows) if row["quality"]["difference"]])
    compared = compared.sort_values("size_mb")
    compared["name"] = [
        f"{name_of(row)} · {size:.1f} MB" for row, size in zip(compared["row"], compared["size_mb"])
    ]
    return core.difference_panels(compared)


def name_of(row: dict) -> str:
    """Return a technique with the short form of its settings: `GPTQ 4/128`."""
    return f"{look_of(row['technique'], row['settings']).title} {tag(row['settings'])}".strip()


def speed_figure(rows: list[dict]) -> Figure:
    """Draw time over dense time of every backend: a line of panels per model, one per kind of work."""
    timed = timed_rows(rows)
    models = list(dict.fromkeys(row["model"] for row in timed))
    by_model = {model: [row for row in timed if row["model"] == model] for model in models}
    work = {m: list(dict.fromkeys(name for row in by_model[m] for name in ratios(row))) for m in models}
    columns = max(len(names) for names in work.values())
    figure, axes = core.row_panels([[len(by_model[model])] * columns for model in models], sharex=True)
    for line, model in zip(axes, models, strict=True):
        for axis, shape in zip(line, work[model]):
            frame = core.ratio_frame(by_model[model], shape, [name_of(row) for row in by_model[model]])
            core.ratio_rows(axis, frame)
            axis.tick_params(labelbottom=True, labelleft=axis is line[0])
            axis.set_title(shape_name(shape), fontsize=9, fontweight="normal")
        for axis in line[len(work[model]) :]:
            axis.set_axis_off()
        line[0].set_title(f"{core.short_model(model)}\n{shape_name(work[model][0])}")
    figure.supxlabel(
        "Time / dense time (log, lower is better); grey: what two copies of the dense model differ by",
        fontsize=9,
    )
    return figure


def training_figure(rows: list[dict]) -> Figure:
    """Draw losses of training in floating point beside those on rounded weights; a line per seed."""
    groups = trained_rows(rows)
    figure, axes = plt.subplots(
        len(groups),
        2,
        figsize=(core.WIDTH, 0.4 + 2.4 * len(groups)),
        squeeze=False,
        sharey="row",
        sharex="row",
    )
    for line, (group, by_kind) in zip(axes, groups.items(), strict=True):
        model, _, bits, group_size = group
        scheme = f"{bits} bits" + (f", group size {group_size}" if group_size else "")
        for axis, aware in zip(line, (False, True), strict=True):
            points = [
                {"step": step, "loss": loss, "part": LOSSES[curve][0], "seed": row["seed"]}
                for row in by_kind[aware]
                for curve in LOSSES
                for step, loss in row["achieved"]["curve"].get(curve) or []
            ]
            if points:
                sns.lineplot(
                    pd.DataFrame(points),
                    x="step",
                    y="loss",
                    hue="part",
                    units="seed",
                    estimator=None,
                    ax=axis,
                    palette=dict(LOSSES.values()),
                    lw=1,
                    alpha=0.8,
                    legend=False,
                )
            training = f"rounded to {scheme} in every step" if aware else "in floating point"
            seeds = len(by_kind[aware])
            axis.set_title(f"{core.short_model(model)}\n{training}, {seeds} seed{'s' * (seeds != 1)}")
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.set(xlabel="Step", ylabel="Loss (nats, lower is better)")
    for name, colour in LOSSES.values():
        axes[0][0].plot([], [], color=colour, label=name)
    core.common_legend(figure, axes.flat, columns=2)
    return figure
