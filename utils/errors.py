"""How a script ends: in one clear line on stderr and an exit status that tells whose fault it was."""

import contextlib
import functools
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn

import torch


class UserError(Exception):
    """Something the user can put right; the message says how. Ends in one line and exit status 2."""


class Fault(Exception):
    """The machine or the training failed, not the user. Ends in one line and exit status 1."""


class Stopped(BaseException):
    """SIGINT or SIGTERM arrived. Not an Exception: nothing on the way up may take it for an error of its own."""


@contextlib.contextmanager
def user_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Around a call into a module whose errors of these kinds tell the user what to do."""
    try:
        yield
    except kinds as error:
        raise UserError(str(error)) from error


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    raise Stopped(number)


def entry(main: Callable) -> Callable:
    """Ends an entry script's `main(argv=None)` in one line and the right exit status, whatever happens to it."""

    @functools.wraps(main)
    def guarded(argv: list[str] | None = None) -> None:
        name = f"{main.__module__}.py" if main.__module__ != "__main__" else Path(sys.argv[0]).name
        handlers = {number: signal.signal(number, _stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            status, line = 0, ""
            main(argv)
        except UserError as error:
            status, line = 2, f"error: {error}"
        except torch.OutOfMemoryError:
            status, line = 1, "error: the device is out of memory; a smaller --batch-size needs less"
        except (Fault, OSError, MemoryError) as error:
            status, line = 1, f"error: {error or type(error).__name__}"
        except Stopped as stop:
            status = 128 + stop.args[0]
            line = f"stopped by {signal.Signals(stop.args[0]).name}; run the same command again to continue"
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        if line:
            print(f"{name}: {' '.join(line.split())}", file=sys.stderr)
        if status:
            sys.exit(status)

    return guarded
