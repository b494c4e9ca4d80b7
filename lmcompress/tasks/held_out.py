"""Rows of a training split that are scored instead, where a benchmark publishes no test labels."""

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Words = tuple[str, ...]


@dataclass(frozen=True)
class HoldOut:
    """How many rows are held out, at most a third; their fewest words; the words of a telling phrase.

    SST-2's training split is full of phrases of the same sentences, so that rows drawn at random would be
    scored by a model that was trained on parts of them.
    """

    rows: int
    least_words: int = 0
    phrase: int = 4

    def split(self, texts: Sequence[str]) -> tuple[list[int], list[int]]:
        """Return the indices of the rows that are held out and of those to train on, both in order.

        Held out are rows of at least `least_words` words that are contained in no other row, in the order of
        the hash of their words; no row to train on shares `phrase` words in sequence with one of them, or
        is one.
        """
        words = [tuple(text.casefold().split()) for text in texts]
        order = sorted(self._whole(words), key=lambda i: hashlib.sha256(" ".join(words[i]).encode()).digest())
        held_out = sorted(order[: min(self.rows, max(1, len(texts) // 3))])
        phrases = {phrase for i in held_out for phrase in _phrases(words[i], self.phrase)}
        short = {words[i] for i in held_out}
        training = [
            i
            for i, row in enumerate(words)
            if row not in short and phrases.isdisjoint(_phrases(row, self.phrase))
        ]
        return held_out, training

    def _whole(self, words: Sequence[Words]) -> list[int]:
        """Return the rows that are long enough and a part of no other; of equal ones the first."""
        first = {row: i for i, row in reversed(list(enumerate(words)))}
        candidates = {row: i for row, i in first.items() if len(row) >= max(1, self.least_words)}
        beginning = max(1, self.least_words)
        by_beginning = defaultdict(list)
        for row in candidates:
            by_beginning[row[:beginning]].append(row)
        contained = set()
        for other in first:
            for start in range(len(other) - beginning + 1):
                for row in by_beginning.get(other[start : start + beginning], ()):
                    if len(row) < len(other) and other[start : start + len(row)] == row:
                        contained.add(row)
        return sorted(i for row, i in candidates.items() if row not in contained)


def _phrases(words: Words, size: int) -> Iterator[Words]:
    return (words[start : start + size] for start in range(len(words) - size + 1))
