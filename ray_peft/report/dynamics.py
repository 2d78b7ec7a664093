"""The loss at chosen steps."""

from collections.abc import Iterable, Sequence

from ray_peft.report.curves import Points

DEFAULT_STEPS = 6


def default_steps(curves: Iterable[Points], number: int = DEFAULT_STEPS) -> tuple[int, ...]:
    """About `number` logged steps spread evenly over the longest run, the last one included."""
    logged = sorted({step for points in curves for step, _ in points})
    if len(logged) <= number:
        return tuple(logged)
    places = [logged[-1] * part / number for part in range(1, number)]
    steps = {min(logged, key=lambda step: (abs(step - place), step)) for place in places}
    return tuple(sorted(steps | {logged[-1]}))


def point_at(points: Points, step: int, *, steps: int) -> tuple[int, float] | None:
    """The logged point nearest to `step`, of two the earlier; None for a trial of fewer `steps`, or without points."""
    if step > max(steps, points[-1][0] if points else 0):
        return None
    return min(points, key=lambda point: (abs(point[0] - step), point[0]), default=None)


def losses_at(points: Points, chosen: Sequence[int], *, steps: int) -> list[tuple[int, float] | None]:
    """The points nearest to the wanted steps."""
    return [point_at(points, step, steps=steps) for step in chosen]
