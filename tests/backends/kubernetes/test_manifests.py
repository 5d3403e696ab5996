"""Manifests: compared whole with files, and held against the schemas of the API."""

import copy
import math
import os
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from launcher.backends.kubernetes.manifests import submission_of
from launcher.backends.registry import executor_of
from launcher.config.compose import compose
from launcher.config.kubernetes_objects import parse_quantity
from launcher.config.snapshot import dump_run, load_run
from launcher.errors import ConfigErrors
from launcher.execution.prepare import replan
from launcher.execution.validate import validate_machine
from launcher.planning.render import render_plan
from launcher.utils.files import sha256_of
from tests.kubernetes_schemas import CRDS, needs_crds, problems, unrestricted

GOLDEN = Path(__file__).parent / "golden"
UPDATE = bool(os.environ.get("UPDATE_GOLDEN"))
WORKLOADS = ("indexed_job", "jobset", "pytorchjob", "trainjob")
FULL = (
    *(
        "+exp=zero3_gpt2xl",
        "job.global_batch=64",
        "tracker=local",
        "backend=kubernetes",
        "backend.image=registry.example/launcher:1",
    ),
    *("backend.nodes=4", "backend.gpus_per_node=8", "backend.cpus=64", "backend.memory=512Gi"),
    *("backend.claim=runs", "backend.volumes={datasets: /data}", "backend.namespace=ml", "backend.secret=tokens"),
    *("backend.service_account=trainer", "backend.node_selector={gpu: h100}", "backend.image_pull_secrets=[registry]"),
    "backend.tolerations=[{key: nvidia.com/gpu, operator: Exists, effect: NoSchedule}]",
    *("backend.queue=training", "backend.priority_class=high", "backend.resources={example.com/fpga: 1}"),
    *("backend.labels={team: nlp}", "backend.annotations={example.com/owner: 'Ada, Grace'}"),
    *("backend.run_as_user=2000", "backend.run_as_group=3000"),
)
RDMA = ("backend.rdma={rdma/hca_shared_devices_a: 1, vpc.amazonaws.com/efa: 4}", "backend.host_network=true")
SMALL = ("tracker=local", "backend=kubernetes", "backend.image=launcher", "job.global_batch=null")


def rendered(*words, monkeypatch=None, run_dir="/home/me/runs/x/20260101-120000-abcd", **environ):
    """Compose and plan as ``launch plan`` does, for a machine that is the same everywhere."""
    run = compose(words).run
    if monkeypatch is not None:
        for name in list(os.environ):
            if not name.startswith(("HOME", "PATH", "XDG_")):
                monkeypatch.delenv(name)
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
    hosts = run.backend.hosts(max_ranks=run.parallel.max_ranks)
    prepared = replan(run, hosts, run_id="20260101-120000-abcd", folder=Path(run_dir), port=29500)
    return prepared, executor_of(run).render(prepared.plan, snapshot=prepared.snapshot)


def documents(text):
    return [document for document in yaml.safe_load_all(text) if document is not None]


def pods_of(text):
    """Return every pod spec, wherever the workload keeps it: those of a PyTorchJob's master and workers are two."""

    def search(tree):
        if isinstance(tree, dict):
            if "containers" in tree:
                yield tree
            tree = list(tree.values())
        if isinstance(tree, list):
            for part in tree:
                yield from search(part)

    return list(search(documents(text)))


def pod_of(text):
    return pods_of(text)[0]


