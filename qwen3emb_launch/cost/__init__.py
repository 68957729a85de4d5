"""What an embedding costs on one's own hardware, against what it costs by the token elsewhere. Pure arithmetic.

Every figure comes with the step that made it; what was not given is left out and named, never guessed.
"""

from __future__ import annotations

from qwen3emb_launch.cost.arithmetic import Capacity, Cost, Costs, Load, Step, capacity, cost
from qwen3emb_launch.cost.money import money
from qwen3emb_launch.cost.prices import Offer, Price, compare, exchange_rates, read_prices, shipped_prices
from qwen3emb_launch.cost.storage import IndexSize, index_sizes

__all__ = [
    "Capacity",
    "Cost",
    "Costs",
    "IndexSize",
    "Load",
    "Offer",
    "Price",
    "Step",
    "capacity",
    "compare",
    "cost",
    "exchange_rates",
    "index_sizes",
    "money",
    "read_prices",
    "shipped_prices",
]
