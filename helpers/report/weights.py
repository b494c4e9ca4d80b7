"""The section on weight statistics: how large weights are, and how much blocks repeat each other."""

from statistics import fmean

from helpers.report import cards
from helpers.report import rows_weights as weights
from helpers.report import wording as w
from helpers.report.section import Section, drawings

MATRICES = ("original", "consecutive difference", "difference to the mean", "Gaussian of the same shape")


def _own(rows: list[dict]) -> list[dict]:
    return [row for row in rows if row["technique"] == weights.TECHNIQUE]


def findings(rows: list[dict]) -> list[str]:
    """The section's paragraphs, in Markdown, every number from a row."""
    rows = _own(rows)
    return [
        "**How large the weights are.** Each parameter once; fractions are sums of counts over sums of "
        "elements.",
        _overall_table(rows),
        *(_group_table(row) for row in rows),
        "**Tails.** The heaviest of each model, by excess kurtosis (a Gaussian has 0). The heavier the "
        "tail, the more a few "
        "large weights widen the grid that all the others are rounded to; biases and norms, which are not "
        "rounded, are left "
        "out:\n\n" + "\n".join(_tail_sentence(row) for row in rows),
        "**How many directions a matrix needs.** The effective rank is the smallest share of the singular "
        f"values that holds {w.percent(rows[0]['settings']['energy'])} of the energy Σσ²; means over roles.",
        _rank_table(rows),
        "\n".join(f"- {_redundancy_sentence(row)}" for row in rows),
    ]


def summary(rows: list[dict]) -> list[str]:
    """One sentence on whether blocks repeat each other."""
    rows = _own(rows)
    saving = [row["model"] for row in rows if _rank(row, MATRICES[1]) < _rank(row, MATRICES[0])]
    share = w.listing(saving) if saving else "none of them"
    return [
        f"**Redundancy between blocks.** Of {w.plural(len(rows), 'model')}, the difference between "
        "neighbouring blocks needs fewer directions than the matrices themselves in "
        f"{share}{'' if saving else ', so that storing differences would save nothing'}; the largest "
        "similarity (absolute cosine) between two different blocks of any is "
        f"{max(_cosine(row)[0] for row in rows):.2f}."
    ]


def _rank(row: dict, of: str) -> float:
    return fmean(entry["effective_rank"] for entry in row["achieved"]["spectra"] if entry["of"] == of)


def _cosine(row: dict) -> tuple[float, str]:
    """Largest absolute cosine between two different blocks, and the role it belongs to."""
    pairs = [(0.0, "")]
    for entry in row["achieved"]["similarity"]:
        for i, line in enumerate(entry["cosine"]):
            pairs += [
                (abs(c), f"{entry['stack']} {entry['kind']} {entry['role']}")
                for c in line[:i]
                if c is not None
            ]
    return max(pairs)


def _overall_table(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        overall = row["achieved"]["overall"]
        lines.append(
            [
                row["model"],
                f"{overall['n']:,}",
                *(
                    f"{100 * overall[name]:.3g} %"
                    for name in ("fraction_above_0_1", "fraction_above_1", "fraction_zero")
                ),
            ]
        )
    return w.table(["Model", "Parameters", "Above 0.1 in size", "Above 1 in size", "Exact zeros"], lines)


def _group_table(row: dict) -> str:
    lines = []
    for group in row["achieved"]["groups"]:
        name = f"{group['stack'] or ''} {group['kind']}{', biases' if group['is_bias'] else ''}".strip()
        lines.append(
            [
                name,
                f"{group['tensors']}",
                f"{group['n']:,}",
                *(
                    "" if group[field] is None else f"{group[field]:.3g}"
                    for field in (
                        "mean",
                        "std",
                        "std_unweighted",
                        "skewness",
                        "excess_kurtosis",
                        "fraction_above_0_1",
                    )
                ),
            ]
        )
    header = [
        "Group",
        "Tensors",
        "Elements",
        "Mean",
        "Std",
        "Std, tensors alike",
        "Skewness",
        "Excess kurtosis",
        "> 0.1",
    ]
    return w.folded(f"{row['model']} by group", w.table(header, lines))


def _tail_sentence(row: dict) -> str:
    layers = [layer for layer in row["achieved"]["layers"] if layer["kind"] != "norm"]
    outside = {g["kind"] for g in row["achieved"]["groups"]} - {layer["kind"] for layer in layers} - {"norm"}
    groups = layers + [g for g in row["achieved"]["groups"] if g["kind"] in outside and not g["is_bias"]]
    worst = max(
        (group for group in groups if group["excess_kurtosis"] is not None),
        key=lambda weights_group: weights_group["excess_kurtosis"],
    )
    block = f"block {worst['block']:.0f} of " if "block" in worst else ""
    where = f"of {block}the {worst['stack']}" if worst["stack"] else ""
    return f"- {row['model']}: the {worst['kind']} weights {where}, {worst['excess_kurtosis']:.3g}"


def _rank_table(rows: list[dict]) -> str:
    lines = [[row["model"], *(f"{_rank(row, of):.2f}" for of in MATRICES)] for row in rows]
    return w.table(["Model", *(f"{of[0].upper()}{of[1:]}" for of in MATRICES)], lines)


def _redundancy_sentence(row: dict) -> str:
    original, difference, gaussian = (_rank(row, MATRICES[i]) for i in (0, 1, 3))
    word = "fewer directions than" if difference < original else "no fewer directions than"
    cosine, role = _cosine(row)
    return (
        f"**{row['model']}**: the difference between neighbouring blocks needs {word} the matrices "
        f"themselves ({difference:.2f} against {original:.2f}; a random matrix needs {gaussian:.2f}), so "
        f"storing differences {'could save something' if difference < original else 'saves nothing'}. The "
        f"most alike pair of blocks has an absolute cosine of {cosine:.2f} ({role})."
    )


SECTION = Section(
    notebook="01_weight_statistics",
    findings=findings,
    summary=summary,
    cards=lambda rows: [cards.figures(figures, rows) for figures in cards.published()["weights"]],
    drawings=drawings("weights-fractions", "weights-skewness"),
)
