"""What counts as a secret, and that none is stored or shown."""

from __future__ import annotations

import dataclasses
import itertools
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.__main__ import main
from launcher.config.backend import base
from launcher.config.option_text import quoted_word
from launcher.config.registry import KINDS, component_class
from launcher.errors import ConfigError, ConfigErrors
from launcher.errors.secrets import (
    HIDDEN,
    hide_secrets,
    is_secret,
    is_secret_argument,
    is_secret_name,
    is_secret_value,
    redact,
)
from launcher.protocol.outcome import Failure, RunOutcome
from launcher.protocol.plan import Plan
from launcher.protocol.rundir import RunDir
from launcher.runs.report.html import show
from launcher.supervision.finalize import finalize_run

ENVIRON = {"HF_TOKEN": "hf_abcdefgh", "MY_PASSWORD": "hunter2hunter2", "API_KEY": "1", "HOME": "/home/user"}

SECRET_NAMES = (
    *("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "DBPASSWORD", "client_secret"),
    *(
        "HTTP_AUTH",
        "AUTHORIZATION",
        "MY_CREDENTIALS",
        "GITHUB_PAT",
        "HFTOKEN",
        "SSH_PASSPHRASE",
        "SSHPASS",
        "SENTRY_DSN",
        "DB_PWD",
    ),
    *("S3_ACCESSKEY", "NPM_AUTHTOKEN", "API_TOKENS", "LAUNCHER_API_KEYS", "accountKey", "SLACK_WEBHOOK_URL"),
    *("AZURE_STORAGE_CONNECTION_STRING", "GOOGLE_APIKEY", "ghToken", "MY_JWT", "SESSION_COOKIE"),
)
HARMLESS_NAMES = (
    *("TOKENIZERS_PARALLELISM", "PWD", "OLDPWD", "max_tokens", "job.max_tokens", "KEYBOARD", "MONKEY", "HF_HOME"),
    *("SSH_AUTH_SOCK", "HF_TOKEN_PATH", "BYPASS", "COMPASS", "PATH", "PATTERN", "HOTKEY", "AUTHOR", "XAUTHORITY"),
    *("MAX_TOKENS", "TOKENIZER", "PASSIVE", "DISPATCH", "num_key_value_heads", "NCCL_DEBUG", "MASTER_ADDR"),
)
SECRET_VALUES = (
    "http://user:hunter2@proxy:3128",
    "postgres://u:hunter2@x@db/main",
    "http://u:hunter2/x@proxy",
    "https://hunter2a1b2c3d4e5f60718@o1.ingest.sentry.io/2",
    "https://bucket/x?X-Amz-Signature=hunter2&a=1",
    "https://hooks.slack.com/services/T1/B2/hunter2hunter2",
    "Authorization: Bearer hunter2hunter2hunter2",
    'curl -H "authorization: bearer hunter2"',
    "{'Authorization': 'Basic hunter2='}",
    "user:hunter2@db.internal:5432",
    "hosts=a:hunter2@10.0.0.1:9092,b:hunter2@[::1]:9093",
    "user:hunter2@example.com/repository",
    "ghp_hunter2hunter2hunter2hunter2",
    "github_pat_hunter2hunter2hunter2",
    "glpat-hunter2hunter2hunter2",
    "hf_hunter2hunter2hunter2",
    "sk-hunter2hunter2hunter2",
    "sk-proj-hunter2_hunter2",
    "xoxb-hunter2hunter2",
    "AKIAHUNTER2HUNTER2AB",
    "eyJhdW50ZXIyaHVudGVy.eyJodW50ZXIyIjoxfQ.hunter2",
    "-----BEGIN OPENSSH PRIVATE KEY-----\nhunter2\n-----END OPENSSH PRIVATE KEY-----",
)
HARMLESS_VALUES = (
    *("http://host:8080/path@v1", "ssh://user@node:22", "ssh://root@[::1]:22", "registry:5000/image@sha256:abcd"),
    *("hf_transfer", "sk-learn", "task-abcdefghijklmnopqrstuvwxyz", "git@github.com:a/b.git", "key=value"),
    *("key:value@12:30:05", "mailto:me@example.com/x", "sip:me@example.com:5060", "a:0,1@b:22", "loss:0.5@step:1000"),
    *("image:tag@sha256:1234567890", "Bearer bonds", "me@host:22", "work1:8@work2:8080"),
    *("https://huggingface.co/org/model@main", "job.api_keys_file=/x", "job.max_tokens=5", "s3://bucket/day=1/x"),
    *("ssh -oPasswordAuthentication=no node1", "ssh -o AddKeysToAgent=yes node1"),
)


@pytest.mark.parametrize("name", SECRET_NAMES)
def test_a_secret_is_known_by_its_name(name: str) -> None:
    assert is_secret_name(name)
    assert hide_secrets(f"backend.env={{{name}: x}}") == f"backend.env={{{name}: {HIDDEN}}}"
    assert redact({"env": {name: "x"}}, {}) == {"env": {name: HIDDEN}}


@pytest.mark.parametrize("name", HARMLESS_NAMES)
def test_a_name_like_a_secret_is_none(name: str) -> None:
    assert not is_secret(name, "1")


def test_no_option_of_ours_has_the_name_of_a_secret() -> None:
    classes = [component_class(group, kind) for group, kinds in KINDS.items() for kind in kinds]
    names = {field.name for field in itertools.chain.from_iterable(map(dataclasses.fields, classes))}
    names_of_secrets = {"secret", "image_pull_secrets", "keys_from", "pods_secret"}
    assert {name for name in names if is_secret_name(name)} <= names_of_secrets
    for name in names:
        assert hide_secrets(f"backend.{name}=tokens") == f"backend.{name}=tokens"
        assert redact({"backend": {name: "tokens"}}, {}) == {"backend": {name: "tokens"}}


@pytest.mark.parametrize("value", SECRET_VALUES)
def test_a_secret_is_known_by_its_value_and_hidden_in_any_text(value: str) -> None:
    assert is_secret_value(value)
    for text in (value, f"see {value!r}, then", f"error: {value} failed"):
        assert "hunter2" not in hide_secrets(text).lower()
    hidden = hide_secrets(value)
    assert HIDDEN in hidden
    assert not is_secret_value(hidden)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("AZURE", "AccountName=me;AccountKey=hunter2;x"),
        ("OPTIONS", "--x=1 API_KEY=hunter2"),
        ("HTTPS_PROXY", "user:hunter2@proxy:3128"),
        ("all_proxy", "user:hunter2@proxy:3128/"),
        ("X", "Bearer hunter2"),
        ("X", "bearer  hunter2"),
        ("X", "Basic dTpodW50ZXIy"),
        ("X", "user:hunter2@db:5432"),
    ],
)
def test_a_variable_is_secret_by_what_its_value_assigns_or_logs_in_with(name: str, value: str) -> None:
    assert is_secret(name, value)
    assert "hunter2" not in redact(f"failed: {value}", {name: value})


