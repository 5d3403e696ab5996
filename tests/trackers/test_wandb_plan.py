"""Which W&B mode a run gets, and that the plan says why without saying the key."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.config.tracker import LocalTracker, Wandb
from launcher.errors import ConfigError
from launcher.protocol.plan import TrackerPlan

KEY = "5ec2e7" * 7
PREFIXED = f"local-{KEY}"


def plan(home: Path, tracker: Wandb | None = None, **environ: str) -> TrackerPlan:
    return (tracker or Wandb()).plan("a-run", environ=environ, home=home, run_name="gpt2")


def put(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    file.chmod(0o600)


def test_without_a_key_it_is_offline(tmp_path: Path) -> None:
    planned = plan(tmp_path)
    assert (planned.kind, planned.mode, planned.run_id) == ("wandb", "offline", "a-run")
    assert (planned.project, planned.group) == ("launcher", "gpt2")
    assert planned.reason == "no WANDB_API_KEY and no netrc entry for api.wandb.ai; `wandb sync` uploads it later"


@pytest.mark.parametrize("key", [KEY, PREFIXED, "header.payload.signature"])
def test_a_key_in_the_environment_means_online(tmp_path: Path, key: str) -> None:
    planned = plan(tmp_path, WANDB_API_KEY=key)
    assert planned.mode == "online"
    assert planned.reason == "key from WANDB_API_KEY, server https://api.wandb.ai"


@pytest.mark.parametrize(
    ("netrc", "server", "mode"),
    [
        (f"machine api.wandb.ai login user password {KEY}", "", "online"),
        (f"machine api.wandb.ai login user password {KEY}", "https://wandb.example.org", "offline"),
        (f"machine wandb.example.org login user password {KEY}", "https://wandb.example.org/", "online"),
        (f"machine localhost:8080 login user password {KEY}", "http://localhost:8080", "online"),
        (f"machine github.com login user password {KEY}", "", "offline"),
        ("machine api.wandb.ai login", "", "offline"),
        ("\0", "", "offline"),
    ],
)
@pytest.mark.parametrize("name", [".netrc", "_netrc", "elsewhere"])
def test_a_netrc_entry_counts_for_its_server(tmp_path: Path, netrc: str, server: str, mode: str, name: str) -> None:
    put(tmp_path / name, netrc)
    environ = {"NETRC": str(tmp_path / name)} if name == "elsewhere" else {}
    planned = plan(tmp_path, WANDB_BASE_URL=server, **environ)
    assert planned.mode == mode
    assert KEY not in planned.reason


def test_the_settings_file_of_wandb_counts_last(tmp_path: Path) -> None:
    settings = tmp_path / ".config" / "wandb" / "settings"
    put(settings, f"[default]\nbase_url = http://wandb.example.org\napi_key = {KEY}\n")
    assert plan(tmp_path).reason == "key from the W&B settings file, server http://wandb.example.org"
    put(settings, "[default]\nmode = offline\n")
    assert plan(tmp_path, WANDB_API_KEY=KEY).mode == "offline"
    put(settings, "no settings at all")
    assert plan(tmp_path, WANDB_API_KEY=KEY).mode == "online"


@pytest.mark.parametrize(("key", "why"), [("abc", "has 3 characters"), (f"{KEY} {KEY}", "contains characters")])
def test_a_key_that_cannot_be_one_is_no_key(tmp_path: Path, key: str, why: str) -> None:
    planned = plan(tmp_path, WANDB_API_KEY=key)
    assert planned.mode == "offline"
    assert why in planned.reason
    assert key not in planned.reason


@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_what_is_configured_needs_no_key_and_beats_the_environment(tmp_path: Path, mode: str) -> None:
    planned = plan(tmp_path, Wandb(mode=mode), WANDB_API_KEY=KEY, WANDB_MODE="online")  # type: ignore[arg-type]
    assert planned.mode == mode
    assert f"tracker.mode={mode}" in planned.reason


@pytest.mark.parametrize(
    ("given", "mode"), [("offline", "offline"), ("dryrun", "offline"), ("disabled", "disabled"), ("online", "online")]
)
def test_the_mode_in_the_environment_decides_auto_and_is_said(tmp_path: Path, given: str, mode: str) -> None:
    planned = plan(tmp_path, WANDB_API_KEY=KEY, WANDB_MODE=given)
    assert planned.mode == mode
    assert mode == "online" or f"WANDB_MODE={given}" in planned.reason


@pytest.mark.parametrize(
    ("tracker", "environ", "option"),
    [
        (Wandb(mode="online"), {}, "tracker.mode=online"),
        (Wandb(mode="online"), {"WANDB_API_KEY": "short"}, "tracker.mode=online"),
        (Wandb(), {"WANDB_MODE": "online"}, "WANDB_MODE=online"),
    ],
)
def test_online_without_a_key_is_refused(tmp_path: Path, tracker: Wandb, environ: dict[str, str], option: str) -> None:
    with pytest.raises(ConfigError) as refused:
        plan(tmp_path, tracker, **environ)
    assert str(refused.value).startswith(f"{option}: needs a key: ")
    assert "set tracker.mode=offline" in refused.value.fix


def test_a_mode_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^WANDB_MODE=ofline: .*did you mean offline"):
        plan(tmp_path, WANDB_MODE="ofline")


def test_in_a_sweep_the_run_is_the_one_the_agent_asked_for(tmp_path: Path) -> None:
    sweep = {"WANDB_SWEEP_ID": "sw1", "WANDB_RUN_ID": "trial7", "WANDB_PROJECT": "tuning"}
    planned = plan(tmp_path, Wandb(project="mine", group_name="group"), **sweep)
    assert (planned.run_id, planned.project, planned.group) == ("trial7", "tuning", "group")
    assert "part of W&B sweep sw1" in planned.reason
    assert plan(tmp_path, WANDB_PROJECT="tuning").project == "launcher", "outside a sweep the configuration names it"


def test_the_local_tracker_has_nothing_to_start(tmp_path: Path) -> None:
    planned = LocalTracker().plan("a-run", environ={"WANDB_API_KEY": KEY}, home=tmp_path, run_name="gpt2")
    assert (planned.kind, planned.mode, planned.reason) == ("local", "offline", "metrics.jsonl only")
