"""Which hosts a worker fetches pictures from."""

from collections.abc import Iterable

from .web_images import refuse_private


class Hosts:
    """A guard for [`~lorgnette.serving.web_images.download`].

    Args:
        allowed: where pictures may come from, these names alone; None for all of the public internet.
        internal: names that may lead into a private network; they are allowed too.

    Raises:
        ValueError: a name with more than a host in it, which no host would ever equal.
    """

    def __init__(self, allowed: Iterable[str] | None = None, internal: Iterable[str] = ()):
        self.internal = _names(internal)
        self.allowed = None if allowed is None else _names(allowed) | self.internal

    def __call__(self, host: str, address: str) -> None:
        host = host.lower().rstrip(".")
        if self.allowed is not None and host not in self.allowed:
            raise PermissionError(f"{host} is not among the hosts that pictures are fetched from here")
        if host not in self.internal:
            refuse_private(host, address)


def _names(hosts: Iterable[str]) -> frozenset[str]:
    names = frozenset(host.lower().rstrip(".") for host in hosts)
    for name in names:
        if not name or set(name) & set("/[]@*") or name.count(":") == 1:  # more of them are IPv6
            raise ValueError(f"{name!r} is no host: a name or an address is needed, without http:// and port")
    return names
