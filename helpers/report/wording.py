"""How numbers become words: one place that formats a value, an interval, a difference and a verdict.

A sentence says "no measurable change" when, after Holm's correction over all comparisons of its model and
task, the paired difference to the dense model could be chance.
"""

from collections.abc import Callable
from statistics import NormalDist

from helpers.plots import look
from helpers.plots import metric_name as metric_name
from helpers.plots_distillation import student_words
from helpers.stats import holm

ALPHA = 0.05
COARSE = 0.02  # below this, too few of a thousand resamples stand behind a bootstrap's p
PERCENT = {"accuracy"}
POINTS = {"accuracy", "spearman"}  # whose differences are told in hundredths, called points
WORDS = ("better", "no measurable difference", "worse")
SHOWN = 4  # lines of a list that is printed whole
UNITS = {"perplexity": "of perplexity", "chrf": "chrF", "bleu": "BLEU"}
_SHAPE = {True: (("hidden", "hidden dimensions"), ("layers", "blocks"))}  # of a target shape


def number(value: float, metric: str = "") -> str:
    """A value in its metric's customary form: accuracies as percent, others to sensible digits."""
    if metric in PERCENT:
        return f"{100 * value:.1f} %"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.2f}" if abs(value) >= 1 else f"{value:.3f}"


def with_interval(part: dict, metric: str = "") -> str:
    """`91.2 % [89.1, 93.0]` from a value with its 95 % interval."""
    if part["value"] is None:
        return "not defined"
    low, high = (number(part[end], metric).removesuffix(" %") for end in ("low", "high"))
    return f"{number(part['value'], metric)} [{low}, {high}]"


def difference(row: dict) -> str:
    """`−2.1 points [−3.0, −1.2]`: the paired difference to the dense model with its interval."""
    return difference_text(row["quality"]["difference"], row["quality"]["metric"])


def difference_text(part: dict, metric: str) -> str:
    """A paired difference with its interval, in points where the metric is a fraction or a correlation."""
    scale, unit = scale_of(metric)
    name = " points" if unit == "points" else ""
    texts = [_signed(scale * part[field]) for field in ("value", "low", "high")]
    return f"{texts[0]}{name} [{texts[1]}, {texts[2]}]"


def scale_of(metric: str) -> tuple[float, str]:
    """What a difference of a metric is multiplied by, and the unit it then has."""
    return (100.0, "points") if metric in POINTS else (1.0, UNITS.get(metric, metric))


def _signed(value: float) -> str:
    text = (
        f"{abs(value):,.0f}"
        if abs(value) >= 1000
        else f"{abs(value):.1f}"
        if abs(value) >= 10
        else f"{abs(value):.2f}"
    )
    return ("−" if value < 0 else "+") + text


def bytes_text(size: float) -> str:
    """Bytes as MB (10⁶ bytes)."""
    return f"{size / 1e6:.1f} MB"


def percent(fraction: float) -> str:
    """A fraction as a whole or one-decimal percentage."""
    scaled = 100 * fraction
    return f"{scaled:.0f} %" if abs(scaled - round(scaled)) < 0.05 else f"{scaled:.1f} %"


def name_of(row: dict) -> str:
    """`Magnitude, per layer, 50 % + recovery`: a row in words, by what was asked."""
    return named(row["technique"], row["settings"])


def named(technique: str, settings: dict) -> str:
    """A technique at its settings, in words."""
    if technique == "chain":
        return " → ".join(map(step_words, settings["steps"]))
    text = look(technique, settings)[0]
    if "sparsity" in settings:
        text += f", {percent(settings['sparsity'])}"
    if "pattern" in settings:
        text += f", {settings['pattern']}"
    if settings.get("allocation"):
        text += " allocated by sensitivity"
    words = student_words(settings) if "student" in settings else _structure_words(settings)
    text += "".join(f", {one}" for one in (*words, *grid_words(settings), *rank_words(settings)))
    recovery = settings.get("recovery") or {}
    taught = ", taught by the dense model" if recovery.get("teacher") else ""
    return text + (f" + recovery{taught}" if recovery else "")


