"""Options of load balancers: rendered whole, hostile values refused by the name of their option."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launcher.errors import ConfigErrors
from tests.deploy.proxies import FILES, KINDS, rendered

GOLDEN = Path(__file__).parent.parent / "golden/deploy"
EVERYTHING = (
    "job.max_body_bytes=1048576",
    "job.request_timeout_s=120",
    "job.max_connections=400",
    "deploy.host=0.0.0.0",
    "deploy.port=443",
    "deploy.user=www-data",
    "deploy.upstreams=[10.0.0.1:8000,'[2001:db8::2]:8000',GPU-3.example.org:8001]",
    "deploy.tls_certificate_file=/etc/ssl/site.crt",
    "deploy.tls_key_file=/etc/ssl/site.key",
    "deploy.rate_per_minute=600",
)
CANARY = (
    *("deploy.upstreams=[10.0.0.1:8000,10.0.0.2:8000]", "deploy.canary_upstreams=[10.0.0.3:8000]"),
    "deploy.canary_percent=5",
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["default", "everything", "canary"])
def test_the_configuration_is_as_reviewed(kind: str, name: str) -> None:
    words = {"default": (), "everything": EVERYTHING, "canary": CANARY}[name]
    if kind == "haproxy":
        words += {"everything": ("deploy.metrics_port=9101",), "canary": ("deploy.admin_socket=/run/a.sock",)}.get(
            name, ()
        )
    text, golden = rendered(kind, words), GOLDEN / f"{name}.{FILES[kind]}"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.parent.mkdir(parents=True, exist_ok=True)
        golden.write_text(text)
    assert text == golden.read_text()


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (["deploy.host='127.0.0.1;'"], "deploy.host"),
        (["deploy.host='*'"], "deploy.host"),
        (["deploy.host=1.2.3"], "deploy.host"),
        (["deploy.port=0"], "deploy.port"),
        (["deploy.port=443"], "deploy.port"),
        (["deploy.port=8000"], "deploy.port"),
        (["deploy.upstreams=['10.0.0.1:8000; }']"], "deploy.upstreams[0]"),
        (['deploy.upstreams=[10.0.0.1:8000,"10.0.0.2:80\\n"]'], "deploy.upstreams[1]"),
        (["deploy.upstreams=[10.0.0.1]"], "deploy.upstreams[0]"),
        (["deploy.upstreams=['::1:8000']"], "deploy.upstreams[0]"),
        (["deploy.upstreams=[10.0.0.1:99999]"], "deploy.upstreams[0]"),
        (["deploy.upstreams=['10.0.0.1:٣']"], "deploy.upstreams[0]"),
        (["deploy.upstreams=[http://a:80]"], "deploy.upstreams[0]"),
        (["deploy.upstreams=[a:80,A:80]"], "deploy.upstreams[1]"),
        (["deploy.upstreams=['unix:/run/a.sock']"], "deploy.upstreams[0]"),
        (["deploy.tls_key_file=/a.key"], "deploy.tls_key_file"),
        (["deploy.tls_certificate_file=a.crt", "deploy.tls_key_file=/a.key"], "deploy.tls_certificate_file"),
        (["deploy.tls_certificate_file='/a$b.crt'", "deploy.tls_key_file=/a.key"], "deploy.tls_certificate_file"),
        (["deploy.tls_certificate_file='/a\".crt'", "deploy.tls_key_file=/a.key"], "deploy.tls_certificate_file"),
        (['deploy.tls_certificate_file="/a\'.crt"', "deploy.tls_key_file=/a.key"], "deploy.tls_certificate_file"),
        (["deploy.tls_certificate_file=/a/../b.crt", "deploy.tls_key_file=/b.key"], "deploy.tls_certificate_file"),
        (["deploy.rate_per_minute=0"], "deploy.rate_per_minute"),
        (["deploy.upstreams=[10.0.0.1:80,127.0.0.1:8080]"], "deploy.upstreams[1]"),
        (["deploy.upstreams=[localhost:8080]"], "deploy.upstreams[0]"),
        (["deploy.upstreams=['0.0.0.0:8080']"], "deploy.upstreams[0]"),
        (["deploy.host=0.0.0.0", "deploy.upstreams=[127.0.0.2:8080]"], "deploy.upstreams[0]"),
        (["deploy.host='::'", "deploy.upstreams=['[::1]:8080']"], "deploy.upstreams[0]"),
        (["deploy.host=lb.example", "deploy.port=8001", "deploy.upstreams=[LB.example:8001]"], "deploy.upstreams[0]"),
        (["deploy.user='root; daemon on'"], "deploy.user"),
        (["deploy.user=www-data", "deploy.user_group='a b'"], "deploy.user_group"),
        (["deploy.user_group=www-data"], "deploy.user_group"),
        (["deploy.name='A b'"], "deploy.name"),
        (["job.rate_per_minute=60"], "job.rate_per_minute"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_hostile_value_is_refused_by_its_option(kind: str, words: list[str], option: str) -> None:
    with pytest.raises(ConfigErrors) as caught:
        rendered(kind, words)
    assert option in [error.option for error in caught.value.errors]


@pytest.mark.parametrize(
    ("kind", "words", "option"),
    [
        ("nginx", ["deploy.tls_certificate_file=/a.crt"], "deploy.tls_certificate_file"),
        ("nginx", ["deploy.log_folder='/var/log; evil'"], "deploy.log_folder"),
        ("nginx", ["deploy.temporary_folder=tmp"], "deploy.temporary_folder"),
        ("nginx", ["deploy.fail_timeout_s=0.2"], "deploy.fail_timeout_s"),
        ("nginx", ["deploy.fail_timeout_s=1.5"], "deploy.fail_timeout_s"),
        ("nginx", ["deploy.fail_timeout_s=0"], "deploy.fail_timeout_s"),
        ("haproxy", ["deploy.tls_certificate_file=/a.pem", "deploy.tls_key_file=/b.key"], "deploy.tls_key_file"),
        ("haproxy", ["deploy.check_every_s=0"], "deploy.check_every_s"),
        ("haproxy", ["deploy.check_timeout_s=.nan"], "deploy.check_timeout_s"),
        ("haproxy", ["deploy.retried_bytes=1"], "deploy.retried_bytes"),
        ("haproxy", ["deploy.retried_bytes=1073741824"], "deploy.retried_bytes"),
        ("haproxy", ["deploy.metrics_port=8080"], "deploy.metrics_port"),
        ("haproxy", ["deploy.metrics_port=70000"], "deploy.metrics_port"),
    ],
)
def test_a_value_without_sense_is_refused_by_its_option(kind: str, words: list[str], option: str) -> None:
    with pytest.raises(ConfigErrors) as caught:
        rendered(kind, words)
    assert option in [error.option for error in caught.value.errors]


@pytest.mark.parametrize(
    ("kind", "words", "example"),
    [
        ("nginx", ["deploy.log_folder=rel"], "deploy.log_folder=/var/log/nginx"),
        ("haproxy", ["deploy.admin_socket=rel.sock"], "deploy.admin_socket=/run/haproxy/launcher.sock"),
        ("haproxy", ["deploy.tls_certificate_file=a.crt"], "deploy.tls_certificate_file=/etc/ssl/FILE"),
    ],
)
def test_a_relative_path_is_answered_with_one_of_its_kind(kind: str, words: list[str], example: str) -> None:
    with pytest.raises(ConfigErrors) as caught:
        rendered(kind, words)
    assert f"give the whole path: {example}" in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("upstream", ["10.0.0.1:8080", "127.0.0.1:8081", "127.0.0.2:8080", "gpu1:8080"])
def test_another_machine_or_port_is_not_the_proxy_itself(kind: str, upstream: str) -> None:
    assert f" {upstream}" in rendered(kind, (f"deploy.upstreams=[{upstream}]",))
    if not upstream.startswith("127."):  # all interfaces of the proxy's machine are not those of others
        assert f" {upstream}" in rendered(kind, ("deploy.host=0.0.0.0", f"deploy.upstreams=[{upstream}]"))


def test_a_rate_of_the_server_needs_a_proxy_that_it_trusts() -> None:
    text = rendered(
        "nginx",
        (
            "job.rate_per_minute=60",
            "job.trusted_proxies=[10.0.0.5]",
        ),
    )
    assert "rate=60r/m" in text
    assert "limit_req" not in rendered("nginx")


def test_without_upstreams_it_is_the_server_of_this_run() -> None:
    assert "server 127.0.0.1:8000 " in rendered("nginx")
    assert "server 127.0.0.1:8123 " in rendered(
        "nginx",
        (
            "job.host=0.0.0.0",
            "job.port=8123",
        ),
    )
    assert "server [::1]:8123 " in rendered(
        "nginx",
        (
            "job.host='::1'",
            "job.port=8123",
        ),
    )


def test_a_job_that_is_no_server_is_refused() -> None:
    with pytest.raises(ConfigErrors) as caught:
        rendered("haproxy", server=("job=train", "model=gpt2_tiny", "tracker=local"))
    assert "job" in [error.option for error in caught.value.errors]
