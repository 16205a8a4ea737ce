"""The rows of a run that is not finished, in a file, so that a run that was stopped can go on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["Partial", "Row"]

Row = dict[str, Any]


class Partial:
    """A file of JSON lines: what the run is, then the rows of each finished cell.

    Parameters
    ----------
    path : Path
        The file. `begin` makes it anew, and `remove` deletes it.
    identity : dict
        What the run is: another run with another identity must not go on with these rows.
    """

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path = path
        self.identity = json.loads(json.dumps(identity))
        self.once: dict[str, Any] = {}
        """What was measured before the first cell."""

    def begin(self, once: dict[str, Any]) -> None:
        """Start the file; rows of an earlier run are lost."""
        self.once = once
        self.path.write_text(_line({**self.identity, "once": once}), encoding="utf-8")

    def add(self, number: int, rows: list[Row]) -> list[Row]:
        """Write a cell's rows and return them as `read` will: resumed or not, a run reports the same values."""
        line = _line({"cell": number, "rows": rows})
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line)
        return json.loads(line)["rows"]

    def read(self) -> dict[int, list[Row]]:
        """Return the rows by cell, and take over what was measured before them.

        Raises
        ------
        ValueError
            There is no such file, or it holds the rows of a run that differs; the message names the difference.
        """
        if not self.path.is_file():
            raise ValueError(f"there is no {self.path}, so no run was stopped here")
        header, *lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True) or [""]
        try:
            self.once = self._checked(json.loads(header))
            # the last line may have been cut, as its run was
            cells = [json.loads(line) for line in lines if line.endswith("\n")]
            found = {cell["cell"]: cell["rows"] for cell in cells}
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path} is not the file of a stopped run: {error!r}") from None
        if lines and not lines[-1].endswith("\n"):
            self.path.write_text("".join([header, *lines[:-1]]), encoding="utf-8")
        return found

    def remove(self) -> None:
        """Delete the file: the run is finished."""
        self.path.unlink(missing_ok=True)

    def _checked(self, header: dict[str, Any]) -> dict[str, Any]:
        for key, now in self.identity.items():
            before = header[key]
            if before == now:
                continue
            if isinstance(now, dict):
                key = next(each for each in {**now, **before} if now.get(each) != before.get(each))
                before, now = before.get(key), now.get(key)
            raise ValueError(f"the stopped run differs: its {key} is {before!r}, this run's {now!r}")
        return header["once"]


def _line(document: dict[str, Any]) -> str:
    return json.dumps(document, default=_number) + "\n"


def _number(value: Any) -> Any:
    """Return a number or an array of NumPy's, or of a library like it, as Python's; a path as its text."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"a row holds {type(value).__name__}, which JSON has no form for")