def step_words(step: dict) -> str:
    """One step of a chain, in words."""
    if "recovery" in step:
        how = "distillation" if step["recovery"].get("teacher") else "fine-tuning"
        steps = step["recovery"]["steps"]
        return f"{how} ({steps} step{'' if steps == 1 else 's'})"
    return named(step["technique"], step)


def _structure_words(settings: dict) -> list[str]:
    """What was asked of heads, channels, blocks and words, and how they were chosen."""
    words = [
        f"{percent(kept) if isinstance(kept, float) else kept} of the {what}"
        for part, what in (("heads", "heads"), ("ffn", "channels"), *_SHAPE.get("hidden" in settings, ()))
        if (kept := settings.get(part)) is not None
    ]
    if settings.get("adapters"):
        words.append({"lora": "recovered by LoRA", "qlora": "recovered by QLoRA"}[settings["adapters"]])
    if "n_iters" in settings:
        words.append("1 iteration" if settings["n_iters"] == 1 else f"{settings['n_iters']} iterations")
    if "blocks" in settings and not isinstance(settings["blocks"], list):
        where = "each stack" if settings.get("stack", "both") == "both" else f"the {settings['stack']}"
        gone = settings["blocks"]
        words.append(f"{percent(gone) if isinstance(gone, float) else gone} of {where}")
    if "experts" in settings:
        words += [
            f"{settings['active']} of {settings['experts']}",
            settings.get("clustering", "balanced-kmeans"),
        ]
        words.append(f"router {settings.get('router', 'mlp')}")
    if settings.get("even") is False:
        words.append("uneven")
    if settings.get("loss", "task") != "task":
        words.append(f"{settings['loss']} labels")
    if settings.get("use_logits"):
        words.append("soft labels")
    if (settings.get("calibration") or {}).get("scored"):
        words.append("calibrated on the scored text")
    return words


def grid_words(settings: dict) -> list[str]:
    """What was asked of the numbers that weights are stored as."""
    words = [settings["dtype"]] if "dtype" in settings else []
    bits, group = settings.get("bits"), settings.get("group_size")
    if bits is not None:
        words.append("mixed bits" if isinstance(bits, dict) else f"{bits} bits")
    if settings.get("weights", "default") != "default":
        words.append(f"{settings['weights']} weights")
    if group or isinstance(bits, int):
        words.append(f"groups of {group}" if group else "per row")
    named = {"symmetric": "symmetric", "act_order": "largest inputs first", "activations": "inputs too",
             "embeddings": "embeddings too"}  # fmt: skip
    return words + [text for name, text in named.items() if settings.get(name)]


def rank_words(settings: dict) -> list[str]:
    """What was asked of low-rank and shared maps."""
    rank, blocks = settings.get("rank"), settings.get("blocks")
    words = [f"{percent(rank)} of the weights" if isinstance(rank, float) else f"rank {rank}"] if rank else []
    bases = {"mean": "basis of the mean", "stacked": "basis of the stack", "random": "random basis"}
    words += [bases[settings["init"]]] if "init" in settings else []
    words += [f"{settings['recover'].replace('-', ' ')} trained"] if "recover" in settings else []
    words += [f"merged below {settings['threshold']:g}"] if "threshold" in settings else []
    if kinds := settings.get("kinds"):
        words.append({"ffn": "feed-forward"}.get(kinds, kinds) + " only")
    return words + ([f"blocks {', '.join(map(str, blocks))}"] if isinstance(blocks, list) else [])


def tested_p(difference: dict) -> float:
    """The p of a recorded difference, fine enough to be corrected over dozens of comparisons.

    A bootstrap of a thousand resamples cannot tell 0.001 from less. Where its p is below `COARSE`, that of the normal
    curve with the width of the interval is taken.
    """
    if difference["p"] >= COARSE or "bootstrap" not in difference["test"]:
        return difference["p"]
    spread = (difference["high"] - difference["low"]) / (2 * NormalDist().inv_cdf(0.975))
    return 2 * NormalDist().cdf(-abs(difference["value"]) / spread) if spread else difference["p"]


