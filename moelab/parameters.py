"""A notebook's parameters: which there are, and whether those given are right.

papermill only warns about a parameter that the notebook doesn't have, then runs
with the defaults. The cell after `parameters` therefore says what it expects:

    from moelab.parameters import given

    p = given(globals(), ["arch", "stages"])
"""

from __future__ import annotations

import ast
import difflib
import io
import json
import os
import sys
import tokenize
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

_IPYTHON_NAMES = frozenset({"In", "Out", "exit", "quit", "get_ipython", "open"})


class ParameterError(ValueError):
    """A notebook parameter that doesn't exist or has no usable value."""


@dataclass(frozen=True)
class Parameter:
    """One line of a notebook's `parameters` cell, as source text."""

    name: str
    type: str
    default: str
    help: str


def given(namespace: Mapping[str, object], allowed: Collection[str]) -> dict[str, object]:
    """Return the notebook's parameters; refuse any name that isn't one.

    A cell that is run again in a live kernel isn't checked for other names: by
    then the notebook's own variables are there.

    Args:
        namespace: the notebook's ``globals()``.
        allowed: names of the parameters.

    Returns:
        ``{name: value}`` in the order of ``allowed``.

    Raises:
        ParameterError: another name has a value, or a parameter has none.
        RuntimeError: papermill started this kernel in another environment.

    >>> given({"arch": "gfx950"}, ["arch"])
    {'arch': 'gfx950'}
    >>> given({"arch": "gfx950", "stage": 2}, ["arch", "stages"])
    Traceback (most recent call last):
    moelab.parameters.ParameterError: 'stage' is not a parameter; did you mean 'stages'? \
This notebook takes: arch, stages
    """
    _require_papermills_environment()
    if not _runs_again(namespace):
        unknown = [name for name, value in namespace.items() if _is_data(name, value, namespace)]
        if unknown := [name for name in unknown if name not in allowed]:
            raise ParameterError(unknown_parameters(unknown, allowed))
    if missing := [name for name in allowed if name not in namespace]:
        raise ParameterError(
            f"no value for {', '.join(missing)}; give the parameters cell a default for each"
        )
    return {name: namespace[name] for name in allowed}


def parameters_of(notebook: Path) -> dict[str, Parameter]:
    """Return what a notebook's `parameters` cell defines, ``{name: Parameter}``.

    Raises:
        ParameterError: the cell is not plain Python assignments.
    """
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    for cell in cells:
        if "parameters" in cell["metadata"].get("tags", []):
            try:
                return assignments("".join(cell["source"]))
            except SyntaxError as error:
                raise ParameterError(
                    f"{notebook.name}: the parameters cell isn't plain Python: {error}"
                ) from error
    return {}


