"""Rows that the section of architecture asks for."""

Shape = tuple[int, str]  # layers and kind of φ
STYLES = {"none": ("-", "o", "no φ"), "shared": ("--", "^", "φ"), "per-head": (":", "s", "φ per head")}
STYLES |= {"linear": ("-.", "D", "linear φ")}  # none comes first: the shallowest is the baseline


def scales(rows: list[dict]) -> list[str]:
    """Return the scales whose models were trained, smallest model first."""
    sizes: dict[str, int] = {}
    for row in rows:
        if row["technique"] == "architecture":
            size = row["achieved"]["parameters"]
            sizes[row["settings"]["scale"]] = min(size, sizes.get(row["settings"]["scale"], size))
    return sorted(sizes, key=sizes.get)


def of_scale(rows: list[dict], scale: str) -> list[dict]:
    """Return the rows of one scale: its models, its training times, and pairs of its models."""

    def settings_of(row: dict) -> dict:
        return (row["achieved"]["first"] if row["technique"] == "paired-difference" else row)["settings"]

    return [row for row in rows if settings_of(row).get("scale") == scale]


def trained(rows: list[dict], metric: str = "perplexity") -> dict[Shape, list[dict]]:
    """Return the rows of trained models scored by `metric`: a shape's runs by seed."""
    by_shape: dict[Shape, list[dict]] = {}
    for row in sorted(rows, key=lambda r: r["seed"]):
        if row["technique"] == "architecture" and row["quality"]["metric"] == metric:
            by_shape.setdefault((row["settings"]["layers"], row["settings"]["phi"]), []).append(row)
    return dict(sorted(by_shape.items(), key=lambda entry: (entry[0][0], [*STYLES].index(entry[0][1]))))


def name_of(shape: Shape) -> str:
    """Return `5 layers, φ`."""
    return f"{shape[0]} layers, {STYLES[shape[1]][2]}"


def timed(runs: list[dict], shape: str = "decode_b1") -> dict | None:
    """Return the times of a shape at one part of the work, if any of its runs was timed."""
    return next((run["latency"]["shapes"][shape] for run in runs if run["latency"]), None)


def step_times(rows: list[dict]) -> dict[Shape, dict]:
    """Return the measured time of a training step per shape: ms, and the ratio to the baseline's."""
    row = next((row for row in reversed(rows) if row["technique"] == "training-speed"), None)
    shapes = row["achieved"]["shapes"] if row else []
    return {(entry["layers"], entry["phi"]): entry for entry in shapes}


def ratio_of(runs: list[dict]) -> float | None:
    """Return the time per decoded token of a shape over the baseline's, if it was timed."""
    time = timed(runs)
    return time and time["ratio"]