@pytest.mark.parametrize("workload", WORKLOADS)
def test_golden_and_valid(workload, monkeypatch):
    restarts = 0 if workload == "pytorchjob" else 3
    prepared, _ = rendered(
        *FULL,
        f"backend.workload={workload}",
        f"backend.restarts={restarts}",
        f"backend.ttl_s={'null' if workload == 'trainjob' else 86400}",
        monkeypatch=monkeypatch,
        HF_TOKEN="hf_very_secret",
        NCCL_DEBUG="INFO",
    )
    # a new option anywhere changes run.yaml and its hash: that is no change of the manifests
    plan = replace(prepared.plan, run_hash="ab" * 32)
    text = executor_of(prepared.run).render(plan, snapshot="job:\n  kind: train\n")
    file = GOLDEN / f"{workload}.yaml"
    if UPDATE:
        file.write_text(text, encoding="utf-8")
    assert text == file.read_text(encoding="utf-8")
    assert {str(document["kind"]): problems(document) for document in documents(text)} == {
        str(document["kind"]): [] for document in documents(text)
    }
    assert [problem for pod in pods_of(text) for problem in unrestricted(pod)] == []


@pytest.mark.parametrize("workload", WORKLOADS)
def test_the_smallest_is_valid_and_restricted_too(workload):
    _, text = rendered(*SMALL, f"backend.workload={workload}")
    assert [problem for document in documents(text) for problem in problems(document)] == []
    (pod,) = pods_of(text)
    assert list(unrestricted(pod)) == []
    assert pod["automountServiceAccountToken"] is False
    (container,) = pod["containers"]
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    writable = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
    assert writable == {"/tmp", "/dev/shm", "/runs"}
    variables = {each["name"]: each["value"] for each in container["env"] if "value" in each}
    assert all(variables[name].startswith("/tmp") for name in ("HOME", "HF_HOME", "TORCHINDUCTOR_CACHE_DIR"))


@pytest.mark.parametrize("workload", WORKLOADS)
def test_rdma_and_the_network_of_nodes_are_valid_and_said_to_be_privileged(workload):
    _, text = rendered(*SMALL, *RDMA, "backend.nodes=2", f"backend.workload={workload}")
    assert [problem for document in documents(text) for problem in problems(document)] == []
    for pod in pods_of(text):
        assert list(unrestricted(pod)) == ["hostNetwork is set", *unrestricted({**pod, "hostNetwork": False})]
        assert any("adds capabilities" in said for said in unrestricted(pod))
        assert pod["dnsPolicy"] == "ClusterFirstWithHostNet", "else pods do not find each other's names"
        (container,) = pod["containers"]
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["IPC_LOCK"]}
        devices = {"rdma/hca_shared_devices_a": "1", "vpc.amazonaws.com/efa": "4"}
        assert devices.items() <= container["resources"]["limits"].items()
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert [port["hostPort"] for port in container["ports"]] == [29500, 29501], "of one run, a node takes one pod"
    assert "# Outside PodSecurity's levels restricted and baseline: backend.rdma" in text
    assert "as user 1000, pods lock memory for RDMA where" in text
    root = rendered(*SMALL, *RDMA, "backend.run_as_user=0")[1]
    assert pod_of(root)["securityContext"]["runAsNonRoot"] is False
    assert "IPC_LOCK is for root alone" not in root


@pytest.mark.parametrize("workload", WORKLOADS)
def test_a_queue_admits_the_workload(workload):
    words = (*SMALL, f"backend.workload={workload}")
    *_, job = documents(rendered(*words, "backend.queue=team-a")[1])
    assert problems(job) == []
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team-a"
    assert (job["spec"]["runPolicy"] if workload == "pytorchjob" else job["spec"])["suspend"] is True
    text = rendered(*words)[1]
    assert "kueue" not in text
    assert "suspend:" not in text


def test_forwarded_folders_replace_those_of_the_pod(monkeypatch):
    words = (*SMALL, "backend.forward=[HF_HOME]")
    _, text = rendered(*words, monkeypatch=monkeypatch, HF_HOME="/hub")
    (found,) = [each for each in pod_of(text)["containers"][0]["env"] if each["name"] == "HF_HOME"]
    assert "value" not in found