def assignments(source: str) -> dict[str, Parameter]:
    """Read ``name: type = value  # help`` lines.

    papermill's own reader skips lines with a second ``=`` and types like
    ``str | None``.

    >>> assignments("stages: str = '1,2'  # pipeline depths")["stages"]
    Parameter(name='stages', type='str', default="'1,2'", help='pipeline depths')
    """
    comments = {
        token.start[0]: token.string.lstrip("#").strip()
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name, kind, value = node.targets[0].id, "", node.value
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value:
            name, kind, value = node.target.id, ast.unparse(node.annotation), node.value
        else:
            continue
        if not kind and isinstance(value, ast.Constant):
            kind = type(value.value).__name__
        default = ast.get_source_segment(source, value) or ""
        comment = comments.get(node.end_lineno or node.lineno, "")
        found[name] = Parameter(name, kind or "any", default, comment)
    return found


def unknown_parameters(unknown: Iterable[str], valid: Collection[str]) -> str:
    """Say which names aren't parameters, the nearest that are, and all there are."""
    parts = []
    for name in unknown:
        near = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ";"
        parts.append(f"{name!r} is not a parameter{hint}")
    return f"{' '.join(parts)} This notebook takes: {', '.join(valid) or 'no parameters'}"


def as_list(value: object, kind: type = str) -> list:
    """Return a list of ``kind`` from a list, a comma separated string or one value.

    Args:
        value: ``[1, 2]``, ``(1, 2)``, ``"1,2"``, ``"[1, 2]"`` or ``1``.
        kind: ``str``, ``int``, ``float`` or ``bool``.

    Raises:
        ParameterError: an element isn't a ``kind``; 1.5 and True are no ``int``.

    >>> as_list("1,2", int)
    [1, 2]
    >>> as_list(3)
    ['3']
    """
    if isinstance(value, str):
        text = value.strip()
        if text[:1] + text[-1:] in ("[]", "()"):
            text = text[1:-1].strip()
        parts: list = [part.strip().strip("'\"") for part in text.removesuffix(",").split(",")]
        parts = parts if text else []
    elif isinstance(value, (list, tuple)):
        parts = list(value)
    else:
        parts = [value]
    return [_as_kind(part, kind, value) for part in parts]


def _as_kind(part: object, kind: type, value: object) -> object:
    """Convert one element without losing anything on the way."""
    if kind is bool and isinstance(part, str):
        part = {"true": True, "false": False}.get(part.lower(), part)
    if isinstance(part, kind) and not (kind is int and isinstance(part, bool)):
        if part != "":
            return part
    # Only these conversions keep the value: int(1.5) is 1, bool("false") is True.
    elif (kind is float and type(part) is int) or (kind in (int, float) and isinstance(part, str)):
        try:
            return kind(part)
        except ValueError:
            pass
    elif kind is int and isinstance(part, float) and part.is_integer():
        return int(part)
    elif kind is str and part is not None and not isinstance(part, (list, tuple, dict)):
        return str(part)
    works = {
        str: '"a,b" or ["a", "b"]',
        int: '"1,2" or [1, 2]',
        float: '"0.5,1" or [0.5, 1]',
        bool: '"true,false" or [True, False]',
    }
    raise ParameterError(
        f"{part!r} in {value!r} is not {kind.__name__}; "
        f"give for example {works.get(kind, 'a list')}"
    )


def _is_data(name: str, value: object, namespace: Mapping[str, object]) -> bool:
    """Whether a user, not Python or IPython, put this value here."""
    if name.startswith("_") or name in _IPYTHON_NAMES:
        return False
    # papermill injects literals, so an import (this guard itself, `annotations`
    # of __future__) is never a mistyped parameter.
    if isinstance(value, ModuleType) or callable(value) or type(value).__module__ == "__future__":
        return False
    # What IPython's start-up files define; %who tells them apart the same way.
    shell = namespace.get("get_ipython")
    hidden = getattr(shell(), "user_ns_hidden", {}) if callable(shell) else {}
    return not (name in hidden and hidden[name] is value)


def _runs_again(namespace: Mapping[str, object]) -> bool:
    """Whether IPython has run the current cell before, in this kernel."""
    cells = namespace.get("In")
    return isinstance(cells, list) and len(cells) > 1 and cells[-1] in cells[1:-1]


def _require_papermills_environment() -> None:
    """Refuse a kernel of another environment than papermill's.

    A `python3` kernelspec in the user's data folder comes before the one of the
    environment. It can be told only on Linux, from papermill's command line; a
    kernel that was asked for by name (`-k`) is meant.
    """
    try:
        raw = Path(f"/proc/{os.environ['JPY_PARENT_PID']}/cmdline").read_bytes()
    except (KeyError, OSError):
        return
    python, *arguments = raw.decode(errors="replace").split("\0")
    by_name = any(a in ("-k", "--kernel") or a.startswith("--kernel=") for a in arguments)
    if "papermill" not in (Path(a).stem for a in arguments[:2]) or by_name:
        return
    prefix = Path(python).parent.parent
    if Path(python).is_absolute() and prefix.resolve() != Path(sys.prefix).resolve():
        raise RuntimeError(
            f"this kernel runs in {sys.prefix}, papermill in {prefix}: a `python3` kernelspec of "
            "another environment comes first (`jupyter kernelspec list` shows it). "
            "Pass --engine moelab, or name the kernel that you mean with -k"
        )
