"""How rows, metrics, shapes, formats and numbers are written in tables, figures, page and command line."""

from lmcompress import registry
from lmcompress.results.rows import chain_steps
from lmcompress.results.store import Row
from lmcompress.results.verdicts import loss_scale
from lmcompress.stats import TOO_FEW_EXAMPLES

METRIC_NAMES = {  # those whose name in rows is another
    "chrf": "chrF",
    "bleu": "BLEU",
    "spearman": "Spearman's ρ",
    "pearson": "Pearson's r",
    "mae": "MAE",
    "rmse": "RMSE",
    "macro_f1": "macro F1",
    "micro_f1": "micro F1",
    "matthews": "MCC",
    "exact_match": "exact match",
    "accuracy_per_byte": "accuracy per byte",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "cross_entropy": "cross-entropy",
    "bits_per_byte": "bits per byte",
}
METRIC_AXES = {
    "accuracy": "Accuracy (fraction, higher is better)",
    "perplexity": "Perplexity (per token, lower is better)",
    "chrf": "chrF (0 to 100, higher is better)",
    "bleu": "BLEU (0 to 100, higher is better)",
    "spearman": "Spearman correlation (higher is better)",
}
SHAPE_NAMES = {
    f"{call}_b{batch}" if call else f"batch{batch}": f"{call}, batch {batch}".removeprefix(", ")
    for call in ("", "prefill", "decode", "encode")
    for batch in (1, 8)
}
FORMAT_NAMES = {
    "dense": "dense",
    "dense_zstd": "dense + zstd",
    "bitmask": "bitmask + values",
    "csr_int32": "CSR, int32 indices",
    "csr_int64": "CSR, int64 indices",
    "bitmask_integers": "bitmask + packed integers",
}
MODEL_NAMES = {  # of the committed models; others are called by the last part of their name
    "pocket/minilm-sst2": "MiniLM (last blocks tuned)",
    "reference/minilm-sst2": "MiniLM",
    "sentence-transformers/all-MiniLM-L6-v2": "all-MiniLM",
    "pocket/gpt2-pydocs": "GPT-2 (5 M)",
    "pocket/llama-pydocs": "LLaMA (4.5 M)",
    "reference/t5-multi30k-en-de": "T5 (5.5 M)",
    "reference/t5-multi30k-en-fr": "T5 (en→fr)",
}
SECOND_BENCHMARKS = ("reference/t5-multi30k-en-fr",)  # without a column beside the first of their family
CASTS = {"bfloat16": "BF16", "float16": "FP16"}
STUDENTS = {
    "copied": "Copied blocks",
    "random": "Same shape, random weights",
    "narrow": "Narrower, random weights",
    "pruned": "Heads and channels pruned",
}
_BASES = {"mean": "basis of the mean", "stacked": "basis of the stack", "random": "random basis"}
_SWITCHES = {
    "symmetric": "symmetric",
    "act_order": "act-order",
    "activations": "weights and activations",
    "embeddings": "incl. embeddings",
    "all_layers": "incl. embeddings",
}
_METHODS = {"scale_estimation": "scale estimation", "awq": "AWQ", "gptq": "GPTQ"}  # of NNCF


def model_name(model: str) -> str:
    """Return how a model is called in tables and figures."""
    return MODEL_NAMES.get(model, model.rpartition("/")[2])


def metric_name(metric: str) -> str:
    """Return a metric as it is usually written: `chrF`."""
    return METRIC_NAMES.get(metric, metric)


def metric_axis(metric: str) -> str:
    """Return the axis label of a metric, with its unit and which direction is better."""
    return METRIC_AXES.get(metric, metric)


def shape_name(shape: str) -> str:
    """Return a timed shape in words: `decode, batch 8`."""
    return SHAPE_NAMES.get(shape, shape)


def look_of(technique: str, settings: dict | None = None) -> registry.Look:
    """Return title, colour and marker of a technique at its settings; an unknown one is grey.

    A student that no teacher taught is not called distilled, nor is rounding after training called aware of
    it.
    """
    settings = settings or {}
    if technique == "qat" and not settings.get("aware", True):
        technique = "qat-after"
    if technique == "distil" and settings.get("soft_weight") == 0 and not settings.get("matches"):
        technique = "distil-hard"
    return registry.look(technique)


