"""Web addresses as people give them: taken apart, or found to be none."""

from __future__ import annotations

import re
from urllib.parse import SplitResult, urlsplit


def web_address(text: str) -> SplitResult | None:
    """The parts of an http(s) address; None for what is none, such as `http://[::1` or `http://host:port`."""
    try:
        parts = urlsplit(text.strip())
        _ = parts.port  # raises as well
    except ValueError:
        return None
    if parts.scheme not in ("http", "https") or not parts.hostname or re.search(r"[\s\x00-\x1f\x7f]", text.strip()):
        return None
    return parts
