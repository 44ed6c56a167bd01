"""The command line in this process."""

import sys
from typing import Any

import pytest

from pascaline import cli


def call(monkeypatch: Any, capsys: Any, *arguments: object) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["pascaline", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


def refused(monkeypatch: Any, capsys: Any, *arguments: object) -> str:
    """The one sentence of a command that is refused."""
    code, out, err = call(monkeypatch, capsys, *arguments)
    lines = [line for line in err.splitlines() if line.startswith("pascaline: ")]
    assert (code, out, len(lines)) == (2, "", 1) and len(lines[0]) < 500 and "Traceback" not in err, err
    return lines[0]
