"""Numbers as text with sensible digits; a missing number is "-". Pure ASCII."""

from collections.abc import Sequence

from ray_peft.foundation.units import GIB, MIB
from ray_peft.report.table import Spread

MISSING = "-"
_LONGEST = 9
"""Characters of a number in a table."""


def fixed(value: float | None, places: int, *, signed: bool = False) -> str:
    """`value` with `places` decimals, or in powers of ten where that takes over 9 characters; "-" if there is none."""
    if value is None:
        return MISSING
    sign = "+" if signed else ""
    # Adding zero turns the minus zero of a rounded small number into zero.
    text = f"{round(value, places) + 0.0:{sign}.{places}f}"
    return text if len(text) <= _LONGEST else f"{value:{sign}.2e}"


def percent(share: float | None, places: int = 2, *, signed: bool = False) -> str:
    """`share` of one as a percentage."""
    return MISSING if share is None else f"{fixed(100 * share, places, signed=signed)} %"


def count(value: int | None) -> str:
    """A whole number with thousands apart."""
    return MISSING if value is None else f"{value:,}"


def size(num_bytes: int) -> str:
    """Bytes on disk, in MiB or GiB; "-" if nothing was saved."""
    if not num_bytes:
        return MISSING
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB else f"{num_bytes / MIB:.2f} MiB"


def speed(per_second: float | None) -> str:
    """A rate: whole numbers from 100 on, else two decimals."""
    return fixed(per_second, 0 if per_second is not None and abs(per_second) >= 100 else 2)


def spread_text(spread: Spread | None, places: int, *, signed: bool = False) -> str:
    """A mean with the least and the greatest value; a value alone if there is but one."""
    if spread is None:
        return MISSING
    mean, low, high = (fixed(value, places, signed=signed) for value in (spread.mean, spread.low, spread.high))
    return f"{mean} ({low} to {high})" if spread.seeds > 1 else mean


def duration(seconds: float | None) -> str:
    """Time in the unit that suits it: 61.3 s, 12.4 min, 8.69 h."""
    if seconds is None:
        return MISSING
    if seconds < 600:
        return f"{fixed(seconds, 1)} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.2f} h"


def gib(value: float | None) -> str:
    """Memory with its unit."""
    return MISSING if value is None else f"{fixed(value, 2)} GiB"


def counted(number: int, noun: str) -> str:
    """A number with what it counts: "1 step", "2 steps"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def listed(names: Sequence[str]) -> str:
    """Names in a sentence: "a", "a and b", "a, b and c"."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
