"""The ``kvmlite`` command: find the subcommand, turn errors into one line and an exit code.

Importing click costs as much as starting a microVM, so ``run`` with plain, correct options is read by
``cli.options.read_plain``; anything else (help, completion, a mistake) goes through click, which knows how to say it.
"""

from __future__ import annotations

import os
import sys

from kvmlite.errors import KvmliteError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

EXIT_TIMEOUT = 124
EXIT_FAILED = 125
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141


def report_error(message: object, hint: str = "") -> None:
    """One line on stderr: what is wrong, then what to do."""
    text = " ".join(str(message).split())
    if hint:
        text = f"{text}; {' '.join(hint.split())}"
    try:
        os.write(2, f"kvmlite: {text}\n".encode(errors="backslashreplace"))
    except OSError:
        return  # nobody reads stderr: the exit code still says it


def main(arguments: Sequence[str]) -> int:
    """Run the command line; the exit code.

    125 stands for "kvmlite could not"; other codes are the subcommand's own.
    """
    _open_standard_streams()
    _take_signals()
    try:
        return _dispatch(list(arguments))
    except KvmliteError as error:
        report_error(error, error.hint)
        return EXIT_FAILED
    except KeyboardInterrupt:
        report_error("interrupted")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        return EXIT_BROKEN_PIPE
    except OSError as error:
        report_error(error)
        return EXIT_FAILED
    except MemoryError:
        report_error("out of memory")
        return EXIT_FAILED
    except Exception:  # a bug of ours: show all of it, and never under an exit code that a guest could have given
        sys.excepthook(*sys.exc_info())
        return EXIT_FAILED


def _open_standard_streams() -> None:
    """Put /dev/null where a standard stream is closed; the next file opened would take its place, and its output."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open("/dev/null", os.O_RDWR), True)


def _take_signals() -> None:
    """Ctrl-C raises KeyboardInterrupt, SIGTERM and SIGHUP SystemExit, so that terminals and files are put back.

    Those that whoever started us chose to ignore stay ignored. (``signal`` itself would import ``enum``.)
    """
    import _signal  # type: ignore[import-not-found]  # what signal is made of

    if _signal.getsignal(_signal.SIGINT) == _signal.SIG_DFL:  # scripts/kvmlite
        _signal.signal(_signal.SIGINT, _signal.default_int_handler)
    for number in (_signal.SIGTERM, _signal.SIGHUP):
        if _signal.getsignal(number) == _signal.SIG_DFL:
            _signal.signal(number, _terminated)


def _terminated(number: int, frame: object) -> None:
    """Leave through every ``finally``; a second signal ends the process at once."""
    import _signal

    _signal.signal(number, _signal.SIG_DFL)
    sys.exit(128 + number)


def _dispatch(arguments: list[str]) -> int:
    if arguments[:1] == ["run"]:
        from kvmlite.cli.options import read_plain
        from kvmlite.cli.run import OPTIONS, run

        values = read_plain(OPTIONS, arguments[1:])
        if values is not None:
            return run(values)
    from kvmlite.cli.commands import run_click

    return run_click(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