def label_of(row: Row) -> str:
    """Return a row in words, by what was asked: `Magnitude, per layer, 50 % + recovery`."""
    return label(row["technique"], row["settings"])


def label(technique: str, settings: dict) -> str:
    """Return a technique at its settings, in words."""
    if technique == "chain":
        return " → ".join(map(step_label, chain_steps(settings)))
    if technique == "cast":
        return CASTS.get(settings["dtype"], settings["dtype"])
    words = [look_of(technique, settings).title]
    words += [percent(settings["sparsity"])] if "sparsity" in settings else []
    words += [settings["pattern"]] if "pattern" in settings else []
    if settings.get("allocation"):
        words[-1] += " allocated by sensitivity"
    words += student_words(settings) if "student" in settings else _structure_words(settings)
    words += [*grid_words(settings), *rank_words(settings)]
    words += [f"{settings['layers']} blocks, φ {settings['phi']}"] if "phi" in settings else []
    recovery, steps = settings.get("recovery") or {}, (settings.get("training") or {}).get("steps")
    kind = "distillation" if recovery.get("teacher") else "recovery"
    recovered = f" + {kind} ({plural(recovery['steps'], 'step')})" if recovery else ""
    return ", ".join(words) + (f" ({plural(steps, 'step')})" if steps else "") + recovered


def step_label(step: dict) -> str:
    """Return one step of a chain in words."""
    if "recovery" not in step:
        return label(step["technique"], step)
    training = "distillation" if step["recovery"].get("teacher") else "fine-tuning"
    return f"{training} ({plural(step['recovery']['steps'], 'step')})"


def student_words(settings: dict) -> list[str]:
    """Return what was asked of a student and of its training, in words."""
    words, blocks = [STUDENTS[settings["student"]].lower()], settings.get("blocks")
    if blocks is not None:
        words.append(f"{100 * blocks:g} % of the blocks" if isinstance(blocks, float) else f"{blocks} blocks")
    if "width" in settings:
        words.append(f"{100 * settings['width']:g} % of the widths")
    return words + loss_words(settings)


def loss_words(settings: dict) -> list[str]:
    """Return in which respects the loss differs from the usual one: soft labels alone at temperature 4."""
    soft, hard, words = settings.get("soft_weight", 1.0), settings.get("hard_weight", 0.0), []
    if (soft, hard) != (1, 0) and soft:
        words.append(f"{soft:g} × soft + {hard:g} × hard")
    if "temperature" in settings:
        words.append(f"temperature {settings['temperature']:g}")
    if "temperature_schedule" in settings:
        words.append(f"temperature by {settings['temperature_schedule']}")
    if "matches" in settings:
        words.append(settings["matches"].replace("+", " and ") + " matched")
    return words


def _structure_words(settings: dict) -> list[str]:
    """Return what was asked of heads, channels, blocks and tokens, and how they were chosen."""
    dimensions = [("heads", "heads"), ("ffn", "channels"), ("kept_experts", "experts")]
    if "hidden" in settings:  # a target shape
        dimensions += [("hidden", "hidden dimensions"), ("layers", "blocks")]
    words = [
        f"{_count_or_share(settings[name])} of the {title}"
        for name, title in dimensions
        if settings.get(name) is not None
    ]
    if settings.get("adapters"):
        words.append({"lora": "recovered by LoRA", "qlora": "recovered by QLoRA"}[settings["adapters"]])
    if "n_iters" in settings:
        words.append(plural(settings["n_iters"], "iteration"))
    blocks = settings.get("blocks")
    if "blocks" in settings and not isinstance(blocks, list):
        stack = settings.get("stack", "both")
        words.append(f"{_count_or_share(blocks)} of {'each stack' if stack == 'both' else f'the {stack}'}")
    if "experts" in settings:
        words.append(f"{settings['active']} of {settings['experts']}")
        words.append(settings.get("clustering", "balanced-kmeans"))
        words.append(f"router {settings.get('router', 'mlp')}")
    words += ["uneven"] if settings.get("even") is False else []
    words += [f"{settings['loss']} labels"] if settings.get("loss", "task") != "task" else []
    words += ["soft labels"] if settings.get("use_logits") else []
    scored = (settings.get("calibration") or {}).get("scored")
    return words + (["calibrated on the scored text"] if scored else [])


def _count_or_share(amount: float) -> str:
    return percent(amount) if isinstance(amount, float) else str(amount)


