"""The one exception a user sees: what was found, what was expected, what to do; and the exit codes of a run."""

import sys
from collections.abc import Callable

STOPPED = 75  # saved on SIGTERM or SIGUSR1; the same command continues (EX_TEMPFAIL)
DIVERGED = 76  # a loss was not finite
STORAGE = 74  # a checkpoint could not be written; the previous one is intact (EX_IOERR)
USAGE = 2  # bad input: nothing was written


class UserError(Exception):
    """Bad input or a run that cannot go on, told in one line.

    Args:
        found: what was found, naming the file, the key, the flag or the rank.
        expected: what was expected instead.
        remedy: what to do about it.
        code: exit code of the process, non-zero.
    """

    def __init__(self, found: str, expected: str, remedy: str, code: int = USAGE) -> None:
        super().__init__(f"{found}; expected {expected}. {remedy}")
        self.parts, self.code = (found, expected, remedy), code

    def __reduce__(self) -> tuple[type, tuple[str, str, str, int]]:
        """Errors travel between ranks."""
        return UserError, (*self.parts, self.code)


def exit_with_one_line(main: Callable[..., None]) -> None:
    """Run a fire command line; a UserError becomes one line on stderr and the exit code it carries."""
    import fire

    # A command that takes any setting would take --help for one; fire's own form of the flag stands behind "--".
    command = ["--", "--help"] if {"--help", "-h"} & set(sys.argv[1:]) else None
    try:
        fire.Fire(main, command=command)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(error.code)
    except KeyboardInterrupt:
        sys.exit(130)
