"""What others wrote, made inert for each place that shows it.

A name in a file of rows is text and nothing else: it commands no terminal and no CI job, and is
no markup. `line` and `frame` are for values, `printed` and `json` for what leaves by stdout and
stderr, `markdown` and `code` for Markdown, `page` for HTML; figures draw what `frame` leaves, and
no mathtext (`plots.style.picture`). Escaping HTML is left to who writes it: pandas, or `escape`.
"""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

# Characters of a name in a picture, and of words such as a reason.
SHORT, LONG = 80, 2000

# What a CI job's log takes as a command. GitHub: `::` at the start of a line whatever blanks are
# before it, `##[` anywhere (actions/runner, ActionCommand.TryParseV2 and TryParse). Azure:
# `##vso[` anywhere (azure-pipelines-agent, Command.TryParse).
_COMMAND = re.compile(r"##(?=\w*\[)")
_AT_START = re.compile(r"^(\s*:)(?=:)", re.MULTILINE)

# What means something to a renderer of Markdown or of formulas, or makes a link of plain text.
_MARKUP = re.compile(
    r"[\\`*\[\]<>|~$&#!{}@]|(?<!\w)_|_(?!\w)|(?<=www)\.|:(?=//)|^[-+=]|(?<=\d)[.)](?=\s|$)",
    re.IGNORECASE,
)

# Control characters but line ends and tabs, those that turn the direction of writing
# (Bidi_Control of Unicode's PropList), halves of surrogate pairs, and what is no character.
_NO_PAGE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)

_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

# What would end a code span, or a table's cell.
_IN_CODE = str.maketrans({"`": "'", "|": "\N{BROKEN BAR}"})


def line(value: Any, most: int = 300) -> str:
    r"""Make a value one line that commands neither a terminal nor a CI job.

    Control characters go, and those that turn the direction of writing; so do the starts of
    GitHub's and Azure's log commands. What is missing or empty is ``-``.

    Args:
        most: characters; of a longer text the start is left, and a checksum, so that two such
            texts stay two.

    >>> line("a\x1b[31m\n::error::b")
    'a [31m : :error: :b'
    """
    if not isinstance(value, str):
        import pandas as pd

        if pd.api.types.is_scalar(value) and pd.isna(value):
            return "-"
        value = str(value)
    if len(value) > most:
        checksum = zlib.crc32(value.encode(errors="surrogatepass"))
        value = f"{value[: most - 9]}\N{HORIZONTAL ELLIPSIS}{checksum:08x}"
    shown = _visible(value).strip()
    return _COMMAND.sub("# #", re.sub(":(?=:)", ": ", shown)) or "-"


def _visible(text: str, but: str = "") -> str:
    """Put a blank for what is no visible character: categories C and Z of Unicode."""
    # Quick for nearly all.
    if text.isascii() and text.isprintable():
        return text
    return "".join(" " if unicodedata.category(c)[0] in "CZ" and c not in but else c for c in text)


def is_file_name(name: str) -> bool:
    """Tell whether a name is one of a file in its folder, on any system.

    >>> [is_file_name(name) for name in ("gfx942_1.2", "../gfx942", "a..b", "a.", "a/b", "")]
    [True, False, False, False, False, False]
    """
    return bool(_FILE_NAME.fullmatch(name)) and ".." not in name and not name.endswith(".")


def frame(
    table: pd.DataFrame, said: Callable[[Any, int], str] = line, most: int = 300
) -> pd.DataFrame:
    """Make every text of a table inert, names of columns too; what is missing or empty stays.

    Args:
        said: what a text becomes: `line` or `markdown`.
        most: characters of each.
    """
    from pandas.api.types import is_numeric_dtype

    def inert(value: Any) -> Any:
        return said(value, most) if isinstance(value, str) and value else value

    table = table.copy(deep=False)
    for at, kind in enumerate(table.dtypes):
        if not is_numeric_dtype(kind):
            texts = table.iloc[:, at].map(inert)
            table.isetitem(at, texts.astype(kind) if kind == "string" else texts)
    table.columns = table.columns.map(inert)
    return table


def printed(text: str) -> str:
    """Make all of what is printed inert; lines, tabs and how long they are stay.

    >>> printed("a line\\n  ::set-output name=x::y")
    'a line\\n  : :set-output name=x::y'
    """
    return _COMMAND.sub("# #", _AT_START.sub(r"\1 ", _visible(text, but="\n\t")))


def json(text: str) -> str:
    r"""Spell JSON so that no log takes a string in it as a command; it says the same.

    Args:
        text: in ASCII, each line an object: that begins with no ``::``.

    >>> json('{"kernel": "##vso[task]"}')
    '{"kernel": "#\\u0023vso[task]"}'
    """
    return text.replace("##", r"#\u0023").replace("\x7f", r"\u007f")


def markdown(value: Any, most: int = 300) -> str:
    r"""Write a value in a sentence of Markdown, where it makes no link, tag, heading or formula.

    >>> markdown("moe_gemm_a8w8 [a](http://b)")
    'moe_gemm_a8w8 \\[a\\](http\\://b)'
    """
    return _MARKUP.sub(r"\\\g<0>", line(value, most))


def code(value: Any) -> str:
    """Write a value as a code span of Markdown that may stand in a table."""
    return f"`{line(value).translate(_IN_CODE)}`"


def page(html: str) -> str:
    """Take from a page what turns the direction of writing, and what no page may hold."""
    return _NO_PAGE.sub("\N{REPLACEMENT CHARACTER}", html)
