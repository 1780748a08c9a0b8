"""How a client proves to a server on a network who it is, and how it checks the server: TLS files and a token."""

from __future__ import annotations

import contextlib
import datetime
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Credentials"]

_LOOK_SECONDS = 3.0
"""To wait for a server's certificate."""


@dataclass(frozen=True, kw_only=True)
class Credentials:
    """Files for TLS, and a token. Raises ValueError for a combination that makes no sense."""

    authority: Path | None = None
    """PEM file: the authority that signed the server's certificate. Without it the connection is plain text."""
    certificate: Path | None = None
    """PEM file: this client's certificate."""
    key: Path | None = None
    """PEM file: its key."""
    token_file: Path | None = None
    """A file that holds nothing but the token."""

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("--tls-cert and --tls-key belong together: give both")
        if self.authority is None and (self.certificate is not None or self.token_file is not None):
            raise ValueError("--tls-ca is missing: a certificate or a token is sent over TLS only")
        for path in (self.authority, self.certificate, self.key, self.token_file):
            if path is not None and not path.is_file():
                raise ValueError(f"{path} is not a file")

    def tls(self) -> dict[str, Any]:
        """Arguments of tritonclient's connection."""
        if self.authority is None:
            return {}
        return {
            "ssl": True,
            "root_certificates": str(self.authority),
            "private_key": str(self.key) if self.key else None,
            "certificate_chain": str(self.certificate) if self.certificate else None,
        }

    def expired(self, url: str) -> str:
        """What has expired of that by which this client and the server at ``HOST:PORT`` know each other.

        A failed handshake does not tell; so each certificate's dates are read. Empty if none has, or without the
        package cryptography.
        """
        try:
            from cryptography import x509
        except ModuleNotFoundError:
            return ""
        found = {f"{path}": path.read_bytes() for path in (self.certificate, self.authority) if path is not None}
        if self.authority is not None:
            host, _, port = url.rpartition(":")
            with contextlib.suppress(OSError, ValueError):
                certificate = ssl.get_server_certificate((host, int(port)), timeout=_LOOK_SECONDS)
                found[f"the certificate of {url}"] = certificate.encode()
        now = datetime.datetime.now(datetime.UTC)
        told = []
        for name, data in found.items():
            with contextlib.suppress(ValueError):
                ends = x509.load_pem_x509_certificate(data).not_valid_after_utc
                if ends < now:
                    told.append(f"{name} expired on {ends:%Y-%m-%d}: renew it")
        return "; ".join(told)

    def headers(self) -> dict[str, str]:
        """Headers of every request."""
        if self.token_file is None:
            return {}
        return {"authorization": f"Bearer {self.token_file.read_text(encoding='utf-8').strip()}"}
