"""The exceptions that ray_peft raises on purpose, as a tree.

    RayPeftError
        SpecError            the settings of one trial contradict each other or cannot be carried out
        SearchSpaceError     a search space file is wrong; the text lists all of its problems
        DataError            a data file is missing, malformed or too small, or training rows repeat held-out rows
        ModelError           a model or its tokenizer cannot be used
        StorageError         a folder cannot be written: the disk is full, read-only or gone
            ReportLost       ... after trials had started: their report, or the next proposals of a search, are missing
        PlacementError       the cluster cannot be reached, or lacks the resources that a trial needs
        JobError             a job of a cluster is not known there, or cannot be submitted, read or stopped
        ClusterLost          the cluster died while trials ran
        TrackingError        the tracking store cannot be reached, or a result could not be stored in it
        TrialCancelled       the user asked a running trial to end
        TrialStopped         a search ends a running trial early, since others are better
        TrialFailed          a trial crashed; a single run raises this, a sweep keeps the trial as a failed row

The user can correct what a `RayPeftError` reports: the command line prints its text and exits with code 2 (1 after
`ClusterLost` and `ReportLost`, since trials were started).
"""


class RayPeftError(Exception):
    """Base of all errors whose text is written for the user; it is shown without a traceback."""


class SpecError(RayPeftError):
    """The settings of a trial contradict each other or cannot be carried out."""


class SearchSpaceError(RayPeftError):
    """A search space is wrong. The text has one line per problem: file, key, rule, value, trials."""


class DataError(RayPeftError):
    """A data file is missing or malformed, has too few usable rows, or its training rows repeat held-out rows."""


class ModelError(RayPeftError):
    """A model or its tokenizer is missing or cannot be used for the task."""


class StorageError(RayPeftError):
    """A folder cannot be written: the disk is full, read-only or gone."""


class ReportLost(StorageError):
    """Trials have ended, but their rows, their report or the journal of their search cannot be written."""


class PlacementError(RayPeftError):
    """The cluster cannot be reached, or lacks the resources that a trial needs."""


class JobError(RayPeftError):
    """A job of a cluster is not known there, or cannot be submitted, read or stopped."""


class ClusterLost(RayPeftError):
    """The Ray cluster died while trials ran. Rows that were there by then are kept."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        """Without the way out."""
        super().__init__(
            f"the Ray cluster is lost: {reason}. What finished is kept; the same command runs what is missing"
        )


class TrackingError(RayPeftError):
    """The tracking store cannot be reached, or a result could not be stored."""


class TrialCancelled(RayPeftError):
    """The user asked a running trial to end; its row says so."""


class TrialStopped(RayPeftError):
    """A search ends a running trial early, since others are better; its row says so."""


class TrialFailed(RayPeftError):
    """A trial crashed; the text says why."""


def first_line(reason: BaseException | str | None) -> str:
    """The first line of a reason. If an error has no text, the name of its type stands in for it."""
    lines = str(reason or "").strip().splitlines()
    return lines[0] if lines else type(reason).__name__ if isinstance(reason, BaseException) else ""
