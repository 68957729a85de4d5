"""Signals as events: a handler notes that one came, and does nothing else."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@contextmanager
def stop_on_signals(stop: Callable[[str], None]) -> Iterator[None]:
    """`stop` is called with a signal's name while this lasts; the handlers that were there before are put back.

    An ignored SIGHUP stays ignored: that is what `nohup` asks for.
    """

    def record(number: int, _: FrameType | None) -> None:
        stop(signal.Signals(number).name)

    wanted = [n for n in SIGNALS if n != signal.SIGHUP or signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, record) for number in wanted}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
