"""The command line: `misa <command>`, the same as `python -m misa <command>`.

Each file of misa/commands is a command of the same name, each folder a group of commands. The docstring of the file is
the command's help; its options are the fields of the `Parameters` that its function `run` takes. Exit status: 0
success, 2 wrong input (one sentence on standard error), 1 failure, 128 + n after signal n.
"""

import argparse
import codecs
import importlib
import itertools
import os
import pkgutil
import select
import signal
import sys
import typing
import unicodedata
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NoReturn

import misa
from misa import commands
from misa.errors import DIVERGED, Diverged, Stopped, UserError, did_you_mean, on_command_line
from misa.machine import is_main_process

ALIASES = {"whence": "provenance"}  # former name of a command
_ASCII = {"±": "+/-", "−": "-", "–": "-", "×": "x", "·": "*", "…": "...", "→": "->", "≥": ">=", "σ": "sigma"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status. Raises SystemExit, as argparse does, for --help and wrong options."""
    rest = list(sys.argv[1:] if argv is None else argv)
    if argv is None and "_ARGCOMPLETE" in os.environ:  # called by the shell's completion; see `misa completion`
        complete()
    _print_what_the_terminal_shows()
    name, module = "misa", commands
    try:
        with on_command_line():
            while not hasattr(module, "run"):
                if not rest:
                    return _say(f"{name}: a command is missing.\n\n{_overview(module, name)}", 2)
                word = rest.pop(0)
                if word in ("-h", "--help"):
                    return _say(_overview(module, name))
                if word == "--version" and module is commands:
                    return _say(f"misa {misa.__version__}")
                module = _command(module, name, word)
                name = f"{name} {word}"
            status: int = module.run(options(module, name, rest))
            sys.stdout.flush()  # raises BrokenPipeError here at the latest if the pipe is closed
            return status
    except UserError as error:
        return _say(f"{name}: {error}", 2) if is_main_process() else 2
    except Diverged as error:
        return _say(f"{name}: {DIVERGED}{error}", 1)
    except Stopped as error:
        return _say(f"{name}: {error}", error.status) if str(error) else error.status
    except KeyboardInterrupt:
        return _say("\nstopped; the same command goes on from what was saved.", 128 + signal.SIGINT)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and reader_closed():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at interpreter exit
            return 128 + signal.SIGPIPE
        # A full disk, or a file system that was unmounted.
        what = f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")
        return _say(f"{name}: {what}; fix that, and the same command goes on.", 1)


def names(group: ModuleType) -> list[str]:
    """Returns the names of the commands in a group: its files and folders except those starting with an underscore."""
    return sorted(info.name for info in pkgutil.iter_modules(group.__path__) if not info.name.startswith("_"))


def parser_of(module: ModuleType, name: str) -> argparse.ArgumentParser:
    """Returns the parser of a command; its help is the docstring, with the part from "example:" on as epilog."""
    description, example, examples = (module.__doc__ or "").partition("example:")
    parser = _Parser(
        prog=name,
        description=description.strip(),
        epilog=(example + examples).strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _declared(module).add_to(parser)
    return parser


def complete() -> NoReturn:
    """Print the shell's completions: commands, options, their choices, rows and paths; then exit."""
    import argcomplete

    argcomplete.autocomplete(_tree(commands, "misa", argparse.ArgumentParser()))
    sys.exit(1)  # reached only if the completion's environment variables are missing


def _tree(group: ModuleType, name: str, parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the commands of a group and its subgroups to one parser, with the rows as completions of a row argument."""
    kinds = parser.add_subparsers()
    for known in names(group):
        module = importlib.import_module(f"{group.__name__}.{known}")
        child = kinds.add_parser(known)
        if not hasattr(module, "run"):
            _tree(module, f"{name} {known}", child)
            continue
        _declared(module).add_to(child)
        hints = typing.get_type_hints(_declared(module))
        for action in child._actions:
            if action.dest in ("row", "rows"):
                action.completer = _rows  # type: ignore[attr-defined]
            elif typing.get_origin(hint := hints.get(action.dest)) is typing.Literal:
                action.choices = [choice for choice in typing.get_args(hint) if choice]
    return parser


def _rows(**_: Any) -> list[str]:
    from misa.rows import table_module, table_names

    return [f"{table}:{row}" for table in table_names() for row in table_module(table).ROWS]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Exit with a one-sentence message, without argparse's usage text."""
        self.exit(2, f"{self.prog}: {message}{' See' if message.endswith('?') else '; see'} {self.prog} --help.\n")


def options(module: ModuleType, name: str, words: Sequence[str]) -> Any:
    """Parse the arguments of a command into its `Parameters`; SystemExit for --help and wrong arguments."""
    parser = parser_of(module, name)
    known = parser._option_string_actions
    for word in itertools.takewhile(lambda word: word != "--", words):  # before argparse misses what was misspelled
        if word.startswith("--") and (flag := word.partition("=")[0]) not in known:
            parser.error(f"there is no option {flag}{did_you_mean(flag, known)}")
    found, unknown = parser.parse_known_args(words)
    if unknown and not unknown[0].startswith("-"):
        parser.error(f"{unknown[0]} is one argument too many")
    if unknown:
        parser.error(f"there is no option {unknown[0]}{did_you_mean(unknown[0], known)}")
    return _declared(module).parsed(found)


def _declared(module: ModuleType) -> Any:
    """Returns the `Parameters` class of the argument of `run`."""
    return next(iter(typing.get_type_hints(module.run).values()))


def _command(group: ModuleType, name: str, word: str) -> ModuleType:
    known = names(group)
    wanted = ALIASES.get(word, word)
    if wanted in known:
        return importlib.import_module(f"{group.__name__}.{wanted}")
    hint = did_you_mean(word, known) or f"; the commands are {', '.join(known)}."
    raise UserError(f"there is no command {word!r}{hint}")


def _overview(group: ModuleType, name: str) -> str:
    """Returns the help of a group: its docstring, and its commands, each with the first line of its docstring."""
    title, _, rest = (group.__doc__ or "").strip().partition("\n")
    lines = [f"usage: {name} <command> [options]", "", title, "", "commands:"]
    for known in names(group):
        summary = (importlib.import_module(f"{group.__name__}.{known}").__doc__ or "").splitlines()[0]
        lines.append(f"  {known:<12} {summary}")
    lines += ["", f"`{name} <command> --help` lists a command's options, with an example."]
    return "\n".join([*lines, rest.rstrip()] if rest else lines)


def _say(text: str, status: int = 0) -> int:
    print(text, file=sys.stderr if status else sys.stdout, flush=True)
    return status


def reader_closed() -> bool:
    """Whether the reader of standard output has closed the pipe, as `head` does."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _print_what_the_terminal_shows() -> None:
    """Transliterate characters that the output encoding lacks to ASCII instead of raising UnicodeEncodeError."""

    def escaped(error: UnicodeError) -> tuple[str, int]:
        assert isinstance(error, UnicodeEncodeError)
        signs = error.object[error.start : error.end]
        plain = (_ASCII.get(s) or unicodedata.normalize("NFKD", s).encode("ascii", "ignore").decode() for s in signs)
        return "".join(text or "?" for text in plain), error.end

    codecs.register_error("misa.escaped", escaped)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a file name may hold bytes that cannot be encoded even in UTF-8
            unicode = stream.encoding.lower().startswith("utf")
            stream.reconfigure(errors="backslashreplace" if unicode else "misa.escaped")
