"""Every exception raised on purpose, as a tree.

    RayPeftError
        SpecError            one trial's settings cannot mean what they say
        SearchSpaceError     a search space file is wrong: all problems at once
        DataError            a data file is missing, malformed or too small, or rows repeat held-out rows
        ModelError           a model or its tokenizer cannot be used
        StorageError         a folder cannot be written: a full disk, one that is read-only, or went away
        PlacementError       the cluster cannot hold what was asked for
        TrackingError        the tracking store cannot be reached or lost a result
        TrialFailed          a trial crashed: raised by single runs, a row in sweeps

A `RayPeftError` is the user's to mend: the command line prints its text and exits with 2.
"""


class RayPeftError(Exception):
    """Base of all errors that carry a message for the user; never shown with a traceback."""


class SpecError(RayPeftError):
    """A trial's settings cannot mean what they say."""


class SearchSpaceError(RayPeftError):
    """A search space is wrong. The text has one line per problem: file, key, rule, value, trials."""


class DataError(RayPeftError):
    """A data file is missing, malformed or holds fewer rows than asked for."""


class ModelError(RayPeftError):
    """A model or its tokenizer is missing or cannot be used for the task."""


class StorageError(RayPeftError):
    """A folder cannot be written: the disk is full, read-only, or went away."""


class PlacementError(RayPeftError):
    """The cluster cannot hold what a trial asks for."""


class TrackingError(RayPeftError):
    """The tracking store cannot be reached, or a result could not be stored."""


class TrialFailed(RayPeftError):
    """A trial crashed; the text is its reason."""


def first_line(reason: BaseException | str | None) -> str:
    """The first line of a reason, for where there is room for one; of an error without text its type's name."""
    lines = str(reason or "").strip().splitlines()
    return lines[0] if lines else type(reason).__name__ if isinstance(reason, BaseException) else ""
