"""Options of ``deploy=compose``: servers, nginx, Prometheus and Grafana on one machine."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from launcher.config.deploy.base import MountingDeploy
from launcher.config.deploy.monitoring import MonitoredDeploy
from launcher.config.deploy.nginx import NginxDeploy
from launcher.config.deploy.proxy import is_host, validate_safe_path
from launcher.config.kubernetes_objects import validate_image
from launcher.errors import ConfigError

_MAX_SERVERS = 100
_NGINX_NUMBER, _FIRST_SERVER = 10, 20
"""Places of nginx and of the first server in the network; Docker takes the first addresses."""
_PORTS = ("port", "prometheus_port", "grafana_port")
TLS_CERTIFICATE, TLS_KEY = "/etc/nginx/tls/certificate.pem", "/etc/nginx/tls/key.pem"
"""Where nginx's container finds them."""
INNER_PORT = 8080
"""On which nginx listens in its container."""


@dataclass(frozen=True, kw_only=True)
class ComposeDeploy(MountingDeploy, MonitoredDeploy):
    """``compose.yaml``: servers behind nginx, Prometheus and Grafana, on one machine."""

    kind: ClassVar[str] = "compose"
    summary_fields: ClassVar[tuple[str, ...]] = ("out", "servers")

    servers: int = 1
    """Containers with a server, each with ``job.replicas`` engines.
    With two, one can be replaced while the other serves."""

    host: str = "127.0.0.1"
    """Address of this machine on which nginx is reached; ``0.0.0.0`` is all interfaces."""

    port: int = 8080
    """Port of this machine on which nginx is reached."""

    tls_certificate_file: str | None = None
    """File on this machine with the certificate and its chain; ``null``: no TLS.
    The user of nginx's image must be able to read it."""

    tls_key_file: str | None = None
    """File on this machine with the private key."""

    rate_per_minute: int | None = None
    """Requests per minute of each client to all servers; ``null`` takes job.rate_per_minute."""

    prometheus_port: int = 9090
    """Port on 127.0.0.1 of Prometheus."""

    grafana_port: int = 3000
    """Port on 127.0.0.1 of Grafana, which shows dashboards without a login."""

    subnet: str = "172.30.93.0/24"
    """Network of the servers; addresses in it are fixed, because nginx resolves names once."""

    nginx_image: str = "nginxinc/nginx-unprivileged:1.28.0-alpine"
    """Image of nginx, run by its own user."""

    prometheus_image: str = "prom/prometheus:v3.5.0"
    """Image of Prometheus."""

    grafana_image: str = "grafana/grafana:12.1.0"
    """Image of Grafana."""

    def validate(self) -> Iterator[ConfigError]:
        """Reject addresses, ports, files and images that Compose refuses or reads otherwise."""
        yield from super().validate()
        yield from self.validate_minimum(1, "servers", "rate_per_minute")
        if not is_host(self.host) or self.host == "localhost":
            yield self.error("host", "is no IP address", "set deploy.host=0.0.0.0")
        yield from self._validate_ports()
        for name in ("tls_certificate_file", "tls_key_file"):
            yield from validate_safe_path(f"deploy.{name}", getattr(self, name), example="/etc/ssl/FILE")
        for name, other in (("tls_certificate_file", "tls_key_file"), ("tls_key_file", "tls_certificate_file")):
            if getattr(self, name) is not None and getattr(self, other) is None:
                yield self.error(name, f"is there without deploy.{other}", f"set deploy.{other}=FILE")
        for name in ("nginx_image", "prometheus_image", "grafana_image"):
            yield from validate_image(f"deploy.{name}", getattr(self, name), logins="docker login")
        yield from self._validate_network()

    def _validate_ports(self) -> Iterator[ConfigError]:
        for at, name in enumerate(_PORTS):
            port = getattr(self, name)
            if not 0 < port < 65536:
                yield self.error(name, "must lie between 1 and 65535", f"leave deploy.{name} out")
            for other in _PORTS[:at]:
                if getattr(self, other) == port:
                    yield self.error(name, f"is deploy.{other} too", f"set deploy.{name} to another port")

    def _validate_network(self) -> Iterator[ConfigError]:
        if self.servers > _MAX_SERVERS:
            yield self.error("servers", f"is more than {_MAX_SERVERS}", "use deploy=kubernetes for so many")
            return
        try:
            network = ipaddress.IPv4Network(self.subnet)
        except ValueError:
            yield self.error("subnet", "is no IPv4 network", "set deploy.subnet=172.30.93.0/24")
            return
        if not network.is_private:
            yield self.error("subnet", "is not private", "set deploy.subnet=172.30.93.0/24")
        needed = _FIRST_SERVER + self.servers + 1
        if network.num_addresses < needed:
            why = f"has {network.num_addresses} addresses; {self.servers} servers, nginx and Docker need {needed}"
            yield self.error("subnet", why, "set deploy.subnet=172.30.93.0/24")

    @property
    def nginx_address(self) -> str:
        """Address of nginx in the network of the servers."""
        return str(ipaddress.IPv4Network(self.subnet)[_NGINX_NUMBER])

    @property
    def server_addresses(self) -> tuple[str, ...]:
        """Addresses of the servers in their network."""
        network = ipaddress.IPv4Network(self.subnet)
        return tuple(str(network[_FIRST_SERVER + at]) for at in range(self.servers))

    def nginx(self) -> NginxDeploy:
        """Return the options of the nginx in its container."""
        secure: dict[str, Any] = {}
        if self.tls_certificate_file is not None:
            secure = {"tls_certificate_file": TLS_CERTIFICATE, "tls_key_file": TLS_KEY}
        own = NginxDeploy(out=self.out, host="0.0.0.0", port=INNER_PORT, log_folder=None, temporary_folder="/tmp")  # noqa: S104, S108 (in a container)
        return replace(own, **secure)
