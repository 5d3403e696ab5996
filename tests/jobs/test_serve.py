"""The job ``serve``: what its plan says, what it refuses, and a whole run."""

from __future__ import annotations

import json
import os
import signal
import socket
from pathlib import Path

import httpx
import image_model
import pytest

from launcher.config.compose import compose
from launcher.config.validate import validate_overrides_used
from launcher.errors import ConfigError, ConfigErrors
from launcher.errors.secrets import hide_secrets
from launcher.execution.validate import validate_machine
from launcher.inference.server.middleware import read_api_keys
from launcher.planning.render import render_plan
from launcher.protocol.plan import Host
from launcher.protocol.rundir import RunDir
from launcher.utils.files import read_json
from tests.ports import free_port

ONE = Host(name="box", slots=1, cores=4, memory_bytes=16 * 2**30)
SERVE = ("job=serve", "backend.ranks=1", "tracker=local")


def problems_of(*words: str) -> list[ConfigError]:
    run = compose([*SERVE, *words]).run
    return list(run.job.validate_machine(run, RunDir(Path("/nowhere"))))


def test_the_plan_says_what_is_served(plan_of) -> None:
    plan = plan_of(*SERVE, "model=gpt2", "job.replicas=2", "precision=bf16", hosts=[ONE])
    assert plan.completes_on_signal
    assert plan.grace_s == 50
    assert plan.work.batch is None
    assert (plan.summary.engine, plan.summary.optimizer, plan.summary.data) == ("paged", "", "")
    assert plan.details["address"] == "http://127.0.0.1:8000"
    assert plan.details["engines"] == "2 replicas of engine=paged"
    assert plan.memory.per_rank.total == 2 * 2 * plan.memory.num_params
    text = render_plan(plan)
    assert "Parts of serve" in text
    assert "124,439,808 parameters" in text
    assert "1×10 1×20 1×50 2×15" in text
    assert "in 2 engines" in text


def test_ranks_follow_the_strategy(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    from launcher.execution.prepare import prepare

    monkeypatch.chdir(tmp_path)
    words = ["job=serve", f"job.port={free_port()}", "model=gpt2_tiny", "job.tokenizer=bytes", "tracker=local"]
    assert prepare(compose(words)).plan.world_size == 1  # though parallel=ddp takes what there is


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["job.port=0"], r"job.port=0 .*must lie between"),
        (["job.replicas=0"], "job.replicas=0"),
        (["job.max_queue=0"], "job.max_queue=0"),
        (["job.stall_s=0"], r"job.stall_s=0 .*must be above 0"),
        (["job.warm_up=[[1,2,3]]"], r"job.warm_up\[0\]"),
        (["job.warm_up=[[1,2000]]", "model=gpt2"], "at most 1024 tokens"),
        (["job.engine=nothing"], "job.engine=nothing"),
        (["job.tokenizer=bytes", "model.vocab_size=100"], "it has 257 tokens"),
        (["job.rate_per_minute=0"], "job.rate_per_minute=0"),
        (["+job.steps=3"], "job.steps"),
        (["attention=eager"], "attention=eager: job.engine=paged"),
        (["compile=true"], "compile=true: .*job.engine=paged"),
    ],
)
def test_what_cannot_be_served_is_refused(plan_of, words: list[str], said: str) -> None:
    with pytest.raises(ConfigErrors, match=said):
        plan_of(*SERVE, *words, hosts=[ONE])


def test_copies_are_replicas_and_no_ranks(plan_of) -> None:
    with pytest.raises(ConfigErrors, match=r"set backend.ranks=1 job.replicas=2"):
        plan_of("job=serve", "tracker=local")
    tensor = ("job=serve", "tracker=local", "model=llama_tiny", "parallel=tensor")
    assert plan_of(*tensor).world_size == 2
    with pytest.raises(ConfigErrors, match=r"set backend.ranks=2"):
        plan_of(*tensor, hosts=[ONE])
    with pytest.raises(ConfigErrors, match="together are one engine"):
        plan_of(*tensor, "job.replicas=2")
    staged = ("job=serve", "tracker=local", "model=gpt2_tiny", "parallel=pipeline")
    assert plan_of(*staged).world_size == 2
    with pytest.raises(ConfigErrors, match=r"set backend.ranks=2"):
        plan_of(*staged, hosts=[ONE])
    with pytest.raises(ConfigErrors, match=r"parallel.schedule=gpipe: .*applies to training only"):
        plan_of(*staged, "parallel.schedule=gpipe")
    with pytest.raises(ConfigErrors, match=r"set parallel=tensor parallel.tensor=2, or parallel=pipeline"):
        plan_of("job=serve", "tracker=local", "model=gpt2_tiny", "parallel=deepspeed_pipeline")


