"""The results of a campaign as Markdown tables."""

from collections.abc import Sequence

from latte_flow.tools.faults.campaign import Result
from latte_flow.tools.faults.inspection import VALID
from latte_flow.tools.faults.moments import RESUME, STEP
from latte_flow.tools.faults.plan import KILL_MOMENTS, LEAVES, VICTIMS


def one_line(result: Result) -> str:
    """Return what happened to a case in one line."""
    faults = ", then ".join(
        f"{s.fault.action}: {s.fault.moment}" + (f" {s.fault.step}" if s.fault.step else "")
        for s in result.starts
        if s.fault
    )
    resumed = result.starts[-1].resumed_from or "the beginning"
    end = "; ".join(result.problems) or f"went on from {resumed}, everything equal"
    return f"{'BROKEN ' if result.problems else ''}{faults} -> {end} ({result.seconds:.0f} s)"


def kill_table(results: Sequence[Result]) -> str:
    """Return the table of a campaign of kills: a row for each victim and moment, and their sums."""
    rows = []
    # A run that is killed a second time while resuming counts there; the kill before it is only what makes it resume.
    cells = [
        (s.fault, number, result)
        for result in results
        for number, s in enumerate(result.starts)
        if _counts(result, number)
    ]
    for moment in KILL_MOMENTS:
        for victim in VICTIMS:
            here = [(n, r) for fault, n, r in cells if (fault.action, fault.moment) == (victim, moment)]
            if here:
                rows.append([moment, victim, *_counts_of(here)])
    rows.append(["**all**", "", *_counts_of([(n, r) for _, n, r in cells])])
    columns = [
        "moment",
        "killed",
        "kills",
        "torn met",
        "damaged",
        "torn accepted",
        "from newest valid",
        "equal",
        "left over",
    ]
    return _markdown(columns, rows)


def _counts(result: Result, number: int) -> bool:
    """Return whether a start's fault is one of the plan's, not one that only makes the next start resume."""
    fault = result.starts[number].fault
    following = result.starts[number + 1].fault if number + 1 < len(result.starts) else None
    return fault is not None and not (fault.moment == STEP and following is not None and following.moment == RESUME)


def _counts_of(cells: list[tuple[int, Result]]) -> list[int]:
    torn = damaged = accepted = newest = equal = left = 0
    for number, result in cells:
        following = result.starts[number + 1] if number + 1 < len(result.starts) else None
        torn += sum(state != VALID for state in result.starts[number].after.values())
        damaged += bool(result.starts[number].damaged)
        equal += bool(result.equal) and all(result.equal.values())
        left += bool(result.left_behind)
        if following:
            accepted += following.accepted_torn
            newest += not following.resumed_wrong
    return [len(cells), torn, damaged, accepted, newest, equal, left]


def signal_table(results: Sequence[Result]) -> str:
    """Return the table of signals: a row for each signal and moment."""
    rows = []
    for result in results:
        for start, following in zip(result.starts, result.starts[1:], strict=False):
            fault = start.fault
            kept = "none new" if fault.action in LEAVES else f"step {start.stopped_at}"
            went_on = following.resumed_from or "the beginning"
            rows.append(
                [
                    fault.action,
                    f"{fault.moment}, step {fault.step}",
                    fault.workers,
                    kept,
                    start.exit_code,
                    "yes" if start.requeue else "no",
                    went_on,
                    "yes" if result.equal and all(result.equal.values()) else "NO",
                    "; ".join(result.problems) or "-",
                ]
            )
    columns = [
        "signal",
        "moment",
        "data workers",
        "checkpoint",
        "exit code",
        "requeue",
        "went on from",
        "equal",
        "broken",
    ]
    return _markdown(columns, rows)


def _markdown(columns: Sequence[str], rows: Sequence[Sequence]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)
