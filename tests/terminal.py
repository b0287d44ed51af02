"""What stands on a terminal's screen after a program has written to it."""

from __future__ import annotations

import re

_PART = re.compile(r"\x1b\[\??([0-9;]*)([A-Za-z])|([\r\n])|([^\x1b\r\n]+)")


def screen_of(written: str) -> list[str]:
    """The lines that a person sees; knows only the few ways to move and erase that rich uses."""
    lines, row, column = [""], 0, 0
    for count, command, move, text in _PART.findall(written):
        if command == "A":
            row -= int(count or 1)
        elif command == "K":
            assert count == "2", "rich erases whole lines"
            lines[row] = ""
        elif move == "\r":
            column = 0
        elif move == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif text:
            lines[row] = lines[row][:column].ljust(column) + text + lines[row][column + len(text) :]
            column += len(text)
    return [line.rstrip() for line in lines if line.strip()]
