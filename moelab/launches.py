"""Anybody's kernel: where it lies, and the launch that a LAUNCH.json describes.

    {"args": {"x_ptr": "*fp8e4nv:16", "k": "i32:16", "BLOCK_K": 128}, "options": {"num_warps": 8}}

``args`` gives each parameter a type or a constant. Types are spelled as for Triton's
ahead-of-time compiler (``triton/tools/compile.py``): ``*`` is a pointer, ``:16`` says that
the value is divisible by 16, ``:1`` that it is 1. A launch knows one thing more of a
pointer, which the AMD backend looks at: whether its tensor spans less than 2 GiB. That is
assumed; ``*bf16:16:large`` says otherwise. Constants are numbers, booleans and null,
``{"const": "text"}``, ``{"dtype": "bf16"}``; a list is a tuple of any of these. A constant is
one for the compiler too, also where the kernel would get it at run time: for that give
``i32:16``, as a launch with 4096 does. Parameters with a default may be left out, and those
that ``triton.autotune`` sets.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib
import importlib.util
import itertools
import json
import os
import re
import sys
import traceback
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Of triton.language.dtype, triton 3.6 to 3.9.
SCALARS = (
    *("i1", "i8", "i16", "i32", "i64", "u1", "u8", "u16", "u32", "u64"),
    *("fp8e4b15", "fp8e4nv", "fp8e4b8", "fp8e5", "fp8e5b16", "fp16", "bf16", "fp32", "fp64"),
)
_EXAMPLE = '"*bf16:16", "i32:16", "fp32", 128, true, null or {"const": "text"}'

# Parameters are short: a file of many launches stays far below.
MOST_BYTES = 1 << 20


class LaunchError(ValueError):
    """A launch that does not describe its kernel; the message says what would."""


@dataclass(frozen=True)
class Type:
    """A parameter that the kernel gets at run time.

    Args:
        name: Triton's: ``*fp8e4nv``, ``i32``.
        divisible: by 16.
        large: of a pointer: its tensor spans 2 GiB or more.
    """

    name: str
    divisible: bool = False
    large: bool = False


@dataclass(frozen=True)
class Constant:
    """A parameter whose value the compiler knows."""

    value: Any


@dataclass(frozen=True)
class DType:
    """A constant that is a type of ``triton.language``, by name."""

    name: str


Argument = Type | Constant | DType | tuple["Argument", ...]


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a LAUNCH.json: its args and its options, the args checked one by one.

    Raises:
        LaunchError: it can't be read, or isn't of that form; the message shows one that is.
    """
    try:
        with path.open("rb") as file:
            text = file.read(MOST_BYTES + 1)
        if len(text) > MOST_BYTES:
            raise LaunchError(
                f"{path} has more than {MOST_BYTES:,} bytes; a launch has a few hundred: give a "
                "LAUNCH.json"
            )
        found = json.loads(text)
        # Halves of surrogate pairs, which JSON can spell, are no text.
        json.dumps(found, ensure_ascii=False).encode()
    except OSError as error:
        raise LaunchError(f"{path}: {error.strerror}; give a LAUNCH.json") from None
    except RecursionError:
        raise LaunchError(f"{path} is nested too deep for a launch: {_EXAMPLE}") from None
    except LaunchError:
        raise
    except ValueError as error:
        raise LaunchError(f"{path} is not JSON: {error}") from None
    if not isinstance(found, dict) or not isinstance(found.get("args"), dict):
        raise LaunchError(f'{path}: expected {{"args": {{...}}, "options": {{...}}}}')
    unknown(f"{path}", set(found) - {"args", "options"}, ("args", "options"))
    options = found.get("options", {})
    if not isinstance(options, dict):
        raise LaunchError(f'{path}: options is {options!r}; expected {{"num_warps": 8, ...}}')
    for name, value in found["args"].items():
        argument(name, value)
    return found["args"], options


def argument(name: str, value: Any) -> Argument:
    """Read what a LAUNCH.json says of one parameter.

    Raises:
        LaunchError: it is neither a type nor a constant; the message has the nearest type.

    >>> argument("x_ptr", "*fp8e4nv:16")
    Type(name='*fp8e4nv', divisible=True, large=False)
    >>> argument("k", "i32:1")
    Constant(value=1)
    """
    if value is None or isinstance(value, (bool, int, float)):
        return Constant(value)
    if isinstance(value, list):
        return tuple(argument(f"{name}[{index}]", part) for index, part in enumerate(value))
    if isinstance(value, dict) and set(value) == {"const"}:
        return Constant(value["const"])
    if isinstance(value, dict) and value.get("dtype") in SCALARS and len(value) == 1:
        return DType(value["dtype"])
    if not isinstance(value, str):
        raise LaunchError(
            f"args: {name} is {json.dumps(value)}; give a type or constant: {_EXAMPLE}"
        )
    return _type(name, value)


