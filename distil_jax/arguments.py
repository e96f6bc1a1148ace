"""Command lines with arguments of their own, beside a config or in place of one."""

import argparse
from collections.abc import Sequence
from typing import NoReturn

from distil_jax.errors import UserError


class Parser(argparse.ArgumentParser):
    """Says what is wrong with a command line as every command does."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}; see {self.prog} --help")


def split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """(the command's own arguments, `--config FILE` and its overrides)."""
    ours: list[str] = []
    of_config: list[str] = []
    arguments = iter(argv)
    for argument in arguments:
        if argument in ("--config", "-config"):
            of_config += [argument, *([value] if (value := next(arguments, None)) is not None else [])]
        elif argument.lstrip("-").startswith(("config.", "config=", "noconfig.")) and argument.startswith("-"):
            of_config.append(argument)
        else:
            ours.append(argument)
    return ours, of_config
