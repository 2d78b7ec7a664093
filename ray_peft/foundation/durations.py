"""Times as people write and read them: "5 minutes"."""

import re

_SECONDS = {"s": 1, "second": 1, "min": 60, "minute": 60, "h": 3600, "hour": 3600}
_TIME = re.compile(r"(\d+(?:\.\d+)?) *([a-z]+)")


def seconds_of(text: str) -> float:
    """Seconds of a text such as "5 minutes", "90 s" or "1.5 hours".

    Raises:
        ValueError: it is no such time, or not above zero.
    """
    match = _TIME.fullmatch(text.strip().lower())
    unit = match and _SECONDS.get(match[2].removesuffix("s") or "s")
    if not match or not unit or float(match[1]) <= 0:
        raise ValueError(f"{text!r} is no time; write one such as 5 minutes, 90 seconds or 1.5 hours")
    return float(match[1]) * unit


def short_time(seconds: float) -> str:
    """Seconds for people, such as "45 s", "12 min" or "3 h 05 min"."""
    if seconds < 90:
        return f"{max(0.0, seconds):.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
