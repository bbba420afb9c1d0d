"""Names of classes that are made at run time."""

from __future__ import annotations

from collections.abc import Callable


def named_after(base: type) -> Callable[[type], type]:
    """Name a class that is made at run time after the class that it extends, as ``print(model)``
    and tracebacks show it: ``OfPacks`` of ``TEDotProductAttention`` is
    ``OfPacksTEDotProductAttention``.
    """

    def rename(made: type) -> type:
        made.__name__ = f"{made.__name__}{base.__name__}"
        made.__qualname__ = made.__name__
        return made

    return rename