def _type(name: str, text: str) -> Argument:
    """Read a type with its hints."""
    if text.startswith("tensordesc<"):
        return Type(text)
    kind, *hints = text.replace(" ", "").split(":")
    scalar = kind.removeprefix("*").removeprefix("k") if kind.startswith("*") else kind
    if scalar not in SCALARS:
        near = difflib.get_close_matches(scalar, SCALARS, n=1, cutoff=0.5)
        hint = f"; did you mean {kind.replace(scalar, near[0])!r}?" if scalar and near else "."
        raise LaunchError(
            f"args: {name} is {text!r}, which is no type{hint} Types are {', '.join(SCALARS)}, "
            'pointers to them ("*bf16"), and tensordesc<...>; a text constant is {"const": "..."}'
        )
    pointer = kind != scalar
    integer = kind[0] in "iu"
    if hints == ["1"] and integer:
        return Constant(1)
    known = {"16", "large"} if pointer else {"16"} if integer else set()
    if not set(hints) <= known:
        raise LaunchError(
            f"args: {name} is {text!r}; a hint is :16 (divisible by 16), of an integer also :1, "
            "of a pointer also :large (2 GiB or more); a float has none"
        )
    return Type(kind, "16" in hints, "large" in hints)


def bind(kernel: Any, args: Mapping[str, Any]) -> dict[str, Argument]:
    """Give each parameter of a kernel what a LAUNCH.json says of it, or its default.

    Args:
        kernel: what `load` returns.
    Raises:
        LaunchError: a parameter is missing, unknown, or needs a constant.
    """
    names = [parameter.name for parameter in kernel.params]
    unknown("args", set(args) - set(names), names)
    bound: dict[str, Argument] = {}
    missing = []
    for parameter in kernel.params:
        if parameter.name in args:
            bound[parameter.name] = argument(parameter.name, args[parameter.name])
        elif parameter.has_default:
            bound[parameter.name] = Constant(parameter.default)
        else:
            missing.append(parameter)
    if missing:
        lacks = ", ".join(f'"{p.name}": {"128" if p.is_constexpr else _guess(p)}' for p in missing)
        raise LaunchError(
            f"args: {len(missing)} of {len(names)} parameters are missing. Add a type or a "
            f"constant for each, in the manner of {lacks}"
        )
    for parameter in kernel.params:
        if parameter.is_constexpr and isinstance(bound[parameter.name], Type):
            raise LaunchError(
                f"args: {parameter.name} is tl.constexpr in the kernel and "
                f"{args[parameter.name]!r} in the launch; give a constant, for example 128"
            )
    return bound


def _guess(parameter: Any) -> str:
    return '"*bf16:16"' if "ptr" in parameter.name.lower() else '"i32:16"'


