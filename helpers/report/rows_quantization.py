"""Rows that the section of quantization asks for."""

from lmcompress.results.rows import is_timed, model_task_of

LOSSES = {"train": ("training", "#0072B2"), "validation": ("validation", "#D55E00")}


def quantized_rows(rows: list[dict]) -> list[dict]:
    """Return the rows of a model that was scored and is not the dense one as it was given."""
    return [row for row in rows if row["quality"] and row["technique"] != "dense"]


def timed_rows(rows: list[dict]) -> list[dict]:
    """Return the rows whose time was measured itself, and not taken from a row of the same shapes."""
    return [row for row in quantized_rows(rows) if is_timed(row)]


def ratios(row: dict) -> dict[str, dict]:
    """Return the shapes of a row that were timed against the dense model; a backend may lack some."""
    return {
        name: shape
        for name, shape in row["latency"]["shapes"].items()
        if shape and shape["ratio"] is not None
    }


def trained_rows(rows: list[dict]) -> dict[tuple, dict[bool, list[dict]]]:
    """Return the rows with a training curve: (model, task, bits, group) -> aware or not -> row per seed."""
    by_run: dict[tuple, dict[bool, list[dict]]] = {}
    for row in quantized_rows(rows):
        if row["technique"] == "qat" and "curve" in row["achieved"]:
            settings = row["settings"]
            run = (*model_task_of(row), settings.get("bits", 8), settings.get("group_size"))
            by_kind = by_run.setdefault(run, {False: [], True: []})
            by_kind[settings.get("aware", True)].append(row)
    return by_run


def tag(settings: dict) -> str:
    """Return settings in a few characters: `4/32`: 4 bits in groups of 32; `+E`: embeddings too."""
    bits = settings.get("bits", {"bfloat16": "bf16", "float16": "fp16"}.get(settings.get("dtype"), ""))
    bits = "mix" if isinstance(bits, dict) else str(settings.get("weights", bits))
    group = f"/{settings['group_size']}" if settings.get("group_size") else ""
    return bits + group + "+E" * settings.get("embeddings", False)
