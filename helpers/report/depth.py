"""Sentences on blocks and words removed, for the structured section."""

from helpers.report import wording as w
from lmcompress.results.rows import is_recovered, model_task_of


def size(row: dict) -> int:
    """Bytes of the weight file of a row's model."""
    return row["memory"]["file_bytes"]


def share(row: dict, dense: dict) -> str:
    """Those bytes relative to the dense file, as a percentage."""
    return w.percent(size(row) / size(dense))


def influence_sentence(rows: list[dict], pair: tuple[str, str]) -> str:
    """Which block of each stack turns the hidden states least and most."""
    row = next((r for r in rows if r["technique"] == "block-influence" and model_task_of(r) == pair), None)
    if not row:
        return ""
    parts = []
    for stack, figures in row["achieved"]["influence"].items():
        order = sorted(range(len(figures)), key=figures.__getitem__)
        low, high = order[0], order[-1]
        parts.append(f"in the {stack} {figures[low]:.3f} (block {low}) to {figures[high]:.3f} (block {high})")
    return (
        "**Influence** of a block, the mean of 1 − cos of what enters and leaves it (the least goes first): "
        + "; ".join(parts)
        + "."
    )


def replacement_sentence(rows: list[dict], pair: tuple[str, str]) -> str:
    """How often another block stood in better than none."""
    parts = []
    for row in (r for r in rows if r["technique"] == "block-replacement" and model_task_of(r) == pair):
        made = row["achieved"]
        better = [
            sum(value < made["null"][i] for j, value in enumerate(line) if j != i)
            for i, line in enumerate(made["replaced"])
        ]
        blocks = len(made["null"])
        parts.append(
            f"in the {row['settings']['stack']} another block stood in better than none in {sum(better)} of "
            f"{w.plural(blocks * (blocks - 1), 'case')} (loss {made['dense']:.2f} dense, {min(made['null']):.2f} to "
            f"{max(made['null']):.2f} with one block gone)"
        )
    return "**Replacement**: " + "; ".join(parts) + "." if parts else ""


def depth_sentence(others: list[dict], verdicts: dict, dense: dict) -> str:
    """What dropped blocks cost, before and after recovery, beside the control."""
    own = [row for row in others if row["technique"] == "drop-blocks"]
    parts = []
    for row in sorted(own, key=lambda r: (-size(r), is_recovered(r))):
        gone = w.listing(
            [
                f"{stack} {'block' if len(ones) == 1 else 'blocks'} {w.listing([str(one) for one in ones])}"
                for stack, ones in row["achieved"]["dropped"].items()
                if ones
            ]
        )
        steps = (
            f", {w.plural(row['settings']['recovery']['steps'], 'step')} of recovery"
            if is_recovered(row)
            else ""
        )
        parts.append(
            f"without {gone}{steps}, {share(row, dense)} of the bytes, {verdicts[row['key']][1]} "
            f"({w.difference(row)}, {w.p_text(verdicts[row['key']][0])})"
        )
    control = next((row for row in others if row["technique"] == "dense" and is_recovered(row)), None)
    note = (
        f" The control, the dense model given as many steps: {verdicts[control['key']][1]} ({w.difference(control)})."
        if control and parts
        else ""
    )
    return "**Blocks dropped** by influence: " + "; ".join(parts) + "." + note if parts else ""


def vocabulary_sentence(others: list[dict], verdicts: dict, dense: dict) -> str:
    """How many words stayed, and what that cost and saved."""
    row = next((row for row in others if row["technique"] == "vocabulary"), None)
    if not row:
        return ""
    found = row["achieved"]
    return (
        f"**Vocabulary.** Of {found['vocabulary_before']:,} tokens {found['vocabulary']:,} stayed "
        f"({found['tokens_seen']:,} seen in {row['settings']['calibration']['n']:,} training texts): "
        f"{share(row, dense)} of the bytes, {verdicts[row['key']][1]} ({w.difference(row)}, "
        f"{w.p_text(verdicts[row['key']][0])})."
    )
