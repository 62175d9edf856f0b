"""Routing workloads: which experts each token visits, drawn by a law or recorded.

How rows spread over experts decides how many tiles a MoE GEMM has and how full they are.
Real routers are skewed, and differently in every layer and for every text: `draw` gives
laws to compare under, `recorded` what a model did. No token visits an expert twice.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Generator, Tensor


def uniform(m: int, experts: int, top_k: int, generator: Generator) -> Tensor:
    """Draw every set of ``top_k`` experts alike: rows differ by chance alone."""
    import torch

    popularity = torch.zeros(experts, dtype=torch.float64, device=generator.device)
    return _without_replacement(popularity, m, top_k, generator)


def balanced(m: int, experts: int, top_k: int, generator: Generator) -> Tensor:
    """Give every expert the same number of rows, or one more.

    Experts are dealt out in a random order that repeats, and the tokens shuffled: what a
    perfect balancing loss would reach.
    """
    import torch

    device = generator.device
    order = torch.randperm(experts, generator=generator, device=device)
    dealt = order[torch.arange(m * top_k, device=device) % experts].view(m, top_k)
    return dealt[torch.randperm(m, generator=generator, device=device)]


def zipf(m: int, experts: int, top_k: int, generator: Generator, s: float = 1.0) -> Tensor:
    """Draw the expert of rank r with probability proportional to r^-s, then the next of the rest.

    Ranks go to experts at random. ``s = 0`` is `uniform`.

    Raises:
        ValueError: ``s`` is negative or not finite.
    """
    import torch

    if not 0 <= s < math.inf:
        raise ValueError(f"s is {s}; expected an exponent of 0 or more")
    rank = 1 + torch.randperm(experts, generator=generator, device=generator.device)
    return _without_replacement(-s * rank.double().log(), m, top_k, generator)


def one_expert(m: int, experts: int, top_k: int, generator: Generator) -> Tensor:
    """Send every token to one same expert, in slot 0; other slots are uniform over the rest."""
    import torch

    device = generator.device
    popularity = torch.zeros(experts, dtype=torch.float64, device=device)
    popularity[torch.randint(experts, (1,), generator=generator, device=device)] = math.inf
    return _without_replacement(popularity, m, top_k, generator)


WORKLOADS: dict[str, Callable[..., Tensor]] = {
    law.__name__: law for law in (uniform, balanced, zipf, one_expert)
}


def draw(
    name: str, m: int, experts: int, top_k: int, generator: Generator, **parameters: float
) -> tuple[Tensor, Tensor]:
    """Draw a workload; equal seeds on one type of device give equal ones.

    Args:
        name: one of `WORKLOADS`.
        m: tokens.
        experts: how many there are.
        top_k: experts per token.
        generator: source of all randomness; the workload lies on its device.
        parameters: the law's own: ``s`` of `zipf`.
    Returns:
        ``expert [m, top_k]`` int64, and ``weight [m, top_k]`` fp32: a softmax of normal
        logits, which do not depend on the experts.
    Raises:
        ValueError: there is no such workload, or no such draw.
        TypeError: the law has no such parameter.
    """
    import torch

    if name not in WORKLOADS:
        raise ValueError(f"no workload {name!r}; there are {', '.join(WORKLOADS)}")
    if m < 0:
        raise ValueError(f"m is {m}; expected 0 tokens or more")
    if experts < 1:
        raise ValueError(f"experts is {experts}; expected 1 or more")
    if not 1 <= top_k <= experts:
        raise ValueError(
            f"top_k is {top_k}; with experts={experts} expected 1 to {experts}, "
            "for a token visits no expert twice"
        )
    expert = WORKLOADS[name](m, experts, top_k, generator, **parameters)
    logits = torch.randn((m, top_k), generator=generator, device=generator.device)
    return expert, logits.softmax(dim=1)


def save(path: Path | str, expert: Tensor, weight: Tensor | None = None) -> None:
    """Write a recording for `recorded`.

    Args:
        path: ends in ``.npz``.
        expert: ``[tokens, top_k]`` integer.
        weight: ``[tokens, top_k]`` float.
    Raises:
        ValueError: `recorded` would refuse it.
    """
    import numpy as np

    if Path(path).suffix != ".npz":
        raise ValueError(f"path is {str(path)!r}; expected one that ends in .npz")
    arrays: dict[str, Any] = {"expert": expert.cpu().numpy()}
    if weight is not None:
        arrays["weight"] = weight.cpu().float().numpy()
    _check_recording(str(path), arrays)
    np.savez_compressed(path, **arrays)


def recorded(
    path: Path | str, m: int | None = None, top_k: int | None = None
) -> tuple[Tensor, Tensor]:
    """Read the routing of a real run.

    Args:
        path: ``.npz`` with ``expert [tokens, top_k]`` integer and, if weights were
            recorded, ``weight [tokens, top_k]`` float; or ``.npy`` with ``expert`` alone.
        m: take the first ``m`` tokens; None takes all.
        top_k: experts per token that the recording must have; None takes any.
    Returns:
        ``expert [m, top_k]`` int64 and ``weight [m, top_k]`` fp32 on the CPU. Without
        recorded weights each is ``1 / top_k``.
    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else; the message says what.
    """
    import torch

    arrays = _load(Path(path))
    _check_recording(str(path), arrays)
    tokens, slots = arrays["expert"].shape
    if top_k not in (None, slots):
        raise ValueError(f"{path}: {slots} experts per token; expected top_k={top_k}")
    if m is not None and not 0 <= m <= tokens:
        raise ValueError(f"{path}: m is {m}; expected 0 to {tokens}, the tokens recorded")
    expert = torch.from_numpy(arrays["expert"][:m].astype("int64"))
    if "weight" in arrays:
        return expert, torch.from_numpy(arrays["weight"][:m].astype("float32"))
    return expert, torch.full(expert.shape, 1 / slots)


def skew(expert: Tensor, experts: int) -> float:
    """Divide the largest expert's rows by the mean: 1 is balanced, ``experts`` is the most.

    Args:
        expert: any shape, integer.
    Returns:
        the ratio; nan without a single row.
    Raises:
        ValueError: an expert is out of range.

    >>> import torch
    >>> skew(torch.tensor([[0, 1], [0, 2]]), experts=4)
    2.0
    """
    if not expert.numel():
        return math.nan
    lowest, highest = int(expert.min()), int(expert.max())
    if not 0 <= lowest <= highest < experts:
        raise ValueError(
            f"expert indices span {lowest} to {highest}; with experts={experts} they must be "
            f"0 to {experts - 1}"
        )
    return int(expert.flatten().bincount().max()) * experts / expert.numel()


def _without_replacement(
    log_popularity: Tensor, m: int, top_k: int, generator: Generator
) -> Tensor:
    """Draw ``top_k`` experts for each token, one after the other.

    Each draw is from those left, in proportion to their popularity. The Gumbel top-k trick
    does all at once: the largest sums of log-popularity and Gumbel noise, in order, are
    such a sequence (Kool, van Hoof and Welling, arXiv:1903.06059).

    Args:
        log_popularity: ``[experts]`` float64; inf is drawn first.
    """
    # Minus the logarithm of an exponential variate is Gumbel. PyTorch's is never 0.
    gumbel = -(
        log_popularity.new_empty((m, len(log_popularity))).exponential_(generator=generator).log()
    )
    return (log_popularity + gumbel).topk(top_k, dim=1).indices


def _load(path: Path) -> dict[str, Any]:
    import numpy as np

    wanted = ".npz with an array 'expert' and optionally 'weight', or .npy with expert alone"
    if not path.exists():
        raise FileNotFoundError(f"no recording {path}; expected a {wanted}")
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return {"expert": loaded}
        with loaded:
            found = list(loaded)
            if "expert" not in found:
                raise ValueError(f"it holds {', '.join(found) or 'nothing'}")
            return {name: loaded[name] for name in ("expert", "weight") if name in found}
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: {error}; expected a {wanted}") from error


def _check_recording(source: str, arrays: dict[str, Any]) -> None:
    import numpy as np

    expert = arrays["expert"]
    if expert.ndim != 2 or not expert.shape[1]:
        raise ValueError(f"{source}: expert has shape {expert.shape}; expected [tokens, top_k]")
    if expert.dtype.kind not in "iu":
        raise ValueError(f"{source}: expert is {expert.dtype}; expected an integer type")
    if "weight" in arrays:
        weight = arrays["weight"]
        if weight.shape != expert.shape:
            raise ValueError(
                f"{source}: weight has shape {weight.shape}; expected {expert.shape}, as expert"
            )
        if weight.dtype.kind != "f":
            raise ValueError(f"{source}: weight is {weight.dtype}; expected a float type")
    if expert.size and expert.min() < 0:
        token, slot = np.argwhere(expert < 0)[0]
        raise ValueError(
            f"{source}: expert is {expert[token, slot]} at token {token}, slot {slot}; "
            "expected 0 or more"
        )
    ordered = np.sort(expert, axis=1)
    twice = np.argwhere(ordered[:, 1:] == ordered[:, :-1])
    if len(twice):
        token, slot = twice[0]
        raise ValueError(
            f"{source}: token {token} visits expert {ordered[token, slot]} twice; expected "
            "different ones"
        )