def test_a_taken_port_is_refused_with_a_free_one() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        (problem,) = problems_of(f"job.port={taken.getsockname()[1]}")
    assert "is already in use" in problem.why
    assert "which is free" in problem.fix


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (["job.host=192.0.2.1"], "job.host"),
        (["job.host=no.such.host.invalid"], "job.host"),
        (["job.tokenizer=/nowhere"], "job.tokenizer"),
        (["job.api_keys_file=/nowhere"], "job.api_keys_file"),
        (["job.api_keys_file=/dev/null"], "job.api_keys_file"),
    ],
)
def test_what_this_machine_lacks_is_said_before_anything_starts(tmp_path: Path, words: list[str], option: str) -> None:
    run = compose([*SERVE, "job.tokenizer=bytes", f"job.port={free_port()}", *words]).run
    assert [problem.option for problem in validate_machine(run, tmp_path / "run", hosts=[])] == [option]


@pytest.mark.parametrize("value", ["", "  ", ",", " , \n,"])
def test_a_variable_of_keys_that_holds_none_is_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It must not mean that anyone may use the server, with a file of keys beside it or not."""
    monkeypatch.setenv("LAUNCHER_API_KEYS", value)
    (problem,) = problems_of(f"job.port={free_port()}")
    assert "unset LAUNCHER_API_KEYS" in hide_secrets(str(problem))
    assert "has no key" in hide_secrets(str(problem))
    with pytest.raises(ConfigError, match="has no key"):
        read_api_keys(None, os.environ)


@pytest.mark.parametrize("key", ["schlüssel", "tab\there", "nul\0", "bell\a", "k" * 4097, "\ufeffkey"])
def test_keys_that_no_client_can_send_are_refused(key: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The right key would always be answered with 401."""
    file = tmp_path / "keys"
    file.write_text(f"good\n{key}\n", encoding="utf-8")
    (problem,) = problems_of(f"job.port={free_port()}", f"job.api_keys_file={file}")
    assert "its key 2 cannot be sent " in str(problem)
    assert key not in str(problem)
    with pytest.raises(ConfigError, match="cannot be sent in an Authorization header"):
        read_api_keys(str(file), {})
    if "\0" not in key:
        monkeypatch.setenv("LAUNCHER_API_KEYS", f"good,{key}")
        (problem,) = problems_of(f"job.port={free_port()}")
        assert "its key 2 cannot be sent " in str(problem)
        with pytest.raises(ConfigError, match="cannot be sent in an Authorization header"):
            read_api_keys(None, os.environ)


def test_keys_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_bytes(b"\xef\xbb\xbffirst\r\n# no key\r\n\r\n two words \r\n")  # as an editor of Windows writes it
    keys = read_api_keys(str(file), {})
    owners = [keys.owner(f"Bearer {key}") for key in ("first", "two words", "# no key", "")]
    assert [owner is not None for owner in owners] == [True, True, False, False]


