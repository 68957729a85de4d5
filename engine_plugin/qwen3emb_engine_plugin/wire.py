"""What the HTTP process and the scheduler process agree on."""

from __future__ import annotations

# Request ids of the fast route begin with this. The scheduler side sends such a request's vector as one float32
# array; every other request gets the stock list of floats, so a consumer that never asked for arrays sees none.
OUR_RIDS = "q3e-"
