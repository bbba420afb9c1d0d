"""Whether the kernel of another machine takes a connection."""

from __future__ import annotations

import errno
import socket

Address = tuple[str, int]
"""Host and port."""

_ANSWER_SECONDS = 10.0
# What says that no connection comes about because of the other side or the way to it.
_NO_WAY = (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN)


def reach(address: Address) -> tuple[Address, str]:
    """Make a connection.

    Returns:
        The address in numbers, and that of this machine on the way there.

    Raises:
        OSError: none comes about.
    """
    with socket.create_connection(address, _ANSWER_SECONDS) as connection:
        host, port, *_ = connection.getpeername()
        return (host, port), connection.getsockname()[0]


def is_unanswered(address: Address) -> bool:
    """Return whether no connection comes about for a reason on the other side, or on the way."""
    try:
        reach(address)
    except (ConnectionRefusedError, TimeoutError):
        return True
    except OSError as error:  # such as too many open files here
        return error.errno in _NO_WAY
    return False
