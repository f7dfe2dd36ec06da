"""How much a property is tried that costs more than most."""

from hypothesis import HealthCheck, Phase, settings


def tried(percent: int, *, shrunk: bool = True) -> settings:
    """So much of the profile's number of examples, in any of which the fixtures are the same.

    What asks whole command lines is not `shrunk`: a failure would take minutes, and says enough.
    """
    profile = settings()
    return settings(
        max_examples=profile.max_examples * percent // 100,
        suppress_health_check=[*profile.suppress_health_check, HealthCheck.function_scoped_fixture],
        phases=profile.phases if shrunk else (Phase.explicit, Phase.generate),
    )
