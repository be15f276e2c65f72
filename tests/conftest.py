"""For all tests: properties are about results. How long an example takes says how busy the machine is."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

settings.register_profile("hyperpod", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("hyperpod")
