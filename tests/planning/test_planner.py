import json
import signal
from dataclasses import replace
from pathlib import Path

import image_model
import pytest

from launcher.config.compose import compose
from launcher.config.folders import groups
from launcher.config.run import NoBenchmark
from launcher.errors import ConfigErrors
from launcher.planning.planner import LocalFacts
from launcher.protocol.plan import Host, plan_from_json
from launcher.utils.schema import to_tree
from tests.conftest import composed_run

BOX = Host(name="box", slots=2, cores=4, memory_bytes=16 * 2**30)
GPUS = Host(
    name="big",
    slots=8,
    devices=("NVIDIA H100",) * 8,
    device_ids=tuple("01234567"),
    device_bytes=80 * 2**30,
    cores=64,
    memory_bytes=1024 * 2**30,
)
NUM_PARAMS = 1_557_611_200
"""Of GPT-2 XL."""


@pytest.mark.parametrize("host", [BOX, GPUS], ids=["cpu", "gpu"])
@pytest.mark.parametrize("exp", groups()["exp"])
def test_every_experiment_is_planned_and_survives_json(plan_of, exp, host):
    run = composed_run(f"+exp={exp}")
    most = min(host.slots, run.job.max_ranks(run) or host.slots)  # what the local backend makes of auto
    slots = most if run.backend.ranks == "auto" else run.backend.ranks
    plan = plan_of(f"+exp={exp}", hosts=[replace(host, slots=slots)])
    assert plan.world_size == slots
    if plan.work.batch is not None:
        assert plan.work.batch.global_batch % plan.work.batch.data_parallel == 0
    assert plan_from_json(json.loads(json.dumps(to_tree(plan)))) == plan


ONE_RANK = [
    *(["job=benchmark", f"benchmark={name}"] for name in groups()["benchmark"] if name != "none"),
    ["job=quantize", "quantization=int8_weight", "parallel=ddp"],
    ["job=serve", "parallel=ddp"],
    ["job=generate", "job.engine=vllm", "parallel=ddp"],
]


@pytest.mark.parametrize("words", ONE_RANK, ids=" ".join)
def test_ranks_auto_is_no_more_than_the_job_has_work_for(words, monkeypatch):
    """On a machine of two cores, the smallest on which ``auto`` would take two."""
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1})
    run = compose(words).run
    (host,) = run.backend.hosts(max_ranks=run.job.max_ranks(run))
    if isinstance(run.benchmark, NoBenchmark) or run.benchmark.max_ranks == 1:
        assert host.slots == 1
    assert not [error for error in run.job.validate_run(run, world_size=host.slots) if error.option == "backend.ranks"]


def test_batch_and_tokens_multiply_out(plan_of):
    words = ("model=gpt2", "job.micro_batch=2", "job.global_batch=64", "job.sequence_length=128", "job.steps=10")
    work = plan_of(*words, hosts=[replace(BOX, slots=4)]).work
    assert str(work.batch) == "micro 2 × accum 8 × dp 4 = 64"
    assert (work.tokens_per_step, work.total_tokens) == (8192, 81920)


def test_ranks_are_counted_host_by_host(plan_of):
    plan = plan_of(hosts=[replace(BOX, name="a", slots=3), replace(GPUS, name="b", slots=2)])
    places = [(place.rank, place.host, place.local_rank, place.device) for place in plan.ranks]
    on_a = [(rank, "a", rank, "cpu") for rank in range(3)]
    assert places == [*on_a, (3, "b", 0, "cuda:0"), (4, "b", 1, "cuda:1")]
    assert [host.first_rank for host in plan.hosts] == [0, 3]
    assert plan.topology == {"data": 5}


def test_everything_wrong_is_said_at_once(plan_of):
    words = (
        "parallel=single",
        "job.sequence_length=1000",
        "job.global_batch=17",
        "data.vocab_size=5000",
        "backend.env={MY_TOKEN: x, RANK: 3}",
        "backend.show_ranks=[0,9]",
        "tracker.mode=online",
    )
    with pytest.raises(ConfigErrors) as caught:
        plan_of(*words, hosts=[replace(GPUS, slots=9)])
    refused = {error.option for error in caught.value.errors}
    assert refused == {
        "parallel",
        "job.sequence_length",
        "job.global_batch",
        "data.vocab_size",
        "backend.ranks",
        "backend.env.MY_TOKEN",
        "backend.env.RANK",
        "backend.show_ranks",
        "tracker.mode",
    }


