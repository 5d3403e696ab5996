import pytest

from launcher.config.backend.base import DEFAULT_GLOBS, forwarded_env, forwarded_names, validate_env

SENT = [
    *("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "HF_HOME", "HF_TOKEN", "WANDB_API_KEY", "OMP_NUM_THREADS"),
    *("TORCH_NCCL_BLOCKING_WAIT", "TORCHINDUCTOR_CACHE_DIR", "PYTORCH_CUDA_ALLOC_CONF", "CUDA_LAUNCH_BLOCKING"),
    *("https_proxy", "NO_PROXY", "SSL_CERT_FILE", "UCX_TLS", "FI_PROVIDER", "DS_SKIP_CUDA_CHECK"),
]
KEPT = [
    *("PATH", "HOME", "SSH_AUTH_SOCK", "CUDA_VISIBLE_DEVICES", "PET_NNODES", "WANDB_SERVICE", "LD_LIBRARY_PATH"),
    *("AWS_SECRET_ACCESS_KEY", "nccl_debug", "LANG", "LC_ALL", "RANK", "LAUNCHER_HOST", "PYTHONPATH", "DS_ENV_FILE"),
]


@pytest.mark.parametrize("name", SENT)
def test_sent(name: str) -> None:
    assert forwarded_env({name: "x"}, DEFAULT_GLOBS) == {name: "x"}


@pytest.mark.parametrize("name", KEPT)
def test_kept(name: str) -> None:
    assert forwarded_env({name: "x"}, DEFAULT_GLOBS) == {}


def test_what_would_break_a_host_stays_even_when_everything_is_asked_for() -> None:
    environ = dict.fromkeys([*SENT, *KEPT], "x")
    never = {"CUDA_VISIBLE_DEVICES", "PET_NNODES", "WANDB_SERVICE", "DS_ENV_FILE", "LAUNCHER_HOST"}
    assert set(forwarded_names(environ, ["*"])) == set(environ) - never


def test_a_name_that_no_shell_takes_is_not_sent() -> None:
    assert forwarded_names({"BASH_FUNC_x%%": "() { :; }", "A-B": "x", "A.B": "x", "FINE": "x"}, ["*"]) == ("FINE",)


def test_globs_of_the_user_add_to_the_others() -> None:
    environ = {"MY_FLAG": "a b", "NCCL_DEBUG": "INFO", "OTHER": "x"}
    assert forwarded_names(environ, [*DEFAULT_GLOBS, "MY_*"]) == ("MY_FLAG", "NCCL_DEBUG")


def test_values_are_not_touched(nasty_strings: tuple[str, ...]) -> None:
    environ = {f"HF_{number}": value for number, value in enumerate(nasty_strings)}
    assert forwarded_env(environ, DEFAULT_GLOBS) == environ


@pytest.mark.parametrize("name", ["", " ", "A-B", "1A", "A B", "A.B", "A=B", "ä", "A\n", "$(x)"])
def test_a_name_that_no_shell_takes_is_refused(name: str) -> None:
    (error,) = validate_env({"FINE_1": "x", "_a": "y", name: "z"})
    assert error.option == "backend.env"
    assert f"{name!r} is not a valid name of a variable" in error.why


def test_a_value_that_no_process_takes_is_refused() -> None:
    (error,) = validate_env({"A": "x\0y"})
    assert error.option == "backend.env.A"
