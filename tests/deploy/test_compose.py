"""``deploy=compose``: accepted by a parser of Compose's schema, its parts by the programs that read them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from compose_spec import PyCompose

from launcher.config.snapshot import load_run
from launcher.deploy.prepare import prepare
from launcher.deploy.registry import render
from launcher.errors import ConfigErrors
from tests.conftest import Start
from tests.deploy.containers import Container
from tests.deploy.monitoring.rendered import PROMTOOL
from tests.deploy.proxies import SERVER, check_command
from tests.helpers import wait_for
from tests.ports import free_port

GOLDEN = Path(__file__).parent.parent / "golden/deploy/compose.yaml"
EVERYTHING = (
    "deploy.servers=2",
    "deploy.host=0.0.0.0",
    "deploy.port=443",
    "deploy.tls_certificate_file=/etc/ssl/site.crt",
    "deploy.tls_key_file=/etc/ssl/site.key",
    "deploy.gpus=1",
    "job.engine=paged",
    "deploy.cpus=8",
    "deploy.memory=32Gi",
    "deploy.rate_per_minute=60",
    "deploy.name=chat",
    "job.api_keys_file=/etc/keys",
    "job.tokenizer=/models/to$HOME",
    "job.drain_s=45",
    "job.port=8123",
)
IMAGE = "deploy.image=registry.example/launcher:1"


def rendered(*words: str) -> dict[str, str]:
    """Return the files of a server in containers."""
    return render(*prepare([*SERVER, "deploy=compose", IMAGE, "deploy.out=x", *words]))


@pytest.fixture(scope="module")
def everything() -> dict[str, str]:
    """All files with every option."""
    return rendered(*EVERYTHING)


def test_the_file_is_as_reviewed(everything: dict[str, str]) -> None:
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(everything["compose.yaml"])
    assert everything["compose.yaml"] == GOLDEN.read_text()


def _misspell(tree: dict[str, Any]) -> None:
    tree["services"]["nginx"]["healthcheckk"] = {}


def _name_no_network(tree: dict[str, Any]) -> None:
    tree["services"]["nginx"]["networks"]["other"] = {}


@pytest.mark.parametrize("break_it", [_misspell, _name_no_network])
def test_compose_accepts_it(everything: dict[str, str], break_it: Callable[[dict[str, Any]], None]) -> None:
    for files in (rendered(), everything):
        PyCompose.from_yaml(files["compose.yaml"]).validate()
        tree = yaml.safe_load(files["compose.yaml"])
        break_it(tree)
        with pytest.raises(Exception, match=r"healthcheckk|other"):  # so the parser looks
            PyCompose.from_yaml(yaml.safe_dump(tree)).validate()


def test_every_file_that_is_mounted_is_rendered(everything: dict[str, str]) -> None:
    services = yaml.safe_load(everything["compose.yaml"])["services"]
    mounted = {each["source"] for service in services.values() for each in service["volumes"] if each["type"] == "bind"}
    own = {source.removeprefix("./") for source in mounted if source.startswith("./")}
    assert all(any(f"{path}/".startswith(f"{source}/") for path in everything) for source in own), own
    unmounted = {path for path in everything if not any(f"{path}/".startswith(f"{source}/") for source in own)}
    assert unmounted == {"run.yaml", "compose.yaml"}
    assert mounted - {f"./{source}" for source in own} == {
        "/etc/ssl/site.crt",
        "/etc/ssl/site.key",
        "/models/to$$HOME",  # Compose reads $$ as $
    }


def test_nothing_runs_with_more_rights_than_it_needs(everything: dict[str, str]) -> None:
    tree = yaml.safe_load(everything["compose.yaml"])
    for name, service in tree["services"].items():
        assert service["cap_drop"] == ["ALL"], name
        assert service["read_only"] is True
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert ":" in service["image"]
        assert not {"privileged", "network_mode", "pid"} & service.keys()
    reached = {name: each["ports"][0]["host_ip"] for name, each in tree["services"].items() if "ports" in each}
    assert reached == {"nginx": "0.0.0.0", "prometheus": "127.0.0.1", "grafana": "127.0.0.1"}


def test_the_run_of_the_servers_fits_their_containers(everything: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(everything["server/run.yaml"])
    run = load_run(tmp_path / "run.yaml")
    job: Any = run.job
    assert (run.deploy.kind, run.run.root, job.host, job.port) == ("none", "/runs", "0.0.0.0", 8123)
    assert (job.api_keys_file, job.trusted_proxies) == ("/run/secrets/api_keys", ("172.30.93.10",))
    tree = yaml.safe_load(everything["compose.yaml"])
    assert tree["secrets"] == {"api_keys": {"file": "/etc/keys"}}
    server = tree["services"]["server-2"]
    assert server["networks"]["servers"]["ipv4_address"] == "172.30.93.21"
    assert server["stop_grace_period"] == "75s"  # drain, time to stop, and some more
    assert server["mem_limit"] == 32 << 30
    assert "server 172.30.93.21:8123 " in everything["nginx/nginx.conf"]
    (tmp_path / "run.yaml").write_text(rendered("deploy.servers=2")["server/run.yaml"])
    without_keys: Any = load_run(tmp_path / "run.yaml").job
    assert {"server-1", "server-2"} <= set(without_keys.allowed_hosts)  # Prometheus asks by these names


def test_nginx_accepts_its_configuration(tmp_path: Path) -> None:
    file = tmp_path / "nginx.conf"
    text = rendered("deploy.servers=2", "deploy.rate_per_minute=60")["nginx/nginx.conf"]
    file.write_text(text.replace('"/tmp', f'"{tmp_path}'))
    done = subprocess.run(check_command("nginx", file), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_command_of_a_server_starts_one_that_is_healthy(tmp_path: Path, preloading: Start) -> None:
    port = free_port()
    files = rendered(f"job.port={port}", "job.engine=echo", "job.tokenizer=bytes", f"deploy.python={sys.executable}")
    service = yaml.safe_load(files["compose.yaml"])["services"]["server-1"]
    mounts = {each["target"]: each["source"] for each in service["volumes"]}
    container = Container(tmp_path / "root", tuple(mounts))
    (snapshot,) = (target for target, source in mounts.items() if source == "./server")
    container.write_run(f"{snapshot}/run.yaml", files["server/run.yaml"])
    kind, *check = service["healthcheck"]["test"]
    assert kind == "CMD"

    def is_healthy() -> bool:
        return subprocess.run(check, capture_output=True, check=False).returncode == 0

    assert not is_healthy()
    environment = {**service["environment"], "HOME": str(tmp_path)}
    with container.running(service["command"], environment, cwd="/runs", start_process=preloading) as process:
        wait_for(is_healthy, process=process, shown=lambda: container.log)
        body = {"model": "gpt2_tiny", "prompt": "abc", "max_tokens": 4}
        answer = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, headers={"host": "server-1"})
        assert answer.json()["usage"]["completion_tokens"] == 4, answer.text
        process.send_signal(signal.SIGTERM)
        assert process.wait(float(service["stop_grace_period"].removesuffix("s"))) == 0


def test_promtool_accepts_what_prometheus_reads(everything: dict[str, str], tmp_path: Path) -> None:
    if PROMTOOL is None:
        pytest.skip("Debian's prometheus is not installed")
    volumes = yaml.safe_load(everything["compose.yaml"])["services"]["prometheus"]["volumes"]
    for mount in volumes:
        if mount["type"] == "bind":
            source, target = mount["source"].removeprefix("./"), tmp_path / mount["target"].lstrip("/")
            for path, text in everything.items():
                if path == source or path.startswith(f"{source}/"):
                    place = Path(f"{target}{path.removeprefix(source)}")
                    place.parent.mkdir(parents=True, exist_ok=True)
                    place.write_text(text)
    file = tmp_path / "etc/prometheus/prometheus.yml"
    found = subprocess.run([PROMTOOL, "check", "config", file], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert "1 rule files found" in found.stdout, found.stdout
    file.write_text(everything["prometheus.yml"].replace("scrape_configs", "scrape_config"))
    assert subprocess.run([PROMTOOL, "check", "config", file], capture_output=True, check=False).returncode != 0


def test_grafana_is_provisioned_with_fields_that_it_knows(everything: dict[str, str]) -> None:
    """The fields are those of Grafana's page on provisioning; it ignores others without a word."""
    folder = "grafana/provisioning"
    (provider,) = (providers := yaml.safe_load(everything[f"{folder}/dashboards/launcher.yaml"]))["providers"]
    (source,) = (sources := yaml.safe_load(everything[f"{folder}/datasources/prometheus.yaml"]))["datasources"]
    assert (providers.keys(), sources.keys()) == ({"apiVersion", "providers"}, {"apiVersion", "datasources"})
    assert providers["apiVersion"] == sources["apiVersion"] == 1
    known = {"name", "orgId", "folder", "folderUid", "type", "disableDeletion", "updateIntervalSeconds"}
    assert {"name", "type", "options"} <= provider.keys() <= known | {"allowUiUpdates", "options"}
    assert provider["type"] == "file"
    known = {"name", "type", "access", "orgId", "uid", "url", "user", "database", "basicAuth", "basicAuthUser"}
    known |= {"withCredentials", "isDefault", "jsonData", "secureJsonData", "version", "editable"}
    assert {"name", "type", "url", "uid"} <= source.keys() <= known
    assert (source["type"], source["access"]) == ("prometheus", "proxy")
    volumes = yaml.safe_load(everything["compose.yaml"])["services"]["grafana"]["volumes"]
    targets = {each["target"]: each["source"] for each in volumes}
    assert targets["/etc/grafana/provisioning"] == f"./{folder}"
    assert any(path.startswith(f"{targets[provider['options']['path']]}/".removeprefix("./")) for path in everything)
    board = json.loads(everything["grafana/dashboards/serving.json"])
    assert {panel["datasource"]["uid"] for panel in board["panels"] if "datasource" in panel} == {"${datasource}"}
    (chosen,) = (each for each in board["templating"]["list"] if each["name"] == "datasource")
    assert (chosen["type"], chosen["query"]) == ("datasource", source["type"])  # the one that is there


