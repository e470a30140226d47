"""Which addresses belong to the public internet, and to nobody's own network."""

import ipaddress


_Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_NAT64 = ipaddress.ip_network("64:ff9b::/96")
# What Python takes for public: Azure's metadata and DNS; protocol assignments, with Oracle's metadata
_SURROUNDINGS = [ipaddress.ip_network(name) for name in ("168.63.129.16/32", "192.0.0.0/24")]


def is_public(address: str) -> bool:
    """Whether a numeric address is one that anybody on the internet could reach.

    Private, loopback, link-local (with it the metadata services of clouds), shared, reserved and multicast addresses
    are not, nor is an IPv6 address that stands for such an IPv4 one (mapped, 6to4, Teredo, NAT64).
    """
    found = ipaddress.ip_address(address.partition("%")[0])
    return all(
        each.is_global
        and not (each.is_multicast or each.is_reserved or getattr(each, "is_site_local", False))
        and not any(each in network for network in _SURROUNDINGS)
        for each in _meant(found)
    )


def refuse_private(host: str, address: str) -> None:
    """A guard for [`download`]: raises PermissionError unless the address [`is_public`], and does not tell it."""
    if not is_public(address):
        raise PermissionError(f"{host} is not on the public internet")


def _meant(address: _Address) -> list[_Address]:
    """The IPv4 addresses that an IPv6 one stands for, or itself."""
    if isinstance(address, ipaddress.IPv4Address):
        return [address]
    if address.ipv4_mapped is not None:
        return [address.ipv4_mapped]
    if address.sixtofour is not None:
        return [address.sixtofour]
    if address.teredo is not None:
        return list(address.teredo)
    if address in _NAT64:
        return [ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)]
    return [address]
