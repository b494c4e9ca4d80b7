"""Fifth floor: figures of weight statistics, drawn from recorded rows alone.

One colour per kind of tensor and one per kind of matrix, the same in every figure.
"""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

TECHNIQUE = "weight-statistics"
KIND_LOOK = {  # kind: (colour, marker)
    "attention": ("#0072B2", "o"),
    "cross-attention": ("#56B4E9", "^"),
    "feed-forward": ("#D55E00", "s"),
    "norm": ("#009E73", "D"),
    "embedding": ("#CC79A7", "v"),
}
MATRIX_LOOK = {
    "original": ("#000000", "o"),
    "consecutive difference": ("#D55E00", "s"),
    "difference to the mean": ("#0072B2", "^"),
    "Gaussian of the same shape": ("#7F7F7F", "x"),
}
ROLES = ("q", "k", "v", "qkv", "o", "gate", "in", "out")
STATISTICS = {
    "mean": "Mean of the weights",
    "std": "Standard deviation of the weights",
    "skewness": "Skewness (0 if symmetric)",
    "excess_kurtosis": "Excess kurtosis (0 if Gaussian)",
    "fraction_above_0_1": "Fraction of weights with |x| > 0.1",
    "fraction_above_1": "Fraction of weights with |x| > 1",
}


def layer_lines(rows: list[dict], statistic: str = "std", *, log: bool = False) -> Figure:
    """One statistic by block, a panel per model, a line per group; dashed lines are the decoder of a pair."""
    rows = _own(rows)
    figure, axes = _panels(len(rows), height=3.4)
    for axis, row in zip(axes, rows, strict=True):
        layers = row["achieved"]["layers"]
        stacks = {layer["stack"] for layer in layers}
        for stack, kind in sorted({(layer["stack"], layer["kind"]) for layer in layers}, reverse=True):
            line = [layer for layer in layers if (layer["stack"], layer["kind"]) == (stack, kind)]
            colour, marker = KIND_LOOK.get(kind, ("#7F7F7F", "."))
            label = f"{stack} {kind}" if len(stacks) > 1 else kind
            dashed = len(stacks) > 1 and stack == "decoder"
            axis.plot(
                [layer["block"] for layer in line],
                [np.nan if layer[statistic] is None else layer[statistic] for layer in line],
                marker=marker, color=colour, ls="--" if dashed else "-", mfc="white" if dashed else colour,
                label=label,
            )  # fmt: skip
        axis.set(title=_short(row["model"]), xlabel="Block")
        axis.xaxis.get_major_locator().set_params(integer=True)
        if log and max(abs(layer[statistic] or 0) for layer in layers) > 10:
            axis.set_yscale("symlog", linthresh=1)
    axes[0].set_ylabel(STATISTICS.get(statistic, statistic))
    _legend(figure, axes)
    return figure


def spectra_figure(rows: list[dict]) -> Figure:
    """Effective rank per role, and how fast the energy gathers, for matrices and differences between blocks."""
    rows = _own(rows)
    figure, axes = _panels(len(rows), height=6.4, lines=2)
    for upper, lower, row in zip(*axes, rows, strict=True):
        spectra = row["achieved"]["spectra"]
        stacks = {entry["stack"] for entry in spectra}
        names = list(dict.fromkeys(_role(entry, stacks) for entry in sorted(spectra, key=_order)))
        for number, (kind, (colour, marker)) in enumerate(MATRIX_LOOK.items()):
            own = [entry for entry in spectra if entry["of"] == kind]
            if not own:
                continue
            x = np.array([names.index(_role(entry, stacks)) for entry in own]) + (number - 1.5) * 0.15
            y = np.array([entry["effective_rank"] for entry in own])
            spans = [y - [entry["low"] for entry in own], [entry["high"] for entry in own] - y]
            upper.errorbar(x, y, yerr=spans, color=colour, marker=marker, ls="", ms=4, label=kind)
            curve = np.mean([entry["curve"] for entry in own], axis=0)
            lower.plot(np.linspace(0, 1, len(curve)), curve, color=colour, label=kind)
        energy = row["settings"]["energy"]
        lower.axhline(energy, color="#7F7F7F", ls=":", lw=1)
        upper.set_xticks(range(len(names)), names, rotation=90 if len(names) > 7 else 0)
        upper.set(title=_short(row["model"]), ylim=(0, 1))
        lower.set(xlabel="Singular values kept (fraction)", xlim=(0, 1), ylim=(0, 1.02))
    axes[0][0].set_ylabel(
        f"Effective rank at {energy:.0%} of the energy\n(fraction; lower compresses better)"
    )
    axes[1][0].set_ylabel("Share of the energy Σσ²\n(mean over roles)")
    _legend(figure, axes[0])
    return figure


def _own(rows: list[dict]) -> list[dict]:
    return [row for row in rows if row["technique"] == TECHNIQUE]


def _short(model: str) -> str:
    return model.rpartition("/")[2]


def _order(entry: dict) -> tuple:
    kinds, role = list(KIND_LOOK), entry["role"]
    return (
        entry["stack"] == "decoder",
        kinds.index(entry["kind"]),
        ROLES.index(role) if role in ROLES else 99,
        role,
    )


def _role(entry: dict, stacks: set[str]) -> str:
    stack = entry["stack"][:3] + " " if len(stacks) > 1 else ""
    return f"{stack}{'cross ' if entry['kind'] == 'cross-attention' else ''}{entry['role']}"


def _panels(count: int, *, height: float, lines: int = 1) -> tuple[Figure, np.ndarray]:
    figure, axes = plt.subplots(
        lines, count, figsize=(max(3.1 * count, 5.0), height), squeeze=False, layout="constrained"
    )
    return figure, axes[0] if lines == 1 else axes


def _legend(figure: Figure, axes: np.ndarray) -> None:
    handles = {label: h for axis in axes for h, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)
