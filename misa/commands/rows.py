"""List the rows that can be trained: table:row, data and description.

Words are a filter: only rows are listed whose line, or whose table's title, has every word; capitals do not matter.
Rows that have the words in their description only come last. A table's name with a colon lists that table. The second
column is the data: demo is drawn by misa itself, coco and voc are a folder of yours, given with --data-root.

example: misa rows demo:
example: misa rows photos sepa
"""

from misa.errors import UserError, counted, did_you_mean
from misa.parameters import Parameters, argument
from misa.rows import Line, in_columns, lines_of, table_module, table_names


class Rows(Parameters):
    """Options of `misa rows`."""

    words: tuple[str, ...] = argument("list only the rows that have all of these words", default=(), optional=True)


def run(options: Rows) -> int:
    """Print the rows; UserError if none matches."""
    named, described, total = listing(options.words)
    counts = [sum(map(len, tables.values())) for tables in (named, described)]
    if not any(counts):
        names = [line.name for table in table_names() for line in lines_of(table, table_module(table))]
        known = {part for name in names for part in (name, *name.split(":"))}
        lost = next((word for word in options.words if not any(listing((word,))[:2])), "")
        hint = did_you_mean(lost, sorted(known)) if lost else ""
        raise UserError(f"no row has {' and '.join(options.words)}{hint or ';'} `misa rows` lists all {total}.")
    width = max(len(line.name) for tables in (named, described) for lines in tables.values() for line in lines)
    for tables, head in ((named, ""), (described, "In the description only:\n\n")):
        for title, lines in tables.items():
            print(f"{head}{title}\n{in_columns(line._replace(name=line.name.ljust(width)) for line in lines)}\n")
            head = ""
    only = f", {counts[1]} by the description only" if counts[1] else ""
    print(counted(total, "row") if sum(counts) == total else f"{sum(counts)} of {counted(total, 'row')}{only}", end="")
    print("; train one with: misa train TABLE:ROW")
    names = [word for word in options.words if word in table_names()]
    if names:
        print(f"`misa rows {names[0]}:` lists the rows of the table {names[0]} alone.")
    return 0


def listing(words: tuple[str, ...] = ()) -> tuple[dict[str, list[Line]], dict[str, list[Line]], int]:
    """Returns the rows that match all words, by the titles of their tables, and the total number of rows.

    First those that match by name, data or title, then those that match by their description only.
    """
    named: dict[str, list[Line]] = {}
    described: dict[str, list[Line]] = {}
    total = 0
    for table in table_names():
        module = table_module(table)
        title = (module.__doc__ or table).strip().partition("\n")[0]
        lines = lines_of(table, module)
        total += len(lines)
        found = [line for line in lines if all(_has(line, title, word.lower()) for word in words)]
        bare = [line._replace(text="") for line in found]
        near = [all(_has(line, title, word.lower()) for word in words) for line in bare]
        for tables, wanted in ((named, True), (described, False)):
            if kept := [line for line, by_name in zip(found, near, strict=True) if by_name is wanted]:
                tables[title] = kept
    return named, described, total


def _has(line: Line, title: str, word: str) -> bool:
    """Whether a row contains a word; a table's name with a colon has to be a prefix of the row's name."""
    if word[-1:] == ":" and word[:-1] in table_names():
        return line.name.startswith(word)
    return word in " ".join((*line, title)).lower()
