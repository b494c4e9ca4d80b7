"""Every error this project raises on purpose, so that a caller can tell bad input from a bug.

Each message says what was wrong, what is available, and what to do next.
"""

import sys


class StudyError(Exception):
    """Base of all deliberate errors; anything else escaping the package is a bug."""


class AssetNotFound(StudyError, FileNotFoundError):
    """A model or data set id resolved to nothing; the message lists every place that was tried."""


class CorruptCheckpoint(StudyError, ValueError):
    """A weight file is truncated, malformed, or does not fit its own header."""


class UnsafeCheckpoint(StudyError, ValueError):
    """A checkpoint could only be read by running arbitrary unpickling."""


class BadWeights(StudyError, ValueError):
    """Weights hold NaN or infinity where a technique or a measurement needs numbers."""


class BadSetting(StudyError, ValueError):
    """A setting lies outside its legal range, or is not a setting at all."""


class BadData(StudyError, ValueError):
    """A data set is empty, or lacks a column or split that the task needs."""


class NoSuchSplit(BadData):
    """A data set has no such split, or it may not be trained on because it is the evaluated one."""


class WrongTask(StudyError, ValueError):
    """The task cannot be run on this kind of model (perplexity of a bidirectional encoder, say)."""


class UnknownFamily(StudyError, ValueError):
    """The architecture could not be mapped; the message says what was looked for."""


class NothingTouched(StudyError, ValueError):
    """A technique matched no layer, so its result would be the input under another name."""


class DiskFull(StudyError, OSError):
    """Writing failed for want of space; what was recorded before is intact."""


class NotWritable(StudyError, OSError):
    """A file cannot be written where it belongs: no permission, read-only, or a file in a folder's place."""


def accept_any_encoding() -> None:
    """Let a command line print "≥" where stdout is ASCII: what it lacks is escaped, instead of an error."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
