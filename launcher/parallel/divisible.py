"""Refusals of degrees that do not divide what they are to divide."""

from __future__ import annotations

from collections.abc import Iterator

from launcher.errors import ConfigError
from launcher.models.base import Shape
from launcher.parallel.base import Parallel


def refuse_heads(parallel: Parallel, option: str, shape: Shape) -> Iterator[ConfigError]:
    """Yield why the model's heads cannot be dealt out over ``parallel.<option>`` ranks, with the degrees that can.

    Tensor parallelism also divides the MLP. Sequence parallelism repeats heads of keys and values where there are
    fewer of them than ranks, so only the query heads must divide.
    """
    degree = getattr(parallel, option)
    sizes = {"heads": shape.heads}
    if option == "tensor":
        sizes |= {"heads of keys and values": shape.kv_heads, "MLP columns": shape.mlp_width}
    uneven = {name: size for name, size in sizes.items() if size % degree}
    if degree == 1 or not uneven:
        return
    legal = [d for d in range(1, shape.heads + 1) if not any(size % d for size in sizes.values())]
    below = max((d for d in legal if d < degree), default=1)
    above = min((d for d in legal if d > degree), default=None)
    choices = " or ".join(f"parallel.{option}={d}" for d in (below, above) if d is not None)
    why = f"the model's {', '.join(f'{size} {name}' for name, size in uneven.items())} are no multiple of it"
    yield parallel.refuse(option, why, f"set {choices}")
