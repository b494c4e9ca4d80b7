"""Under which conditions the rows were measured, and how to repeat them."""

import json
from collections import Counter

from helpers.report import wording as w
from lmcompress.results.rows import is_timed


def paragraphs(rows: list[dict]) -> list[str]:
    """Profile, machine, packages, data and wall time of the rows, and how to repeat them."""
    profile, *further = [name for name, _ in Counter(row["profile"] for row in rows).most_common()]
    profiles = [
        f", of them {sum(row['profile'] == name for row in rows)} of profile `{name}` "
        f"({', '.join(sorted({row['notebook'] for row in rows if row['profile'] == name}))})"
        for name in further
    ]
    places: dict[str, list[dict]] = {}
    for row in rows:
        places.setdefault(json.dumps(row["provenance"]["machine"], sort_keys=True), []).append(row)
    machines = [_machine_text(several) for several in places.values()]
    packages = sorted({f"{n} {v}" for row in rows for n, v in row["provenance"]["packages"].items() if v})
    codes = sorted({row["provenance"]["code"] for row in rows})
    seconds: dict[str, float] = {}
    for row in rows:
        seconds[row["notebook"]] = seconds.get(row["notebook"], 0.0) + row["provenance"]["wall_s"]
    seeds = sorted({row["seed"] for row in rows if row["seed"] is not None})
    command = f"python -m helpers.run.runner --profile {profile} --only "
    minutes = [
        [name, str(sum(r["notebook"] == name for r in rows)), f"{s / 60:.1f}", f"`{command}{name[:2]}`"]
        for name, s in seconds.items()
    ]
    days = sorted(row["provenance"]["started"][:10] for row in rows)
    return [
        f"Profile `{profile}`, {w.plural(len(rows), 'row')}{''.join(profiles)}, seed{'s' * (len(seeds) > 1)} "
        f"{', '.join(map(str, seeds))}, measured {' to '.join(dict.fromkeys((days[0], days[-1])))}.",
        ("Machine: " if len(machines) == 1 else "Machines:\n\n- ") + "\n- ".join(machines),
        "Packages: " + ", ".join(packages) + f". Code: {', '.join(codes)}.",
        "Accuracies are compared by McNemar's exact test, everything else by a paired bootstrap; where "
        "fewer than 2 % of its resamples reach a difference, p is that of the normal curve with the "
        "interval's width, since a correction over dozens of comparisons needs finer steps than a thousand "
        "resamples have.",
        *_timed(rows),
        *_rates(rows),
        w.table(["Notebook", "Rows", "Minutes of measuring", "To run it alone"], minutes),
        f"To repeat it: `make report PROFILE={profile}`. To check that this page is current: `make check`.",
    ]


def _timed(rows: list[dict]) -> list[str]:
    """How long the sequences of timed calls were, and how many calls there were."""
    timed = [row["latency"] for row in rows if is_timed(row)]
    lengths = sorted({shape["length"] for latency in timed for shape in latency["shapes"].values() if shape})
    if not lengths:
        return []
    fewest = min(latency["calls"] for latency in timed)
    return [
        f"Timed calls are of {w.listing([str(n) for n in lengths])} tokens a sequence, at least {fewest} of "
        f"each."
    ]


def _rates(rows: list[dict]) -> list[str]:
    """Count which learning rate won where several were tried: a sentence per model and choice of rates."""
    counts_by_model: dict[tuple, Counter] = {}
    tuned = {row["key"]: row for row in rows if "rates" in row["achieved"]}
    if not tuned:
        return []
    where = sorted({row["notebook"][:2] for row in tuned.values()})
    lead = (
        f"Several learning rates were tried in {w.plural(len(tuned), 'training')} of the notebooks "
        f"{w.listing(where)}; all other trainings ran at one given rate."
    )
    for row in tuned.values():
        tried = tuple(rate for rate, _ in row["achieved"]["rates"])
        counts_by_model.setdefault((row["model"], tried), Counter())[row["achieved"]["rate"]] += 1
    return [lead] + [
        f"Of those, runs of {model} were tried at learning rates of "
        f"{w.listing([f'{rate:g}' for rate in tried])}, and the one "
        "with the lowest loss on held-out training text was kept: "
        f"{w.listing([f'{rate:g} in {counts[rate]}' for rate in tried])} of {counts.total()}."
        for (model, tried), counts in counts_by_model.items()
    ]


def _machine_text(several: list[dict]) -> str:
    """Describe a machine, how many of its threads rows used, and which notebooks were timed on it."""
    machine = several[0]["provenance"]["machine"]
    threads = sorted({row["provenance"]["threads"] for row in several})
    timed_rows = [row for row in several if is_timed(row)]
    timed = (
        f"; timed there: {w.listing(sorted({row['notebook'][:2] for row in timed_rows}))}"
        if timed_rows
        else ""
    )
    used = f"{' or '.join(map(str, threads))} {'thread' if threads == [1] else 'threads'} used"
    gpu = f", {machine['gpu']}" if machine.get("gpu") else ""
    instructions = f" with {machine['instructions']}" if machine.get("instructions") else ""
    return (
        f"{machine['cpu']}{instructions}, {w.plural(machine['cores'], 'core')} ({used}), "
        f"{machine['memory_bytes'] / 2**30:.0f} GiB{gpu}, {machine['os']}, Python {machine['python']}{timed}"
    )
