"""The kernels, by name. Each module reads top to bottom:

equation, kernel, ``source`` (its description for the compiler), launcher (named as the
module), ``cost`` and ``reference``. To add one, write such a module and name it here.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import io
import textwrap
import tokenize
from types import ModuleType
from typing import Any

KERNELS = (
    "moe_gemm_a8w8",
    "moe_gemm_a8w8_blockscale",
    "moe_gemm_a8w4",
    "moe_gemm_a4w4",
    "ff_a16w16_fused",
    "fused_gemm_afp4wfp4_a16w16",
)


def load(name: str) -> ModuleType:
    """Import a kernel's module, and Triton with it.

    Raises:
        ValueError: there is no such kernel; the message lists those there are.
    """
    if name not in KERNELS:
        raise ValueError(f"no kernel {name!r}; there are {', '.join(KERNELS)}")
    return importlib.import_module(f"{__name__}.{name}")


@functools.cache
def source_hash(name: str) -> str:
    """Hash what a kernel's machine code comes from: its jitted functions, and those they call.

    Those of kernels that its module imports count too, comments and layout don't.

    Raises:
        ValueError: there is no such kernel.
    """
    found: dict[str, str] = {}
    module = load(name)
    beside = [of for of in vars(module).values() if isinstance(of, ModuleType)]
    left = [
        function
        for of in (module, *beside)
        if of.__name__.startswith(__name__)
        for function in _jitted(vars(of))
    ]
    while left:
        function = left.pop()
        where = f"{function.__module__}.{function.__qualname__}"
        if where not in found:
            found[where] = _without_comments(inspect.getsource(function))
            names = function.__code__.co_names
            left += _jitted({name: function.__globals__.get(name) for name in names})
    text = "\n".join(f"{where} {found[where]}" for where in sorted(found))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _jitted(named: dict[str, Any]) -> list[Any]:
    """Take the Python functions of those that are jitted, for the GPU or the interpreter."""
    functions = [getattr(value, "fn", None) for value in named.values()]
    return [function for function in functions if inspect.isfunction(function)]


def _without_comments(source: str) -> str:
    tokens = tokenize.generate_tokens(io.StringIO(textwrap.dedent(source)).readline)
    return " ".join(t.string for t in tokens if t.type not in (tokenize.COMMENT, tokenize.NL))
