"""How an option, and a decision among options, become words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmcompress.results.labels import FORMAT_NAMES, bytes_text, shape_name

if TYPE_CHECKING:
    from lmcompress.study.decision import Budget, Decision, Option


NIL = 0.005  # what is less than this of the unit is written as 0.00: no gain to speak of


def loss_text(option: Option) -> str:
    """`loses 0.57 points, at worst 1.74`, or `is better by 0.02 of perplexity, at worst loses 0.01`.

    With what it costs the likelihood of the right answers, where an interval shows it: `; bits per byte from
    0.617 to 0.625`.
    """
    if option.baseline:
        return "the dense model itself"
    verbs = ["loses" if value > -NIL else "is better by" for value in (option.loss, option.loss_high)]
    again = f"{verbs[1]} " if verbs[0] != verbs[1] else ""
    lost = f"; {option.less_likely}" if option.less_likely else ""
    return (
        f"{verbs[0]} {abs(option.loss):.2f} {option.unit}, at worst {again}{abs(option.loss_high):.2f}{lost}"
    )


def size_text(option: Option) -> str:
    """Bytes, and the form they are stored in where the plain file is larger."""
    if option.bytes is None:
        return "not measured"
    form = "" if option.form == "dense" else f", {FORMAT_NAMES[option.form]}"
    return bytes_text(option.bytes) + form


def described(option: Option, budget: Budget) -> str:
    """`GPTQ, 4 bits (8.5 MB, 3.1 ms at decode, batch 1; loses 0.12 of perplexity, at worst 0.15)`."""
    ms = option.ms.get(budget.shape)
    time = f", {ms:.1f} ms at {shape_name(budget.shape)}" if ms is not None else ""
    if budget.max_peak is not None and option.peak is not None:
        time += f", {option.peak / 1e6:.0f} MB of memory"
    return f"{option.name} ({size_text(option)}{time}; {loss_text(option)})"


def explain(decision: Decision, budget: Budget, *, count: int) -> str:
    """The decision in sentences: what, why, and from how many; or what came nearest."""
    if decision.chosen:
        text = (
            f"use {described(decision.chosen, budget)}. {len(decision.fitting)} of {count} measured ways fit"
        )
        if len(decision.tied) > 1:
            cheapest = "fastest" if budget.shape and budget.max_bytes is None else "smallest"
            all_of_them = len(decision.tied) == len(decision.fitting)
            tie = "" if all_of_them else f"{len(decision.tied)} cannot be told from the best of them, and "
            text += f"; {tie}this is the {cheapest} of {'them' if all_of_them else 'those'}"
        return text + "."
    text = f"nothing measured fits, of {count} ways."
    if decision.least_loss:
        text += f" Least loss within the cost: {described(decision.least_loss, budget)}."
    if decision.least_cost:
        text += f" Least cost within the loss: {described(decision.least_cost, budget)}."
    return text
