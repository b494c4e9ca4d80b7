"""What every figure shares: the tidy frame with one look per technique, panels, points, forests, heat maps.

Figures are drawn from recorded rows, so that notebooks and report use the same functions. Each is `WIDTH`
inches wide: on a page of 900 pixels a point of type is then 1.4 pixels, and nothing is set below 8 points.
"""

import json
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from lmcompress.results.frame import frame, times
from lmcompress.results.labels import look_of, metric_axis, short_machine, step_label
from lmcompress.results.labels import model_name as short_model
from lmcompress.results.rows import is_dense
from lmcompress.results.rows import machine_of as rows_machine

STYLE_SHEET = Path(__file__).with_name("study.mplstyle")
WIDTH = 9.0  # inches
ROW = 0.19  # inches of height of a named row
GREY, NOISE, DENSE = "#7F7F7F", "#d9d9d9", "#000000"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#000000")
MARGINS = {"1 % margin": (-1, "--"), "5 % margin": (-5, ":")}  # of non-inferiority, in % of the dense quality
BELOW = -100  # % of the dense quality: a forest draws what is lower at its edge
LINEAR = 10  # % of the dense quality up to which a wide axis of differences is linear
RATIO = "Time / dense time (log, lower is better)"
RATIO_TICKS = (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20)
FINE_TICKS = (0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.4, 1.6)
SHORT_NAMES = {
    "magnitude-layer": "magnitude",
    "heads-ffn": "heads+FFN",
    "low-rank": "SVD",
    "low-rank-aware": "SVD, activation-aware",
    "int8-dynamic": "int8 dynamic",
    "smoothquant": "SmoothQuant",
    "drop-blocks": "drop blocks",
    "rtn": "RTN",
    "awq": "AWQ",
    "qat": "QAT",
    "cast": "",
}


def use_style() -> None:
    """Apply the project's style sheet to every figure made from now on."""
    plt.style.use(STYLE_SHEET)


def scored(rows: Iterable[dict]) -> pd.DataFrame:
    """Return the frame of the rows that have a quality, the dense row of a model and task once.

    Columns added to those of `lmcompress.results.frame`: `panel` (model and task), `name` (the technique's
    title), `short` (the configuration in a few characters), `colour`, `marker`, `open` (trained while or
    after compressing), `examples` (trained on), `is_dense`, and `relative`, `relative_low`, `relative_high`:
    the paired difference in % of the dense quality, higher is better for every metric.
    """
    rows = list({row["key"]: row for row in rows if row["quality"]}.values())
    table = looks(frame(rows), rows)
    table["is_dense"] = [is_dense(row) for row in rows]
    table = table[~table["is_dense"] | ~table.duplicated(["model", "task", "is_dense"])]
    numbers = table[["value", "delta", "delta_low", "delta_high"]].astype(float)
    base = table["panel"].map(table[table["is_dense"]].set_index("panel")["value"].astype(float))
    scale = np.where(table["higher_is_better"], 100, -100) / base
    change = numbers["delta"].fillna(numbers["value"] - base)  # too few examples: a difference, no interval
    ends = numbers[["delta_low", "delta_high"]].mul(scale, axis="index")
    return table.assign(
        value=numbers["value"],
        relative=change * scale,
        relative_low=ends.min(axis="columns"),
        relative_high=ends.max(axis="columns"),
    )


def examples_of(settings: dict) -> int:
    """Return how many examples a row's training saw, repeats counted; 0 for one that was not trained."""
    budget = settings.get("recovery") or settings.get("training") or {}
    return budget.get("steps", 0) * budget.get("batch_size", 0)


