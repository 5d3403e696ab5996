"""Manifests of a server: compared whole with a file, held against the schemas of the API and PodSecurity."""

from __future__ import annotations

import copy
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.config.snapshot import load_run
from launcher.errors import ConfigErrors
from launcher.utils.files import sha256_of
from tests.conftest import REPOSITORY
from tests.deploy.conftest import Render, manifests_of
from tests.kubernetes_schemas import needs_crds, problems, unrestricted

GOLDEN = REPOSITORY / "tests/golden/deploy/kubernetes.yaml"
ROUTES = (
    *("deploy.gateway=istio-system/main", "deploy.hostnames=[models.example.org]"),
    *("deploy.version=v2", "deploy.baseline=v1", "deploy.weights={v1: 90, v2: 10}"),
)
KEDA = ("deploy.autoscaling=keda", "deploy.prometheus=http://prometheus:9090")
FULL = (
    *("deploy.name=chat", "deploy.namespace=ml", "deploy.gpus=1", "deploy.cpus=8", "deploy.secret=tokens"),
    *("deploy.keys_from=keys", "deploy.image_pull_secrets=[registry]", "deploy.node_selector={gpu: h100}"),
    "deploy.tolerations=[{key: nvidia.com/gpu, operator: Exists, effect: NoSchedule}]",
    *("deploy.model_from=object_store", "deploy.model_source=s3://models/chat", "deploy.volumes={adapters: /adapters}"),
    *("deploy.min_replicas=0", "deploy.queue_query=sum(gateway_waiting)", "deploy.load_s=41.5", *KEDA),
    *("deploy.traffic=istio", *ROUTES, "job.drain_s=60"),
)
CASES = {
    "smallest": (),
    "full": FULL,
    "gateway": ("deploy.traffic=gateway", *ROUTES),
    "hpa": ("deploy.autoscaling=hpa", "deploy.max_replicas=8"),
    "keda": KEDA,
    "monitored": ("deploy.monitoring=true", "deploy.traffic=gateway", *ROUTES),
    "stateful": ("deploy.workload=stateful_set", "deploy.replicas=2"),
    "claim": ("deploy.model_from=claim", "deploy.model_source=models", "deploy.model_subpath=team/chat"),
    "image": ("deploy.model_from=image", "deploy.model_path=/opt/model"),
    "image volume": ("deploy.model_from=image_volume", "deploy.model_source=registry.example/model:1"),
    "shared cache": ("deploy.cache_claim=hub", "deploy.workload=stateful_set"),
}


def pod_of(files: dict[str, str]) -> dict[str, Any]:
    found = manifests_of(files)
    workload = found.get("Deployment") or found["StatefulSet"]
    pod: dict[str, Any] = workload["spec"]["template"]["spec"]
    return pod


def test_the_whole_rendering(rendered: Render) -> None:
    _, _, files = rendered(*FULL)
    run_hash = sha256_of(manifests_of(files)["ConfigMap"]["data"]["run.yaml"].encode())
    parts = []
    for path, text in files.items():
        if path.startswith("manifests/"):
            manifest = yaml.safe_load(text)
            if manifest["kind"] == "ConfigMap":  # a new option anywhere changes it: that is no change of the manifests
                assert "  run.yaml: |" in text
                text = text[: text.index("  run.yaml: |")]
            parts.append(f"--- # {path}\n{text.replace(run_hash, '0' * 64).replace(run_hash[:10], '0' * 10)}")
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text("".join(parts), encoding="utf-8")
    assert "".join(parts) == GOLDEN.read_text(encoding="utf-8")


@pytest.mark.parametrize("case", CASES)
def test_every_manifest_is_valid_and_restricted(rendered: Render, case: str) -> None:
    _, _, files = rendered(*CASES[case])
    manifests = [yaml.safe_load(text) for path, text in files.items() if path.startswith("manifests/")]
    assert {each["kind"]: problems(each) for each in manifests} == {each["kind"]: [] for each in manifests}
    assert list(unrestricted(pod_of(files))) == []
    assert {each["metadata"]["namespace"] for each in manifests} == {"ml" if case == "full" else "default"}