def test_prometheus_and_grafana_find_each_other(everything: dict[str, str]) -> None:
    scraped = yaml.safe_load(everything["prometheus.yml"])["scrape_configs"][0]["static_configs"]
    assert scraped == [{"targets": ["server-1:8123", "server-2:8123"]}]
    source = yaml.safe_load(everything["grafana/provisioning/datasources/prometheus.yaml"])["datasources"][0]
    assert source["url"] == "http://prometheus:9090"
    assert json.loads(everything["grafana/dashboards/serving.json"])["panels"]
    services = yaml.safe_load(everything["compose.yaml"])["services"]
    networks = {name: set(service["networks"]) for name, service in services.items()}
    assert networks["prometheus"] & networks["server-1"]
    assert networks["prometheus"] & networks["grafana"]
    assert networks["nginx"] & networks["server-2"]
    assert not networks["nginx"] & networks["prometheus"]  # the proxy that faces clients reaches servers alone


@pytest.mark.parametrize(
    ("word", "option"),
    [
        ("deploy.servers=0", "deploy.servers"),
        ("deploy.servers=101", "deploy.servers"),
        ("deploy.host=localhost", "deploy.host"),
        ("deploy.port=70000", "deploy.port"),
        ("deploy.prometheus_port=3000", "deploy.grafana_port"),
        ("deploy.subnet=8.8.8.0/24", "deploy.subnet"),
        ("deploy.subnet=172.30.93.7/24", "deploy.subnet"),
        ("deploy.subnet=172.30.93.0/29", "deploy.subnet"),
        ("deploy.tls_key_file=/a.key", "deploy.tls_key_file"),
        ("deploy.tls_certificate_file=a.crt", "deploy.tls_certificate_file"),
        ("deploy.nginx_image='a b'", "deploy.nginx_image"),
        ("deploy.rate_per_minute=0", "deploy.rate_per_minute"),
        ("job.port=80", "job.port"),
        ("job.tokenizer=./folder", "job.tokenizer"),
        ("job.tokenizer=/", "job.tokenizer"),
        ("job.api_keys_file=keys.txt", "job.api_keys_file"),
        ("deploy.name='${HOME}'", "deploy.name"),
    ],
)
def test_a_bad_value_is_refused_by_its_option(word: str, option: str) -> None:
    with pytest.raises(ConfigErrors) as caught:
        rendered(word)
    assert option in [error.option for error in caught.value.errors]
