"""Command lines: unknown and missing flags are one line before any work is done."""

import sys

import pytest

from trainer.errors import UserError, exit_with_one_line


def command(folder: str, workers: int = 1, overwrite: bool = False) -> None:
    print("worked", folder, workers, overwrite)
    if folder == "bad":
        raise UserError("found", "expected", "remedy", code=7)


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["there"], 0, "worked there 1 False"),
        (["there", "--workers", "2"], 0, "worked there 2 False"),
        (["--workers=2", "there"], 0, "worked there 2 False"),
        (["--workers", "2", "there"], 0, "worked there 2 False"),
        (["--folder", "there", "--overwrite"], 0, "worked there 1 True"),
        (
            ["there", "--wokers", "2"],
            2,
            "error: unknown flag --wokers; expected one of --folder, --workers, --overwrite. Did you",
        ),
        ([], 2, "error: --folder is missing"),
        (["--overwrite"], 2, "error: --folder is missing"),
        (["bad"], 7, "error: found; expected expected. remedy"),
    ],
)
def test_a_command_line_works_or_is_one_line(monkeypatch, capsys, arguments, code, told):
    monkeypatch.setattr(sys, "argv", ["command", *arguments])
    try:
        exit_with_one_line(command)
        ended = 0
    except SystemExit as exit_:
        ended = exit_.code
    out, err = capsys.readouterr()
    assert ended == code
    assert told in (err if code else out)
    assert code in (0, 7) or "worked" not in out
