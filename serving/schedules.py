"""The choice among the schedules that a service allows."""

from __future__ import annotations

from flexvar_runtime import ScaleSchedule

from .errors import HTTPError

Allowed = tuple[ScaleSchedule, ...] | None
"""The schedules that requests may use; None means any."""


def nearest_allowed(wanted: ScaleSchedule, steps: int | None, allowed: Allowed, param: str) -> ScaleSchedule:
    """The wanted schedule if it is allowed, else the first allowed one of the same size.

    steps: the number of scales that it must have, if the client has named one. Raises HTTPError if there is none.
    """
    if allowed is None or wanted in allowed:
        return wanted
    fitting = [one for one in allowed if one[-1] == wanted[-1] and steps in (None, len(one))]
    if not fitting:
        raise not_allowed(wanted, allowed, param)
    return fitting[0]


def not_allowed(schedule: ScaleSchedule, allowed: tuple[ScaleSchedule, ...], param: str) -> HTTPError:
    got = f"The schedule {schedule} is not allowed here. This service runs {', '.join(map(str, allowed))}."
    return HTTPError(400, got, "schedule_not_allowed", param)
