"""Sentences on blocks and words removed, for the structured section."""

from helpers.report import wording as w
from lmcompress.results.rows import is_recovered, model_task_of


def size(row: dict) -> int:
    """Bytes of the weight file of a row's model."""
    return row["memory"]["file_bytes"]


def share(row: dict, dense: dict) -> str:
    """Those bytes relative to the dense file, as a percentage."""
    return w.percent(size(row) / size(dense))


def influence_sentence(rows: list[dict], model_task: tuple[str, str]) -> str:
    """Which block of each stack turns the hidden states least and most."""
    row = next(
        (r for r in rows if r["technique"] == "block-influence" and model_task_of(r) == model_task), None
    )
    if not row:
        return ""
    phrases = []
    for stack, figures in row["achieved"]["influence"].items():
        order = sorted(range(len(figures)), key=figures.__getitem__)
        low, high = order[0], order[-1]
        phrases.append(
            f"in the {stack} {figures[low]:.3f} (block {low}) to {figures[high]:.3f} (block {high})"
        )
    return (
        "**Influence** of a block, the mean of 1 − cos of what enters and leaves it (the least goes first): "
        + "; ".join(phrases)
        + "."
    )


def replacement_sentence(rows: list[dict], model_task: tuple[str, str]) -> str:
    """How often another block stood in better than none."""
    phrases = []
    for row in (r for r in rows if r["technique"] == "block-replacement" and model_task_of(r) == model_task):
        achieved = row["achieved"]
        better = [
            sum(value < achieved["null"][i] for j, value in enumerate(line) if j != i)
            for i, line in enumerate(achieved["replaced"])
        ]
        blocks = len(achieved["null"])
        phrases.append(
            f"in the {row['settings']['stack']} another block stood in better than none in {sum(better)} of "
            f"{w.plural(blocks * (blocks - 1), 'case')} (loss {achieved['dense']:.2f} dense, "
            f"{min(achieved['null']):.2f} to {max(achieved['null']):.2f} with one block gone)"
        )
    return "**Replacement**: " + "; ".join(phrases) + "." if phrases else ""


def depth_sentence(compressed: list[dict], verdicts: dict, dense: dict) -> str:
    """What dropped blocks cost, before and after recovery, beside the control."""
    dropped = [row for row in compressed if row["technique"] == "drop-blocks"]
    phrases = []
    for row in sorted(dropped, key=lambda r: (-size(r), is_recovered(r))):
        removed = w.listing(
            [
                f"{stack} {'block' if len(blocks) == 1 else 'blocks'} "
                f"{w.listing([str(block) for block in blocks])}"
                for stack, blocks in row["achieved"]["dropped"].items()
                if blocks
            ]
        )
        steps = (
            f", {w.plural(row['settings']['recovery']['steps'], 'step')} of recovery"
            if is_recovered(row)
            else ""
        )
        phrases.append(
            f"without {removed}{steps}, {share(row, dense)} of the bytes, {verdicts[row['key']][1]} "
            f"({w.difference(row)}, {w.p_text(verdicts[row['key']][0])})"
        )
    control = next((row for row in compressed if row["technique"] == "dense" and is_recovered(row)), None)
    note = (
        f" The control, the dense model given as many steps: {verdicts[control['key']][1]} "
        f"({w.difference(control)})."
        if control and phrases
        else ""
    )
    return "**Blocks dropped** by influence: " + "; ".join(phrases) + "." + note if phrases else ""


def vocabulary_sentence(compressed: list[dict], verdicts: dict, dense: dict) -> str:
    """How many words stayed, and what that cost and saved."""
    row = next((row for row in compressed if row["technique"] == "vocabulary"), None)
    if not row:
        return ""
    achieved = row["achieved"]
    return (
        f"**Vocabulary.** Of {achieved['vocabulary_before']:,} tokens {achieved['vocabulary']:,} stayed "
        f"({achieved['tokens_seen']:,} seen in {row['settings']['calibration']['n']:,} training texts): "
        f"{share(row, dense)} of the bytes, {verdicts[row['key']][1]} ({w.difference(row)}, "
        f"{w.p_text(verdicts[row['key']][0])})."
    )
