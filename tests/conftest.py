"""What all tests share: properties are about values, never about how busy the machine was."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# The default deadline, 200 ms for each example, is missed where every core is wanted by others; drawing
# examples slowly says as little.
settings.register_profile("braid", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("braid")