def test_a_proxy_or_a_pair_of_words_without_a_password_is_no_secret() -> None:
    pairs = {
        "HTTPS_PROXY": "proxy:3128",
        "NO_PROXY": "localhost,127.0.0.1",
        "HOSTS": "a:0,1@b:22",
        "OPTIONS": "--key=1",
    }
    pairs |= {"A": "Basic English", "B": "Basic", "C": "bearer", "D": "key:value@time", "E": "key:value@12:30"}
    assert not any(is_secret(name, value) for name, value in pairs.items())


@pytest.mark.parametrize("value", HARMLESS_VALUES)
def test_a_value_like_a_secret_stays(value: str) -> None:
    assert not is_secret_value(value)
    assert hide_secrets(value) == value


def test_a_secret_of_the_environment_is_hidden_wherever_it_occurs() -> None:
    tree = {"data": {"path": ["https://user:hunter2hunter2@host/x", "/home/user/x"]}, "job": {"prompt": "hf_abcdefgh"}}
    assert redact(tree, ENVIRON) == {
        "data": {"path": [f"https://user:{HIDDEN}@host/x", "/home/user/x"]},
        "job": {"prompt": HIDDEN},
    }


def test_everything_else_stays() -> None:
    tree = {"steps": 1, "lr": 1e-3, "sample": "1", "none": None, "on": True, "tags": ["a", "b"]}
    assert redact(tree, ENVIRON) == tree
    assert redact("/home/me/runs", {"PWD": "/home/me/runs", "DB_PWD": "hunter22"}) == "/home/me/runs"
    assert redact("hunter22", {"DB_PWD": "hunter22"}) == HIDDEN