def unknown(where: str, names: Collection[str], right: Collection[str]) -> None:
    """Refuse names that there are not.

    Raises:
        LaunchError: there is any; the message has the nearest that there is, and all.
    """
    for name in sorted(names):
        near = difflib.get_close_matches(name, right, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise LaunchError(f"{where}: no {name!r}{hint} There are: {', '.join(right)}")


@functools.cache
def load(kernel: str) -> Any:
    """Import a kernel: the ``triton.jit`` function under its decorators.

    Args:
        kernel: ``FILE.py:KERNEL`` or ``package.module:KERNEL``.
    Raises:
        LaunchError: no such file, module or kernel, or it raises on import; in its words.
    """
    found = _decorated(kernel)
    while not hasattr(found, "params"):
        found = found.fn
    return found


@dataclass(frozen=True)
class Tuned:
    """What one ``triton.Config`` adds to a launch, as a LAUNCH.json says it."""

    args: Mapping[str, Any]
    options: Mapping[str, Any]


def configurations(kernel: str, args: Mapping[str, Any]) -> list[Tuned]:
    """List what ``triton.autotune`` would try for a launch; one that adds nothing without it.

    Nothing is added either where ``args`` has every parameter that it sets; where it has
    some, those stay.

    Raises:
        LaunchError: a configuration sets what a LAUNCH.json can't say.
    """
    parameters = {parameter.name for parameter in load(kernel).params}
    found = _decorated(kernel)
    while not hasattr(found, "configs") and not hasattr(found, "params"):
        found = found.fn
    configs = [config.all_kwargs() for config in getattr(found, "configs", ())]
    sets = parameters.intersection(itertools.chain(*configs))
    if sets and sets <= set(args):
        return [Tuned({}, {})]
    tuned = []
    for given in configs:
        own = {n: _constant(n, v) for n, v in given.items() if n in sets - set(args)}
        # num_ctas 1 is no choice: every backend's default.
        others = {n: v for n, v in given.items() if n not in sets and (n, v) != ("num_ctas", 1)}
        tuned.append(Tuned(own, others))
    return tuned or [Tuned({}, {})]


def _constant(name: str, value: Any) -> Any:
    """Spell a constant of a ``triton.Config`` as a LAUNCH.json does."""
    # Of triton.language by name: only `compiler` imports Triton.
    if type(value).__name__ == "constexpr":
        value = value.value
    if isinstance(value, (list, tuple)):
        return [_constant(name, part) for part in value]
    if type(value).__name__ == "dtype" and value.name in SCALARS:
        return {"dtype": value.name}
    if isinstance(value, str):
        return {"const": value}
    if value is None or isinstance(value, (bool, int, float)):
        return value
    raise LaunchError(
        f"triton.autotune sets {name} to {value!r}, which a LAUNCH.json can't say; "
        f"give args a {name} of its own: {_EXAMPLE}"
    )


@functools.cache
def _decorated(kernel: str) -> Any:
    """Import what a kernel's name stands for in its module."""
    place, _, name = kernel.rpartition(":")
    if not place or not name:
        raise LaunchError(f"{kernel!r}: expected FILE.py:KERNEL or package.module:KERNEL")
    module = _module(place)
    kernels = [other for other, value in vars(module).items() if _is_kernel(value)]
    found = getattr(module, name, None)
    if not _is_kernel(found):
        near = difflib.get_close_matches(name, kernels, n=1, cutoff=0.5)
        what = "is no triton.jit kernel" if found is not None else "is not there"
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise LaunchError(f"{place}: {name!r} {what}{hint} Kernels: {', '.join(kernels) or 'none'}")
    return found


def _is_kernel(value: Any) -> bool:
    """Tell a ``triton.jit`` function, autotuned or not; only those have such parameters."""
    while hasattr(value, "fn") and not hasattr(value, "params"):
        value = value.fn
    return hasattr(value, "params") and hasattr(value, "arg_names")


def _module(place: str) -> Any:
    """Import a module by name, or a file as part of the package that it lies in."""
    folder = None
    dotted = place
    if place.endswith(".py") or "/" in place:
        path = Path(place).resolve()
        if not path.is_file():
            raise LaunchError(f"{place}: no such file; give FILE.py:KERNEL")
        folder, parts = path.parent, [path.stem]
        while (folder / "__init__.py").exists():
            parts.insert(0, folder.name)
            folder = folder.parent
        dotted = ".".join(parts)
    with _off_stdout():
        try:
            return _imported(dotted, folder)
        except LaunchError:
            raise
        except (Exception, SystemExit) as error:
            frames = traceback.extract_tb(error.__traceback__)
            own = [frame for frame in frames if "importlib" not in frame.filename][-1]
            raise LaunchError(
                f"{place} can't be imported: {type(error).__name__}: {error} "
                f"({own.filename}:{own.lineno}). If it launches kernels when imported, put that "
                "under `if __name__ == '__main__'`, or run it by `moelab capture`"
            ) from error


@contextlib.contextmanager
def _off_stdout() -> Iterator[None]:
    """Send to stderr what is printed meanwhile, by children and libraries too."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _imported(dotted: str, folder: Path | None) -> Any:
    """Import with a folder first on the path, as for a script in it, and only meanwhile.

    Workers inherit the path: a ``json.py`` beside somebody's kernel must not be theirs.
    """
    if folder is None:
        return importlib.import_module(dotted)
    sys.path.insert(0, str(folder))
    try:
        alone = folder / f"{dotted}.py"
        if alone.is_file():
            # A file of its own may have any name, that of an installed module too.
            alias = "moelab_file_" + re.sub(r"\W", "_", str(folder / dotted))
            return sys.modules.get(alias) or _executed(alias, alone)
        module = importlib.import_module(dotted)
        path = folder.joinpath(*dotted.split(".")).with_suffix(".py")
        if not module.__file__ or not path.samefile(module.__file__):
            raise LaunchError(
                f"{path}: another package {dotted.partition('.')[0]!r} is imported already, and "
                f"{dotted} is {module.__file__}; rename the package, or copy the file out of it"
            )
        return module
    finally:
        sys.path.remove(str(folder))


def _executed(alias: str, path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(alias, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = sys.modules[alias] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[alias]
        raise
    return module
