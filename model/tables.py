"""Tables of named components, such as solvers, that code outside the package adds entries to."""

from typing import TypeVar

from latte_flow.model.errors import ArgumentError

Entry = TypeVar("Entry")


def enter(table: dict, name: str, entry: Entry) -> Entry:
    """Add an entry to a table and return it.

    Raises:
        ArgumentError: when the name is taken.
    """
    if name in table:
        raise ArgumentError(f"{name!r} is taken; accepted: another name than {', '.join(table)}")
    table[name] = entry
    return entry


def look_up(table: dict[str, Entry], name: str, argument: str) -> Entry:
    """Return the entry of a table.

    Raises:
        ArgumentError: when the name is unknown; the message begins with the argument and lists the table.
    """
    if name not in table:
        raise ArgumentError(f"{argument}: {name!r} is unknown; accepted values: {', '.join(table)}")
    return table[name]
