"""A Typer app that reports mistakes in one line. Data on stdout, everything else on stderr."""

import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypeVar

import typer
from typer.core import TyperCommand

from resdiag.errors import ResdiagError
from resdiag.models.variants import list_variants
from resdiag.registry import load_extensions
from resdiag.terminal import has_colour, paint

F = TypeVar("F", bound=Callable[..., Any])


class Group(typer.Typer):
    """A Typer app whose list of commands has the first sentence of each whole."""

    def command(self, name: str | None = None, **options: Any) -> Callable[[F], F]:  # noqa: ANN401
        """Register a command; Typer itself would cut the sentence at the width of the list."""

        def register(function: F) -> F:
            add = super(Group, self).command(name, short_help=summary(function), **options)
            return add(function)

        return register


def summary(function: Callable[..., Any]) -> str:
    """The first sentence of a command's help."""
    paragraph = inspect.cleandoc(function.__doc__ or "").partition("\n\n")[0]
    return re.split(r"(?<=\.)\s+(?=[A-Z])", paragraph, maxsplit=1)[0].replace("\n", " ")


class NoVariant(ResdiagError):
    """`resdiag run` alone: what could be run, in a few lines (exit code 2).

    Attributes:
        problems: The lines.
    """

    exit_code = 2

    def __init__(self) -> None:
        super().__init__("name a variant and a depth: resdiag run --variant elu_pre --depth 110")
        self.problems = (
            self.message,
            f"variants: {', '.join(list_variants())}; `resdiag variants` describes them",
            "depths: 6n+2 layers, such as 20, 32, 44, 56, 110; `resdiag run --help` has the rest",
        )


class NamesItsVariants(TyperCommand):
    """A command that says which variants there are if it is called without any argument."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: ANN401
        """Parse the arguments.

        Raises:
            NoVariant: There are none.
        """
        if not args:
            raise NoVariant
        return super().parse_args(ctx, args)


class App(Group):
    """A Typer app whose mistakes are one line on stderr, or one JSON object on stdout."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Run the command line and exit with its code."""
        try:
            sys.exit(_deliver(self.run(kwargs.pop("args", None))))
        except KeyboardInterrupt:  # while the command line is read
            sys.exit(130)

    def run(self, args: Sequence[str] | None = None) -> int:
        """Run one command line.

        Args:
            args: Arguments; None takes those of the process.

        Returns:
            The exit code.
        """
        load_extensions()
        words = list(sys.argv[1:] if args is None else args)
        as_json = "--json" in words
        command = typer.main.get_command(self)
        try:
            code = command.main(args=words, prog_name="resdiag", standalone_mode=False, obj=words)
        except ResdiagError as error:
            return _fail_all(error, as_json)
        except OSError as error:
            return _fail(str(error), "", 74, as_json)
        except Exception as error:
            # Typer's own errors: Ctrl-C; wrong options, missing arguments
            if type(error).__name__ == "Abort":
                return _fail("stopped by Ctrl-C", "", 130, as_json)
            if not hasattr(error, "format_message"):
                raise
            message = " ".join(str(error.format_message()).split())
            context = getattr(error, "ctx", None)
            hint = f"{context.command_path if context else 'resdiag'} --help"
            return _fail(message, hint, getattr(error, "exit_code", 2), as_json)
        return code if isinstance(code, int) else 0


def _deliver(code: int) -> int:
    """Flush what was printed; the exit code says if that did not arrive."""
    try:
        sys.stdout.flush()
    except OSError as error:
        # what is left in the buffer would fail once more when Python exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # the reader has seen enough
            return code or 1
        return code or _fail(f"cannot write to standard output: {error}", "", 74, as_json=False)
    return code


def _fail_all(error: ResdiagError, as_json: bool) -> int:
    """Report an error; a file with several mistakes has them one a line."""
    problems: Sequence[str] = () if as_json else getattr(error, "problems", ())
    *first, last = problems or (error.message,)
    for problem in first:
        _fail(problem, "", error.exit_code, as_json)
    return _fail(last, error.hint, error.exit_code, as_json)


def _fail(message: str, hint: str, code: int, as_json: bool) -> int:
    if as_json:
        print(json.dumps({"error": message, "hint": hint}))
    else:
        name = paint("resdiag:", "failed") if has_colour(sys.stderr) else "resdiag:"
        line = f"{name} {message}" + (f" ({hint})" if hint else "")
        print(" ".join(line.splitlines()), file=sys.stderr)
    return code


def group(help: str) -> Group:
    """A command that has commands of its own."""
    app = Group(help=help, invoke_without_command=True, rich_markup_mode=None)
    app.callback()(print_help)
    return app


def print_help(context: typer.Context) -> None:
    """Without a command the help is printed, which is not what a script wanted: exit code 2."""
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(2)


def print_help_or_version(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)
    ] = False,
) -> None:
    """What `resdiag` does without a command."""
    if version:
        from resdiag import __version__

        print(__version__)
        raise typer.Exit
    print_help(context)
