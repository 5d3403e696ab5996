"""Options of ``deploy=nginx``: nginx in front of servers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from launcher.config.deploy.proxy import ProxyDeploy
from launcher.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class NginxDeploy(ProxyDeploy):
    """``nginx.conf``: the open-source nginx, which learns of a server's state by requests."""

    kind: ClassVar[str] = "nginx"
    summary_fields: ClassVar[tuple[str, ...]] = ("out", "upstreams")

    log_folder: str | None = "/var/log/nginx"
    """Folder of access.log and error.log; ``null`` writes both to the standard streams."""

    temporary_folder: str | None = None
    """Folder of temporary files and the process id; ``null`` takes nginx's own (root's)."""

    fail_timeout_s: int = 2
    """Whole seconds without new requests for a server that broke a connection or answered 503."""

    def validate(self) -> Iterator[ConfigError]:
        """Reject folders that no quotes make safe, and times beyond reason."""
        yield from super().validate()
        yield from self.validate_path("log_folder", example="/var/log/nginx")
        yield from self.validate_path("temporary_folder", example="/var/lib/nginx")
        if not 1 <= self.fail_timeout_s <= 3600:
            yield self.error("fail_timeout_s", "must lie between 1 and 3600", "set deploy.fail_timeout_s=2")

    def validate_tls(self) -> Iterator[ConfigError]:
        """Require the key beside the certificate."""
        yield from super().validate_tls()
        if self.tls_certificate_file is not None and self.tls_key_file is None:
            yield self.error("tls_certificate_file", "has no key", "set deploy.tls_key_file=FILE")
