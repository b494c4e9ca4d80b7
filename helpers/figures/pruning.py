"""Unstructured pruning: quality by sparsity, what a zero is worth in bytes and time, and sensitivity."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from helpers.figures import core
from lmcompress.results.labels import FORMAT_NAMES
from lmcompress.results.rows import dense_of, is_plain, is_recovered

CRITERIA = ("random", "magnitude-layer", "magnitude-global", "wanda", "sparsegpt", "movement")
FORMATS = {  # storage format: (colour, break-even sparsity by arithmetic in fp32)
    "dense_zstd": ("#E69F00", None),
    "bitmask": ("#0072B2", 1 / 32),
    "csr_int32": ("#009E73", 1 / 2),
    "csr_int64": ("#CC79A7", 2 / 3),
}
KERNELS = {  # kernel of one linear layer: (title, colour)
    "dense_fp32": ("dense FP32", "#000000"),
    "dense_bf16": ("dense BF16", "#E69F00"),
    "csr": ("CSR, drop-in", "#009E73"),
    "csr_matmul": ("CSR, product alone", "#CC79A7"),
    "semi_structured": ("2:4, semi-structured", "#56B4E9"),
    "rows_removed": ("rows removed", "#0072B2"),
}


def quality(rows: list[dict]) -> Figure:
    """Draw quality over achieved sparsity, a line per criterion, a panel per model; dashed: trained."""
    pruned = [row for row in rows if row["technique"] in CRITERIA and is_plain(row)]
    dense = [row for row in rows if row["technique"] == "dense" and not is_recovered(row)]
    table = core.scored([*dense, *pruned])
    table = table[table["panel"].isin(table[~table["is_dense"]]["panel"])]
    budget = table.get("settings.recovery.steps", pd.Series(index=table.index, dtype=float)).astype(float)
    longest = budget.groupby(table["panel"]).transform("max")
    table = table[budget.isna() | (budget == longest)]  # one budget of recovery in one line
    xlabel = "Achieved sparsity (fraction\nof prunable weights)"
    figure, _ = core.quality_panels(table, "achieved.sparsity", xlabel, dense_at=0.0)
    return core.legend(figure, columns=3)


def zeros_worth(rows: list[dict]) -> Figure:
    """Draw what a zero saves: bytes by storage encoding, and time of one layer through each kernel."""
    kernels = [row for row in rows if row["technique"] == "kernels"][:1]
    timings = pd.DataFrame([entry for row in kernels for entry in row["achieved"]["timings"]])
    batches = list(timings.sort_values("sparsity").groupby("rows")) if kernels else []
    figure, axes = core.panels(1 + len(batches), height=3.4)
    _encodings(axes[0], rows)
    for axis, (batch, lines) in zip(axes[1:], batches):
        names = lines["kernel"].map(lambda kernel: KERNELS.get(kernel, (kernel, core.GREY)))
        drawn = lines.assign(name=names.str[0], colour=names.str[1], marker="o", open=False)
        core.noise_floor(axis, lines)
        core.points(axis, drawn, "sparsity", "ratio")
        levels = sorted(lines["sparsity"].unique())
        by_arithmetic = [1 - level for level in levels]
        axis.plot(levels, by_arithmetic, color=core.GREY, ls="--", lw=1, label="by arithmetic, 1 − sparsity")
        axis.set(xlabel="Sparsity (fraction\nof this layer's weights)")
        axis.set_title(f"One linear layer, tokens: {batch}\n{core.machine_of(kernels[0])}")
        core.log_axis(axis)
        axis.set_ylabel("Time / time of dense FP32\n(log, lower is better)")
    return core.legend(figure)


def _encodings(axis: Axes, rows: list[dict]) -> None:
    """Draw counted bytes over sparsity; dotted: where the encoding breaks even in FP32."""
    dense = dense_of(row for row in rows if row["memory"])
    pruned = (dense["model"], dense["task"], "magnitude-layer")
    pruned_rows = [row for row in rows if (row["model"], row["task"], row["technique"]) == pruned]
    lines = [
        {"sparsity": row["achieved"].get("sparsity", 0.0), **row["memory"]["formats"]}
        for row in [dense, *pruned_rows]
        if row["memory"] and is_plain(row) and not is_recovered(row)
    ]
    table = pd.DataFrame(lines).drop_duplicates("sparsity").sort_values("sparsity")
    whole = dense["memory"]["formats"]["dense"]
    for name, (colour, break_even) in FORMATS.items():
        if name in table:
            axis.plot(table["sparsity"], table[name] / whole, "o-", color=colour, label=FORMAT_NAMES[name])
            axis.axvline(break_even or 0, color=colour, ls=":", lw=1.2 if break_even else 0)
    axis.axhline(1.0, color=core.DENSE, lw=0.9)
    axis.set_title(f"Whole model, by arithmetic\n{core.short_model(dense['model'])}")
    axis.set(xlabel="Achieved sparsity (fraction\nof prunable weights)")
    axis.set_ylabel("Counted bytes / dense FP32\n(lower is better; not files written)")


SCANS = {"sensitivity": "{:.0%} pruned", "sensitivity-bits": "{} bits"}


def sensitivity(rows: list[dict]) -> Figure:
    """Draw how far the outputs move when one layer is pruned or quantized, levels down, layers across."""
    tables: dict[str, list[pd.DataFrame]] = {}
    for row in sorted((row for row in rows if row["technique"] in SCANS), key=lambda row: row["technique"]):
        scan = row["achieved"]
        level_names = [SCANS[row["technique"]].format(level) for level in scan["levels"]]
        table = pd.DataFrame(scan["change"], index=level_names) * 1e3
        table = table[sorted(table, key=lambda name: name.startswith("decoder"))]  # behind its encoder
        several = len({name.partition(".")[0] for name in table}) > 1
        tables.setdefault(core.short_model(row["model"]), []).append(
            table.rename(columns=lambda name, several=several: _layer(name, several))
        )
    merged = {model: pd.concat(parts) for model, parts in tables.items()}
    return core.heat_maps(
        merged, "KL divergence of the outputs\n(thousandths of a nat, log, lower is better)"
    )


def _layer(name: str, several: bool) -> str:
    """Return `0 attn` of `encoder.0.attention`, with the stack in front where there are `several`."""
    stack, block, kind = name.split(".")
    kind = {"attention": "attn", "cross-attention": "cross", "feed-forward": "FFN"}.get(kind, kind)
    return f"{stack[:3]} {block}\n{kind}" if several else f"{block}\n{kind}"