def test_a_rank_that_does_not_exist_cannot_be_shown(plan_of):
    with pytest.raises(ConfigErrors, match=r"backend\.show_ranks=\[2, 7\]: the run has ranks 0 to 1"):
        plan_of("backend.show_ranks=[1,2,7]")


def test_the_deepspeed_agent_is_refused_where_it_misnumbers_local_ranks(plan_of):
    uneven = [replace(BOX, name="a", slots=3), replace(BOX, name="b", slots=2)]
    with pytest.raises(ConfigErrors, match="it misnumbers the 2 ranks of b, whose first is 3"):
        plan_of("backend.agent=deepspeed", hosts=uneven)
    assert plan_of("backend.agent=torchrun", hosts=uneven).world_size == 5
    assert plan_of("backend.agent=deepspeed", hosts=[uneven[0], replace(uneven[0], name="b")]).world_size == 6


def test_without_gpus_model_state_lies_in_host_ram(plan_of):
    words = ("model=gpt2_xl", "data.vocab_size=4096")
    on_cpu, on_gpu = plan_of(*words).memory, plan_of(*words, hosts=[GPUS]).memory
    assert on_cpu.num_params == NUM_PARAMS
    assert on_cpu.per_rank.total == 16 * NUM_PARAMS
    assert on_cpu.per_host_ram == 2 * 16 * NUM_PARAMS
    assert on_gpu.per_host_ram == 0


def test_offload_is_counted_where_it_goes(plan_of):
    memory = plan_of("+exp=zero3_gpt2xl", hosts=[GPUS]).memory
    assert memory.per_rank.device == 0
    assert memory.per_host_ram == 8 * memory.per_rank.host > 0
    memory = plan_of("+exp=zero_infinity_gpt2xl", hosts=[replace(BOX, slots=1)]).memory
    assert memory.per_host_nvme == memory.per_rank.nvme > 12 * NUM_PARAMS


@pytest.mark.parametrize(
    ("words", "host", "warning"),
    [
        (("+exp=zero3_gpt2xl",), BOX, "GiB of RAM on box, which has 16.00 GiB"),
        (("+exp=zero3_gpt2xl", "parallel=zero0"), replace(GPUS, device_bytes=16 * 2**30), "of each GPU of big"),
        (("job.steps=100", "schedule.warmup_steps=100"), BOX, "never reaches optimizer.lr"),
        (("job.steps=100", "checkpoint.every=200", "checkpoint.at_end=false"), BOX, "no checkpoint will be written"),
        (("precision=fp16",), BOX, "precision=bf16 is faster here"),
        (("precision=fp16",), replace(BOX, computes_bf16=False), "precision=fp32 is faster here"),
        (("precision=bf16",), replace(BOX, computes_bf16=False), "no bfloat16 instructions"),
        ((), replace(BOX, slots=5), "5 ranks share 4 cores of box"),
        (("+exp=zero3_gpt2xl",), BOX, "pin_memory"),
        (("adapter=lora",), BOX, "adapter=lora trains beside random weights"),
        (("activation=offload",), BOX, "activation=offload moves nothing without a GPU"),
    ],
)
def test_warnings(plan_of, words, host, warning):
    assert any(warning in line for line in plan_of(*words, hosts=[host]).warnings)


def test_memory_that_the_copies_of_checkpoints_exceed(plan_of):
    words = ("checkpoint.every=10", "checkpoint.async_mode=async")
    memory = plan_of(*words).memory
    state = memory.per_host_ram - BOX.slots * memory.checkpoint_copies
    for memory_bytes, is_said in ((state, False), (state + 1, True), (memory.per_host_ram, False)):
        warnings = plan_of(*words, hosts=[replace(BOX, memory_bytes=memory_bytes)]).warnings
        assert any("checkpoint.async_mode=disabled needs no copies" in line for line in warnings) == is_said


