"""Addresses as people may see them."""

from __future__ import annotations

import re

_ADDRESS = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.\-]*://)(?P<rest>[^\s\"'<>`]+)")


def without_secrets(text: str) -> str:
    """`https://user:password@host` -> `https://host`, wherever it stands in the text.

    A password may hold `/` and `@` although an address should escape them, so the login ends at the last `@`.
    """
    return _ADDRESS.sub(lambda found: found["scheme"] + found["rest"].rpartition("@")[2], text)
