"""Prepares the process of a tool; imported first by every one.

The repository comes first on the module path: `torchrun tools/train.py` starts with tools/ on it, and a foreign package
called `models` or `engine` must not win over ours. Standard streams are open and take any name of a file. Ctrl-C is one
line from here on, for importing PyTorch takes seconds; when it is imported, `engine.errors.guarded` answers.
"""

import logging
import os
import sys
from io import TextIOWrapper
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def _open_streams() -> None:
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:  # the next file would get the number, and with it what libraries print
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
            os.set_inheritable(number, True)
            setattr(sys, name, open(number, mode, encoding="utf-8"))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    logging.raiseExceptions = False  # a line that cannot be printed is no reason for a traceback


def _say_stopped(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print("stopped", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


_open_streams()
sys.excepthook = _say_stopped