def memory_of(*words):
    prepared, text = rendered(*SMALL, *words)
    limit = pod_of(text)["containers"][0]["resources"]["limits"]["memory"]
    assert parse_quantity(limit) == prepared.plan.hosts[0].host.memory_bytes, "the plan shows what pods get"
    return int(limit.removesuffix("Gi"))


def test_memory_follows_from_the_plan():
    one, two = memory_of("backend.ranks=1"), memory_of("backend.ranks=2", "parallel=ddp")
    assert (one, two) == (6, 9)  # (2 GiB a rank + 1 GiB) × 5/4 for activations + 2 GiB of shared memory
    assert memory_of("backend.ranks=1", "backend.shared_memory=10Gi") == one + 8
    large = ("model=gpt2_xl", "parallel=zero3", "backend.gpus_per_node=8")
    on_gpus = memory_of(*large, "checkpoint.every=0")
    assert on_gpus == 8 * 2 + 1 + 2, "state is on the GPUs"
    prepared, _ = rendered(*SMALL, *large, "parallel.offload_optimizer=cpu", "checkpoint.every=0")
    state = prepared.plan.memory.per_host_ram
    assert memory_of(*large, "parallel.offload_optimizer=cpu", "checkpoint.every=0") == math.ceil(state / 2**30 + 19)
    prepared, text = rendered(*SMALL[:-1], "job=benchmark", "benchmark=memory")
    assert prepared.plan.memory is None
    assert pod_of(text)["containers"][0]["resources"]["limits"]["memory"] == "16Gi"
    assert "16Gi of RAM, the amount of a run without an estimate; backend.memory sets another" in text


def test_memory_under_the_estimate_is_refused():
    words = (*SMALL, "model=gpt2_xl", "parallel=zero3", "backend.gpus_per_node=8", "parallel.offload_optimizer=cpu")
    with pytest.raises(ConfigErrors) as caught:
        rendered(*words, "backend.memory=24Gi")
    (error,) = caught.value.errors
    processes = r"2\.00 GiB for each of 8 ranks, and 1\.00 GiB for the launcher"
    message = rf"is 24\.00 GiB, and a pod needs (.*) GiB: .* of model state.*, {processes}; "
    found = re.match(
        rf"backend\.memory=24Gi.*: {message}set backend\.memory=(.*)Gi or more, or auto$", str(error), re.DOTALL
    )
    assert found, str(error)
    assert float(found[1]) > 24
    rendered(*words, f"backend.memory={found[2]}Gi")


@pytest.mark.parametrize("workload", WORKLOADS)
def test_the_validators_refuse(workload):
    if CRDS is None and workload != "indexed_job":
        pytest.skip(needs_crds.kwargs["reason"])
    *_, job = documents(rendered(*SMALL, f"backend.workload={workload}")[1])
    wrong = copy.deepcopy(job)
    wrong["spec"]["completion"] = 3
    assert problems(wrong)
    wrong = copy.deepcopy(job)
    wrong["spec"] = "none"
    assert problems(wrong)


@needs_crds
def test_the_rules_of_custom_resources_are_evaluated():
    _, runtime, _ = documents(rendered(*SMALL, "backend.workload=trainjob")[1])
    runtime["spec"]["mlPolicy"] |= {"torch": {}, "mpi": {}}
    assert any("mlPolicy" in problem for problem in problems(runtime))


def test_secrets_are_named_and_never_shown(monkeypatch):
    prepared, text = rendered(*SMALL, monkeypatch=monkeypatch, HF_TOKEN="hf_very_secret", WANDB_API_KEY="w" * 40)
    assert "hf_very_secret" not in text
    assert "w" * 40 not in text
    variables = pod_of(text)["containers"][0]["env"]
    sources = {each["name"]: each["valueFrom"]["secretKeyRef"] for each in variables if "valueFrom" in each}
    name = submission_of(prepared.run.backend, prepared.plan).job
    assert sources == {key: {"name": name, "key": key} for key in ("HF_TOKEN", "WANDB_API_KEY")}


