"""The cards of the committed models, filled from their training.json so that no number in them is typed."""

from collections.abc import Iterable
from pathlib import Path

from scripts.make_models import MODELS_MADE


def model_card(name: str, training: dict) -> str:
    """Return the card of a pocket model, from what its training.json holds; Markdown with front matter."""
    kind = name.removesuffix("-pydocs")
    last = [phase["training"][-1] for phase in training["phases"].values()]
    metrics = sorted(training["validation"]["task"].items())
    return _template("pocket").format(
        kind=kind,
        **MODELS_MADE[kind]["card"],
        millions=training["parameters"] / 1e6,
        million_tokens=sum(phase["tokens"] for phase in last) / 1e6,
        hours=sum(phase["seconds"] for phase in last) / 3600,
        others=", ".join(f"{metric} {value:.3g}" for metric, value in metrics if metric != "bits_per_byte"),
        more_steps=10 * training["budget"]["steps"],
        **training | {"samples": (_summaries if kind == "t5" else _continuations)(training["samples"])},
    )


def translation_card(name: str, training: dict) -> str:
    """Return the card of a translator trained from scratch, from what its training.json holds."""
    settings, losses, test = training["settings"], training["curve"]["validation"], training["test"]
    interval = (
        "too few for an interval" if test["low"] is None else "{low:.1f} to {high:.1f}, 95 %".format(**test)
    )
    return _template("translation").format(
        name=name,
        language=name[-2:],
        shape=MODELS_MADE["t5"]["card"]["shape"],
        millions=training["parameters"] / 1e6,
        epochs=settings["steps"] * settings["batch_size"] / training["examples"],
        minutes=training["curve"]["seconds"] / 60,
        loss=losses[-1][1],
        interval=interval,
        samples=_rows(test["details"]["samples"], ("text", "output", "target")),
        **training,
    )


def _template(name: str) -> str:
    return (Path(__file__).parent / f"{name}.md").read_text(encoding="utf-8")


def _summaries(samples: list[dict]) -> str:
    distinct = len({sample["text"] for sample in samples})
    shortened = [s | {"prompt": " ".join(s["prompt"][:160].split()) + "…"} for s in samples]
    rows = _rows(shortened, ("prompt", "text", "reference"))
    table = f"| signature and body | its summary | the author's |\n|---|---|---|\n{rows}"
    return f"Greedy, unpicked: {distinct} different texts in {len(samples)}.\n\n{table}"


def _continuations(samples: list[dict]) -> str:
    blocks = [f"```\n{sample['prompt']}⟦{sample['text'].strip()}⟧\n```" for sample in samples]
    heading = "Sampled at temperature 0.7, top-p 0.9, unpicked; what it wrote stands in ⟦⟧."
    return "\n\n".join([heading, *blocks])


def _rows(samples: Iterable[dict], columns: tuple[str, ...]) -> str:
    cells = ([" ".join(sample[name].split()).replace("|", "\\|") for name in columns] for sample in samples)
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)
