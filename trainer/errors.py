"""The one exception a user sees: what was found, what was expected, what to do; and the exit codes of a run."""

import sys
from collections.abc import Callable

STOPPED = 75  # saved on SIGTERM or SIGUSR1; the same command continues (EX_TEMPFAIL)
DIVERGED = 76  # a loss was not finite
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
        self.code = code


def exits_cleanly(main: Callable[..., None]) -> Callable[[], None]:
    """Make a fire entry point that ends a UserError with one line on stderr and its exit code."""

    def run() -> None:
        import fire

        try:
            fire.Fire(main)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(error.code)

    return run