def looks(table: pd.DataFrame, rows: Sequence[dict]) -> pd.DataFrame:
    """Return a table with a line per row with the look and the names of each row's technique."""
    drawn = [look_of(row["technique"], row["settings"]) for row in rows]
    shorts = Counter(map(short_model, {row["model"] for row in rows}))
    names = {model: short_model(model) for model in {row["model"] for row in rows}}
    names |= {model: model for model, short in names.items() if shorts[short] > 1}
    return table.assign(
        panel=[f"{names[row['model']]}, {row['task']}" for row in rows],
        name=[look.title for look in drawn],
        colour=[look.colour for look in drawn],
        marker=[look.marker for look in drawn],
        open=table["recovered"].astype(bool),
        short=table["recipe"].map(short_recipe),
        examples=[examples_of(row["settings"]) for row in rows],
    )


def timed(rows: Iterable[dict]) -> pd.DataFrame:
    """Return a line per row and shape whose time was taken of the row itself, on the machine in `machine`."""
    rows = list({row["key"]: row for row in rows if row["latency"]}.values())
    table = times(rows)
    by_key = {row["key"]: row for row in rows}
    table = looks(table, [by_key[key] for key in table["key"]])
    table["machine"] = table["machine"].map(short_machine)
    return table[table["timed"].astype(bool) & table["ratio"].notna()]


def machine_of(row: dict) -> str:
    """Return the processor that a row was measured on."""
    return short_machine(rows_machine(row))


def tag(settings: dict) -> str:
    """Return a number format in a few characters: `4-bit g32 +emb`: group size 32, embeddings included."""
    bits = settings.get("bits", {"bfloat16": "BF16", "float16": "FP16"}.get(settings.get("dtype"), ""))
    bits = "mixed bits" if isinstance(bits, dict) else f"{bits}-bit" if isinstance(bits, int) else bits
    group = f"g{settings['group_size']}" if settings.get("group_size") else ""
    weights = settings.get("weights", "")
    flags = {"act_order": "act-order", "embeddings": "+emb", "activations": "calibrated"}
    words = [bits, "" if weights == "default" else weights, group]
    return " ".join(filter(None, [*words, *(text for name, text in flags.items() if settings.get(name))]))


def short_step(step: dict) -> str:
    """Return one step of a recipe in a few characters: `GPTQ 4-bit g128`, `SparseGPT 50%`."""
    if "recovery" in step and "technique" not in step:
        return "distil" if (step["recovery"] or {}).get("teacher") else "fine-tune"
    look = look_of(step["technique"], step)
    title = SHORT_NAMES.get(step["technique"], look.title) if step.get("aware", True) else look.title
    shares = [
        step[name] for name in ("sparsity", "heads", "ffn", "rank") if isinstance(step.get(name), float)
    ]
    percentages = "/".join(f"{100 * share:.0f}" for share in shares) + "%" * bool(shares)
    words = [title, percentages, step.get("pattern"), tag(step)]
    recovery = step.get("recovery")
    after = f" + {short_step({'recovery': recovery})}" if recovery else ""
    return (" ".join(filter(None, words)) or step_label(step)) + after


def short_recipe(recipe: str) -> str:
    """Return a frame's `recipe` in a few characters, with arrows between its steps."""
    return " → ".join(short_step(step) for step in json.loads(recipe))