def test_the_validators_refuse(rendered: Render) -> None:
    found = manifests_of(rendered()[2])
    for kind, manifest in found.items():
        wrong = {**manifest, "sepc": {}}
        assert problems(wrong), kind
    pod = pod_of(rendered()[2])
    for change in ({"hostNetwork": True}, {"securityContext": {}}, {"volumes": [{"name": "a", "hostPath": {}}]}):
        assert list(unrestricted({**pod, **change})), change
    loose = copy.deepcopy(pod)
    loose["containers"][0]["securityContext"]["allowPrivilegeEscalation"] = True
    assert list(unrestricted(loose)) == ["server may gain privileges"]


@needs_crds
@pytest.mark.parametrize("kind", ["ScaledObject", "VirtualService", "DestinationRule", "HTTPRoute"])
def test_the_definitions_of_custom_kinds_refuse(rendered: Render, kind: str) -> None:
    words = CASES["gateway"] if kind == "HTTPRoute" else FULL
    manifest = manifests_of(rendered(*words)[2])[kind]
    assert problems(manifest) == []
    assert problems({**manifest, "spec": {**manifest["spec"], "wieghts": 1}})


def test_the_snapshot_is_that_of_a_pod_and_another_one_starts_other_pods(rendered: Render, tmp_path: Path) -> None:
    _, _, files = rendered("deploy.name=chat", "deploy.namespace=ml", "deploy.cpus=6")
    config = manifests_of(files)["ConfigMap"]
    text = config["data"]["run.yaml"]
    run_hash = sha256_of(text.encode())
    assert config["metadata"]["name"] == f"chat-v1-{run_hash[:10]}"
    assert config["metadata"]["annotations"] == {"launcher/run-hash": run_hash}
    assert {"name": "snapshot", "configMap": {"name": config["metadata"]["name"]}} in pod_of(files)["volumes"]
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
    started = load_run(tmp_path / "run.yaml", expected_hash=run_hash)
    assert (started.job.host, started.run.root, started.backend.threads) == ("0.0.0.0", "/runs", 6)
    assert {"chat", "chat.ml", "chat.ml.svc.cluster.local", "chat-v1.ml.svc"} <= set(started.job.allowed_hosts)
    other = manifests_of(rendered("deploy.name=chat", "deploy.namespace=ml", "job.max_queue=9")[2])["ConfigMap"]
    assert other["metadata"]["name"] != config["metadata"]["name"]


