"""The hosts that a worker downloads pictures from."""

from collections.abc import Iterable

from .web_images import refuse_private


class AllowedHosts:
    """A guard for [`~lorgnette.serving.web_images.download`].

    Args:
        allowed: the only host names that pictures may come from; None for all of the public internet.
        internal: host names that may resolve to private addresses; they are allowed too.

    Raises:
        ValueError: a name that holds more than a host, which no host would ever match.
    """

    def __init__(self, allowed: Iterable[str] | None = None, internal: Iterable[str] = ()):
        self.internal = _names(internal)
        self.allowed = None if allowed is None else _names(allowed) | self.internal

    def __call__(self, host: str, address: str) -> None:
        host = host.lower().rstrip(".")
        if self.allowed is not None and host not in self.allowed:
            raise PermissionError(f"{host} is not one of the allowed hosts for pictures")
        if host not in self.internal:
            refuse_private(host, address)


def _names(hosts: Iterable[str]) -> frozenset[str]:
    names = frozenset(host.lower().rstrip(".") for host in hosts)
    for name in names:
        if not name or set(name) & set("/[]@*") or name.count(":") == 1:  # two or more colons: IPv6
            raise ValueError(f"{name!r} is not a host: give a name or an address, without http:// and port")
    return names
