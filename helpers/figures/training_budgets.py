"""What longer training changes: a configuration at each budget, beside the dense model given the same."""

from collections import Counter

import pandas as pd
from matplotlib.figure import Figure

from helpers.figures import core


def several(rows: list[dict]) -> bool:
    """Return whether anything was trained at two budgets or more."""
    return not _lines(rows).empty


def training(rows: list[dict]) -> Figure:
    """Draw the difference to dense over the examples trained on, a panel per model, a line per configuration.

    Drawn is what was trained at two budgets or more; untrained it stands at the left.
    """
    groups = list(_lines(rows).groupby("panel", sort=False))
    figure, axes = core.panels(len(groups), columns=2, height=3.2)
    for axis, (panel, lines) in zip(axes, groups):
        budgets = sorted(lines["examples"].unique())
        drawn = Counter()  # lines of one technique: of different levels, in different strokes
        for of, line in lines.groupby("of", sort=False):
            line = line.sort_values("examples")
            name, colour, marker = line[["name", "colour", "marker"]].iloc[0]
            again = drawn[name] > 0
            drawn[name] += 1
            look = {"color": colour, "marker": marker, "ms": 5, "mew": 1.2, "ls": "--" if again else "-"}
            look |= {"mfc": "white"} if again else {}
            spans = [line["relative"] - line["relative_low"], line["relative_high"] - line["relative"]]
            places = line["examples"].map(budgets.index)
            axis.errorbar(places, line["relative"], yerr=[s.clip(lower=0) for s in spans], label=of, **look)
        low = max(lines["relative_low"].min(), -20)  # so that what the margins divide is seen
        label = core.difference_axis(axis, low, lines["relative_high"].max(), "y")
        axis.set(title=panel, ylabel=label, xlabel="Examples trained on")
        axis.set_xticks(range(len(budgets)), [f"{count:,}" if count else "none" for count in budgets])
    return core.legend(figure, columns=2)


def _lines(rows: list[dict]) -> pd.DataFrame:
    """Return the scored rows of what was trained at several budgets; `of` says what each is of."""
    table = core.scored(rows)
    of = table["label"].str.replace(r"( \+ recovery)? \([\d,]+ steps?\)$", "", regex=True)
    table = table.assign(of=of)
    table.loc[table["is_dense"], ["relative", "relative_low", "relative_high"]] = 0.0
    trained = table[table["examples"] > 0].groupby(["panel", "of"])["examples"].nunique()
    return table[pd.MultiIndex.from_frame(table[["panel", "of"]]).isin(trained[trained > 1].index)]
