"""The command line: `misa <command>`, the same as `python -m misa <command>`.

Every file of misa/commands is a command of its name, every folder there a group of them. A file's docstring is its
help, and its function `run` takes the options that the type of its argument declares. Exit status: 0 done, 2 wrong
input (one sentence on standard error), 1 failure, 128 + n where signal n ended the command.
"""

import argparse
import codecs
import importlib
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
from misa.errors import DIVERGED, Diverged, Stopped, UserError, did_you_mean
from misa.machine import is_main_process

ALIASES = {"whence": "provenance"}  # a command's name of before
_ASCII = {"±": "+/-", "−": "-", "–": "-", "×": "x", "·": "*", "…": "...", "→": "->", "≥": ">=", "σ": "sigma"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. SystemExit, as of argparse, for a command's --help or wrong options."""
    rest = list(sys.argv[1:] if argv is None else argv)
    if argv is None and "_ARGCOMPLETE" in os.environ:  # a shell asks what may come next; see `misa completion`
        complete()
    _print_what_the_terminal_shows()
    name, module = "misa", commands
    try:
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
        sys.stdout.flush()  # here at the latest a closed pipe shows
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
        if isinstance(error, BrokenPipeError) and nobody_reads():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still to be flushed at the end
            return 128 + signal.SIGPIPE
        # A full disk, or a file system that went away.
        what = f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")
        return _say(f"{name}: {what}; fix that, and the same command goes on.", 1)


def names(group: ModuleType) -> list[str]:
    """The commands of a group: its files and folders, save those that begin with an underscore."""
    return sorted(info.name for info in pkgutil.iter_modules(group.__path__) if not info.name.startswith("_"))


def parser_of(module: ModuleType, name: str) -> argparse.ArgumentParser:
    """The parser of a command, with its docstring as help; what follows "example:" comes last."""
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
    """Answer a shell's completion with commands, options, their choices, rows and paths."""
    import argcomplete

    argcomplete.autocomplete(_tree(commands, "misa", argparse.ArgumentParser()))
    sys.exit(1)  # reached only where the variables of a completion are missing


def _tree(group: ModuleType, name: str, parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """One parser for all commands of a group and of the groups in it, with the rows as answers for a row."""
    kinds = parser.add_subparsers()
    for known in names(group):
        module = importlib.import_module(f"{group.__name__}.{known}")
        child = kinds.add_parser(known)
        if not hasattr(module, "run"):
            _tree(module, f"{name} {known}", child)
            continue
        _declared(module).add_to(child)
        for action in child._actions:
            if action.dest in ("row", "rows"):
                action.completer = _rows  # type: ignore[attr-defined]
            elif str(action.metavar).startswith("{"):
                action.choices = str(action.metavar)[1:-1].split(",")
    return parser


def _rows(**_: Any) -> list[str]:
    from misa.rows import table_module, table_names

    return [f"{table}:{row}" for table in table_names() for row in table_module(table).ROWS]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One sentence, without the usage that argparse prints before it."""
        self.exit(2, f"{self.prog}: {message}{' See' if message.endswith('?') else '; see'} {self.prog} --help.\n")


def options(module: ModuleType, name: str, words: Sequence[str]) -> Any:
    """The `Parameters` of a command that words stand for; SystemExit for --help and wrong words."""
    parser = parser_of(module, name)
    found, unknown = parser.parse_known_args(words)
    if unknown:
        parser.error(f"there is no option {unknown[0]}{did_you_mean(unknown[0], parser._option_string_actions)}")
    return _declared(module).parsed(found)


def _declared(module: ModuleType) -> Any:
    """The `Parameters` that `run` takes."""
    return next(iter(typing.get_type_hints(module.run).values()))


def _command(group: ModuleType, name: str, word: str) -> ModuleType:
    known = names(group)
    wanted = ALIASES.get(word, word)
    if wanted in known:
        return importlib.import_module(f"{group.__name__}.{wanted}")
    hint = did_you_mean(word, known) or f"; the commands are {', '.join(known)}."
    raise UserError(f"there is no command {word!r}{hint}")


def _overview(group: ModuleType, name: str) -> str:
    """The commands of a group, each with the first line of its docstring, and the rest of the group's own."""
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


def nobody_reads() -> bool:
    """Whether the reader of standard output has ended, as `head` does."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _print_what_the_terminal_shows() -> None:
    """Where the output is not in Unicode, a sign that it lacks is spelt in ASCII instead of being an error."""

    def spelt(error: UnicodeError) -> tuple[str, int]:
        assert isinstance(error, UnicodeEncodeError)
        signs = error.object[error.start : error.end]
        plain = (_ASCII.get(s) or unicodedata.normalize("NFKD", s).encode("ascii", "ignore").decode() for s in signs)
        return "".join(text or "?" for text in plain), error.end

    codecs.register_error("misa.spelt", spelt)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a file's name may be no text in any encoding
            unicode = stream.encoding.lower().startswith("utf")
            stream.reconfigure(errors="backslashreplace" if unicode else "misa.spelt")