def test_a_secret_inside_a_longer_one_does_not_uncover_it() -> None:
    assert redact("abcdefgh-and-more", {"A_KEY": "abcdefgh", "B_KEY": "abcdefgh-and-more"}) == HIDDEN


@pytest.mark.parametrize(
    "text",
    [
        "SSH_PASSPHRASE=hunter2 rest",
        "--api-key=hunter2",
        "  HF_TOKEN: hunter2\n  X: y",
        '{"client_secret": "hunter2", "a": 1}',
        "backend.env={GITHUB_PAT: hunter2 hunter2, B: c}",
        "AccountName=me;AccountKey=hunter2;x",
    ],
)
def test_what_stands_behind_a_secret_name_is_hidden_in_text(text: str) -> None:
    assert "hunter2" not in hide_secrets(text)
    assert HIDDEN in hide_secrets(text)


def test_an_error_repeats_no_secret_and_keeps_its_advice() -> None:
    error = ConfigError("backend.env.HF_TOKEN", "hunter2", why="looks like a secret", fix="leave it out")
    assert str(error) == f"backend.env.HF_TOKEN={HIDDEN}: looks like a secret; leave it out"
    assert "hunter2" not in str(ConfigErrors([ConfigError("backend.env={GITHUB_PAT: hunter2", why="x", fix="y")]))


@pytest.mark.parametrize(
    ("word", "option"),
    [
        ("backend.env={HTTPS_PROXY: 'http://user:hunter2@proxy:3128'}", "backend.env.HTTPS_PROXY"),
        ("backend.env.X=Bearer hunter2", "backend.env.X"),
        ("backend.env={X: 'user:hunter2@db:5432'}", "backend.env.X"),
        ("backend.env.SENTRY_DSN=hunter2", "backend.env.SENTRY_DSN"),
        ("data.path='https://user:hunter2@host/x.txt'", "data.path"),
        ("job.sample_prompt=hf_hunter2hunter2hunter2", "job.sample_prompt"),
        ("run.name=ghp_hunter2hunter2hunter2hunter2", "run.name"),
    ],
)
def test_no_plan_is_made_of_a_secret(plan_of: Callable[..., Plan], word: str, option: str) -> None:
    with pytest.raises(ConfigErrors) as caught:
        plan_of(word)
    assert option in [error.option for error in caught.value.errors]
    assert "hunter2" not in str(caught.value)
    assert "export" in str(caught.value)


@pytest.mark.parametrize(
    "word",
    [
        *("-oPassword=hunter22", "-o IdentityPassphrase=hunter22", "-oSetEnv=API_TOKEN=hunter22", "-Jme:hunter22@gate"),
        *(
            "-oProxyCommand=nc -X 5 --proxy-auth=me:hunter22@h %h",
            "-oSetEnv=A=hf_abcdefghijklmnop1234",
            "--token=hunter22",
        ),
    ],
)
def test_an_argument_of_another_program_holds_no_secret(
    plan_of: Callable[..., Plan], tmp_path: Path, word: str
) -> None:
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("n1 slots=1\n")
    options = quoted_word("backend.ssh_options", [word])
    with pytest.raises(ConfigErrors) as refused:
        plan_of("backend=ssh", f"backend.hostfile={hostfile}", *shlex.split(options))
    (error,) = refused.value.errors
    assert error.option.startswith("backend.ssh_options")
    assert "hunter22" not in str(error)
    assert "hf_abc" not in str(error)


@pytest.mark.parametrize(
    ("line", "is_secret_here"),
    [
        ("export MY_TOKEN=hunter22", True),
        ("env WANDB_API_KEY='hunter22' x", True),
        ("curl https://me:hunter22@host/x", True),
        ("export MY_TOKEN=$(cat ~/.token)", False),
        ('export MY_TOKEN="$OTHER"', False),
        ("module load cuda/12.4; export OMP_PROC_BIND=close", False),
    ],
)
def test_a_line_of_setup_holds_no_secret(plan_of: Callable[..., Plan], line: str, is_secret_here: bool) -> None:
    words = ("backend=slurm", *shlex.split(quoted_word("backend.setup", [line])))
    if not is_secret_here:
        assert plan_of(*words)
        return
    with pytest.raises(ConfigErrors) as refused:
        plan_of(*words)
    assert [error.option for error in refused.value.errors] == ["backend.setup"]
    assert "hunter22" not in str(refused.value)


