"""Every option of every kind of deployment changes what is rendered, or is refused by its name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields, replace
from typing import Any

import pytest

from launcher.config.deploy.base import RenderedDeploy
from launcher.config.run import Run
from launcher.deploy import docker
from launcher.deploy.prepare import prepare
from launcher.deploy.registry import RENDERERS, render
from launcher.errors import ConfigErrors
from launcher.protocol.plan import Plan

SERVER = ("job=serve", "tracker=local", "deploy.out=out")
IN_CONTAINER = (*SERVER, "deploy.image=r/l:1")
HPA = {"autoscaling": "hpa", "traffic": "istio", "gateway": "a/b", "hostnames": ("m.example.org",)}
KEDA = {"autoscaling": "keda", "prometheus": "http://p:9090", "monitoring": True}
CANARY = {"traffic": "istio", "gateway": "a/b", "hostnames": ("m.example.org",), "version": "v2", "baseline": "v1"}
STORE = {"model_from": "object_store", "model_source": "s3://a/b", "cache_claim": "hub"}
CLAIM = {"model_from": "claim", "model_source": "models"}
VLLM = ("job.engine=vllm", "job.vllm_python=/v/bin/python", "model=gpt2", "model.weights=pretrained")
GROUP = (
    *("model=llama_tiny", "model.vocab_size=257", "job.tokenizer=bytes", "parallel=tensor", "parallel.tensor=4"),
    "model.num_key_value_heads=4",
    *("deploy.pods_per_engine=2", "deploy.pods_secret=key"),
)
CONFIGURATIONS: dict[str, list[tuple[tuple[str, ...], Mapping[str, Any]]]] = {
    "kubernetes": [
        (IN_CONTAINER, {}),
        (IN_CONTAINER, {**HPA, **CLAIM}),
        (IN_CONTAINER, {**KEDA, **STORE}),
        (IN_CONTAINER, {**CANARY, "cache_claim": "hub"}),
        ((*IN_CONTAINER, *VLLM, "deploy.vllm_image=r/v:1"), {}),
        ((*IN_CONTAINER, *GROUP), {}),
    ],
    "helm": [
        (IN_CONTAINER, {**KEDA, **STORE}),
        ((*IN_CONTAINER, *VLLM, "deploy.vllm_image=r/v:1"), {**HPA, "autoscaling": "none", **CLAIM}),
    ],
    "docker": [(IN_CONTAINER, {"torch_build": "cu126"})],
    "compose": [(IN_CONTAINER, {}), (IN_CONTAINER, {"tls_certificate_file": "/c.pem", "tls_key_file": "/c.key"})],
    "nginx": [
        (SERVER, {"user": "www"}),
        (SERVER, {"canary_upstreams": ("b:1",), "tls_certificate_file": "/c.pem", "tls_key_file": "/c.key"}),
    ],
    "haproxy": [
        (SERVER, {"user": "www"}),
        (SERVER, {"canary_upstreams": ("b:1",), "admin_socket": "/s", "tls_certificate_file": "/c.crt"}),
    ],
    "monitoring": [(SERVER, {}), (("tracker=prometheus", "deploy.out=out"), {})],
}
"""Overrides and fields of each kind that together make every part of it."""
VALUES: dict[str, Any] = (
    {"name": "other", "image": "r/other:1", "python": "python3.13", "cpus": 5, "memory": "200Gi", "gpus": 1}
    | {"namespace": "ml", "workload": "stateful_set", "pods_per_engine": 4, "pods_secret": "other", "replicas": 3}
    | {"service_port": 81, "secret": "tokens", "keys_from": "keys", "image_pull_secrets": ("a",), "run_as_user": 7}
    | {"node_selector": {"gpu": "a"}, "tolerations": ({"key": "a"},), "spread": (), "max_unavailable": 2}
    | {"shared_memory": "2Gi", "load_s": 500.0, "pre_stop_s": 9, "model_from": "image_volume", "model_source": "other"}
    | {"model_path": "/other", "model_subpath": "team", "cache_claim": "other", "cache_size": "7Gi"}
    | {"volumes": {"a": "/a"}, "vllm_image": "r/other:1", "autoscaling": "hpa", "min_replicas": 2, "max_replicas": 9}
    | {"monitoring": True, "target_requests": 3, "prometheus": "http://other:1", "queue_query": "sum(a)"}
    | {"traffic": "gateway", "gateway": "other", "hostnames": ("other.example.org",), "version": "v7"}
    | {"baseline": "v0", "weights": {"v1": 40, "v2": 60}, "scrape_every_s": 7, "slo_ttft_s": 5.0}
    | {"slo_ttft_share": 0.97, "slo_success_share": 0.995, "targets": ("a:1",), "alertmanagers": ("a:1",)}
    | {"stalled_s": 301, "goodput_share": 0.4, "torch_build": "cu128", "base_image": "python:3.13", "host": "10.0.0.9"}
    | {"port": 8181, "upstreams": ("a:1", "a:2"), "canary_upstreams": ("c:1",), "canary_percent": 5}
    | {"tls_certificate_file": "/o.crt", "tls_key_file": "/o.key", "rate_per_minute": 7, "user": "other"}
    | {"user_group": "others", "log_folder": None, "temporary_folder": "/t", "fail_timeout_s": 3.0}
    | {"check_every_s": 2.0, "check_timeout_s": 7.0, "retried_bytes": 2**15, "metrics_port": 9101}
    | {"admin_socket": "/other", "servers": 3, "prometheus_port": 9191, "grafana_port": 3131}
    | {"subnet": "10.9.0.0/24", "nginx_image": "r/n:1", "prometheus_image": "r/p:1", "grafana_image": "r/g:1"}
    | {"canary_steps": (50, 100), "canary_interval_s": 61, "canary_checks": 4, "canary_failure_limit": 3}
    | {"canary_min_requests": 21, "canary_deadline_s": 3601, "canary_failure_share": 0.02}
    | {"canary_ttft_p95_s": 5.0, "canary_tokens_per_s": 3.0, "canary_slowdown": 2.0}
    | {"canary_prometheus": "http://other:1", "context": "other"}
)
"""Another value of each option."""
NEVER = {
    "helm": {"baseline", "weights", "pods_per_engine", "pods_secret", *(name for name in VALUES if "canary_" in name)}
    - {"canary_upstreams", "canary_percent"},
    "docker": {"python"},
    "nginx": {"name"},
    "haproxy": {"name", "tls_key_file"},  # HAProxy looks for the key beside the certificate
}
"""Options that a kind refuses, or only compares with others."""


def rendering(run: Run, plan: Plan) -> dict[str, str | bytes]:
    """Return the files but for run.yaml, which holds every option."""
    return {path: text for path, text in render(run, plan).items() if path != "run.yaml"}


def changed_or_refused(run: Run, plan: Plan, name: str) -> Run | None:
    """Return the run with another value of an option; ``None`` if it is refused."""
    try:
        changed = replace(run, deploy=replace(run.deploy, **{name: VALUES[name]}))
        changed.deploy.hosts(changed)
    except ConfigErrors:
        return None
    return None if list(changed.deploy.validate_run(changed, plan)) else changed


def is_read_by_actions(run: Run, name: str) -> bool:
    has_canary = getattr(run.deploy, "has_canary", False)
    return name == "context" or (has_canary and (name.startswith("canary_") or name == "prometheus"))


@pytest.mark.parametrize("kind", RENDERERS)
def test_each_option_has_an_effect_or_is_refused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docker, "program_wheel", lambda: ("launcher.whl", b""))  # takes a second each time
    effective = {"out"}
    for words, own in CONFIGURATIONS[kind]:
        run, plan = prepare((*words, f"deploy={kind}"))
        run = replace(run, deploy=replace(run.deploy, **own))
        assert isinstance(run.deploy, RenderedDeploy)
        assert list(run.deploy.validate_run(run, plan)) == [], own
        before = rendering(run, plan)
        for each in fields(run.deploy):
            if each.name == "out" or VALUES[each.name] == getattr(run.deploy, each.name):
                continue
            found = changed_or_refused(run, plan, each.name)
            if found is None:
                continue
            if rendering(found, plan) != before or is_read_by_actions(run, each.name):
                effective.add(each.name)
            else:
                is_needed = each.default is MISSING and each.default_factory is MISSING
                is_accepted = is_needed or each.name == "workload"  # where it says what auto chooses
                assert is_accepted, f"deploy.{each.name} of deploy={kind} has no effect beside {words} {own}"
    assert {each.name for each in fields(run.deploy)} - effective == NEVER.get(kind, set())
