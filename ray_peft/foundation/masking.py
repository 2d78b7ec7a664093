"""Secrets in text: what is shown, logged or stored has *** in their place."""

from __future__ import annotations

import re

from ray_peft.foundation import dotted

_MASKS = (
    # user:password@, where a password may hold "/" and "@"; a port before a path is no password.
    (re.compile(r"://(?:[^/\s\"'\\]*|[^/\s:@\"'\\]*:(?!\d+/)[^\s\"'\\]*)@"), "://***@"),
    (
        re.compile(
            r"([?&;][^=&;\s\"']*(?:token|key|secret|passw|pwd|sig|auth|credential)[^=&\s\"']*=)[^&\s\"'\\#]+", re.I
        ),
        r"\1***",
    ),
    (re.compile(r"\bhf_[A-Za-z0-9]{20,}"), "hf_***"),
)
_MASKED = re.compile(r"://\*\*\*@|=\*\*\*|\bhf_\*\*\*")


def mask(text: str) -> str:
    """`text` without the passwords in URIs, token-like query values and Hugging Face tokens."""
    for pattern, replacement in _MASKS:
        text = pattern.sub(replacement, text)
    return text


def mask_address(text: str) -> str:
    """The same of a text that names one address: whatever lies before its last @ is hidden.

    Passwords hold @, slashes and spaces; in a text with several addresses that would hide what lies between them.
    """
    return mask(re.sub(r"(?s)://(?!/).*@", "://***@", text))


def masked_keys(plain: object) -> dict[str, str]:
    """The texts in JSON-like data of which `mask` has taken something away, by their dotted keys."""
    return {key: text for key, text in dotted.leaves(plain) if isinstance(text, str) and _MASKED.search(text)}
