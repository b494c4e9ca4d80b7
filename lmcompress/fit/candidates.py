"""What a search tries: recipes from a list per kind of model, and moves on those that survive it."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_type_hints

import yaml

from lmcompress import compress
from lmcompress.compress.settings import Bits
from lmcompress.errors import BadSetting
from lmcompress.formats import FORMATS
from lmcompress.models.packed import BITS
from lmcompress.results.labels import step_label
from lmcompress.results.store import canonical
from lmcompress.study import recipes

LIST = Path(__file__).with_name("candidates.yaml")
PLAIN = "transformers"  # the format of a recipe that names none
MIXED = "mixed_bits"  # a move that deals out bits anew, in a step of its own
RUNTIMES = ("torch", "openvino", "onnxruntime")
# One scale of the inputs for a whole call: what an answer is depends on what else is in its batch.
SCALED_PER_CALL = ("int8-dynamic", "smoothquant", "onnxruntime-dynamic")


@dataclass(frozen=True)
class Candidate:
    """A recipe, its steps complete, the last perhaps `{format: NAME}`; `moved`: made from a survivor."""

    steps: tuple[Mapping, ...]
    moved: bool = False

    @property
    def name(self) -> str:
        """12 hex digits over the steps: under these its measurements and its model are kept."""
        return hashlib.sha256(canonical(self.steps).encode()).hexdigest()[:12]

    @property
    def label(self) -> str:
        """The recipe in words."""
        written = f", written as {self.format}" if self.format != PLAIN else ""
        return " → ".join(step_label(step) + _widths(step) for step in self.recipe) + written

    @property
    def recipe(self) -> list[Mapping]:
        """The steps that change the model, as `study.recipes` reads them."""
        return [step for step in self.steps if "format" not in step]

    @property
    def format(self) -> str:
        """What the model is written as (`formats.FORMATS`)."""
        return self.steps[-1].get("format", PLAIN)

    @property
    def techniques(self) -> tuple[str, ...]:
        """Names of the techniques, in order."""
        return tuple(step["technique"] for step in self.steps if "technique" in step)

    @property
    def runtime(self) -> str:
        """The library that runs the result."""
        writers = [*self.techniques, {"onnx": "onnxruntime"}.get(self.format, self.format)]
        return next((r for r in RUNTIMES[1:] if any(name.startswith(r) for name in writers)), RUNTIMES[0])

    @property
    def scaled_per_call(self) -> bool:
        """Whether what else is in a batch changes an answer."""
        return not set(self.techniques).isdisjoint(SCALED_PER_CALL)

    @property
    def rounding(self) -> int | None:
        """Position of the last step whose bits may differ by layer and have smaller ones; None: of none."""
        if self.format != PLAIN:
            return None
        hints = {name: get_type_hints(compress.get(name).function) for name in self.techniques}
        for position, step in reversed(list(enumerate(self.steps))):
            bits = step.get("bits")
            if isinstance(bits, int) and hints[step["technique"]]["bits"] == Bits:
                return position if bits > min(BITS) else None
        return None

    @property
    def trains(self) -> bool:
        """Whether a step trains."""
        return trains(self.steps)


def listed(
    kind: str, *, file: Path | None, runtime: str, texts: int
) -> tuple[list[Candidate], list[list[dict]]]:
    """Return the candidates for a `kind` of model that end in `runtime` ("any"), and the moves.

    Args:
        file: a list of recipes, or such lists per kind of model, instead of the package's; one recipe is
            also a list.
        texts: how many texts a step may look at, where a recipe does not say.

    Raises:
        BadSetting: the file is none, or a recipe in it is wrong.
    """
    content = _read(file or LIST)
    entries, moves = content, []
    if isinstance(content, Mapping):
        if kind not in content:
            raise BadSetting(
                f"{file} lists {', '.join(content)}: nothing for this model, which is an {kind}."
            )
        entries, moves = content[kind], (content.get("moves") or {}).get(kind, [])
    if entries and all(isinstance(step, Mapping) for step in entries):
        entries = [entries]
    candidates = [completed(steps, texts) for steps in entries or ()]
    distinct = list({c.name: c for c in candidates if runtime in ("any", c.runtime)}.values())
    if not distinct:
        raise BadSetting(f"{file or LIST} lists no candidate that runs with {runtime}: take --runtime any.")
    moves = [[move] if isinstance(move, Mapping) else list(move) for move in moves]
    for move in moves:
        if MIXED not in move[0]:
            recipes.read(move)
        elif len(move) > 1 or not (isinstance(share := move[0][MIXED], int | float) and 0 < share <= 1):
            raise BadSetting(f"{file or LIST}: {move}: {MIXED} stands alone, a share above 0 and up to 1.")
    return distinct, moves


def trains(steps: Iterable[Mapping]) -> bool:
    """Return whether one of the steps trains."""
    return any("recovery" in step or "training" in step for step in steps)


def completed(steps: Sequence[Mapping], texts: int, *, moved: bool = False) -> Candidate:
    """Return the candidate of a recipe; its steps look at `texts` texts unless they say how many."""
    filled, steps = [], list(steps) if isinstance(steps, Sequence) else [steps]
    written = [steps.pop()] if isinstance(steps[-1], Mapping) and list(steps[-1]) == ["format"] else []
    if written and written[0]["format"] not in FORMATS:
        raise BadSetting(f"no format {written[0]['format']!r}; available: {', '.join(FORMATS)}.")
    for step in steps:
        is_technique = isinstance(step, Mapping) and step.get("technique") in compress.registered()
        looks = is_technique and "calibration" in compress.get(step["technique"]).needs
        filled.append({"calibration": {"n": texts}, **step} if looks else step)
    return Candidate((*recipes.read(filled), *written), moved)


def moves_on(
    survivors: Iterable[Candidate], moves: Iterable[Sequence[Mapping]], texts: int
) -> list[Candidate]:
    """Return each move put before each survivor; of one move all lie together, so that it is done once."""
    plain = [survivor for survivor in survivors if not survivor.trains]
    return [completed([*move, *survivor.steps], texts, moved=True) for move in moves for survivor in plain]


def mixed(candidate: Candidate, widths: Mapping[str, int]) -> Candidate:
    """Return the candidate with a width per group of layers in place of its bits."""
    steps = list(candidate.steps)
    steps[candidate.rounding] = {**steps[candidate.rounding], "bits": dict(widths)}
    return Candidate(tuple(steps))


def _widths(step: Mapping) -> str:
    """Return how many groups of layers have which bits, where they differ: ` (groups: 7 × 3, 6 × 4 bits)`."""
    if not isinstance(step.get("bits"), Mapping):
        return ""
    counts = sorted(Counter(step["bits"].values()).items())
    return f" (groups: {', '.join(f'{count} × {bits}' for bits, count in counts)} bits)"


def _read(file: Path) -> object:
    if not file.is_file():
        raise BadSetting(f"no file {file}: --candidates takes a .yaml file with a list of recipes.")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise BadSetting(f"{file} is not YAML: {str(error).splitlines()[0]}.") from error
    if not isinstance(content, list | Mapping) or not content:
        raise BadSetting(
            f"{file} holds no list of recipes: each is a list of steps, {{technique: NAME, ...}}."
        )
    return content
