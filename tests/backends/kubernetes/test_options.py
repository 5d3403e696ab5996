"""Options: what is refused before anything reaches a cluster."""

import pytest

from launcher.backends.kubernetes.submit import KubernetesExecutor
from launcher.config.backend.kubernetes import KubernetesBackend
from launcher.errors import ConfigErrors, EnvironmentProblem
from launcher.protocol.plan import Host


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("image", "", "is not a valid image"),
        ("image", "a b", "is not a valid image"),
        ("nodes", 0, "at least 1"),
        ("gpus_per_node", -1, "at least 0"),
        ("cpus", 0, "at least 1"),
        ("memory", "64GB", "64Gi"),
        ("shared_memory", "lots", "64Gi"),
        ("namespace", "My_Team", "lowercase letters"),
        ("namespace", "a.b", "namespace"),
        ("claim", "runs_1", "lowercase letters"),
        ("secret", "-a", "lowercase letters"),
        ("service_account", "A", "lowercase letters"),
        ("image_pull_secrets", ("ok", "N o"), "lowercase letters"),
        ("volumes", {"data": "data"}, "absolute"),
        ("volumes", {"data": "/data", "more": "/data/"}, r"more=/data/: is the folder of backend\.volumes\.data"),
        ("volumes", {"data": "/x/../runs"}, r"is the folder of backend\.mount"),
        ("volumes", {"data": "/dev/shm"}, "is the folder of the launcher itself"),
        ("mount", "/run/launcher/", "is the folder of the launcher itself"),
        ("mount", "/x/..", "is the root of the image, which a volume would hide; name a folder below it"),
        ("mount", "runs", "absolute"),
        ("mount", "/", "is the root of the image"),
        ("volumes", {"data": "/a:b"}, "holds a colon"),
        ("context", "", "='': is empty; set backend.context=NAME"),
        ("python", "", "='': is one program of the image, without options"),
        ("python", "python3 -u", "is one program of the image"),
        ("node_selector", {"a b": "c"}, "=a b: is not a valid key of a label"),
        ("node_selector", {"a": "b c"}, r"\.a=b c: is not a valid value of a label"),
        ("tolerations", ({"key": "a b"},), "=a b: is not a valid key of a taint"),
        ("tolerations", ({"key": "a", "value": True},), "=true: is no text, .*; write it in quotes: value: 'true'"),
        ("tolerations", ({"key": "a", "value": "b c"},), "=b c: is not a valid value of a taint"),
        ("tolerations", ({"key": "a", "tolerationSeconds": 1.5},), "=1.5: is no whole number of seconds"),
        ("tolerations", ({"keys": "x"},), "key"),
        (
            "tolerations",
            ({"key": "x", "operator": "Exist"},),
            "=Exist: is not a valid operator of a toleration; did you mean Exists",
        ),
        ("tolerations", ({"key": "x", "effect": "Evict"},), "=Evict: is not a valid effect of a toleration; "),
        ("store", "bucket", "is not the URL of a folder; write it like s3://bucket/runs"),
        ("store", "s3://me@bucket/runs", ": is not the URL of a folder without a login"),
        ("store", "https://store/runs?token=x", ": is not the URL of a folder alone"),
        ("store_grace_s", -1, "at least 0"),
        ("run_as_user", 0, "is root, which most namespaces refuse; set backend.run_as_user=1000"),
        ("run_as_user", -1, "must be at least 0"),
        ("run_as_group", -1, "at least 0"),
        ("queue", "Team_A", "is not a valid name of a queue"),
        ("queue", "a.b", "is not a valid name of a queue"),
        ("priority_class", "High", "lowercase letters"),
        ("resources", {"cpu": 2}, "=cpu: is set by backend.cpus; set backend.cpus instead"),
        ("resources", {"nvidia.com/gpu": 2}, "is set by backend.gpus_per_node"),
        ("resources", {"fpga": 2}, "is not a resource of a device plugin"),
        ("resources", {"kubernetes.io/x": 2}, "is not a resource of a device plugin"),
        ("resources", {"example.com/fpga": 0}, r"\.example\.com/fpga=0: must be at least 1"),
        ("rdma", {"rdma/": 1}, "=rdma/: is not a resource of a device plugin; write it like rdma/hca"),
        ("rdma", {"memory": 1}, "is set by backend.memory"),
        ("labels", {"team": "a b"}, r"\.team=a b: is not a valid value of a label"),
        ("labels", {"-team": "a"}, "=-team: is not a valid key of a label"),
        ("labels", {"a/b/c": "a"}, "is not a valid key of a label"),
        ("labels", {"x" * 64: "a"}, "is not a valid key of a label"),
        ("labels", {"app.kubernetes.io/instance": "a"}, "is not free: the launcher finds the run by it"),
        ("labels", {"kueue.x-k8s.io/queue-name": "a"}, "is not free: backend.queue sets it"),
        ("annotations", {"a b": "any text"}, "=a b: is not a valid key of an annotation"),
        ("volumes", {"data": "/tmp"}, "is the folder of the launcher itself"),
        ("ttl_s", -1, "at least 0"),
        ("gather_timeout_s", 0, "above 0"),
        ("gather_timeout_s", -1, "above 0"),
    ],
)
def test_refused(option, value, said):
    with pytest.raises(ConfigErrors, match=f"backend.{option}.*{said}"):
        KubernetesBackend(**{"image": "launcher", option: value})


