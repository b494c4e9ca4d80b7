"""What rows are called: a technique at its settings, in words."""

from helpers.figures.core import look
from helpers.figures.distillation import student_words

_SHAPE = {True: (("hidden", "hidden dimensions"), ("layers", "blocks"))}  # of a target shape


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


def percent(fraction: float) -> str:
    """A fraction as a whole or one-decimal percentage."""
    scaled = 100 * fraction
    return f"{scaled:.0f} %" if abs(scaled - round(scaled)) < 0.05 else f"{scaled:.1f} %"
