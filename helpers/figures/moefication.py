"""MoEfication: quality over the active share of the feed-forward, and the time that was measured."""

from matplotlib.figure import Figure

from helpers.figures import core
from lmcompress.results.labels import shape_name

CLUSTERINGS = {"balanced-kmeans": "#0072B2", "co-activation": "#D55E00", "random": "#8C6D31"}
ROUTERS = {"oracle": "D", "mlp": "o", "centroid": "^"}


def quality_and_time(rows: list[dict]) -> Figure:
    """Draw quality over FFN FLOPs, a panel per model with several, and time over dense time by shape."""
    experts = [row for row in rows if row["technique"] == "moefy"]
    pruned = [row for row in rows if row["technique"] == "heads-ffn" and row["settings"].get("heads") is None]
    dense = [row for row in rows if row["technique"] == "dense"]
    table = core.scored([*dense, *experts, *pruned])
    table = table[table["is_dense"] | (table["technique"] != "dense")]
    share = table["achieved.ffn_flops_share"]
    if "settings.ffn" in table:
        share = share.fillna(table["settings.ffn"])
    moefied = table["technique"] == "moefy"
    names = table["settings.clustering"] + " clustering, " + table["settings.router"] + " router"
    table = table.assign(
        share=share,
        name=names.where(moefied, "channels pruned for all tokens"),
        colour=table["settings.clustering"].map(CLUSTERINGS).where(moefied, table["colour"]),
        marker=table["settings.router"].map(ROUTERS).where(moefied, table["marker"]),
    )
    levels = table[moefied].groupby("panel")["share"].nunique()
    table = table[table["panel"].map(levels).fillna(0) > min(1, levels.max() - 1)]
    times = core.timed(experts)
    timed_models = list(times.groupby(["model", "machine"], sort=False))
    xlabel = "FFN and router FLOPs / dense\n(lower is better)"
    figure, axes = core.quality_panels(table, "share", xlabel, dense_at=1.0, further=len(timed_models))
    for axis, ((model, machine), lines) in zip(axes, timed_models):
        active = lines["settings.active"].astype(int).astype(str)
        experts_used = active + " of " + lines["settings.experts"].astype(int).astype(str)
        lines = lines.assign(short=lines["shape"].map(shape_name) + "\n" + experts_used)
        core.ratio_panel(axis, lines, list(dict.fromkeys(lines["short"])))
        axis.set(title=f"{core.short_model(model)}\n{machine}", xlabel=core.RATIO.replace(" (", "\n("))
    return core.legend(figure, columns=2)