@pytest.mark.parametrize(
    "word",
    [
        *("-oStrictHostKeyChecking=accept-new", "-oPasswordAuthentication=no", "-oHostKeyAlias=gate", "-A", "-p2222"),
        *("-oNumberOfPasswordPrompts=0", "-oPubkeyAuthentication=yes", "-oUserKnownHostsFile=/dev/null", "-J"),
        *(
            "-oProxyJump=me@gate:22,you@wall",
            "-oProxyCommand=ssh -W %h:%p me@gate",
            "/home/me/my_key.pem",
            "me@gate:22",
        ),
        *(
            "-oIdentitiesOnly=yes",
            "-oAddKeysToAgent=no",
            "-oVerifyHostKeyDNS=yes",
            "-oKexAlgorithms=x@y",
            "-L8080:a:80",
        ),
        *("--mail-user=me@b.org", "--dependency=afterok:12", "--comment=a note"),
    ],
)
def test_an_argument_without_a_secret_is_none(word: str) -> None:
    assert not is_secret_argument(word)


@pytest.mark.parametrize(
    ("image", "is_right"),
    [
        ("me:hunter22@registry/x", False),
        ("me@registry/x", False),
        ("me:hunter22@registry x", False),
        ("registry:5000/team/x:1.0", True),
        (f"registry/x:1@sha256:{'0a' * 32}", True),
    ],
)
def test_an_image_has_no_login(plan_of: Callable[..., Plan], image: str, is_right: bool) -> None:
    words = ("backend=kubernetes", f"backend.image={image}")
    if is_right:
        assert plan_of(*words)
        return
    with pytest.raises(ConfigErrors, match=r"only a digest .* may follow the @") as refused:
        plan_of(*words)
    assert "hunter22" not in str(refused.value)


@pytest.mark.parametrize("option", ["backend.env.X", "job.sample_prompt", "data.path", "model.name"])
def test_no_plan_is_made_of_the_value_of_a_secret_variable(
    plan_of: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    monkeypatch.setenv("MY_TOKEN", "hunter2 and more")
    words = ["model=hf"] if option == "model.name" else []
    with pytest.raises(ConfigErrors) as caught:
        plan_of(*words, f"{option}=${{oc.env:MY_TOKEN}}")
    assert f"{option}: holds the value of the variable MY_TOKEN" in str(caught.value)


def test_an_option_may_name_the_file_that_a_secret_variable_names(
    plan_of: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSH_KEY", "/home/me/.ssh/id")
    assert plan_of("backend.env.X=/home/me/.ssh/id")


def test_the_last_words_show_no_value_of_a_secret_variable(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MY_TOKEN", "hunter2 and more")
    assert main(["plan", "job.steps=hunter2 and more"]) == 2
    said = capsys.readouterr().err
    assert HIDDEN in said
    assert "hunter2" not in said


def test_the_advice_about_a_variable_can_be_read_whole() -> None:
    (error,) = base.validate_env({"GITHUB_PAT": "x"})
    assert "leave it out and export the variable GITHUB_PAT in your shell: ranks inherit it" in str(error)


def test_the_advice_names_what_sends_the_variable_to_other_hosts() -> None:
    (error,) = base.validate_env({"MY_PAT": "x"}, forward=())
    assert "add backend.forward=[MY_PAT]" in error.fix
    assert "forward" not in next(base.validate_env({"HF_TOKEN": "x"}, forward=())).fix  # sent by default


def test_no_secret_stands_in_a_failure_or_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SSH_PASSPHRASE", "correct horse")
    run_dir = RunDir(tmp_path)
    run_dir.logs.mkdir()
    error = "ProxyError: http://me:hunter2@proxy refused correct horse"
    failure = Failure(host="a", rank=0, exit_code=1, signal=None, reason=error, error=error, traceback=f"...\n{error}")
    finalize_run(RunOutcome(status="failed", exit_code=1, failure=failure), run_dir, run_id="x")
    written = run_dir.failure.read_text() + capsys.readouterr().err
    assert HIDDEN in written
    assert not any(secret in written for secret in ("hunter2", "correct horse"))


def test_a_page_shows_no_secret() -> None:
    page = show("backend:\n  env:\n    HTTPS_PROXY: 'http://me:hunter2@proxy'\n    GITHUB_PAT: 'hunter2'\n")
    assert page.count(HIDDEN) == 2
    assert "hunter2" not in page
