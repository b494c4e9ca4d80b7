"""How long what comes next in a search takes, from what was measured until then, and whether it is begun."""

import time
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch

from lmcompress.fit.candidates import Candidate
from lmcompress.fit.journal import Journal
from lmcompress.fit.split import Parts
from lmcompress.measure.calls import Shape, prepared_calls
from lmcompress.measure.latency import DENSE, interleave
from lmcompress.models.loading import LoadedModel

CALLS, WARM_UP = 30, 3  # rounds of a finalist's time run, and those before them
# Rung 0's, as many as the seconds allow; a third warms up, because a cold dense model flatters what is
# timed first.
SHORT_ROUNDS, SHORT_S = (10, 60), 2.5
TAKES_LONGER = 1.3  # what is left of the time must be so much more than an estimate
FIRST_S = 20.0  # thought of the first candidate, before any was made
MAKING, TIMING = 0.6, 0.25  # most of the time for making what is listed, and kept for the times of finalists
TESTED = 3  # finalists whose tests time is kept for; the sequence may end after any


@dataclass
class Clock:
    """The minutes of a search; `now` is seconds since it began."""

    minutes: float
    began: float = field(default_factory=time.monotonic)

    def now(self) -> float:
        """Return the seconds since the search began."""
        return time.monotonic() - self.began

    def allows(self, seconds: float, reserve: float = 0.0) -> bool:
        """Return whether so many seconds more are left, by a margin, beside those of the `reserve`."""
        return self.now() + TAKES_LONGER * seconds + reserve <= 60 * self.minutes


@dataclass
class Schedule:
    """Estimates in seconds; `finalists` is how many of them time is kept for."""

    clock: Clock
    journal: Journal
    loaded: LoadedModel
    parts: Parts
    shape: Shape
    goal: str
    finalists: int

    def per_example(self) -> float:
        """Return the dense model's seconds per example."""
        return self.journal.find("scored", name="dense")["per_example_s"]

    def to_make(self, candidate: Candidate) -> float:
        """Return the seconds of making a candidate, as those alike took; with its training."""
        lines = [(Candidate(tuple(line["steps"])), line["seconds"]) for line in self.journal.all("made")]
        alike = [seconds for other, seconds in lines if other.techniques[-1:] == candidate.techniques[-1:]]
        alike = alike or [seconds for other, seconds in lines if other.runtime == candidate.runtime]
        seconds = max(alike or [FIRST_S])
        for step in candidate.steps:  # a step of training does three passes, and its teacher one
            if budget := step.get("recovery") or step.get("training"):
                seconds += 4 * budget["steps"] * budget.get("batch_size", 16) * self.per_example()
        return seconds

    def to_cost(self) -> float:
        """Return the seconds of taking a time or a peak of memory in rung 0."""
        if self.goal == "memory":
            return max((line["seconds"] for line in self.journal.all("peak")), default=FIRST_S)
        return 2 * self.short_rounds() * self.to_call()

    def short_rounds(self) -> int:
        """Return how many rounds a time run of rung 0 has."""
        return int(np.clip(SHORT_S / (2 * self.to_call()), *SHORT_ROUNDS))

    def to_score(self, name: str, chunk: str) -> float:
        """Return the seconds of scoring a candidate on a chunk."""
        if scored := self.journal.find("scored", name=name):
            per_example = scored["per_example_s"]
        else:
            per_example = max(self.journal.find("made", name=name)["per_text_s"], self.per_example())
        return 1.0 + per_example * len(self.parts.tasks[chunk].examples)

    def to_time(self) -> float:
        """Return the seconds of a finalist's time run."""
        return 3 * (CALLS + WARM_UP) * self.to_call()  # dense, its copy, the candidate

    def to_call(self) -> float:
        """Return the seconds of a timed call as the short runs took; before there is one, of dense alone.

        That is taken anew by every process, because one taken on a busy machine would plan all the rest.
        """
        if runs := [line["call_s"] for line in self.journal.all("time")]:
            return float(np.median(runs))
        return self._dense_call_s

    @cached_property
    def _dense_call_s(self) -> float:
        seconds = []
        with torch.no_grad():
            work = prepared_calls({DENSE: self.loaded.model}, self.shape, kind=self.loaded.kind)
            for _ in range(3):
                started = time.monotonic()
                interleave(work, calls=1, warmup=0)
                seconds.append(time.monotonic() - started)
        return min(seconds)

    def reserve(self, *, searching: bool = True, timing: bool = True) -> float:
        """Return the seconds that the rest of the search takes: confirmation, times, and some scoring."""
        per_example, count = self.per_example(), self.finalists
        seconds = 5.0 + (1 + min(count, TESTED)) * per_example * len(self.parts.confirm.examples)
        if timing:
            seconds += min(count * self.to_time(), TIMING * 60 * self.clock.minutes)
        if searching:
            seconds += count * per_example * self.parts.searched
        return seconds
