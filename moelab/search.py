"""The neighbourhood of a configuration, searched for what fits.

Neighbours are asked for their LDS, the nearest of those that fit are compiled in full, and
`advice` puts them in order: what is proposed was compiled.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import advice, sweep
from .plan import WARPS, named
from .specs import SETTINGS, Question

if TYPE_CHECKING:
    import pandas as pd

# Blocks below what matrix units multiply at once leave them partly idle.
_LEAST_BLOCK = 16


def propose(
    questions: Sequence[Question],
    store: Path | str,
    *,
    keep: object = (),
    top: int = 8,
    always: bool = False,
    measured: pd.DataFrame | None = None,
    jobs: int | None = None,
) -> Iterator[tuple[pd.Series, pd.DataFrame]]:
    """Find what fits instead of each question that doesn't.

    Launches that share a tile are asked as the one that needs the most LDS, and a proposal
    must fit them all.

    Args:
        keep: of `SETTINGS`, what must stay as it is.
        top: how many to give, cheapest first; fewer stages alone is given too.
        always: look for alternatives to what fits, too.
        measured: times to order by, as `advice.check_measured` gives them.
    Yields:
        the question's row and its alternatives, as `advice.rank` has them.
    Raises:
        ParameterError: ``keep`` names something else.
        ValueError, OSError: as `sweep.run`.
    """
    kept = named("keep", keep, SETTINGS) if keep else []
    asked = [sweep.settled(question) for question in questions]
    answers = sweep.run(asked, store, jobs=jobs)
    for first, *others in advice.tilings(answers):
        base = answers.iloc[first]
        near: list[Question] = []
        if always or base["status"] != "ok":
            near = [asked[first], *alternatives(asked[first], kept)]
        near = [near[at] for at in advice.shortlist(sweep.run(near, store, jobs=jobs), base)]
        ranked = advice.rank(sweep.run(near, store, full=True, jobs=jobs), base, measured)
        shown = advice.first(ranked, base, top)
        held = [
            asked[other].with_settings(**near[at].settings)
            for at in shown.index
            for other in others
        ]
        fits = sweep.run(held, store, jobs=jobs)["status"].eq("ok").to_numpy(bool)
        yield base, shown[fits.reshape(len(shown), len(others)).all(axis=1)]


def alternatives(question: Question, keep: Collection[str] = (), most: int = 60) -> list[Question]:
    """List what lies nearest to a question, nearest first; see `neighbours`."""
    return [
        question.with_settings(**changed) for changed in neighbours(question.settings, keep, most)
    ]


def neighbours(
    settings: Mapping[str, Any], keep: Collection[str] = (), most: int = 60
) -> list[dict[str, Any]]:
    """Change one setting, or two; nearest first.

    A step is one stage more or fewer, a block halved, block_k doubled, warps halved or
    doubled, async copy off. Stages go down to one, blocks to a quarter. What asks for more
    LDS, a stage or block_k doubled, is paired with the other one made smaller, and with
    nothing else: a deeper step with fewer stages, and more stages of a shorter step.

    Args:
        settings: of `SETTINGS`, those that there are, by name.
        keep: those that must stay as they are.
        most: the furthest beyond this many are left out.
    Returns:
        the settings that differ, by name.

    >>> neighbours({"num_stages": 2, "block_k": 32})
    [{'num_stages': 1}, {'num_stages': 3}, {'block_k': 16}, {'block_k': 64}, \
{'num_stages': 1, 'block_k': 16}, {'num_stages': 1, 'block_k': 64}, \
{'num_stages': 3, 'block_k': 16}]
    """
    moves = [
        (name, value, steps)
        for name in SETTINGS
        if name not in keep and settings.get(name) is not None
        for value, steps in _moves(name, settings[name])
    ]
    found = [(steps, {name: value}) for name, value, steps in moves]
    for (name, value, steps), (other, to, more) in itertools.combinations(moves, 2):
        grown = [n for n, v in ((name, value), (other, to)) if _grows(n, v, settings)]
        traded = {name, other} == {"num_stages", "block_k"} and len(grown) == 1
        if name != other and (traded or not grown):
            found.append((steps + more, {name: value, other: to}))
    # Sorting is stable: of equally near ones a single change comes first.
    found.sort(key=lambda one: one[0] + len(one[1]))
    return [changed for _, changed in found[:most]]


def _moves(name: str, value: Any) -> Iterator[tuple[Any, int]]:
    """Yield what a setting may become, and how many steps away that is."""
    if name == "num_stages":
        yield from ((fewer, value - fewer) for fewer in range(value - 1, 0, -1))
        yield value + 1, 1
    elif name == "num_warps":
        yield from ((warps, 1) for warps in (value // 2, value * 2) if warps in WARPS)
    elif name == "async_copy":
        yield from [(False, 1)] if value else []
    else:
        halved = ((value // part, steps) for part, steps in ((2, 1), (4, 2)))
        yield from ((block, steps) for block, steps in halved if block >= _LEAST_BLOCK)
        if name == "block_k":
            yield value * 2, 1


def _grows(name: str, value: Any, settings: Mapping[str, Any]) -> bool:
    return name in ("num_stages", "block_k") and value > settings[name]
