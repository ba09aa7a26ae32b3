"""The one exception a user sees: what was found, what was expected, what to do; and the exit codes of a run."""

import difflib
import inspect
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
        if command is None:
            _check_flags(main, sys.argv[1:])
        fire.Fire(main, command=command)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(error.code)
    except KeyboardInterrupt:
        sys.exit(130)


def _check_flags(main: Callable[..., None], arguments: list[str]) -> None:
    """Refuse unknown and missing flags before the work: fire would find them after it."""
    parameters = inspect.signature(main).parameters
    flags = [argument[2:].partition("=")[0].replace("-", "_") for argument in arguments if argument.startswith("--")]
    any_flag = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for flag in flags:
        if flag not in parameters and not any_flag:
            near = difflib.get_close_matches(flag, parameters, n=1)
            hint = f"Did you mean --{near[0]}?" if near else "See --help."
            raise UserError(f"unknown flag --{flag}", f"one of --{', --'.join(parameters)}", hint)
    required = [name for name, p in parameters.items() if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    words = sum(not argument.startswith("--") for argument in arguments)
    words -= sum(argument.startswith("--") and "=" not in argument for argument in arguments)  # at least so many stand alone
    for name in required[max(0, words) :]:
        if name not in flags:
            raise UserError(f"--{name} is missing", "a value for it", "See --help.")
