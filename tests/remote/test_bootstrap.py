"""The bootstrap, run by real login shells in a folder that stands for the home of a host."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.errors import ConfigError
from launcher.remote import command as bootstrap
from launcher.remote.bundle import Bundle, make_bundle
from launcher.remote.command import prologue, shell_command

ECHO = """
import json, os, sys
seen = sys.stdin.buffer.read()
facts = {"cwd": os.getcwd(), "env": dict(os.environ), "file": __file__, "argv": sys.argv[1:]}
sys.stdout.buffer.write(json.dumps(facts).encode() + b"\\n" + seen)
"""
SHELLS = ("sh", "bash", "dash", "tcsh", "fish", "zsh")


class Home:
    """A home directory of a host, and what its login shell runs there."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def store(self) -> Path:
        return self.path / ".cache" / "launcher" / "code"

    def run(
        self, stdin: bytes, *, shell: str = "sh", python: str = sys.executable, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[bytes]:
        environ = {"HOME": str(self.path), "PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", **(env or {})}
        command = [shell, "-c", shell_command(python)]
        return subprocess.run(command, input=stdin, cwd=self.path, env=environ, capture_output=True, timeout=60)

    def facts(self, stdin: bytes, **how: str) -> tuple[dict[str, object], bytes]:
        """Return what the module saw of its process, and of stdin."""
        ended = self.run(stdin, **how)
        assert ended.returncode == 0, ended.stderr.decode()
        facts, _, rest = ended.stdout.partition(b"\n")
        return json.loads(facts), rest


@pytest.fixture
def home(tmp_path: Path) -> Home:
    folder = tmp_path / "home"
    folder.mkdir()
    return Home(folder)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A working tree with a module that tells what it sees."""
    folder = tmp_path / "tree"
    folder.mkdir()
    (folder / "echo_module.py").write_text(ECHO)
    subprocess.run(["git", "init", "-q", folder], check=True)
    return folder


@pytest.fixture(params=["shared", "sent"])
def start(request: pytest.FixtureRequest, tree: Path) -> Callable[..., bytes]:
    """Return a prologue, for shared code and for code that is sent."""
    bundle = make_bundle(tree) if request.param == "sent" else None
    shared = () if bundle else (str(tree),)
    return lambda cwd=tree: prologue("echo_module", cwd=str(cwd), pythonpath=shared, bundle=bundle)


@pytest.mark.parametrize("shell", SHELLS)
def test_the_module_reads_exactly_what_follows(shell: str, home: Home, start: Callable[..., bytes], tree: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    rest = bytes(range(256)) * 4096
    facts, seen = home.facts(start() + rest, shell=shell)
    assert seen == rest
    assert facts["cwd"] == str(tree)
    assert facts["argv"] == []


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("name", ["py thon", "a;b $HOME `id` *", "~", "é", 'double"quote', "{a,b}"])
def test_the_interpreter_may_have_any_name_that_can_be_quoted(
    shell: str, name: str, home: Home, tree: Path, tmp_path: Path
) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    python = tmp_path / name
    python.symlink_to(os.path.realpath(sys.executable))
    stdin = prologue("echo_module", cwd=str(tree), pythonpath=[str(tree)])
    facts, _ = home.facts(stdin, shell=shell, python=str(python))
    assert str(facts["env"]["PATH"]).startswith(f"{tmp_path}:")  # type: ignore[index]


@pytest.mark.parametrize("shell", SHELLS)
def test_the_interpreter_may_lie_below_the_home_directory(shell: str, home: Home, tree: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    (home.path / "python3").symlink_to(os.path.realpath(sys.executable))
    home.facts(prologue("echo_module", cwd=str(tree), pythonpath=[str(tree)]), shell=shell, python="~/python3")


@pytest.mark.parametrize("python", ["it's", "a\\b", "wow!", "two\nlines", "-c"])
def test_an_interpreter_that_no_shell_could_be_given_is_refused(python: str) -> None:
    with pytest.raises(ConfigError, match=r"backend\.python"):
        shell_command(python)


def test_modules_in_the_home_directory_do_not_stand_in_for_those_of_python(
    home: Home, start: Callable[..., bytes]
) -> None:
    for name in ("json", "os", "hashlib", "tarfile"):
        (home.path / f"{name}.py").write_text("raise SystemExit('the wrong one')")
    home.facts(start())


def test_environment_of_the_host_is_kept_and_ours_comes_first(home: Home, tree: Path) -> None:
    stdin = prologue("echo_module", cwd=str(tree), pythonpath=[str(tree), "/second"])
    facts, _ = home.facts(stdin, env={"PYTHONPATH": "/the/hosts", "KEPT": "yes"})  # type: ignore[arg-type]
    env = facts["env"]
    assert env["PYTHONPATH"] == f"{tree}:/second:/the/hosts"  # type: ignore[index]
    assert env["PATH"] == f"{Path(sys.executable).parent}:/usr/bin:/bin"  # type: ignore[index]
    assert env["KEPT"] == "yes"  # type: ignore[index]
    assert env["PYTHONSAFEPATH"] == "1"  # type: ignore[index]


def test_a_missing_folder_is_reported_when_the_code_is_shared(home: Home, tree: Path, tmp_path: Path) -> None:
    gone = str(tmp_path / "gone")
    ended = home.run(prologue("echo_module", cwd=gone, pythonpath=[str(tree)]))
    assert ended.returncode == 0
    lines = ended.stderr.decode().splitlines()
    assert lines == [f"launcher: cannot enter {gone}: No such file or directory; staying in {home.path}"]
    ended = home.run(prologue("echo_module", cwd=gone, bundle=make_bundle(tree)))
    assert (ended.returncode, ended.stderr) == (0, b"")


def test_code_that_was_sent_wins_over_the_working_directory(home: Home, tree: Path, tmp_path: Path) -> None:
    stale = tmp_path / "stale"
    stale.mkdir()
    (stale / "echo_module.py").write_text("raise SystemExit('stale')")
    bundle = make_bundle(tree)
    facts, _ = home.facts(prologue("echo_module", cwd=str(stale), bundle=bundle))
    assert facts["file"] == str(home.store / bundle.sha256 / "echo_module.py")
    assert facts["cwd"] == str(stale)


def test_damaged_code_is_refused(home: Home, tree: Path) -> None:
    bundle = make_bundle(tree)
    damaged = replace(bundle, payload=bundle.payload[:-1] + bytes([bundle.payload[-1] ^ 1]))
    ended = home.run(prologue("echo_module", cwd=str(tree), bundle=damaged))
    assert ended.returncode == 2
    assert ended.stderr.decode() == f"launcher: the code arrived damaged: its SHA-256 is not {bundle.sha256}\n"
    assert not home.store.exists()


def test_a_stream_that_ends_too_early_is_reported_in_one_line(home: Home, tree: Path) -> None:
    whole = prologue("echo_module", cwd=str(tree), bundle=make_bundle(tree))
    header = whole.index(b"\n") + 1
    for length in (header, header + 1, whole.index(b"\n", header), whole.index(b"\n", header) + 1, len(whole) - 1):
        ended = home.run(whole[:length])
        assert ended.returncode == 2
        assert ended.stderr.startswith(b"launcher: the connection ended"), length
        assert ended.stderr.count(b"\n") == 1
    assert home.run(whole[:10]).returncode != 0
    assert home.run(b"").returncode != 0
    assert not home.store.exists()


def test_code_is_unpacked_once(home: Home, tree: Path) -> None:
    bundle = make_bundle(tree)
    stdin = prologue("echo_module", cwd=str(tree), bundle=bundle)
    with ThreadPoolExecutor(4) as pool:
        assert {ended.returncode for ended in pool.map(lambda _: home.run(stdin), range(4))} == {0}
    assert [folder.name for folder in home.store.iterdir()] == [bundle.sha256]
    (home.store / bundle.sha256 / "sentinel").touch()
    home.facts(stdin)
    assert (home.store / bundle.sha256 / "sentinel").exists()


def test_a_store_that_cannot_be_written_is_reported_in_one_line(home: Home, tree: Path) -> None:
    (home.path / ".cache").write_text("a file")
    ended = home.run(prologue("echo_module", cwd=str(tree), bundle=make_bundle(tree)))
    assert ended.returncode == 2
    assert ended.stderr.startswith(b"launcher: the code cannot be unpacked into ")
    assert ended.stderr.count(b"\n") == 1


def test_an_old_python_says_so() -> None:
    source = Path(bootstrap.__file__).with_name("on_host.py").read_text()
    ast.parse(source, feature_version=(3, 7))
    code = "import sys; sys.version_info = (3, 9, 2, 'final', 0); exec(sys.stdin.read())"
    ended = subprocess.run([sys.executable, "-c", code], input=source, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert ended.stderr.endswith("is Python 3.9.2, and Python 3.11 or newer is needed\n")
    assert ended.stderr.count("\n") == 1


def test_nothing_that_is_sent_stands_in_a_process_list_or_a_file(home: Home, tree: Path) -> None:
    """Two secrets: one among the messages, one in the environment that travels in them."""
    (tree / "waits.py").write_text("import sys\nprint('up', flush=True)\nsys.stdin.read()\n")
    secret = "sk-0123456789-very-secret"
    command = ["sh", "-c", shell_command(sys.executable)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=home.path, env={"HOME": str(home.path)}
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(prologue("waits", cwd=str(tree), bundle=make_bundle(tree)) + secret.encode() + b"\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"up\n"
        lines = [Path(f"/proc/{process.pid}/{name}").read_bytes() for name in ("cmdline", "environ")]
        process.stdin.close()
    assert b"waits" in lines[0]
    assert not any(secret.encode() in line for line in lines)
    files = [path for path in home.path.rglob("*") if path.is_file()]
    assert files
    assert not any(secret.encode() in path.read_bytes() for path in files)


def test_every_string_arrives_unchanged(home: Home, tree: Path, nasty_strings: tuple[str, ...]) -> None:
    """As a message on stdin, and as a value that the module hands to a process of its own."""
    (tree / "hands_on.py").write_text(
        "import json, os, subprocess, sys\n"
        "values = json.loads(sys.stdin.readline())\n"
        "env = {**os.environ, **{f'V{n}': value for n, value in enumerate(values)}}\n"
        "show = 'import json, os; print(json.dumps([os.environ[f\"V{n}\"] for n in range(%d)]))' % len(values)\n"
        "subprocess.run([sys.executable, '-c', show], env=env, check=True)\n"
    )
    stdin = prologue("hands_on", cwd=str(tree), bundle=make_bundle(tree)) + json.dumps(nasty_strings).encode() + b"\n"
    ended = home.run(stdin)
    assert json.loads(ended.stdout) == list(nasty_strings), ended.stderr.decode()


def test_a_bundle_shows_no_payload() -> None:
    assert repr(Bundle(sha256="ab", payload=b"x" * 100)) == "Bundle(sha256='ab')"