def test_what_lives_in_secrets_is_named_and_never_in_a_manifest(
    rendered: Render, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_very_secret")
    fetched = ("deploy.model_from=object_store", "deploy.model_source=s3://models/chat")
    _, _, files = rendered("deploy.secret=tokens", "deploy.keys_from=keys", *fetched)
    assert "hf_very_secret" not in "".join(files.values())
    container, fetching = pod_of(files)["containers"][0], pod_of(files)["initContainers"][0]
    assert fetching["envFrom"] == container["envFrom"]
    assert not [each for each in fetching["env"] if "valueFrom" in each], "it answers no clients"
    assert container["envFrom"] == [{"secretRef": {"name": "tokens"}}]
    (keys,) = [each for each in container["env"] if "valueFrom" in each]
    assert keys["valueFrom"] == {"secretKeyRef": {"name": "keys", "key": "LAUNCHER_API_KEYS"}}
    assert "allowed_hosts: []" in manifests_of(files)["ConfigMap"]["data"]["run.yaml"]  # keys and names exclude another


def test_times_follow_from_the_drain_and_the_measured_load(rendered: Render) -> None:
    run, _, files = rendered("job.drain_s=60", "deploy.pre_stop_s=7", "deploy.load_s=100", *KEDA)
    pod = pod_of(files)
    container = pod["containers"][0]
    assert pod["terminationGracePeriodSeconds"] == 7 + run.job.shutdown_grace_s + 15 >= 7 + 60 + 15
    assert container["lifecycle"]["preStop"]["sleep"]["seconds"] == 7
    probe = container["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] >= 300
    assert probe["httpGet"]["path"] == container["readinessProbe"]["httpGet"]["path"] == "/health/ready"
    assert container["livenessProbe"]["httpGet"]["path"] == "/health/live"
    scaled = manifests_of(files)["ScaledObject"]["spec"]
    (pods,) = re.findall(r'pod=~"(.*?)"', scaled["triggers"][0]["metadata"]["query"].partition(" or ")[0])
    names = {"gpt2-tiny-v1-5d8f7c9b6-x2x4z": True, "gpt2-tiny-v1-b-5d8f7c9b6-x2x4z": False, "gpt2-tiny-v1-0": False}
    assert {name: bool(re.fullmatch(pods, name)) for name in names} == names  # not those of a version v1-b
    assert min(scaled["cooldownPeriod"], scaled["initialCooldownPeriod"]) > 300  # a loading pod does not count as idle
    assert "replicas" not in manifests_of(files)["Deployment"]["spec"]


def test_a_start_may_take_the_time_of_compiling_and_of_a_download(rendered: Render) -> None:
    def startup_s(*words: str) -> int:
        probe = pod_of(rendered(*words)[2])["containers"][0]["startupProbe"]
        return int(probe["periodSeconds"] * probe["failureThreshold"])

    assert startup_s("deploy.load_s=0.5") == 300, "what a warm machine measured is not what a cold pod takes"
    assert startup_s("deploy.load_s=200") == 600
    published = ("model=gpt2", "model.weights=pretrained", "job.tokenizer=bytes", "deploy.load_s=0.5")
    download_s = 124_439_808 * 4 / 25e6
    assert startup_s(*published) == pytest.approx(300 + download_s, abs=10)  # a whole number of periods
    assert startup_s(*published, *CASES["image"]) == 300
    stored = ("deploy.model_from=object_store", "deploy.model_source=s3://models/chat")
    assert startup_s(*published, *stored) == startup_s(*published)
    run, _, _ = rendered(*stored, "deploy.load_s=0.5", "deploy.cache_size=100G")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(run.model), "shape", lambda self: None)
        assert run.deploy.startup_s(run) == 300 + 100e9 / 25e6, "of unknown size: the whole cache"


def test_memory_follows_from_the_plan(rendered: Render) -> None:
    small = pod_of(rendered()[2])["containers"][0]["resources"]["limits"]["memory"]
    cache = pod_of(rendered("job.kv_cache_tokens=4_000_000")[2])["containers"][0]["resources"]["limits"]["memory"]
    two = pod_of(rendered("job.replicas=2")[2])["containers"][0]["resources"]["limits"]["memory"]
    assert int(small.removesuffix("Gi")) < int(two.removesuffix("Gi"))
    assert int(small.removesuffix("Gi")) < int(cache.removesuffix("Gi"))
    assert pod_of(rendered("deploy.memory=64Gi")[2])["containers"][0]["resources"]["requests"]["memory"] == "64Gi"


def test_an_engine_of_several_ranks_is_one_pod_of_a_stateful_set(rendered: Render) -> None:
    words = ("model=llama_tiny", "model.vocab_size=257", "job.tokenizer=bytes", "parallel=tensor", "parallel.tensor=2")
    _, plan, files = rendered(*words, "deploy.gpus=2", "deploy.cpus=8")
    assert plan.world_size == 2
    found = manifests_of(files)
    assert (
        found["StatefulSet"]["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
        == "2"
    )
    started = yaml.safe_load(found["ConfigMap"]["data"]["run.yaml"])
    assert (started["backend"]["ranks"], started["backend"]["threads"]) == (2, 4)


def test_the_model_is_mounted_where_the_snapshot_looks_for_it(rendered: Render) -> None:
    _, _, files = rendered(*CASES["claim"])
    pod = pod_of(files)
    (mount,) = [each for each in pod["containers"][0]["volumeMounts"] if each["name"] == "model"]
    assert mount == {"name": "model", "mountPath": "/models", "readOnly": True, "subPath": "team/chat"}
    started = yaml.safe_load(manifests_of(files)["ConfigMap"]["data"]["run.yaml"])
    assert started["model"]["weights"] == "/models"
    _, _, files = rendered(*CASES["image"])
    assert "model" not in {each["name"] for each in pod_of(files)["volumes"]}
    started = yaml.safe_load(manifests_of(files)["ConfigMap"]["data"]["run.yaml"])
    assert started["model"]["weights"] == "/opt/model"
    _, _, files = rendered(*CASES["image volume"])
    (volume,) = (each for each in pod_of(files)["volumes"] if each["name"] == "model")
    assert volume["image"]["reference"] == "registry.example/model:1"
    for case, cache in (("smallest", "emptyDir"), ("shared cache", "persistentVolumeClaim")):
        (volume,) = (each for each in pod_of(rendered(*CASES[case])[2])["volumes"] if each["name"] == "cache")
        assert cache in volume
    _, _, files = rendered(*FULL)
    init = pod_of(files)["initContainers"][0]
    assert init["command"][1:] == ["-m", "launcher.deploy.fetch", "s3://models/chat", "/models"]


def test_vllm_runs_in_an_image_of_its_own(rendered: Render) -> None:
    words = ("job.engine=vllm", "job.vllm_python=/opt/vllm/bin/python", "model=smollm2_135m", "deploy.memory=8Gi")
    with pytest.raises(ConfigErrors, match=r"job\.engine=vllm: .*deploy\.vllm_image="):
        rendered(*words)
    _, _, files = rendered(*words, "deploy.vllm_image=registry.example/launcher-vllm:1", "deploy.gpus=4")
    assert pod_of(files)["containers"][0]["image"] == "registry.example/launcher-vllm:1"


@pytest.mark.parametrize("traffic", ["istio", "gateway"])
def test_weights_of_versions(rendered: Render, traffic: str) -> None:
    found = manifests_of(rendered(f"deploy.traffic={traffic}", *ROUTES)[2])
    if traffic == "istio":
        routes = found["VirtualService"]["spec"]["http"][0]["route"]
        assert {each["destination"]["subset"]: each["weight"] for each in routes} == {"v1": 90, "v2": 10}
        subsets = found["DestinationRule"]["spec"]["subsets"]
        labels = found["Deployment"]["spec"]["template"]["metadata"]["labels"]
        assert subsets[1]["labels"].items() <= labels.items()
    else:
        backends = found["HTTPRoute"]["spec"]["rules"][0]["backendRefs"]
        assert [each["weight"] for each in backends] == [90, 10]
        assert backends[1]["name"] == found["Deployment"]["metadata"]["name"]


def test_others_reach_the_port_of_the_server_alone(rendered: Render) -> None:
    for words, proxy in (((), False), (FULL, True)):
        run, _, files = rendered(*words, "job.port=8123")
        found = manifests_of(files)
        policy, workload = found["NetworkPolicy"]["spec"], found["Deployment"]
        assert (
            policy["podSelector"]["matchLabels"].items() <= workload["spec"]["template"]["metadata"]["labels"].items()
        )
        (allowed,) = policy["ingress"]
        ports = {each["port"] for each in allowed["ports"]}
        assert run.job.port in ports
        assert len(ports) == (5 if proxy else 1)
        assert 29500 not in ports
        assert "from" not in allowed


@pytest.mark.parametrize(
    ("image", "policy"),
    [
        ("registry.example:5000/team/launcher:1.2_3", "IfNotPresent"),
        ("launcher@sha256:" + "0" * 64, "IfNotPresent"),
        ("registry.example:5000/launcher", "Always"),
        ("LOCALHOST/launcher:latest", "Always"),
    ],
)
def test_an_image_whose_tag_moves_is_pulled_each_time(rendered: Render, image: str, policy: str) -> None:
    (container,) = pod_of(rendered(f"deploy.image={image}")[2])["containers"]
    assert (container["image"], container["imagePullPolicy"]) == (image, policy)


HOSTS = ("deploy.gateway=a/b", "deploy.hostnames=[m.example.org]")
REFUSED = {
    "weights": (
        ("deploy.traffic=istio", *HOSTS, "deploy.baseline=v0", "deploy.weights={v0: 90, v1: 20}"),
        "90 + 20 = 110",
    ),
    "no baseline": (("deploy.traffic=istio", *HOSTS, "deploy.weights={v0: 90, v1: 10}"), "a canary needs a baseline"),
    "own baseline": (("deploy.traffic=istio", *HOSTS, "deploy.baseline=v1"), "deploy.baseline=v1"),
    "own baseline of another number": (
        ("deploy.traffic=istio", *HOSTS, "deploy.version=v2", "deploy.baseline=v2"),
        "set deploy.version=v3, or another baseline",
    ),
    "a weight below 0": (
        ("deploy.traffic=istio", *HOSTS, "deploy.baseline=v0", "deploy.weights={v0: -10, v1: 110}"),
        "deploy.weights={v0: -10, v1: 110}: has a share below 0",
    ),
    "a gateway of no name": (("deploy.traffic=istio", HOSTS[1], "deploy.gateway=a/..b"), "deploy.gateway=a/..b"),
    "an empty context": (("deploy.context=",), "deploy.context='': is empty"),
    "an empty interpreter": (("deploy.python=",), "deploy.python='': is one program"),
    "the root": (("deploy.volumes={a: /}",), "deploy.volumes.a=/: is the root of the image"),
    "a colon": (("deploy.volumes={a: '/a:b'}",), "deploy.volumes.a=/a:b: holds a colon"),
    "no key of pods": (
        ("deploy.pods_per_engine=1", "deploy.keys_from=x/y"),
        "deploy.keys_from=x/y: is not a valid name",
    ),
    "a login of a store": (
        ("deploy.model_from=object_store", "deploy.model_source=s3://user:pw@b/x"),
        "deploy.model_source: is not the URL of a folder without a login",
    ),
    "a token of prometheus": (
        ("deploy.autoscaling=keda", "deploy.prometheus=http://p:9090/?x=abc"),
        "deploy.prometheus: is not the address of Prometheus alone: no ? or # may follow it",
    ),
    "a secret in any option": (
        (*KEDA, "deploy.queue_query='a{b=\"https://u:hunter2@c\"}'"),
        "deploy.queue_query: holds a secret",
    ),
    "a label of any name": (
        ("deploy.node_selector={nvidia.com/gpu.present: true, 'x y': 1e3}",),
        "deploy.node_selector=x y: is not a valid key of a label",
    ),
    "no gateway": (("deploy.traffic=gateway",), "deploy.gateway: "),
    "weights without routes": (("deploy.weights={v1: 100}",), "nothing routes requests"),
    "zero with hpa": (("deploy.autoscaling=hpa", "deploy.min_replicas=0"), "deploy.min_replicas=0"),
    "zero without a queue": ((*KEDA, "deploy.min_replicas=0"), "set deploy.queue_query="),
    "keda alone": (("deploy.autoscaling=keda",), "deploy.prometheus: "),
    "a login of prometheus": (("deploy.autoscaling=keda", "deploy.prometheus=http://a:b@p"), "deploy.prometheus"),
    "no autoscaler": (("deploy.max_replicas=3",), "deploy.max_replicas=3"),
    "least above most": (("deploy.autoscaling=hpa", "deploy.min_replicas=9"), "deploy.min_replicas=9"),
    "root": (("deploy.run_as_user=0",), "deploy.run_as_user=0"),
    "a name": (("deploy.secret=My_Secret",), "deploy.secret=My_Secret"),
    "a version": (("deploy.version=V_2",), "deploy.version=V_2"),
    "a claim without name": (("deploy.model_from=claim",), "deploy.model_source: "),
    "a source of nothing": (("deploy.model_source=x",), "deploy.model_source=x"),
    "no URL": (("deploy.model_from=object_store", "deploy.model_source=bucket"), "deploy.model_source=bucket"),
    "a path upwards": ((*CASES["claim"][:2], "deploy.model_subpath=../x"), "deploy.model_subpath=../x"),
    "a taken folder": (("deploy.volumes={a: /runs}",), "deploy.volumes.a=/runs"),
    "a toleration": (("deploy.tolerations=[{efect: NoSchedule}]",), "deploy.tolerations=efect"),
    "keys in a file": (("job.api_keys_file=/etc/hostname",), "name in deploy.keys_from a Secret"),
    "adapters here": (("job.adapters={a: /here/a}",), "job.adapters.a=/here/a: is a path of this machine"),
    "an image": (("deploy.image=registry.example/Team/x:1",), "deploy.image=registry.example/Team/x:1"),
    "a topology": (("deploy.spread=['a b']",), "deploy.spread=a b"),
    "a label": (("deploy.node_selector={gpu: 'a b'}",), "deploy.node_selector.gpu=a b"),
    "an empty query": ((*KEDA, "deploy.min_replicas=0", "deploy.queue_query=''"), "deploy.queue_query=: is empty"),
    "more than the memory": (("deploy.memory=8Gi", "deploy.shared_memory=8Gi"), "set deploy.memory=16Gi"),
    "an interpreter with options": (("deploy.python='python3 -u'",), "deploy.python=python3 -u"),
    "few GPUs": (
        ("model=llama_tiny", "job.tokenizer=bytes", "parallel=tensor", "parallel.tensor=2", "deploy.gpus=1"),
        "deploy.gpus=1: a container of the engine has 2 ranks",
    ),
    "idle GPUs": (
        ("model=llama_tiny", "job.tokenizer=bytes", "parallel=tensor", "parallel.tensor=2", "deploy.gpus=4"),
        "deploy.gpus=4: a container has 2 ranks, each on one GPU, so 2 GPUs would be idle; set deploy.gpus=2",
    ),
    "idle GPUs of pods": (
        (
            *("model=llama_tiny", "job.tokenizer=bytes", "parallel=tensor", "parallel.tensor=2", "deploy.gpus=2"),
            *("deploy.pods_per_engine=2", "deploy.pods_secret=s"),
        ),
        "deploy.gpus=2: a container has 1 rank, each on one GPU, so 1 GPU would be idle; set deploy.gpus=1",
    ),
    "idle GPUs of replicas": (("job.replicas=2", "deploy.gpus=2"), "so 1 GPU would be idle"),
    "a GPU of echo": (("job.engine=echo", "deploy.gpus=1"), "deploy.gpus=1: job.engine=echo computes on no GPU"),
    "a size": (("deploy.cache_size=big",), "deploy.cache_size=big"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_cluster_could_run_is_refused_by_its_option(rendered: Render, case: str) -> None:
    words, message = REFUSED[case]
    with pytest.raises(ConfigErrors) as caught:
        rendered(*words)
    assert message in str(caught.value).replace(" (command line)", "")


def test_weights_of_this_machine_are_refused_unless_they_are_mounted(rendered: Render, tmp_path: Path) -> None:
    with pytest.raises(ConfigErrors, match=r"model\.weights=.*no pod sees; set deploy\.model_from=claim"):
        rendered(f"model.weights={tmp_path}")
    _, _, files = rendered(f"model.weights={tmp_path}", *CASES["claim"])
    assert str(tmp_path) not in manifests_of(files)["ConfigMap"]["data"]["run.yaml"]


def test_each_pod_is_scraped_once_with_its_version(rendered: Render) -> None:
    """A Service of one version has the same pods as that of all."""
    run, _, files = rendered(*CASES["monitored"])
    manifests = [yaml.safe_load(text) for path, text in files.items() if path.startswith("manifests/")]
    (monitor,) = (each for each in manifests if each["kind"] == "ServiceMonitor")
    services = [each["metadata"] for each in manifests if each["kind"] == "Service"]
    selector = monitor["spec"]["selector"]
    (absent,) = selector["matchExpressions"]
    matching = [
        each["name"]
        for each in services
        if selector["matchLabels"].items() <= each["labels"].items() and absent["key"] not in each["labels"]
    ]
    assert len(services) == 2
    assert matching == [run.deploy.object_name(run)], "its name is the label job, which alerts name"
    assert monitor["spec"]["podTargetLabels"] == ["app.kubernetes.io/version"]
