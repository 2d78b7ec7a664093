"""Settings by dotted key, put into a search space before it is expanded: `--set`, and its named profiles."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from typing import Any

from ray_peft.errors import SearchSpaceError
from ray_peft.foundation import dotted


def put(plain: dict[str, Any], key: str, value: Any, where: str) -> None:
    """Set a dotted key in `plain`; mappings on the way are made, and an entry of a list is named by its place from 0.

    Args:
        plain: a search space, which is changed.
        key: such as train.steps or data.sources.0.train.
        value: what is put there.
        where: opens an error's text.

    Raises:
        SearchSpaceError: something on the way is neither mapping nor list, or the list has no such entry.
    """
    try:
        dotted.put(plain, key, value, add=True)
    except dotted.NotAMapping as error:
        raise SearchSpaceError(f"{where}: {error} in the search space") from None
    except dotted.WrongKey as error:
        raise SearchSpaceError(f"{where}: {error}") from None


def settle(plain: dict[str, Any], profile: str | None, source: str) -> set[str]:
    """Take `profiles` out of a search space and put the settings of the chosen one into it; returns their keys.

    Raises:
        SearchSpaceError: no such profile, or one, chosen or not, whose settings cannot be put into the search space.
    """
    profiles = _checked(plain.pop("profiles", None), plain, source)
    if profile is None:
        return set()
    if profile not in profiles:
        way = f"choose one of {', '.join(profiles)}" if profiles else "it has none: leave it out, or add `profiles:`"
        raise SearchSpaceError(f"{source}: profile {profile!r} is not in this search space; {way}")
    _apply(plain, profile, profiles[profile], source)
    return set(profiles[profile])


def blamed(text: str, keys: Iterable[str], source: str, profile: str | None) -> str:
    """An error's lines, of which those about `keys` name the profile that set them."""
    opening, ours = f"{source}: ", sorted(keys)
    lines = [(line, line.removeprefix(opening)) for line in text.splitlines()]
    return "\n".join(
        f"{opening}profiles.{profile}: {message}" if any(_about(message, key) for key in ours) else line
        for line, message in lines
    )


def _about(line: str, key: str) -> bool:
    """Whether an error's line names the key, or a mapping that the key is in, and its last part."""
    # Pydantic puts the method's name into its keys: method.lora.rank.
    pattern = re.escape(key).replace(r"method\.", r"method\.(\w+\.)?", 1)
    if re.search(rf"(?<![\w.]){pattern}(?!\w)", line):
        return True
    named, last = line.partition(":")[0], key.rpartition(".")[2]
    return key.startswith(f"{named}.") and re.search(rf"\b{re.escape(last)}\b", line) is not None


def _checked(profiles: Any, plain: dict[str, Any], source: str) -> dict[str, dict[str, Any]]:
    """Profiles of the right form: name -> settings by dotted key, each of which can be put into `plain`."""
    if profiles is None:
        return {}
    if not isinstance(profiles, dict):
        raise SearchSpaceError(f"{source}: profiles: must map names to settings (found {profiles!r})")
    for name, settings in profiles.items():
        if not isinstance(settings, dict) or not settings:
            raise SearchSpaceError(
                f"{source}: profiles.{name}: must map dotted keys to values, such as train.fit: auto "
                f"(found {settings!r})"
            )
        _apply(copy.deepcopy(plain), name, settings, source)
    return profiles


def _apply(plain: dict[str, Any], name: str, settings: dict[str, Any], source: str) -> None:
    for key, value in settings.items():
        put(plain, key, copy.deepcopy(value), f"{source}: profiles.{name}: {key}")
