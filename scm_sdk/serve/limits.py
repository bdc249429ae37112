"""Limits of the server: API keys, the ``Host`` and ``Origin`` rules, and the bounded queue of images."""

from __future__ import annotations

import hmac
import ipaddress
import os
import stat
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from urllib.parse import urlsplit

from ..errors import ConfigError
from .schemas import RequestError

SHORTEST_KEY = 16
"""Minimum length of an API key, characters."""
LARGEST_KEY_FILE = 1 << 20
ANYONE = "anyone"
"""Name of the caller if no API key is required."""


class ApiKeys:
    """The accepted API keys, as digests.

    Args:
        keys: Key by name.
    """

    def __init__(self, keys: Mapping[str, str]) -> None:
        self._digests = {name: sha256(key.encode()).digest() for name, key in keys.items()}

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> ApiKeys:
        """Read a file of keys: ``KEY`` or ``NAME KEY`` on each line; empty lines and comments (#) are skipped.

        Raises:
            ConfigError: If it cannot be read, others may write to it, it holds no key, or a key is short or repeated.
        """
        try:
            mode = os.stat(path).st_mode
            if not stat.S_ISREG(mode):
                raise ConfigError(f"{path} is no file, expected a file of API keys.")
            with Path(path).open("rb") as file:
                text = file.read(LARGEST_KEY_FILE + 1).decode()
        except (OSError, ValueError) as exc:
            raise ConfigError(
                f"the API keys in {path} cannot be read ({exc}), expected UTF-8, one key per line."
            ) from exc
        if len(text) > LARGEST_KEY_FILE:
            raise ConfigError(f"{path} is larger than 1 MiB, expected a file of API keys, one per line.")
        if mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise ConfigError(
                f"{path} has mode {stat.S_IMODE(mode):03o}, expected a file that only its owner can write: chmod 600"
            )
        keys: dict[str, str] = {}
        for number, line in enumerate(text.splitlines(), 1):
            words = line.split()
            if not words or words[0].startswith("#"):
                continue
            if len(words) > 2:
                raise ConfigError(f"line {number} of {path} holds {len(words)} words, expected KEY or NAME KEY.")
            name, key = words if len(words) == 2 else (f"key-{number}", words[0])
            if len(key) < SHORTEST_KEY or not key.isascii():
                raise ConfigError(
                    f"line {number} of {path} holds a key of {len(key)} characters, expected {SHORTEST_KEY} or more, "
                    "ASCII. Make one: openssl rand -hex 32"
                )
            if name in keys or key in keys.values():
                raise ConfigError(f"line {number} of {path} repeats a name or a key, expected each once.")
            keys[name] = key
        if not keys:
            raise ConfigError(f"{path} holds no API key, expected one per line. Make one: openssl rand -hex 32")
        return cls(keys)

    def __len__(self) -> int:
        return len(self._digests)

    def find(self, given: str) -> str | None:
        """Return the name of a key, or None. Every key is compared, each in constant time."""
        digest, found = sha256(given.encode()).digest(), None
        for name, known in self._digests.items():
            if hmac.compare_digest(digest, known):
                found = name
        return found


def check_caller(keys: ApiKeys | None, authorization: str) -> str:
    """Return the name of the caller's key.

    Args:
        keys: The accepted keys; None accepts everyone.
        authorization: The header of that name, ``Bearer KEY``.

    Raises:
        RequestError: ``invalid_api_key`` if there is none or it is not known.
    """
    if keys is None:
        return ANYONE
    scheme, _, given = authorization.partition(" ")
    name = keys.find(given.strip()) if scheme.lower() == "bearer" else None
    if name is None:
        raise RequestError(
            "invalid_api_key", "expected the header 'Authorization: Bearer KEY' with a key of this server."
        )
    return name


def check_host(host: str, allowed: Iterable[str]) -> None:
    """Refuse a request that names another host: a web page can resolve its own name to this address.

    An IP address and ``localhost`` are always accepted: no page can take those for its own.

    Raises:
        RequestError: ``invalid_host``.
    """
    name = _host_name(host)
    if name is None or not (name == "localhost" or _is_address(name) or name in {each.lower() for each in allowed}):
        raise RequestError(
            "invalid_host",
            f"Host is {host[:100]!r}, expected an IP address, localhost or a name that this server was started with "
            "(--allowed-host).",
        )


def check_origin(origin: str | None, host: str) -> None:
    """Refuse a request that a page of another site makes a browser send; CORS is off.

    Raises:
        RequestError: ``forbidden_origin``.
    """
    if origin is None:
        return
    try:
        found = urlsplit(origin).netloc.lower()
    except ValueError:
        found = ""
    if found != host.lower():
        raise RequestError(
            "forbidden_origin", f"Origin is {origin[:100]!r}, expected this server's own page, or a client without one."
        )


def _host_name(host: str) -> str | None:
    try:
        parts = urlsplit(f"//{host}")
        _ = parts.port  # raises where it is none
    except ValueError:
        return None
    is_plain = parts.netloc == host and "@" not in host and not parts.path and not parts.query
    return parts.hostname.lower() if is_plain and parts.hostname else None


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


@dataclass(frozen=True)
class Admission:
    """Images that were accepted and are not yet made. Used on the event loop alone, so it has no lock.

    Attributes:
        limit: Images of all callers.
        limit_per_key: Images of one caller.
        by_key: Images by the name of the caller's key.
    """

    limit: int
    limit_per_key: int
    by_key: Counter[str]

    @classmethod
    def of(cls, limit: int, limit_per_key: int | None) -> Admission:
        """Return an empty queue."""
        return cls(limit, limit_per_key or limit, Counter())

    @property
    def images(self) -> int:
        """Images of all callers."""
        return self.by_key.total()

    def check(self, images: int, key: str, *, retry_after: float) -> None:
        """Refuse images for which there is no room now.

        Args:
            images: Number of images.
            key: Name of the caller's key.
            retry_after: Seconds after which a refused caller should come again.

        Raises:
            RequestError: ``queue_full`` or ``key_limit``.
        """
        if self.images + images > self.limit:
            raise RequestError(
                "queue_full",
                f"{self.images} images wait, expected room for {images} with at most {self.limit}. Try again later.",
                retry_after=retry_after,
            )
        if self.by_key[key] + images > self.limit_per_key:
            raise RequestError(
                "key_limit",
                f"{self.by_key[key]} images of this key wait, expected room for {images} with at most "
                f"{self.limit_per_key} for one key. Wait for an answer first.",
                retry_after=retry_after,
            )

    def take(self, images: int, key: str, *, retry_after: float) -> None:
        """Accept images at once or not at all; arguments and errors are those of ``check``."""
        self.check(images, key, retry_after=retry_after)
        self.by_key[key] += images

    def release(self, images: int, key: str) -> None:
        """Remove images that were made or given up from the queue."""
        self.by_key[key] -= images
        if not self.by_key[key]:
            del self.by_key[key]
