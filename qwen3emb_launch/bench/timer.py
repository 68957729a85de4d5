"""Waking at a moment, not up to a millisecond after it: epoll, and so every asyncio timer, counts in milliseconds.

An open loop's latency counts from the scheduled moment; a late wake-up would be measured as the server's. Linux's
timerfd has the kernel's own resolution; elsewhere the loop's timer serves.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import sys
from collections.abc import Callable

CLOCK_MONOTONIC = 1
TFD_TIMER_ABSTIME = 1
TFD_NONBLOCK = os.O_NONBLOCK


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class _Itimerspec(ctypes.Structure):
    _fields_ = (("interval", _Timespec), ("value", _Timespec))


class PreciseTimer:
    """Calls `action` once at each moment armed, on the loop. Moments are `time.monotonic()` seconds."""

    def __init__(self, loop: asyncio.AbstractEventLoop, action: Callable[[], None]) -> None:
        self._loop = loop
        self._action = action
        self._handle: asyncio.TimerHandle | None = None
        self._fd = -1
        if sys.platform == "linux":
            self._libc = ctypes.CDLL(None, use_errno=True)
            self._fd = self._libc.timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | os.O_CLOEXEC)
        if self._fd >= 0:
            loop.add_reader(self._fd, self._fired)

    def arm(self, moment: float) -> None:
        """Fire at `moment`, in place of an earlier arming; a past moment fires at once."""
        if self._fd < 0:
            if self._handle:
                self._handle.cancel()
            self._handle = self._loop.call_at(moment, self._action)
            return
        nanoseconds = max(1, int(moment * 1e9))
        spec = _Itimerspec(_Timespec(0, 0), _Timespec(nanoseconds // 10**9, nanoseconds % 10**9))
        if self._libc.timerfd_settime(self._fd, TFD_TIMER_ABSTIME, ctypes.byref(spec), None) != 0:
            raise OSError(ctypes.get_errno(), "timerfd_settime")

    def _fired(self) -> None:
        try:
            os.read(self._fd, 8)
        except BlockingIOError:  # armed again between the wake-up and this call
            return
        self._action()

    def close(self) -> None:
        """Never fire again."""
        if self._handle:
            self._handle.cancel()
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1