@pytest.mark.parametrize("text", ["", "# none\n"])
def test_a_file_of_keys_that_was_emptied_after_the_plan_serves_no_client(text: str, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(text)
    with pytest.raises(ConfigError, match="has no key"):
        read_api_keys(str(tmp_path / "keys"), {})


def test_hosts_that_are_allowed_have_an_effect_or_are_refused(
    monkeypatch: pytest.MonkeyPatch, plan_of, tmp_path: Path
) -> None:
    names = "job.allowed_hosts=[models.example.org]"
    assert not list(problems_of(f"job.port={free_port()}", names))
    for wrong in ("http://models.example.org", "a b", "a:80", "a/b"):
        with pytest.raises(ConfigErrors, match=r"is not a host name"):
            plan_of(*SERVE, f"job.allowed_hosts=['{wrong}']", hosts=[ONE])
    with pytest.raises(ConfigErrors, match=r"Host headers are not checked"):
        plan_of(*SERVE, names, "job.api_keys_file=/x", hosts=[ONE])
    monkeypatch.setenv("LAUNCHER_API_KEYS", "a")
    (problem,) = problems_of(f"job.port={free_port()}", names)
    assert problem.option == "job.allowed_hosts"
    with pytest.raises(ConfigErrors, match=r"job.max_body_bytes=16777216 or less"):
        plan_of(*SERVE, "job.max_body_bytes=16777217", hosts=[ONE])


def test_limits_of_images_fit_bodies_and_have_an_effect(plan_of, tmp_path: Path) -> None:
    image_model.write_image_model(tmp_path / "vlm", "llava")
    words = (*SERVE, "model=hf", f"model.name={tmp_path / 'vlm'}", "model.weights=random")
    plan = plan_of(*words, "job.max_images=2", "job.max_image_pixels=1000", hosts=[ONE])
    assert "at most 2 in a request, of 1,000 pixels and 10" in render_plan(plan)
    run = compose([*words]).run
    assert (run.job.body_limit(run), compose([*SERVE]).run.job.body_limit(compose([*SERVE]).run)) == (1 << 24, 1 << 21)
    for more, option, words_of_error in (
        (("job.max_image_bytes=16000000",), "job.max_image_bytes", "a request body may have 16,777,216"),
        (("job.max_body_bytes=1000000", "job.max_image_bytes=900000"), "job.max_image_bytes", "may have 1,000,000"),
        (("job.max_images=0",), "job.max_images", ""),
        (("job.adapters={a: b}",), "job.adapters", "takes images"),
        (("job.engine=transformers",), "job.engine", "takes text only"),
        (("parallel=tensor", "parallel.tensor=2", "backend.ranks=2"), "parallel", "takes images"),
    ):
        with pytest.raises(ConfigErrors) as caught:
            plan_of(*words, *more, hosts=[ONE])
        assert any(option in str(each.option) and words_of_error in each.why for each in caught.value.errors), more
    used = validate_overrides_used(compose([*SERVE, "job.max_images=2"]).run, ["job.max_images=2"])
    assert [(error.option, "takes text only" in error.why) for error in used] == [("job.max_images", True)]
    assert not list(validate_overrides_used(compose([*words, "job.max_images=2"]).run, ["job.max_images=2"]))


def test_trusted_proxies_are_addresses_or_networks(plan_of) -> None:
    plan_of(*SERVE, "job.trusted_proxies=[10.0.0.5,10.1.0.0/16,'2001:db8::/32']", hosts=[ONE])
    for wrong in ("lb.example.org", "10.0.0.5:80", "*", ""):
        with pytest.raises(ConfigErrors) as caught:
            plan_of(*SERVE, f"job.trusted_proxies=[10.0.0.5,'{wrong}']", hosts=[ONE])
        assert [problem.option for problem in caught.value.errors] == ["job.trusted_proxies[1]"]


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.config.job.serve._PACKAGES", ("uvicorn", "no_such_package"))
    (problem,) = problems_of(f"job.port={free_port()}")
    assert (problem.why, problem.fix) == ("it needs no_such_package", "pip install 'launcher[serve]'")


def test_strangers_are_warned_of(plan_of) -> None:
    warnings = plan_of(*SERVE, "job.host=0.0.0.0", hosts=[ONE]).warnings
    assert any("anyone who can connect" in warning for warning in warnings)
    assert not plan_of(*SERVE, "job.host=0.0.0.0", "job.api_keys_file=/x", hosts=[ONE]).warnings


def test_keys_reach_other_hosts_and_stand_in_no_plan(plan_of) -> None:
    from launcher.config.backend.base import DEFAULT_GLOBS, forwarded_env

    environ = {"LAUNCHER_API_KEYS": "s3cret", "LAUNCHER_HOST": "x"}
    assert forwarded_env(environ, DEFAULT_GLOBS) == {"LAUNCHER_API_KEYS": "s3cret"}
    assert "s3cret" not in render_plan(plan_of(*SERVE, hosts=[ONE], LAUNCHER_API_KEYS="s3cret"))
    with pytest.raises(ConfigErrors, match="looks like a secret"):
        plan_of(*SERVE, "+backend.env.LAUNCHER_API_KEYS=s3cret", hosts=[ONE])


@pytest.mark.parametrize("parallel", ["tensor", "pipeline"])
def test_ranks_serve_as_one(launch_in_background, tmp_path: Path, parallel: str) -> None:
    port = free_port()
    words = ("model=llama_tiny", f"parallel={parallel}", "backend.ranks=2", "job.tokenizer=bytes", f"job.port={port}")
    running = launch_in_background("job=serve", "tracker=local", *words, "run.dir=served")
    running.wait_for_output("serving llama_tiny at")
    body = {"model": "llama_tiny", "prompt": "abc", "max_tokens": 8, "temperature": 0}
    answer = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=60).json()
    assert answer["usage"]["completion_tokens"] == 8
    running.send_signal(signal.SIGTERM)
    assert running.wait() == 0
    assert read_json(tmp_path / "served" / "result.json")["status"] == "completed"


def test_a_whole_run_serves_and_completes_when_signalled(launch_in_background, tmp_path: Path) -> None:
    port = free_port()
    words = (
        "model.num_hidden_layers=2",
        "model.hidden_size=32",
        "model.num_attention_heads=2",
        "model.vocab_size=257",
        "job.tokenizer=bytes",
    )
    running = launch_in_background(*SERVE, *words, f"job.port={port}", "run.dir=served", "job.metrics_every_s=0.2")
    running.wait_for_output("serving gpt2_tiny at")
    body = {"model": "gpt2_tiny", "prompt": "abc", "max_tokens": 8, "temperature": 0}
    answer = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=60).json()
    assert answer["usage"]["completion_tokens"] == 8
    running.send_signal(signal.SIGTERM)
    assert running.wait() == 0
    result = read_json(tmp_path / "served" / "result.json")
    assert result["status"] == "completed"
    assert result["metrics"]["serve/generation_tokens"] == 8
    lines = [json.loads(line) for line in (tmp_path / "served" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) >= 2
    assert not (tmp_path / "served" / "failure.json").exists()
