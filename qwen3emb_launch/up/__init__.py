"""`up`: the supervisor. `machine` decides, `supervisor` acts, the rest are their parts."""

from __future__ import annotations