def panels(count: int, *, columns: int = 3, height: float = 2.7, **shared) -> tuple[Figure, list[Axes]]:
    """Return a figure of `count` panels, `columns` to a line, `height` inches each, and its panels."""
    lines = -(-max(count, 1) // columns)
    size = WIDTH, height * lines + 0.3
    figure, axes = plt.subplots(lines, min(max(count, 1), columns), figsize=size, squeeze=False, **shared)
    for axis in axes.flat[count:]:
        axis.set_axis_off()
    return figure, list(axes.flat[:count])


def legend(figure: Figure, *, columns: int = 4) -> Figure:
    """Put one legend below the figure for all its panels, each label once; a long one makes it taller."""
    handles = {
        label: handle
        for axis in figure.axes
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    if handles:
        width, height = figure.get_size_inches()
        figure.set_size_inches(width, height + 0.2 * -(-len(handles) // columns))
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns)
    return figure


def log_axis(axis: Axes, direction: str = "y") -> None:
    """Set a log scale with plain numbers at its ticks: 20, 50, 100, not powers of ten."""
    axis.set(**{f"{direction}scale": "log"})
    line = getattr(axis, f"{direction}axis")
    low, high = line.get_view_interval()
    narrow = high / low < 6  # a decade's ticks at 1, 2 and 5 would leave one or none
    locator = ticker.MaxNLocator(4) if narrow else ticker.LogLocator(subs=(1, 2, 5), numticks=12)
    line.set_major_locator(ticker.LogLocator(numticks=8) if high / low > 200 else locator)
    line.set_major_formatter(lambda number, _: f"{number:,.10g}")
    line.set_minor_locator(ticker.NullLocator())


def quality_axis(axis: Axes, lines: pd.DataFrame) -> None:
    """Label the y axis with the metric's unit and direction; perplexity's is log, and says so."""
    label = metric_axis(lines["metric"].iloc[0])
    if lines["metric"].iloc[0] == "perplexity":
        log_axis(axis)
        label = label.replace("(per token,", "(log,")
    axis.set_ylabel(label.replace(" (", "\n("))


def difference_axis(axis: Axes, low: float, high: float, direction: str = "x") -> str:
    """Scale an axis of relative differences, draw dense and the margins; return the words of its label.

    An axis that reaches below −60 % is symlog, and its label says so.
    """
    wide, line = low < -60, getattr(axis, f"{direction}axis")
    if wide:
        getattr(axis, f"set_{direction}scale")("symlog", linthresh=LINEAR)
        powers = [10**power for power in range(1, 9) if 10**power <= -low]
        shown = powers[::-1] if len(powers) < 4 else powers[::-2]
        line.set_major_locator(ticker.FixedLocator([*(-power for power in shown), 0]))
        line.set_major_formatter(lambda number, _: f"{number:,.0f}".replace("-", "−"))
        line.set_minor_locator(ticker.NullLocator())
    pad = LINEAR / 2 if wide else 0.04 * (high - low)
    getattr(axis, f"set_{direction}lim")(1.5 * low if wide else low - pad, high + pad)
    draw = axis.axvline if direction == "x" else axis.axhline
    draw(0, color=DENSE, lw=0.9)
    for name, (margin, style) in MARGINS.items():
        draw(margin, color=GREY, ls=style, lw=1, label=name)
    scale = f"; symlog, linear within ±{LINEAR}" if wide else ""
    return f"Δ quality (% of dense, higher is better{scale})"


def points(axis: Axes, lines: pd.DataFrame, x: str, y: str = "value", *, line: bool = True) -> None:
    """Draw `y` over `x` with its interval (`low`, `high`, or `<y>_low`, `<y>_high`), one look per `name`.

    Points are open and their line dashed where the model was trained while or after compressing.
    """
    low, high = ("low", "high") if y == "value" else (f"{y}_low", f"{y}_high")
    lines = lines.astype({low: float, high: float}).dropna(subset=[x, y])
    for (name, is_open), group in lines.groupby(["name", "open"], sort=False):
        group, colour = group.sort_values(x), group["colour"].iloc[0]
        spans = [(group[y] - group[low]).clip(lower=0), (group[high] - group[y]).clip(lower=0)]
        style = "" if not line else "--" if is_open else "-"
        face, label = ("white", f"{name}, trained") if is_open else (colour, name)
        look = {"color": colour, "marker": group["marker"].iloc[0], "mfc": face, "label": label, "ls": style}
        axis.errorbar(group[x], group[y], yerr=spans, elinewidth=1.1, lw=1.3, mew=1.3, **look)


def mark(axis: Axes, point: tuple, x: str, y: float) -> None:
    """Draw a line of a frame, as `itertuples` gives it, at the height `y` with its horizontal interval."""
    names = ("low", "high") if x == "value" else (f"{x}_low", f"{x}_high")
    middle, low, high = np.array(
        [getattr(point, name) for name in (x, *names)], dtype=float
    )  # None: no interval
    spans = np.nan_to_num([[middle - low], [high - middle]]).clip(0)
    look = {"color": point.colour, "marker": point.marker, "mfc": "white" if point.open else point.colour}
    axis.errorbar(middle, y, xerr=spans, elinewidth=1.1, ls="", mew=1.4, ms=5, **look)


def baseline(axis: Axes, lines: pd.DataFrame, x: float) -> None:
    """Draw the dense model as a star at `x` over its shaded interval, and the trivial baseline as a line."""
    for dense in lines[lines["is_dense"]].itertuples():
        if pd.notna(dense.low):
            axis.axhspan(dense.low, dense.high, color=DENSE, alpha=0.1, lw=0, label="Dense, 95 % interval")
        axis.plot(x, dense.value, "*", color=DENSE, ms=11, ls="", label="Dense", zorder=5)
        if pd.notna(dense.floor):
            name = "Trivial baseline (majority class, unigram)"
            axis.axhline(dense.floor, color=GREY, ls=":", lw=1.2, label=name)


def quality_panels(
    table: pd.DataFrame, x: str, xlabel: str, *, dense_at: float, further: int = 0, **style
) -> tuple[Figure, list[Axes]]:
    """Draw quality over `x`, a panel per model and task; returns the figure and `further` empty panels."""
    groups = list(table.groupby("panel", sort=False))
    figure, axes = panels(len(groups) + further)
    for axis, (name, lines) in zip(axes, groups):
        baseline(axis, lines, dense_at)
        points(axis, lines[~lines["is_dense"]], x, **style)
        axis.set(title=name.replace(", ", "\n"), xlabel=xlabel)
        quality_axis(axis, lines)
    return figure, axes[len(groups) :]


def forest(table: pd.DataFrame, *, sort: bool = True) -> Figure:
    """Draw relative differences to dense: a line per `short`, a panel per model and task, all on one axis.

    The first panel holds the bytes of the file written over the dense model's in FP32; `sort`: the smallest
    first. Of several budgets the longest is drawn, so that marks on one line are seeds.
    """
    table = table[~table["is_dense"]]
    table = table[table["examples"] == table.groupby(["panel", "short"])["examples"].transform("max")]
    names = list(dict.fromkeys(table["short"]))
    if sort:
        names = list(table.groupby("short", sort=False)["size_share"].mean().sort_values(kind="stable").index)
    models = list(dict.fromkeys(table["panel"]))
    height = 1.1 + ROW * len(names)
    figure, axes = panels(len(models) + 1, columns=6, height=height, sharey=True)
    _sizes(axes[0], table, names, models)
    ends = table[["relative", "relative_low", "relative_high"]].astype(float).stack()
    for axis, model in zip(axes[1:], models):
        lines = table[table["panel"] == model]
        seeds = lines.groupby("short")["short"]
        offset = 0.22 * (seeds.cumcount() - (seeds.transform("size") - 1) / 2)
        lines = lines.assign(y=lines["short"].map(names.index) + offset)
        for point in lines[lines["relative"] >= BELOW].itertuples():
            mark(axis, point, "relative", point.y)
        for point in lines[lines["relative"] < BELOW].itertuples():
            axis.plot(BELOW, point.y, color=point.colour, marker="<", mfc="white", ms=6)
        words = (textwrap.fill(name, 16 if len(models) < 5 else 12) for name in model.split(", "))
        axis.set_title("\n".join(words))  # of neighbours, none runs into the next
        label = difference_axis(axis, float(np.clip(ends.min(), BELOW, -5)), max(ends.max(), 0))
    axes[0].set_yticks(range(len(names)), names)
    axes[0].set_ylim(len(names) - 0.4, -0.6)
    label += f"\n◁: below {BELOW} %" if table["relative"].min() < BELOW else ""
    axes[1 + (len(models) - 1) // 2].set_xlabel(label.replace("; ", ";\n").replace("-", "−"))
    return legend(figure)


def _sizes(axis: Axes, table: pd.DataFrame, names: list[str], models: list[str]) -> None:
    """Draw the written file over the dense model in FP32, per name and model."""
    for model, colour, marker in zip(models, COLOURS, "os^Dv"):
        share = 100 * table[table["panel"] == model].groupby("short")["size_share"].mean().reindex(names)
        axis.plot(share, range(len(names)), marker, color=colour, ms=4, ls="", label=model)
    axis.axvline(100, color=DENSE, lw=0.9)
    label = "File / dense model in FP32\n(%, lower is better)"
    axis.set(title="Bytes of the\nfile written", xlim=(0, None), xlabel=label)


def noise_floor(axis: Axes, lines: pd.DataFrame) -> None:
    """Shade the widest A/A noise floor of times over dense time on the y axis, and draw the dense time."""
    noise = lines["noise_floor"].max()
    axis.axhspan(1 - noise, 1 + noise, color=NOISE, lw=0, zorder=0, label="A/A noise floor")
    axis.axhline(1, color=DENSE, lw=0.9)


def ratio_panel(axis: Axes, lines: pd.DataFrame, names: list[str]) -> None:
    """Draw time over dense time per `short` in the order of `names`, over each one's shaded A/A noise floor.

    Args:
        lines: lines of `timed`, of one machine; the shapes of one name lie below each other.
    """
    for position, name in enumerate(names):
        shapes = lines[lines["short"] == name].drop_duplicates("shape")
        for top, line in zip(np.arange(len(shapes)) / len(shapes) - 0.5, shapes.itertuples()):
            height = 0.86 / len(shapes)
            middle = position + 0.86 * top + height / 2
            noise = 0.0 if pd.isna(line.noise_floor) else line.noise_floor
            axis.barh(middle, 2 * noise, left=1 - noise, height=height, color=NOISE, lw=0, zorder=0)
            mark(axis, line, "ratio", middle)
    axis.axvline(1.0, color=DENSE, lw=0.8)
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.margins(x=0.12)
    log_axis(axis, "x")
    low, high = axis.get_xlim()
    axis.xaxis.set_major_locator(ticker.FixedLocator(RATIO_TICKS if high > 2 * low else FINE_TICKS))


def curves(axis: Axes, lines: pd.DataFrame, x: str, y: str, **looks: object) -> None:
    """Draw a loss curve per run (column `run`); hue, style, palette and dashes as seaborn takes them."""
    if len(lines):
        sns.lineplot(
            lines, x=x, y=y, units="run", estimator=None, lw=1.1, ax=axis, legend=False, alpha=0.85, **looks
        )


def heat_maps(tables: dict[str, pd.DataFrame], label: str) -> Figure:
    """Draw tables of positive numbers below each other, all on one log scale, with their numbers."""
    numbers = pd.concat([table.stack() for table in tables.values()])
    top = max(numbers.max(), 1e-12)
    norm = LogNorm(max(numbers[numbers > 0].min(), top / 1e4) if (numbers > 0).any() else top / 10, top)
    heights = [0.8 + 0.24 * len(table) for table in tables.values()]
    size = WIDTH, sum(heights) + 0.2
    figure, axes = plt.subplots(len(tables), 1, figsize=size, squeeze=False, height_ratios=heights)
    for axis, (name, table) in zip(axes.flat, tables.items()):
        text = table.map(lambda number: f"{float(f'{number:.2g}'):g}" if number >= 0.01 else "<0.01")
        text = text.where(table.notna(), "")
        look = {"cmap": "cividis", "cbar": False, "linewidths": 0.5, "fmt": "", "annot_kws": {"fontsize": 8}}
        sns.heatmap(table.clip(lower=norm.vmin), ax=axis, norm=norm, annot=text, **look)
        axis.tick_params(rotation=0, length=0)
        axis.grid(False)
        axis.set(title=name, xlabel="", ylabel="")
    bar = figure.colorbar(plt.cm.ScalarMappable(norm, "cividis"), ax=list(axes.flat), label=label, pad=0.01)
    bar.ax.yaxis.set_major_formatter(lambda number, _: f"{number:.10g}")
    bar.ax.yaxis.set_minor_formatter(ticker.NullFormatter())
    return figure
