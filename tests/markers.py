"""Which of the markers in pyproject.toml each test has: by its place, else by its fixtures, else ``unit``."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

import pytest

MARKERS = ("unit", "process", "cluster", "bench", "gpu", "image")

_BY_PLACE = (
    ("gpu/*", "gpu"),
    ("deploy/test_image.py*", "image"),
    *((f"scripts/test_{name}.py*", "bench") for name in ("gpu_check", "serving_peers", "serving_soak")),
    *((f"benchmarks/test_{name}.py*", "bench") for name in ("peak", "lm_eval")),
    ("benchmarks/*::test_a_wrong_value_on_one_rank_ends_the_job_on_all", "bench"),
    ("benchmarks/test_quantization.py::test_what_failed_in_a_process_of_its_own_is_named", "bench"),
    ("benchmarks/*::test_a_kernel_that_cannot_do_something_here_says_why", "bench"),
    ("benchmarks/test_activation.py::test_files_of_gradients_are_compared_by_tensor_and_bit", "bench"),
    ("benchmarks/test_activation.py::test_recomputing_takes_less_memory_and_changes_no_bit_of_a_gradient", "bench"),
    ("benchmarks/*::test_blocks_share_one_compilation_*", "bench"),
    ("benchmarks/test_reports.py::test_a_model_is_quantized_kept_and_measured_*", "bench"),
    *((f"scripts/test_{name}.py*", "cluster") for name in ("faults", "lab")),
    # Models, engines and servers: in this process or in others, seconds of torch each.
    ("engines/*", "process"),
    ("quantization/*", "process"),
    ("sparsity/*", "process"),
    ("checkpoint/foreign/*", "process"),
    *((f"models/test_{name}.py*", "process") for name in ("build", "compiled", "float8", "from_pretrained", "hub")),
    *((f"models/test_{name}.py*", "process") for name in ("kernels", "lazy", "processor", "recompute", "smollm2")),
    ("models/test_weights.py*", "process"),
    *(
        (f"models/test_{name}.py*", "process")
        for name in ("adapters", "checkpoint_weights", "export", "families", "gguf")
    ),
    *(
        (f"inference/test_{name}.py*", "process")
        for name in ("adapters", "beams", "chat", "engine", "exactness", "image_engine", "invariance", "speculation")
    ),
    *(
        (f"inference/test_{name}.py*", "process")
        for name in ("distributed", "isolation", "kernels", "sampling", "step_plan")
    ),
    *((f"inference/test_{name}.py*", "process") for name in ("detokenizer", "transformers_engine", "vllm_engine")),
    ("inference/server/*", "process"),
    # Whole files that start processes by themselves.
    ("backends/slurm/test_setup.py*", "process"),
    *(
        (f"{name}.py*", "process")
        for name in ("planning/test_agents", "utils/test_build_once", "test_layers", "test_package")
    ),
    *(
        (f"{name}.py*", "process")
        for name in ("jobs/test_rank", "scripts/test_scripts", "supervision/test_full_disk", "remote/test_bootstrap")
    ),
    *((f"trackers/test_{name}.py*", "process") for name in ("orders", "revision", "several", "sidecar", "wandb_sweep")),
    *((f"{name}.py*", "process") for name in ("ops/test_build", "ops/test_locks", "checkpoint/test_lock")),
    *(
        (f"{name}.py*", "process")
        for name in ("doctor/test_examine", "backends/kubernetes/test_kubectl", "remote/test_bundle")
    ),
    *((f"supervision/test_{name}.py*", "process") for name in ("dumps", "file_channel", "working_directory")),
    ("plugins/test_contracts.py*", "process"),
    ("backends/kubernetes/test_manifest_text.py::test_kubectl_*", "process"),
    *((f"deploy/test_{name}.py*", "process") for name in ("canary_proxies", "proxies", "load_balancing")),
    *((f"deploy/test_docker.py::test_{name}", "process") for name in ("hadolint_*", "the_wheel_*")),
    ("deploy/test_checkov.py*", "process"),
    ("deploy/kubernetes/test_group.py::test_the_pods_*", "cluster"),
    *((f"deploy/test_compose.py::test_{name}_accepts_*", "process") for name in ("nginx", "promtool")),
    ("deploy/test_canary_gates.py::test_promtool_accepts_every_query", "process"),
    ("data/test_example_encoding.py*", "process"),
    ("deploy/monitoring/test_rules.py*", "process"),
    ("deploy/monitoring/test_prometheus.py*", "process"),
    *((f"deploy/kubernetes/test_{name}.py*", "process") for name in ("canary", "helm", "cluster")),
    # Single tests that do.
    ("plugins/test_other_processes.py*", "process"),
    ("plugins/test_example.py*", "process"),
    ("api/test_functions.py::test_importing_it_loads_nothing", "process"),
    *(
        (f"api/test_functions.py::test_a_{name}", "process")
        for name in (
            "starter_with_unread_output_is_ended",
            "refusal_of_the_starter_is_a_config_error",
            "submitted_run_is_cancelled_by_its_scheduler",
        )
    ),
    ("api/test_notebook.py*", "process"),
    ("*::test_the_submission_is_readable_complete_and_without_secrets", "process"),
    ("cli/test_cancel.py::test_a_job_is_cancelled_by_its_scheduler*", "process"),
    ("cli/test_cancel.py::test_a_run_on_another_machine_is_left_alone", "process"),
    ("cli/test_cancel.py::test_now_is_two_interrupts", "process"),
    ("cli/test_cancel.py::test_the_session_is_asked_and_its_agents_are_waited_for", "process"),
    ("cli/test_cancel.py::test_without_its_session_the_agents_get_the_order", "process"),
    ("cli/test_completion.py::test_a_shell_*", "process"),
    ("cli/test_logs.py::test_a_reader_that_goes_away_ends_the_following", "process"),
    ("cli/test_plan.py::test_the_parent_imports_nothing_heavy*", "process"),
    ("data/test_formats.py::test_a_json_object_becomes_rows_by_the_command_named*", "process"),
    ("data/test_formats.py::test_what_must_be_converted_is_refused_with_the_command_that_does*", "process"),
    ("data/test_tokens.py::test_four_processes_build_it_once", "process"),
    ("data/test_tokens.py::test_the_trained_tokenizer_is_the_same_every_time", "process"),
    ("jobs/test_generate.py::test_columns_of_prompts_are_written_as_lines_by_the_command_named*", "process"),
    ("jobs/test_verify.py::test_a_fork_*", "process"),
    ("jobs/test_verify.py::test_the_ranks_of_a_case_follow_one_that_failed", "process"),
    ("ops/test_folder.py::test_it_is_answered_without_torch", "process"),
    ("checkpoint/test_store.py::test_killed_thirty_times_the_latest_is_always_complete", "process"),
    ("profiling/test_profiling.py::test_a_case_in_a_process_of_its_own_is_taken_once_more", "process"),
    ("profiling/test_profiling.py::test_the_engine_of_a_server", "process"),
    ("profiling/test_profiling.py::test_cases_in_the_process_of_a_rank_are_taken_once_more*", "process"),
    ("supervision/test_heartbeat.py::test_it_crosses_processes", "process"),
    ("supervision/test_scratch_folders.py::test_folder_of_a_killed_agent_is_removed_at_the_next_start", "process"),
    ("supervision/test_processes.py::test_spared_processes_and_their_descendants_live", "process"),
    ("utils/test_machine.py::test_gpus_are_read_from_*", "process"),
    ("utils/test_machine.py::test_this_machine_takes_a_rank_for_each_gpu", "process"),
    ("config/test_compose.py::test_the_advice_for_such_a_file_works", "process"),
    ("config/test_overrides.py::test_quoted_words_*", "process"),
    ("errors/test_long_texts.py*", "process"),
    ("planning/test_render.py::test_a_pasted_command_is_the_command", "process"),
    ("training/test_metrics.py::test_killed_at_any_moment_it_has_every_line_that_was_recorded", "process"),
)
"""Patterns of tests, by their names below ``tests``; the first that matches decides, before any fixture."""

_BY_FIXTURE = {
    **dict.fromkeys(("lab_hosts", "lab_hosts_of_module", "cluster", "doomed_cluster"), "cluster"),
    **dict.fromkeys(
        (
            "launch",
            "launch_in_background",
            "preloading",
            "completed",
            "supervise",
            "child",
            "open_page",
            "browser",
            "chat",
        ),
        "process",
    ),
}
"""Fixtures that start processes, asked for by the test itself or through others; the first that is there decides."""

_STARTS = {"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.system", "pty.spawn"}
"""Audit events of a new process."""

_ALLOWED = {"nvidia-smi", "uname", "ldconfig", "fc-list", "cc", "gcc", "c++", "g++"}
"""Programs that any test may start: they describe this machine (GPUs, libraries, fonts), or compile what a cache keeps.