def test_memory_is_not_checked_before_the_size_of_the_model_is_known(plan_of):
    plan = plan_of("model=hf", "model.name=org/model", "optimizer.lr=1e-5")
    assert plan.memory is None
    assert plan.warnings == (
        "the model's sizes are known only once its files are downloaded, so memory was not checked",
    )


def test_the_plan_of_a_local_image_model_says_why_memory_was_not_checked(plan_of, tmp_path):
    image_model.write_image_model(tmp_path, "idefics3")
    plan = plan_of("model=hf", f"model.name={tmp_path}", "model.weights=random")
    assert plan.memory is None
    (said,) = plan.warnings
    assert said.startswith(
        "the sizes of idefics3 models are read from weights, and model.weights=random reads none, so"
    )


@pytest.mark.parametrize("words", [(), ("job.steps=100", "schedule.warmup_steps=99", "checkpoint.every=100")])
def test_no_warning_without_a_reason(plan_of, words):
    assert plan_of(*words).warnings == ()


def test_missing_ops_are_built_before_ranks_with_their_folder_and_device(plan_of):
    (host,) = plan_of("parallel=zero2", missing_ops=["cpu_adam", "async_io?"]).hosts
    (command,) = host.build_commands
    assert command.argv == ("python", "-m", "launcher.ops", "cpu_adam", "async_io?")
    assert command.env == {"DS_ACCELERATOR": "cpu", "TORCH_EXTENSIONS_DIR": "/ops"}
    assert host.agent_command.env["TORCH_EXTENSIONS_DIR"] == "/ops"
    assert plan_of("parallel=zero2").hosts[0].build_commands == ()


def test_the_tracker_runs_once_beside_the_first_host(plan_of):
    hosts = [replace(BOX, name="a"), replace(BOX, name="b")]
    first, second = plan_of("tracker.mode=offline", hosts=hosts).hosts
    program = ("python", "-m", "launcher.trackers.sidecar", "/runs/x")
    assert [command.argv for command in first.sidecars] == [(*program, "wandb")]
    assert second.sidecars == ()
    several = plan_of("tracker.report_to=[mlflow,wandb,tensorboard]", "tracker.wandb.mode=disabled")
    assert [command.argv for command in several.hosts[0].sidecars] == [(*program, "mlflow"), (*program, "tensorboard")]
    assert plan_of("tracker.mode=disabled").hosts[0].sidecars == ()
    assert plan_of("tracker=local").hosts[0].sidecars == ()


def test_no_secret_of_the_environment_reaches_the_plan(plan_of):
    key = "0123456789abcdef0123456789abcdef01234567"
    plan = plan_of(WANDB_API_KEY=key)
    assert plan.tracker.mode == "online"
    assert key not in json.dumps(to_tree(plan))
    assert key not in repr(LocalFacts(environ={"WANDB_API_KEY": key}, home=Path("/home/me")))


def test_the_same_inputs_give_the_same_plan(plan_of):
    assert plan_of("+exp=zero2_gpt2_large") == plan_of("+exp=zero2_gpt2_large")


def test_the_written_plan_grows_linearly_with_hosts(plan_of):
    sizes = [
        len(json.dumps(to_tree(plan_of(hosts=[replace(GPUS, name=f"n{n:04d}") for n in range(count)]))))
        for count in (64, 128)
    ]
    assert sizes[1] < 2.1 * sizes[0]


def test_ranks_that_save_on_sigterm_get_half_a_minute_and_others_the_grace_of_the_backend(plan_of):
    trains, verifies = plan_of(), plan_of("job=verify")
    graces = [
        [plan.grace_after(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
        for plan in (trains, verifies, plan_of("backend.grace_s=100"), plan_of("backend.grace_s=2"))
    ]
    assert graces == [[30.0, 7.0, 60.0], [7.0, 7.0, 60.0], [100.0, 100.0, 60.0], [2.0, 2.0, 60.0]]