def test_memory_holds_shared_memory():
    said = r"backend\.shared_memory=20Gi: is more than backend\.memory=16Gi.*; set backend\.memory=20Gi or more"
    with pytest.raises(ConfigErrors, match=said):
        KubernetesBackend(image="launcher", memory="16Gi", shared_memory="20Gi")


def test_a_device_is_named_once_and_root_is_for_rdma():
    with pytest.raises(ConfigErrors, match=r"backend\.resources=a/b: is in backend\.rdma too"):
        KubernetesBackend(image="launcher", resources={"a/b": 1}, rdma={"a/b": 1})
    KubernetesBackend(image="launcher", rdma={"a/b": 1}, run_as_user=0)
    KubernetesBackend(
        image="launcher", labels={"team": "", "example.com/Cost_Center": "a.B-9"}, annotations={"a/b": ""}
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"workload": "pytorchjob", "restarts": 1, "claim": "c"}, "backend.restarts=1: a PyTorchJob"),
        ({"workload": "trainjob", "ttl_s": 60}, "backend.ttl_s=60: a TrainJob"),
        ({"restarts": 2}, "backend.restarts=2: without backend.claim"),
        (
            {"store": "s3://a/b", "nodes": 2},
            "backend.store=s3://a/b: without backend.claim each pod has files of its own",
        ),
    ],
)
def test_what_a_workload_cannot_do(options, said):
    backend = KubernetesBackend(image="launcher", **options)
    assert next(str(error) for error in backend.validate_hosts(())).startswith(said)
    assert not list(KubernetesBackend(image="launcher", claim="c", restarts=2).validate_hosts(()))
    assert not list(KubernetesBackend(image="launcher", store="s3://a/b", restarts=2).validate_hosts(()))
    assert not list(KubernetesBackend(image="launcher", store="s3://a/b", claim="c", nodes=2).validate_hosts(()))


@pytest.mark.parametrize(
    ("options", "slots", "devices"),
    [({}, 2, 0), ({"cpus": 1}, 1, 0), ({"gpus_per_node": 8}, 8, 8), ({"gpus_per_node": 8, "ranks": 2}, 2, 8)],
)
def test_hosts_are_the_pods_asked_for(options, slots, devices):
    hosts = KubernetesBackend(image="launcher", nodes=3, memory="2Gi", **options).hosts(max_ranks=None)
    assert [host.name for host in hosts] == ["node0", "node1", "node2"]
    assert {(host.slots, len(host.devices), host.memory_bytes) for host in hosts} == {(slots, devices, 2**31)}


def test_no_user_logs_in_to_a_pod():
    with pytest.raises(EnvironmentProblem, match="only during its run"):
        KubernetesExecutor(KubernetesBackend(image="launcher")).remote_command(
            Host(name="node0", slots=1), "launcher.doctor.probe"
        )


def test_paths_of_this_machine_stay_unless_they_are_asked_for():
    environ = {"HF_HOME": "/home/me", "HF_TOKEN": "t", "NCCL_TOPO_FILE": "/x", "MINE": "1", "LAUNCHER_X": "2"}
    backend = KubernetesBackend(image="launcher", forward=("MINE", "NCCL_TOPO_*", "LAUNCHER_*"))
    assert backend.forwards(environ) == ("HF_TOKEN", "MINE", "NCCL_TOPO_FILE")
    assert KubernetesBackend(image="launcher").forwards(environ) == ("HF_TOKEN",)
