"""Whole runs: submitted with kubectl, played by real processes, supervised across pods."""

import contextlib
import json
import signal

import psutil
import pytest
import yaml

from launcher.protocol.rundir import RunDir
from launcher.protocol.session_file import read_session_file
from tests.backends.contract import SMALL, ForkedBackendContract
from tests.conftest import start_interpreter
from tests.helpers import wait_for
from tests.torchless import wait_for_answers


def run_dir_in_claim(cluster):
    (found,) = (cluster.folder / "claim-runs").glob("*/*/")
    return RunDir(found)


def rank_in(pod, rank):
    """Return the process that computes for ``rank`` in a pod: the child of its guard, which looks the same."""
    found = []
    for process in psutil.Process(pod.process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()
            if "launcher.jobs.rank" in words and "--module" not in words and process.environ()["RANK"] == str(rank):
                found.append(process)
    return next(process for process in found if process.parent() in found)


class TestContract(ForkedBackendContract):
    takes_part = ("completions: 2\n", "parallelism: 2\n")  # names are indices
    # A pod that is replaced just before the run fails may be deleted while its first process cannot handle SIGTERM yet:
    # then Kubernetes ends it after terminationGracePeriodSeconds, here 60 s and 15 of slack.
    gone_within_s = 80

    @pytest.fixture
    def words(self):
        return ("backend=kubernetes", "backend.image=launcher:test", "backend.nodes=2", "backend.cpus=1")

    @pytest.fixture
    def run(self, cluster, kubectl, small_run, launch):
        cluster.start_process = start_interpreter
        return self.starting(launch, cluster, kubectl, small_run)

    @pytest.fixture
    def failing_run(self, cluster, kubectl, small_run, launch_forked):
        return self.starting(launch_forked, cluster, kubectl, small_run)

    def starting(self, launch, cluster, kubectl, small_run):
        def start(*more):
            ended = launch(*small_run(*SMALL, *more), env=kubectl)
            return ended.returncode, ended.output, run_dir_in_claim(cluster)

        return start

    @pytest.fixture
    def left(self, cluster):
        return lambda: [pod.name for pod in cluster.the_run().pods if pod.process.poll() is None]

    def check_syntax(self, submission):
        assert [manifest["kind"] for manifest in yaml.safe_load_all(submission)] == ["ConfigMap", "Service", "Job"]


@pytest.mark.parametrize("workload", ["indexed_job", "pytorchjob", "trainjob"])
def test_a_run_completes_and_its_secrets_stay_secret(launch_forked, cluster, kubectl, echo_run, workload):
    ended = launch_forked(
        *echo_run(f"backend.workload={workload}"), env={**kubectl, "HF_TOKEN": "hf_very_secret"}
    ).expect(0)
    run = cluster.the_run()
    assert [pod.code for pod in run.pods] == [0, 0]
    assert "node0:0 | " in ended.stdout
    there, here = run_dir_in_claim(cluster), RunDir(ended.run_dir)
    assert there.log_of("node1", 1).exists()
    result = json.loads(there.result.read_text())
    assert (result["status"], result["metrics"]["generate/errors"]) == ("completed", 0)
    assert result["run_id"] == here.path.name
    name = run.manifest["metadata"]["name"]
    assert read_session_file(here).job["name"] == name
    secret = cluster.objects["Secret", name]
    assert secret["metadata"]["ownerReferences"][0]["uid"] == run.manifest["metadata"]["uid"]
    files = [path for folder in (here.path, there.path) for path in folder.rglob("*") if path.is_file()]
    texts = [json.dumps(cluster.calls), ended.output, *(pod.log.read_text() for pod in run.pods)]
    texts += [path.read_text(errors="replace") for path in files]
    secrets = [cluster.values("Secret", name)[key] for key in ("key", "HF_TOKEN")]
    assert not any(value in text for value in secrets for text in texts)


def test_an_image_without_a_plugin_of_the_run_ends_it_at_once(launch_forked, cluster, kubectl, small_run, tmp_path):
    plugin = 'Plugin(name="mine", executors={"loss": {"focal": "mine:focal"}})'
    (tmp_path / "mine.py").write_text(f"from launcher.plugins import Plugin\nplugin = {plugin}\nfocal = None\n")
    words = ("plugins=[mine]", "job.loss=focal", "backend.restarts=2")
    ended = launch_forked(*small_run(*words), env=kubectl).expect(69)
    refused = "the plugin mine, which this run uses, cannot be loaded: there is no module mine"
    either_pod = [f"exit code 69: {hostname}: {refused}" for hostname in cluster.the_run().hostnames]
    assert any(text in ended.output.splitlines()[-1] for text in either_pod), "both fail, in either order"
    assert "build the image launcher:test (backend.image) with its package" in ended.output
    assert len(cluster.the_run().pods) == 2, "no pod was started again"


GRACE = "backend.preempt_grace_s=10"


def wait_for_ranks(cluster):
    wait_for(lambda: list(cluster.folder.glob("claim-runs/*/*/")))
    wait_for_answers(run_dir_in_claim(cluster).path)


def test_a_killed_rank_ends_the_run_with_its_cause(launch_with, cluster, torchless_run):
    running = launch_with(*torchless_run(GRACE))
    wait_for_ranks(cluster)
    pod = cluster.the_run().newest(1)
    rank_in(pod, 1).kill()
    assert running.wait(timeout=60) == 128 + signal.SIGKILL
    assert "rank 1 on node1 was ended by signal 9 (SIGKILL)" in running.output
    wait_for(lambda: all(pod.code is not None for pod in cluster.the_run().pods))
    codes = [pod.code for pod in cluster.the_run().pods if pod.code != 143]
    assert codes[:2] == [137, 75]
    assert cluster.the_run().condition == "Failed"


def test_a_killed_pod_ends_the_others(launch_with, cluster, torchless_run):
    running = launch_with(*torchless_run(GRACE))
    wait_for_ranks(cluster)
    first, second = cluster.the_run().pods
    second.send(signal.SIGKILL)
    assert running.wait(timeout=60) == 128 + signal.SIGKILL
    assert f"the pod {second.name} ended with exit code 137" in running.output
    assert wait_for(lambda: first.code) == 75, "it was not the first pod that failed"


def evict(cluster):
    cluster.evict(1)


def kill(cluster):
    cluster.the_run().newest(1).send(signal.SIGKILL)


@pytest.mark.parametrize(("disturb", "restarts", "code"), [(evict, 0, 75), (kill, 1, 137)])
def test_new_pods_continue_what_others_saved(launch_with, cluster, small_run, disturb, restarts, code):
    words = ("job.steps=200", "checkpoint.every=10", f"backend.restarts={restarts}", GRACE)
    running = launch_with(*small_run(*words))
    wait_for(lambda: list(cluster.folder.glob("claim-runs/*/*/checkpoints/*/manifest.json")))
    disturb(cluster)
    assert running.wait(timeout=250) == 0, running.output
    assert sorted(pod.code for pod in cluster.the_run().pods) == [0, 0, 75, code]
    there = run_dir_in_claim(cluster)
    metrics = [json.loads(line) for line in there.metrics.read_text().splitlines()]
    steps = [line["train/step"] for line in metrics if "train/loss" in line]
    assert steps[-1] == 200
    assert len(steps) < 300, "the second pods went on from a checkpoint"
    assert json.loads(there.result.read_text())["run_id"] == there.path.name


def test_ctrl_c_takes_the_run_out_of_the_cluster(launch_with, cluster, torchless_run):
    running = launch_with(*torchless_run(GRACE))
    running.wait_for_output("submitted")
    wait_for(lambda: cluster.runs and cluster.the_run().pods)
    running.send_signal(signal.SIGINT)
    assert running.wait(timeout=60) == 130
    assert not cluster.objects
    wait_for(lambda: all(pod.process.poll() is not None for pod in cluster.the_run().pods))


def test_without_wait_it_says_what_to_type(launch_forked, cluster, kubectl, torchless_run):
    ended = launch_forked(*torchless_run(GRACE, "backend.wait=false"), env=kubectl).expect(0)
    name = cluster.the_run().manifest["metadata"]["name"]
    assert f"kubectl --namespace=default delete jobs.batch {name}" in ended.stdout
    assert f"--selector=app.kubernetes.io/instance={name},batch.kubernetes.io/job-completion-index=0" in ended.stdout
    assert not RunDir(ended.run_dir).result.exists()


def test_a_refusal_of_the_cluster_leaves_nothing_there(launch_forked, cluster, kubectl, small_run):
    cluster.missing_kinds.add("JobSet")
    ended = launch_forked(*small_run("backend.workload=jobset"), env=kubectl).expect(2)
    assert "set backend.workload=indexed_job" in ended.output
    assert not cluster.objects


def test_without_kubectl_it_says_where_to_get_it(launch_forked, small_run, tmp_path):
    (tmp_path / "empty").mkdir()
    ended = launch_forked(*small_run(), env={"PATH": str(tmp_path / "empty")}).expect(2)
    assert "https://kubernetes.io/docs/tasks/tools/" in ended.output


def test_what_is_in_the_cluster_is_known_to_other_shells(launch_forked, cluster, kubectl, torchless_run):
    ended = launch_forked(*torchless_run(GRACE, "backend.wait=false"), env=kubectl).expect(0)
    name = cluster.the_run().manifest["metadata"]["name"]
    status = launch_forked("status", str(ended.run_dir), env=kubectl).expect(0)
    assert f"kubectl --namespace=default get -- jobs.batch {name}" in status.stdout
    launch_forked("cancel", str(ended.run_dir), env=kubectl).expect(0)
    assert not cluster.objects


def test_other_shells_see_a_run_whose_files_are_in_the_cluster(launch_forked, cluster, kubectl, echo_run):
    ended = launch_forked(*echo_run("backend.wait=false", "backend.queue=team-a"), env=kubectl).expect(0)
    run_dir = str(ended.run_dir)
    assert not cluster.the_run().pods

    def shell(*words, code=0):
        return launch_forked(*words, env=kubectl).expect(code)

    name = cluster.the_run().manifest["metadata"]["name"]
    assert "\ncluster    suspended" in shell("status", run_dir).stdout
    assert f"{name} has no pods in the namespace default: its queue has not" in shell("logs", run_dir, code=2).output
    cluster.admit()
    followed = shell("logs", "-f", "--rank", "0", run_dir)
    assert "the run is completed" in followed.stderr
    lines = followed.stdout.splitlines()
    assert len(lines) > 2
    assert [line for line in lines if not line.startswith("node0:0 | ")] == []
    (last,) = shell("logs", "--rank", "0", "-n", "1", run_dir).stdout.splitlines()
    assert last == lines[-1]
    assert shell("logs", "--rank", "1", run_dir).stdout == ""
    said = json.loads(shell("status", "--json", run_dir).stdout)["cluster"]
    assert (said["status"], [pod["phase"] for pod in said["pods"]]) == ("completed", ["Succeeded", "Succeeded"])
    assert [f"{each['host']}:{each['rank']} | {each['line']}" for each in said["ranks"]] == [last]


def test_a_new_pod_continues_from_the_object_store(launch_with, cluster, small_run, tmp_path):
    words = ("backend.nodes=1", "backend.claim=null", f"backend.store=file://{tmp_path}/store", GRACE)
    running = launch_with(*small_run(*words, "job.steps=200", "checkpoint.every=10"))
    there = tmp_path / "store"
    wait_for(lambda: list(cluster.folder.glob("*-runs/*/*/checkpoints/*/manifest.json")))
    cluster.evict(0)  # what is not copied yet, it copies before it ends
    assert running.wait(timeout=250) == 0, running.output
    assert [pod.code for pod in cluster.the_run().pods] == [75, 0]
    assert "files of the run are restored from" in running.output
    (found,) = there.glob("*/*/")
    metrics = [json.loads(line) for line in RunDir(found).metrics.read_text().splitlines()]
    steps = [line["train/step"] for line in metrics if "train/loss" in line]
    assert (steps[0], steps[-1]) == (1, 200)
    assert len(steps) < 300, "the second pod went on from a checkpoint"
    assert json.loads(RunDir(found).result.read_text())["status"] == "completed"
    assert list(RunDir(found).checkpoints.glob("step_00000200/manifest.json"))
