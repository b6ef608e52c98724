"""`sedac-hf`: the list of commands, and how errors become exit codes.

Exit codes: 0 done, 1 an error that the message explains, 2 wrong usage (unknown command, flag or recipe key), 130
interrupted. A command module imports torch and transformers inside its function, so that `--help` stays quick.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

import sedac_hf
from sedac_hf.cli import bench, calibrate, demo, env, eval, generate, info, models
from sedac_hf.cli.recipes import RecipeError
from sedac_hf.errors import SedacError

DONE, FAILED, WRONG_USAGE = 0, 1, 2

app = typer.Typer(
    name="sedac-hf",
    help="Spend the FFN compute of a Hugging Face decoder on the tokens that need it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# Every command of the program: the name, and a function or a typer.Typer with sub-commands.
COMMANDS = (
    ("demo", demo.command),
    ("calibrate", calibrate.command),
    ("generate", generate.command),
    ("eval", eval.app),
    ("bench", bench.command),
    ("info", info.command),
    ("models", models.command),
    ("env", env.command),
)

for _name, _command in COMMANDS:
    if isinstance(_command, typer.Typer):
        app.add_typer(_command, name=_name)
    else:
        app.command(_name)(_command)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"sedac-hf {sedac_hf.__version__}")
        raise typer.Exit


@app.callback()
def _program(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass  # the docstring of the program is `help` above; this only declares the flags that precede a command


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code.

    Args:
        argv: arguments without the program's name; default those of the process.
    """
    try:
        app(args=None if argv is None else list(argv), prog_name="sedac-hf")
    except SystemExit as stop:  # how typer ends, also after a success
        return stop.code if isinstance(stop.code, int) else FAILED
    except RecipeError as error:
        return _report(error, WRONG_USAGE)
    except (SedacError, OSError) as error:  # OSError: a file that is missing, a model that the hub does not have
        return _report(error, FAILED)
    return DONE


def _report(error: Exception, code: int) -> int:
    print(f"sedac-hf: error: {' '.join(str(error).split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
