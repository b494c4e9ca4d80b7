"""The search: makes candidates, measures no more of each than it takes, and confirms what is left.

Every measurement goes into the journal when it is taken; every choice is made by `decision` from what is
there. So a search that is run again goes on where the last one stopped.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import nn

from lmcompress import compress, formats
from lmcompress.compress import sensitivity
from lmcompress.compress.pipeline import StepCache
from lmcompress.errors import DiskFull, NotWritable, StudyError
from lmcompress.fit import decision, divergence
from lmcompress.fit.candidates import MIXED, Candidate, mixed, moves_on
from lmcompress.fit.decision import RUNGS, Contender
from lmcompress.fit.journal import Journal
from lmcompress.fit.loss import Loss
from lmcompress.fit.power import predicted_chance
from lmcompress.fit.schedule import CALLS, MAKING, TESTED, Clock, Schedule
from lmcompress.fit.split import CONFIRM, Parts
from lmcompress.measure.bytes import file_bytes
from lmcompress.measure.calls import Shape, prepared_calls, shape_signature
from lmcompress.measure.latency import DENSE, VARIANT, interleave, latency
from lmcompress.measure.memory import peak_memory
from lmcompress.models import storage
from lmcompress.models.loading import LoadedModel
from lmcompress.models.packed import Unpack
from lmcompress.results.labels import bytes_text, metric_name, number
from lmcompress.stats import LEAST_EXAMPLES, Columns, finite
from lmcompress.study import recipes
from lmcompress.study.job import CompressionJob
from lmcompress.tasks import evaluate
from lmcompress.tasks.base import Run
from lmcompress.tasks.classification import Classification
from lmcompress.timing_lock import timing_lock

SHORT_MS = 0.9  # a short run must be so far below a limit of milliseconds to be out of the question
SCORING = 0.6  # share of the time for scores; examples are left out where all would take longer
MOVED = 2  # of the likely finalists, the cheapest: what moves are tried on
SCANNED = 32  # texts by which the layers that need more bits are found


class TimeUp(Exception):
    """What comes next would not end within the minutes given."""


@dataclass
class Search:
    """A model, a task in parts, and what is asked for; `run()` returns the confirmed candidate, or None.

    Attributes:
        goal: "size", "memory", or the time at `shape`.
        limits: most bytes and milliseconds, None: any.
        say: is told of every step, and what is best so far.
    """

    loaded: LoadedModel
    parts: Parts
    loss: Loss
    goal: str
    shape: Shape
    limits: tuple[float | None, float | None]
    candidates: list[Candidate]
    moves: list[list[dict]]
    texts: int
    journal: Journal
    clock: Clock
    say: Callable[[str, str], None]
    seed: int = 0
    _in_memory: tuple[str, nn.Module, object] | None = None
    _steps: StepCache = field(default_factory=StepCache)

    def __post_init__(self) -> None:
        self.all = {candidate.name: candidate for candidate in self.candidates}
        self.task, self.tasks = self.parts.training, self.parts.tasks
        self.skipped: dict[str, str] = {}
        parts = self.parts, self.shape, self.goal, min(decision.FINALISTS, len(self.all))
        self.schedule = Schedule(self.clock, self.journal, self.loaded, *parts)

    def run(self) -> Candidate | None:
        """Search and confirm; what there was no time for is in `skipped`."""
        first, *later = self.parts.chunks
        self.score(DENSE, first)
        self._limit()
        for chunk in later:
            self.score(DENSE, chunk)
        self.tell(f"dense: {self._dense_quality()}")
        self.loss.check(self.scored(DENSE, confirmed=False)[0])
        if not self.journal.find("scored", name=DENSE, chunk=CONFIRM):  # from then on the order is fixed
            for candidate in self.candidates:
                self.consider(candidate)
            survivors = decision.halving(self.contenders(), self.misses)
            if self.moves and survivors:
                for candidate in self._moved(survivors):
                    self.all.setdefault(candidate.name, candidate)
                    self.consider(candidate)
                survivors = decision.halving(self.contenders(), self.misses)
            order = self.order(survivors)
            for contender in order:
                label, chance = self.all[contender.name].label, self.chance(contender.name)
                self.tell(f"{label}: to be confirmed, expected to pass with {100 * chance:.0f} %")
            self.journal.add("order", names=[c.name for c in order])
        for line in self.journal.lines:  # of a search that went on after its moves
            if "steps" in line:
                self.all.setdefault(line["name"], Candidate(tuple(line["steps"]), moved=True))
        order = [Contender(name, 0.0, 0.0) for name in self.finalists()]
        answer = decision.confirm(order, self.confirms)
        return answer and self.all[answer.name]

    def _dense_quality(self) -> str:
        """Return the dense model's quality on the search part, of a classifier beside that of a constant."""
        columns, _, examples = self.scored(DENSE, confirmed=False)
        task, floor, collapsed = self.loss.task, None, None
        value = float(task.statistic(columns))
        if isinstance(task, Classification):
            run = Run(self.loaded.model, self.loaded.tokenizer)
            floor, collapsed, _ = task.check_collapsed(columns, value, run)
        text = f"{metric_name(task.metric)} {number(value, task.metric)} on {examples} examples to search by"
        text += f"; always the commonest label: {number(floor, task.metric)}" if floor is not None else ""
        return f"{text}; warning: {collapsed}" if collapsed else text

    def finalists(self) -> list[str]:
        """Return the names of those to confirm, in the order that was fixed; none before it was."""
        return (self.journal.find("order") or {"names": []})["names"]

    def _limit(self) -> None:
        """Leave examples out that there is no time to score, the last by hash; the first chunk stays.

        How many was decided by the speed of the dense model, before anything else was scored. (What was
        recorded without `by_hash` goes on with the first as they stand in the file.)
        """
        if not (line := self.journal.find("limited")):
            confirming = (1 + TESTED) * len(self.tasks[CONFIRM].examples)
            needed = self.schedule.per_example() * (confirming + decision.FINALISTS * self.parts.searched)
            share = min(1.0, SCORING * 60 * self.clock.minutes / needed)
            line = self.journal.add("limited", share=share, by_hash=True)
            if line["share"] < 1:
                self.tell(f"time is enough to score {100 * line['share']:.0f} % of the examples")
        _, *later = self.tasks.values()
        for task in later if line["share"] < 1 else ():
            ordered = task.parts({CONFIRM: 1.0})[CONFIRM] if line.get("by_hash") else task
            task.examples = ordered.examples[: max(LEAST_EXAMPLES, round(line["share"] * len(task.examples)))]

    # Rung 0: what needs no labels

    def consider(self, candidate: Candidate) -> None:
        """Make a candidate and measure what needs no labels: bytes, distance from dense, perhaps its time."""
        name, journal = candidate.name, self.journal
        if journal.find("failed", name=name):
            return
        if not journal.find("made", name=name):
            is_late = not candidate.moved and self.clock.now() > MAKING * 60 * self.clock.minutes
            if is_late or not self.clock.allows(self.schedule.to_make(candidate), self.schedule.reserve()):
                self._skip(candidate, "made")
                return
            try:
                self._make(candidate)
            except (DiskFull, NotWritable):  # no fault of the candidate
                raise
            except (StudyError, RuntimeError, ValueError, TypeError, AttributeError, ImportError) as error:
                reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                journal.add("failed", name=name, steps=candidate.steps, error=reason)
                journal.remove_model(name)
                journal.remove_checkpoint(name)
                self.tell(f"{candidate.label}: not possible here ({reason[:120]})")
                return
        is_costed = name in {contender.name for contender in self.contenders()}
        if is_costed or (self.limits[0] or np.inf) < journal.find("made", name=name)["bytes"]:
            return
        if not self.clock.allows(self.schedule.to_cost(), self.schedule.reserve()):
            self._skip(candidate, "timed")
            return
        try:
            self._cost(candidate)
        except (DiskFull, NotWritable):
            raise
        except StudyError as error:
            self._skip(candidate, f"timed ({error})")

    def _make(self, candidate: Candidate) -> None:
        started, name = time.monotonic(), candidate.name
        model, result = self.job(candidate).run()
        self.journal.remove_model(name)
        folder = formats.save(
            model,
            self.journal.model_folder(name),
            format=candidate.format,
            tokenizer=result.tokenizer or self.loaded.tokenizer,
            report=result,
            base_name=self.loaded.name,
        )
        del model
        line = {"name": name, "steps": candidate.steps, "bytes": file_bytes(folder)}
        line["own_tokenizer"] = bool(result.tokenizer)
        self._in_memory = None
        reloaded, tokenizer = self.model(candidate, own_tokenizer=line["own_tokenizer"])
        began = time.monotonic()
        rows = divergence.outputs(reloaded, tokenizer, self._texts)
        per_text = (time.monotonic() - began) / len(self._texts)
        distance, flipped = divergence.compared(self._dense_outputs, rows, self.loaded.model)
        line |= {"divergence": distance, "flipped": flipped, "signature": shape_signature(reloaded)}
        line |= {"backend": result.achieved.get("backend"), "per_text_s": per_text}
        self.journal.add("made", **line, seconds=time.monotonic() - started)
        self.journal.remove_checkpoint(name)
        self.tell(f"{candidate.label}: {bytes_text(line['bytes'])}, KL {distance:.4f}")

    def job(self, candidate: Candidate) -> CompressionJob:
        """Return the job that makes a candidate of the dense model."""
        arguments = recipes.as_one(candidate.recipe)
        if arguments is None or "technique" not in arguments:
            arguments = {"technique": "chain", "steps": candidate.recipe}
        budgets = {name: arguments.pop(name, None) for name in ("calibration", "training", "recovery")}
        technique = compress.get(arguments.pop("technique"))
        folder = self.journal.checkpoint_folder(candidate.name)
        settings = {"settings": arguments, "seed": self.seed, "checkpoint": folder}
        settings["step_cache"] = self._steps if candidate.moved else None
        return CompressionJob(self.loaded, self.task, technique, **settings, **budgets)

    def _moved(self, survivors: Sequence[Contender]) -> Iterator[Candidate]:
        """Yield what the moves make of the cheapest that came through the search, one by one."""
        cheapest = [self.all[contender.name] for contender in self._sequence(survivors)[-MOVED:]]
        rounded = self.in_front(lambda candidate: candidate.rounding is not None)[:MOVED]
        for move in self.moves:
            if MIXED not in move[0]:
                yield from moves_on(cheapest, [move], self.texts)
            elif self.goal == "size":  # bytes are what it saves
                for contender in rounded:
                    yield from self._mixed(self.all[contender.name], move[0][MIXED])

    def _mixed(self, candidate: Candidate, share: float) -> Iterator[Candidate]:
        """Yield the candidate with its bits dealt out anew, unless all layers need the same or time is up."""
        step = candidate.steps[candidate.rounding]
        if scanned := self._scanned(candidate, step):
            widths = sensitivity.allocate_bits(scanned, step["bits"], share=share)
            if len(set(widths.values())) > 1:
                yield mixed(candidate, widths)

    def _scanned(self, candidate: Candidate, step: Mapping) -> dict | None:
        """Return how much each group of layers changes the outputs at which bits, as once measured."""
        grid = {name: step[name] for name in ("group_size", "symmetric", "embeddings") if name in step}
        of = {"after": list(candidate.steps[: candidate.rounding]), "grid": grid}
        if line := self.journal.find("scanned", **of):
            return line["scan"]
        groups = sensitivity.groups_of(self.loaded.model, embeddings=grid.get("embeddings", False))
        calls = len(groups) * len(sensitivity.BITS) * SCANNED
        if not self.clock.allows(calls * self.schedule.per_example(), self.schedule.reserve()):
            self._skip(candidate, "given mixed bits")
            return None
        model = self.job(Candidate(tuple(of["after"]))).run()[0] if of["after"] else self.loaded.model
        texts = self._draw(divergence.TEXTS + SCANNED)[-SCANNED:]  # others than its KL is taken on
        dense = divergence.outputs(self.loaded.model, self.loaded.tokenizer, texts)

        def distance() -> float:
            rows = divergence.outputs(model, self.loaded.tokenizer, texts)
            return divergence.compared(dense, rows, self.loaded.model)[0]

        scan = sensitivity.scan_bits(model, distance, **grid)
        self.tell(f"{candidate.label}: which layers need more bits, {len(groups)} groups scanned")
        return self.journal.add("scanned", **of, scan=scan)["scan"]

    def _cost(self, candidate: Candidate) -> None:
        """Take the time or the memory of a candidate whose kernels and shapes were not measured yet."""
        signature = self.journal.find("made", name=candidate.name)["signature"]
        if self.goal == "memory" and not self.journal.find("peak", signature=signature):
            self._peak(self.journal.model_folder(candidate.name), signature)
        if (self.goal == "time" or self.limits[1]) and not self.journal.find("time", signature=signature):
            model, _ = self.model(candidate)
            contenders = {DENSE: self.loaded.model, VARIANT: model}
            rounds = self.schedule.short_rounds()
            with self._alone(), torch.no_grad():
                started = time.monotonic()
                work = prepared_calls(contenders, self.shape, kind=self.loaded.kind)
                times = interleave(work, calls=rounds - rounds // 3, warmup=rounds // 3)
                call_s = (time.monotonic() - started) / (2 * rounds)
            ratio = float(np.median(times[VARIANT] / times[DENSE]))
            ms = 1e3 * float(np.median(times[VARIANT]))
            self.journal.add("time", signature=signature, ratio=ratio, ms=ms, call_s=call_s)

    def contenders(self) -> list[Contender]:
        """Return what was made, with its cost in what is asked for, and is within the limits."""
        contenders = []
        for line in (line for line in self.journal.all("made") if line["name"] in self.all):
            short = self.journal.find("time", signature=line["signature"])
            peak = self.peak_bytes(line["signature"])
            timed = self.journal.find("timed", name=line["name"])
            cost = {
                "size": line["bytes"] / self.dense_bytes,
                # To two digits: more one process, or a short run, cannot tell apart.
                "memory": peak and float(f"{peak / self._dense_peak:.2g}"),
                "time": timed["ratio"] if timed else short and float(f"{short['ratio']:.2g}"),
            }[self.goal]
            ms = timed["high_ms"] if timed else short and SHORT_MS * short["ms"]
            amounts = zip((line["bytes"], ms), self.limits, strict=True)
            fits = all(limit is None or (x is not None and x <= limit) for x, limit in amounts)
            if cost is not None and fits:
                contenders.append(Contender(line["name"], cost, line["divergence"], line["bytes"]))
        return contenders

    def in_front(self, among: Callable[[Candidate], bool] = bool) -> list[Contender]:
        """Return what was not dropped and nothing else `among` these beats, the cheapest first."""
        dropped = {line["name"] for line in self.journal.all("dropped")}
        contenders = [c for c in self.contenders() if c.name not in dropped]
        return decision.front(c for c in contenders if among(self.all[c.name]))

    @property
    def unpack(self) -> Unpack:
        """How integers are held when a model is loaded: alone, where memory is what counts."""
        return False if self.goal == "memory" else "auto"

    @cached_property
    def dense_bytes(self) -> int:
        """Bytes of the dense model's file."""
        return self.loaded.file_bytes or sum(p.nbytes for p in self.loaded.model.parameters())

    @cached_property
    def _dense_peak(self) -> int:
        if not self.journal.find("peak", signature=DENSE):
            folder = self.journal.model_folder(DENSE)
            if not folder.exists():
                storage.save(self.loaded.model, folder, tokenizer=self.loaded.tokenizer)
            self._peak(folder, DENSE)
        return self.peak_bytes(DENSE)

    def peak_bytes(self, signature: str) -> int | None:
        """Return the peak memory of a call beyond that of the libraries, of what has this signature."""
        line = self.journal.find("peak", signature=signature)
        return line and line["peak_bytes"] - line["baseline_bytes"]

    def _peak(self, folder: Path, signature: str) -> None:
        started = time.monotonic()
        peak = peak_memory(folder, kind=self.loaded.kind, shape=self.shape, unpack=self.unpack)
        self.journal.add("peak", signature=signature, **peak, seconds=time.monotonic() - started)

    @cached_property
    def _texts(self) -> list[dict]:
        return self._draw(divergence.TEXTS)

    def _draw(self, limit: int) -> list[dict]:
        """Return so many training texts as tokens, if there are; more begin with the same."""
        source = {"limit": limit, "seed": self.seed, "length": 128, "model": self.loaded.model}
        return self.task.training_features(self.loaded.tokenizer, **source)

    @cached_property
    def _dense_outputs(self) -> list[np.ndarray]:
        return divergence.outputs(self.loaded.model, self.loaded.tokenizer, self._texts)

    # Scores, each of an example once

    def model(self, candidate: Candidate, *, own_tokenizer: bool | None = None) -> tuple[nn.Module, object]:
        """Return the reloaded model of a candidate and its tokenizer; the last one stays in memory."""
        if self._in_memory is None or self._in_memory[0] != candidate.name:
            self._in_memory = None
            model, tokenizer = formats.load(self.journal.model_folder(candidate.name), unpack=self.unpack)
            self._in_memory = (candidate.name, model, tokenizer)
        _, model, tokenizer = self._in_memory
        if own_tokenizer is None:
            own_tokenizer = self.journal.find("made", name=candidate.name)["own_tokenizer"]
        return model, tokenizer if own_tokenizer else self.loaded.tokenizer

    def score(self, name: str, chunk: str) -> Columns:
        """Return the columns of a chunk: as kept, else scored now and kept.

        Raises:
            TimeUp: scoring would not end in time.
        """
        if self.journal.find("scored", name=name, chunk=chunk):
            return self.journal.load_scores(name, chunk)
        task, candidate = self.tasks[chunk], self.all.get(name)
        if candidate:
            reserve = 0 if chunk == CONFIRM else self.schedule.reserve(searching=False)
            if not self.clock.allows(self.schedule.to_score(name, chunk), reserve):
                begun = "scored further" if self.journal.find("scored", name=name) else "scored"
                self._skip(candidate, "confirmed" if chunk == CONFIRM else begun)
                raise TimeUp
        model, tokenizer = self.model(candidate) if candidate else (self.loaded.model, self.loaded.tokenizer)
        size = self.shape.batch if candidate and candidate.scaled_per_call else None
        evaluation = evaluate(model, tokenizer, task, batch_size=size)
        if chunk == CONFIRM and evaluation.outputs:
            self.journal.save_outputs(name, evaluation.outputs)
        self.journal.save_scores(name, chunk, evaluation.columns)
        line = {"name": name, "chunk": chunk, "value": finite(evaluation.value), "batch": size}
        self.journal.add("scored", **line, per_example_s=evaluation.seconds / len(task.examples))
        return evaluation.columns

    def searched(self, name: str, share: float = 1.0) -> tuple[Columns, Columns, int]:
        """Return a candidate's and dense columns on a share of the search part, and the count of examples."""
        chunks = [chunk for chunk, rung in zip(self.parts.chunks, RUNGS, strict=True) if rung <= share]
        return self._joined(name, chunks)

    def scored(self, name: str, *, confirmed: bool = True) -> tuple[Columns, Columns, int] | None:
        """Return the same of what was scored of the candidate, with what `confirmed` it; None of nothing."""
        chunks = [line["chunk"] for line in self.journal.all("scored", name=name)]
        chunks = [chunk for chunk in chunks if confirmed or chunk != CONFIRM]
        return self._joined(name, chunks) if chunks else None

    def _joined(self, name: str, chunks: Sequence[str]) -> tuple[Columns, Columns, int]:
        sides = []
        for side in (name, "dense"):
            columns = [self.score(side, chunk) for chunk in chunks]
            sides.append({key: np.concatenate([chunk[key] for chunk in columns]) for key in columns[0]})
        return *sides, sum(len(self.tasks[chunk].examples) for chunk in chunks)

    def misses(self, contender: Contender, share: float) -> bool | None:
        """Return whether a contender misses the margin on a share of the search part; None: no time."""
        label, name, before = self.all[contender.name].label, contender.name, len(self.journal.lines)
        try:
            columns, dense, examples = self.searched(name, share)
        except TimeUp:
            return None
        misses = self.loss.misses(columns, dense)
        observed = self.loss.margin.text(self.loss.value(columns, dense))
        if misses and not self.journal.find("dropped", name=name):
            self.journal.add("dropped", name=name, examples=examples)
            self.journal.remove_model(name)
        if len(self.journal.lines) > before:
            self.tell(f"{label}: loss {observed} on {examples}{': dropped' if misses else ''}")
        return misses

    # Finalists

    def order(self, survivors: Sequence[Contender]) -> list[Contender]:
        """Return the finalists in the order of their tests, after each was timed as it is served.

        Under a limit of milliseconds one that was not is left out, unless none was.
        """
        sequence = self._sequence(survivors)
        for contender in sequence:
            candidate = self.all[contender.name]
            if self.journal.find("timed", name=candidate.name):
                continue
            if not self.clock.allows(
                self.schedule.to_time(), self.schedule.reserve(searching=False, timing=False)
            ):
                self._skip(candidate, "timed")
                continue
            self.tell(f"{candidate.label}: timed beside dense, {self.shape.name} × {self.shape.length}")
            model, _ = self.model(candidate)
            try:
                with self._alone():
                    times = latency(
                        self.loaded.model, model, kind=self.loaded.kind, shapes=[self.shape], calls=CALLS
                    )
            except StudyError as error:
                self._skip(candidate, f"timed ({error})")
                continue
            about = {"threads": times["threads"], "calls": times["calls"]}
            self.journal.add("timed", name=candidate.name, **times["shapes"][self.shape.name], **about)
        costed = {contender.name: contender for contender in self.contenders()}
        worthwhile = [
            costed[c.name] for c in sequence if c.name in costed and costed[c.name].cost <= decision.WORTH
        ]
        timed = [c for c in worthwhile if self.journal.find("timed", name=c.name)]
        return self._sequence(timed if timed and self.limits[1] else worthwhile)

    def _sequence(self, survivors: Sequence[Contender]) -> list[Contender]:
        scored = [c for c in survivors if self.journal.find("scored", name=c.name)]
        return decision.finalists(scored, [self.chance(c.name) for c in scored]) if scored else []

    def chance(self, name: str) -> float:
        """Return how probable it is that a candidate passes, by its scores on the search part."""
        columns, dense, examples = self.scored(name)
        value, error = self.loss.estimate(columns, dense)
        n = len(self.tasks[CONFIRM].examples)
        return predicted_chance(value, error, self.loss.margin.amount, scored=examples, n=n)

    def confirms(self, contender: Contender) -> bool:
        """Return whether a finalist is within the margin on the examples that confirm."""
        name = contender.name
        try:
            dense, columns = self.score("dense", CONFIRM), self.score(name, CONFIRM)
        except TimeUp:
            return False
        low, high = self.loss.bounds(columns, dense)
        passed, value = bool(self.loss.is_within(columns, dense)), self.loss.value(columns, dense)
        if not self.journal.find("confirmed", name=name):
            self.journal.add("confirmed", name=name, passed=passed, loss=value, low=low, bound=high)
        text, outcome = self.loss.margin.text, "passed" if passed else "failed"
        self.tell(f"{self.all[name].label}: loss {text(value)}, at most {text(high)}: {outcome}")
        return passed

    # Time

    def tell(self, text: str) -> None:
        """Say a step, with the best of what lost no more than the margin until now."""
        best = None
        for contender in self.in_front():
            scored = self.scored(contender.name)
            if best is None and scored and self.loss.value(*scored[:2]) <= self.loss.margin.amount:
                best = contender.name
        size = best and bytes_text(self.journal.find("made", name=best)["bytes"])
        self.say(text, f"best so far: {self.all[best].label}, {size}" if best else "")

    def _alone(self) -> AbstractContextManager:
        """Hold the machine for a measurement; `StudyError` if others hold it for half of the time left."""
        left_s = (
            60 * self.clock.minutes - self.clock.now() - self.schedule.reserve(searching=False, timing=False)
        )
        return timing_lock(timeout_s=max(1.0, left_s / 2))

    def _skip(self, candidate: Candidate, work: str) -> None:
        self.skipped[candidate.name] = work
        self.tell(f"{candidate.label}: not {work}, no time is left for it")
