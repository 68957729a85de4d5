"""Measuring an embedding endpoint: load, figures, comparison, reports.

`load_worker` and what it imports (`spec`, `connection`, `answers`, `texts`, `lengths`, `timer`) need the standard
library alone, so that they run on a host which has nothing but Python and this folder; orjson is used where it is
installed.
"""