def grid_words(settings: dict) -> list[str]:
    """Return what was asked of the numbers that weights are stored as."""
    words = [settings["dtype"]] if "dtype" in settings else []
    bits, group = settings.get("bits"), settings.get("group_size")
    if bits is not None:
        words.append("mixed precision" if isinstance(bits, dict) else f"{bits} bits")
    words += [_METHODS[settings["method"]]] if settings.get("method") in _METHODS else []
    if settings.get("weights", "default") != "default":
        words.append(f"{settings['weights']} weights")
    if group or isinstance(bits, int):
        words.append(f"group size {group}" if group else "per-channel")
    return words + [text for name, text in _SWITCHES.items() if settings.get(name)]


def rank_words(settings: dict) -> list[str]:
    """Return what was asked of low-rank and shared layers."""
    rank, blocks = settings.get("rank"), settings.get("blocks")
    words = [f"{percent(rank)} of the weights" if isinstance(rank, float) else f"rank {rank}"] if rank else []
    words += [_BASES[settings["init"]]] if "init" in settings else []
    words += [f"{settings['recover'].replace('-', ' ')} trained"] if "recover" in settings else []
    words += [f"merged below {settings['threshold']:g}"] if "threshold" in settings else []
    if kinds := settings.get("kinds"):
        words.append({"ffn": "feed-forward"}.get(kinds, kinds) + " only")
    return words + ([f"blocks {', '.join(map(str, blocks))}"] if isinstance(blocks, list) else [])


def percent(fraction: float) -> str:
    """Return a fraction as a whole or one-decimal percentage."""
    scaled = 100 * fraction
    return f"{scaled:.0f} %" if abs(scaled - round(scaled)) < 0.05 else f"{scaled:.1f} %"


def plural(count: float, singular: str, many: str = "") -> str:
    """Return a count with its noun: `1 head`, `2 heads`, `1,500 examples`."""
    return f"{count:,.10g} {singular if count == 1 else many or singular + 's'}"


def number(value: float, metric: str = "") -> str:
    """Return a value in its metric's customary form: accuracies as percent, others to sensible digits."""
    if metric == "accuracy":
        return f"{100 * value:.1f} %"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.2f}" if abs(value) >= 1 else f"{value:.3f}"


def with_interval(interval: dict, metric: str = "") -> str:
    """Return a value with its 95 % interval: `91.2 % [89.1, 93.0]`."""
    if interval["value"] is None:
        return "not defined"
    if interval["low"] is None:
        return f"{number(interval['value'], metric)} ({TOO_FEW_EXAMPLES} for an interval)"
    low, high = (number(interval[end], metric).removesuffix(" %") for end in ("low", "high"))
    return f"{number(interval['value'], metric)} [{low}, {high}]"


def difference(row: Row) -> str:
    """Return the paired difference to the dense model with its interval: `−2.1 pp [−3.0, −1.2]`."""
    change = row["quality"]["difference"]
    return difference_text(change, row["quality"]["metric"]) if change else TOO_FEW_EXAMPLES


def difference_text(change: dict, metric: str) -> str:
    """Return a paired difference with its interval, in points where the metric has them."""
    scale, unit = loss_scale(metric)
    return change_text(*(scale * change[end] for end in ("value", "low", "high")), unit)


def change_text(value: float, low: float, high: float, unit: str) -> str:
    """Return a change in a unit of `verdicts.loss_scale` with its interval: `−1.15 pp [−2.38, +0.04]`."""
    short = {"points": "pp", "of perplexity": "PPL"}.get(unit, unit)
    return f"{signed(value)} {short}".rstrip() + f" [{signed(low)}, {signed(high)}]"


def signed(value: float) -> str:
    """Return a difference with its sign, to sensible digits; what rounds to zero has none."""
    size = abs(value)
    digits = f"{size:,.0f}" if size >= 1000 else f"{size:.1f}" if size >= 10 else f"{size:.2f}"
    return digits if digits == "0.00" else ("−" if value < 0 else "+") + digits


def bytes_text(size: float) -> str:
    """Return bytes as MB (10⁶ bytes)."""
    return f"{size / 1e6:.1f} MB"


def short_machine(name: str) -> str:
    """Return a processor's name without its marks: `Intel Xeon`."""
    return name.replace("(R)", "").replace(" Processor", "")
