"""Configurations under which Megatron would ignore given experts without a word."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from megatron_antisd.models.routing import obstacle


@pytest.mark.parametrize("changes, reason", [
    ({}, None), ({"moe_router_load_balancing_type": ["aux_loss"]}, None), ({"num_moe_experts": None}, "no experts"),
    ({"moe_router_fusion": True}, "moe_router_fusion"), ({"moe_router_load_balancing_type": "sinkhorn"}, "sinkhorn"),
    ({"moe_router_load_balancing_type": ["sinkhorn", "aux_loss"]}, "sinkhorn"),
])
def test_what_would_ignore_given_experts_is_named(changes: dict[str, Any], reason: str | None) -> None:
    config = SimpleNamespace(**{"num_moe_experts": 8, "moe_router_fusion": False, "moe_router_load_balancing_type": "none", **changes})
    found = obstacle(config)
    assert found is None if reason is None else reason in found
