from dataclasses import replace

import pytest

from launcher.config.backend import base
from launcher.config.compose import compose
from launcher.planning.commands import HostPosition, rank_environment
from launcher.protocol.plan import Host, RunIdentity

IDENTITY = RunIdentity(run_id="20260101-120000-abcd", run_dir="/runs/x", run_hash="ab" * 32, port=29500)
GPUS = Host(name="big", slots=2, cores=64, devices=("a", "b", "c", "d"), device_ids=("4", "5", "6", "7"))


def added(*words, host=GPUS, number=0):
    place = HostPosition(host=host, number=number, num_hosts=3)
    return rank_environment(compose(words).run, place, IDENTITY, ops_folder="/ops")


def test_what_identifies_the_run_and_the_host():
    result = added(number=2)
    assert result["LAUNCHER_HOST"] == "big"
    assert result["LAUNCHER_RUN_ID"] == IDENTITY.run_id
    assert result["LAUNCHER_RUN_HASH"] == IDENTITY.run_hash
    assert (result["LOCAL_SIZE"], result["CROSS_RANK"], result["CROSS_SIZE"]) == ("2", "2", "3")


@pytest.mark.parametrize(("cores", "slots", "threads"), [(64, 2, "32"), (3, 2, "1"), (1, 4, "1")])
def test_cores_are_shared_among_ranks(cores, slots, threads):
    assert added(host=Host(name="x", slots=slots, cores=cores))["OMP_NUM_THREADS"] == threads
    assert added("backend.threads=7", host=Host(name="x", slots=slots, cores=cores))["OMP_NUM_THREADS"] == "7"


def test_only_a_part_of_the_gpus_is_named():
    assert added()["CUDA_VISIBLE_DEVICES"] == "4,5"
    assert "CUDA_VISIBLE_DEVICES" not in added(host=replace(GPUS, slots=4))
    assert "CUDA_VISIBLE_DEVICES" not in added(host=Host(name="x", slots=2))


@pytest.mark.parametrize(
    ("word", "accelerator"), [("parallel=ddp", None), ("parallel=zero1", "cuda"), ("backend.agent=deepspeed", "cuda")]
)
def test_deepspeed_gets_its_device_and_folder_only_where_it_is_used(word, accelerator):
    result = added(word)
    assert result.get("DS_ACCELERATOR") == accelerator
    assert ("TORCH_EXTENSIONS_DIR" in result) == (accelerator is not None)
    if accelerator:
        assert added(word, host=Host(name="x", slots=2))["DS_ACCELERATOR"] == "cpu"


def test_what_the_user_adds_wins():
    assert added("backend.env={OMP_NUM_THREADS: 3, NCCL_DEBUG: INFO}")["OMP_NUM_THREADS"] == "3"


@pytest.mark.parametrize(
    "name",
    [
        "WANDB_API_KEY",
        "HF_TOKEN",
        "AWS_SECRET_ACCESS_KEY",
        "DBPASSWORD",
        "client_secret",
        "HTTP_AUTH",
        "MY_CREDENTIALS",
    ],
)
def test_secrets_are_refused_without_being_repeated(name):
    (error,) = base.validate_env({name: "hunter2"})
    assert error.option == f"backend.env.{name}"
    assert f"export the variable {name}" in error.fix
    assert "hunter2" not in str(error)


@pytest.mark.parametrize("name", ["RANK", "MASTER_PORT", "LAUNCHER_HOST", "CUDA_VISIBLE_DEVICES"])
def test_what_the_launcher_sets_is_refused(name):
    (error,) = base.validate_env({name: "1"})
    assert error.why == "is set by the launcher"


@pytest.mark.parametrize("name", ["TOKENIZERS_PARALLELISM", "NCCL_DEBUG", "MONKEY", "KEYBOARD", "HF_HOME"])
def test_harmless_names_pass(name):
    assert list(base.validate_env({name: "1"})) == []