On a machine with an empty cache the first test that needs a compiled kernel or matplotlib's list of fonts starts them.
"""

_in_unit_test: list[str] = []


def holds_only_others(file: Path, marker: str) -> bool:
    """Whether every test of a file has another marker than ``marker``, by its place alone."""
    name = file.relative_to(Path(__file__).parent).as_posix()
    for pattern, found in _BY_PLACE:
        place, _, test = pattern.partition("::")
        if fnmatch(name, place):
            if found == marker:
                return False
            if not test:
                return True
    return False


def mark(item: pytest.Item) -> None:
    """Give a test its one marker."""
    tests = Path(__file__).parent
    name = f"{item.path.relative_to(tests).as_posix()}{item.nodeid.partition('.py')[2]}"
    item.add_marker(_marker(name, getattr(item, "fixturenames", ())))


def _marker(name: str, fixtures: Collection[str]) -> str:
    for pattern, marker in _BY_PLACE:
        if fnmatch(name, pattern):
            return marker
    for fixture, marker in _BY_FIXTURE.items():
        if fixture in fixtures:
            return "bench" if marker == "process" and name.startswith("benchmarks/") else marker
    return "unit"


@contextmanager
def refusing_processes(item: pytest.Item) -> Iterator[None]:
    """While a unit test runs, let the start of a process fail it."""
    if item.get_closest_marker("unit") is None:
        yield
        return
    _in_unit_test.append(item.nodeid)
    try:
        yield
    finally:
        _in_unit_test.clear()


def _refuse(event: str, arguments: tuple[object, ...]) -> None:
    if not _in_unit_test or event not in _STARTS:
        return
    if event == "subprocess.Popen" and Path(os.fsdecode(arguments[0])).name in _ALLOWED:  # type: ignore[arg-type]
        return
    raise AssertionError(f"{_in_unit_test[0]} starts a process: give it another marker in tests/markers.py")


sys.addaudithook(_refuse)