def test_the_snapshot_arrives_as_it_was_planned(tmp_path):
    prepared, text = rendered(*SMALL, "run.name='größe a $(HOME)'", "backend.env={A: '$(B) ü'}")
    config = documents(text)[0]["data"]
    assert sha256_of(config["run.yaml"].encode()) == prepared.plan.run_hash
    (tmp_path / "run.yaml").write_text(config["run.yaml"], encoding="utf-8")
    assert dump_run(load_run(tmp_path / "run.yaml")) == prepared.snapshot


def test_a_run_directory_on_the_mount_is_kept_and_another_gets_a_place_there():
    prepared, _ = rendered(*SMALL, "backend.claim=c")
    backend = prepared.run.backend
    there = submission_of(backend, prepared.plan).config.identity.run_dir
    assert there == "/runs/x/20260101-120000-abcd"
    on_mount = replace(prepared.plan, run_dir="/runs/deep/er/y")
    assert submission_of(backend, on_mount).config.identity.run_dir == "/runs/deep/er/y"


@pytest.mark.parametrize("workload", WORKLOADS)
def test_size_and_time_do_not_grow_with_pods(workload):
    words = (*SMALL, "parallel=zero3", "backend.gpus_per_node=8", f"backend.workload={workload}")
    _, few = rendered(*words, "backend.nodes=16")
    composed = compose((*words, "backend.nodes=1024")).run
    started = time.monotonic()
    hosts = composed.backend.hosts(max_ranks=None)
    prepared = replan(composed, hosts, run_id="20260101-120000-abcd", folder=Path("/r/x/y"), port=29500)
    many = executor_of(composed).render(prepared.plan, snapshot=prepared.snapshot)
    assert prepared.plan.world_size == 8192
    assert time.monotonic() - started < 10  # 2 s where nothing else runs
    assert len(many) < len(few) + 100
    assert len(re.findall("\n", many)) == len(re.findall("\n", few))


def test_a_plan_shows_the_folders_of_the_pods_alone(monkeypatch):
    words = (*SMALL, "backend.claim=runs", "backend.nodes=2", "parallel=zero2", "tracker=wandb")
    prepared, submission = rendered(*words, monkeypatch=monkeypatch)
    text = render_plan(prepared.plan, submission=submission)
    assert "/home/me" not in text
    assert str(Path.home()) not in text
    assert "Files in /runs/x/20260101-120000-abcd" in text
    assert prepared.plan.run_dir == "/home/me/runs/x/20260101-120000-abcd"
    assert prepared.plan.hosts[0].agent_command.argv[-1] == "/runs/x/20260101-120000-abcd"


def test_files_of_pods_are_looked_for_in_the_first_pod(tmp_path):
    words = (*SMALL, "backend.claim=runs", f"backend.mount={tmp_path}/mnt", "data.path=/data/of-pods.txt")
    run = compose(words).run
    assert not list(validate_machine(run, tmp_path / "here" / "x", hosts=()))
    (found,) = validate_machine(run, tmp_path / "mnt" / "x" / "y", hosts=())
    assert str(found).startswith("data.path=/data/of-pods.txt: there is no such file")


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (("parallel=zero_infinity", "parallel.nvme_path=/nvme"), "parallel.nvme_path=/nvme"),
        (("data=text", "data.path=/data/a.txt", "data.cache=/cache"), "data.cache=/cache"),
    ],
)
def test_what_ranks_write_is_on_a_volume(words, option):
    words = (*SMALL, *words)
    with pytest.raises(ConfigErrors) as caught:
        rendered(*words)
    (error,) = caught.value.errors
    assert re.sub(r" \(.*?\)", "", str(error)).startswith(f"{option}: is outside of the folders that ranks may write")
    name, _, folder = option.partition("=")
    rendered(*words, f"backend.volumes={{scratch: {folder}}}")
    rendered(*words, f"{name}=/tmp{folder}")