def adjusted(rows: list[dict]) -> dict[str, tuple[float, str]]:
    """Per row key: Holm-adjusted p over these rows' comparisons with dense, and the verdict it leads to."""
    compared = [row for row in rows if row["quality"] and row["quality"]["difference"]]
    values = [tested_p(row["quality"]["difference"]) for row in compared]
    return {row["key"]: (p, _verdict(row, p)) for row, p in zip(compared, holm(values), strict=True)}


def comparisons(
    rows: list[dict], pair: tuple[str, str], keep: Callable[[dict], bool] = lambda found: True
) -> list[tuple[dict, float, str]]:
    """The tested differences between two ways on one model and task: `achieved`, Holm-adjusted p, and a word.

    The word is "better", "worse" or "no measurable difference", of the first against the second. `keep` chooses the
    family of comparisons that Holm's correction is over. "keys" holds the keys of both rows.
    """
    own = [
        r["achieved"] | {"keys": r["settings"]}
        for r in rows
        if r["technique"] == "paired-difference" and (r["model"], r["task"]) == pair
    ]
    own = [found for found in own if found["difference"] and keep(found)]
    adjusted_p = holm([tested_p(found["difference"]) for found in own])
    return [(found, p, _direction(found, p)) for found, p in zip(own, adjusted_p, strict=True)]


def _direction(found: dict, p: float) -> str:
    if p >= ALPHA:
        return "no measurable difference"
    return "better" if (found["difference"]["value"] > 0) == found["higher_is_better"] else "worse"


def _verdict(row: dict, p: float) -> str:
    quality = row["quality"]
    if quality["collapsed"]:
        return "collapsed"
    if p >= ALPHA:
        return "no measurable change"
    return "better" if (quality["difference"]["value"] > 0) == quality["higher_is_better"] else "worse"


def p_text(p: float) -> str:
    """`p < 0.001` or `p = 0.032`."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def table(header: list[str], lines: list[list[str]]) -> str:
    """A Markdown table."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def listing(items: list[str]) -> str:
    """`a, b and c`."""
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


def plural(count: float, one: str, many: str = "") -> str:
    """`1 head`, `2 heads`, `1,500 examples`."""
    return f"{count:,.10g} {one if count == 1 else many or one + 's'}"


def tally(words: list[str], order: tuple[str, ...] = WORDS) -> str:
    """`2 better and 5 no measurable difference`: how often each word came out, those of `order` first."""
    known = [word for word in dict.fromkeys((*order, *words)) if word in words]
    return listing([f"{words.count(word)} {word}" for word in known])


def folded(title: str, body: str) -> str:
    """A part that is read by who asks for it."""
    return f"<details><summary>{title}</summary>\n\n{body}\n\n</details>"


def tested_list(title: str, entries: list[tuple[str, list[str]]]) -> str:
    """Tested differences, a line and its words each: counted, those that are measurable shown, the others folded away."""
    if not entries:
        return ""
    if len(entries) <= SHOWN:
        return f"{title}:\n\n" + "\n".join(line for line, _ in entries)
    words = [word for _, several in entries for word in several]
    still = [line for line, several in entries if set(several) <= {WORDS[1]}]
    shown = [line for line, several in entries if not set(several) <= {WORDS[1]}]
    count = plural(len(words), "test")
    text = (
        f"{title}, {count}: {tally(words)}."
        if shown
        else f"{title}: none of {count} shows a measurable difference."
    )
    text += "\n\n" + "\n".join(shown) if shown else ""
    fold = folded(f"{plural(len(still), 'comparison')} without a measurable difference", "\n".join(still))
    return f"{text}\n\n{fold}" if still else text


def unnoticed(rows: list[dict], verdicts: dict) -> list[dict]:
    """The rows a summary may recommend: no loss after Holm's correction, nor in the interval of the one difference.

    The correction alone would let pass, in a large family of comparisons, losses that their own interval shows.
    """
    kept = []
    for row in rows:
        word, difference = verdicts.get(row["key"], (1, ""))[1], row["quality"]["difference"]
        spared = difference["high"] if row["quality"]["higher_is_better"] else -difference["low"]
        if word == "better" or (word == "no measurable change" and spared >= 0):
            kept.append(row)
    return kept
