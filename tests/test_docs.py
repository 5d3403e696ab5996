"""Every command in the documentation runs, and every line of output it shows is printed.

A command is in a ``console`` block after ``$ ``, or is a line of a ``bash`` block. What follows it in a console
block is output: each line must be printed; ``…`` stands for anything left out. Commands that only look (plans, lists)
are run here; of the others, ``SLOW`` names the test that runs them.
"""

from __future__ import annotations

import ast
import importlib
import os
import re
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import launcher
from tests.conftest import REPOSITORY

PAGES = [*sorted(REPOSITORY.glob("*.md")), *sorted(REPOSITORY.glob("docs/**/*.md"))]

WHOLE = {"tutorial-finetune.md": "test_tutorial.py::test_every_command_does_what_the_page_shows"}
"""Pages whose commands build on each other, and the test that runs them in their order."""

SLOW = {
    "scripts/install && .venv/bin/launch": "test_main_job.py::test_the_default_run_learns_and_leaves_everything",
    "launch +exp=zero3_gpt2xl parallel=zero_infinity parallel.nvme_path=DISK parallel.pin_memory=false "
    "parallel.reduce_bucket_size=100_000_000 precision=fp32 backend.ranks=1 job.steps=2 job.global_batch=1 "
    "job.sequence_length=64 job.eval_sequences=1 job.sample_tokens=2": (
        "training/test_train.py::test_the_pages_command_for_gpt2_xl_on_a_small_model"
    ),
    "launch data preview data.path=chat.jsonl data.chat_template=chatml rows=1": (
        "cli/test_data.py::test_the_preview_that_the_page_shows"
    ),
    **dict.fromkeys(
        (
            "scripts/lab/image_model.py idefics3 model",
            "launch model=hf model.name=./model model.weights=random data.path=rows.jsonl job.sequence_length=256",
        ),
        "training/test_image_runs.py::test_a_run_continues_to_the_bit_and_transformers_loads_it",
    ),
    "launch runs": "cli/test_runs.py::test_a_real_run",
    "launch status": "cli/test_status.py::test_a_real_run_that_is_over",
    "launch logs -f --rank 0": "cli/test_cancel.py::test_a_real_run_is_followed_cancelled_and_gone",
    "launch cancel": "cli/test_cancel.py::test_a_real_run_is_followed_cancelled_and_gone",
    "launch rerun 20260101-120000-abcd job.steps=20": "cli/test_rerun.py::test_a_real_run_again",
    "launch report": "cli/test_report.py::test_a_real_run_in_a_browser",
    "launch job=serve model=smollm2_135m job.adapters='{polite: adapters/polite, terse: adapters/terse}'": (
        "inference/server/test_real.py::test_adapters_are_served_beside_the_base_model"
    ),
    "launch +exp=serve_smollm2": "jobs/test_serve.py::test_a_whole_run_serves_and_completes_when_signalled",
    "curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' -d "
    """'{"model": "smollm2_135m", "messages": [{"role": "user", "content": "What is the capital of France?"}]}'""": (
        "inference/server/test_openai.py::test_a_chat"
    ),
    **dict.fromkeys(
        (
            "python scripts/lab/image_model.py idefics3 tiny-vlm --weights",
            "launch job=serve model=hf model.name=tiny-vlm",
        ),
        "inference/server/test_image_requests.py::test_eight_mixed_requests_at_once_get_what_transformers_gives_each",
    ),
    "launch job=generate model.weights=20260101-120000-abcd@best": (
        "training/test_train.py::test_a_run_is_continued_in_its_own_directory"
    ),
    "launch export 20260101-120000-abcd@best mymodel dtype=bf16": (
        "jobs/test_export.py::test_transformers_loads_it_with_equal_logits"
    ),
    **dict.fromkeys(
        (
            "launch export 20260101-120000-abcd my.gguf format=gguf dtype=q8_0",
            "launch export mymodel my.gguf format=gguf dtype=q4_k",
            "launch export mymodel my_onnx format=onnx dtype=int4",
            "launch export mymodel my_openvino format=openvino dtype=int8",
            "launch job=generate model.weights=my.gguf",
        ),
        "jobs/test_export.py::test_a_run_goes_to_one_file_and_back",
    ),
    **dict.fromkeys(
        (
            "launch export 20260101-120000-abcd my.gguf format=gguf merge=true",
            "launch export 20260101-120000-abcd myadapter",
            "launch export 20260101-120000-abcd mymodel merge=true",
            "launch job=evaluate model=smollm2_135m model.adapter=myadapter",
            "launch job=generate model=smollm2_135m job.adapters='{my: 20260101-120000-abcd}' job.input=prompts.jsonl",
        ),
        "jobs/test_adapters.py::test_a_run_is_resumed_used_exported_and_merged",
    ),
    "launch job=serve model.weights=20260101-120000-abcd": (
        "execution/test_saved_weights.py::test_every_job_takes_the_model_and_the_tokenizer_of_the_run"
    ),
    "python scripts/bench/faults.py --out faults.json": (
        "scripts/test_faults.py::test_a_run_ends_everywhere_and_tells_why"
    ),
    "launch +exp=generate_smollm2 job.input=questions.jsonl job.output=answers.jsonl": (
        "jobs/test_generate.py::test_one_rank_or_two_a_killed_one_or_none_the_answers_are_the_same"
    ),
    "python scripts/bench/serving_peers_make.py PEERS": "scripts/test_serving_peers.py::test_cells_become_a_table",
    "python scripts/bench/serving_peers.py --peers PEERS --out cells.json": (
        "scripts/test_serving_peers.py::test_cells_become_a_table"
    ),
    "python scripts/bench/serving_soak.py --minutes 20 -- model=smollm2_135m precision=fp32": (
        "scripts/test_serving_soak.py::test_a_short_soak_of_echoing_engines"
    ),
    **dict.fromkeys(
        ("pip install --no-deps ./examples/plugin", "launch +exp=example"),
        "plugins/test_example.py::test_the_installed_example_trains_with_all_that_it_adds",
    ),
    **dict.fromkeys(
        (
            "launch deploy job=serve tracker=local deploy=monitoring deploy.out=monitoring/chat deploy.name=chat",
            "launch deploy tracker=prometheus deploy=monitoring deploy.out=monitoring/training deploy.name=training",
        ),
        "deploy/monitoring/test_render.py::test_the_verb_writes_what_is_rendered",
    ),
    **dict.fromkeys(
        (
            "launch deploy +exp=serve_smollm2 deploy=nginx deploy.out=nginx "
            "deploy.upstreams=[10.0.0.1:8000,10.0.0.2:8000]",
            "launch deploy +exp=serve_smollm2 deploy=haproxy deploy.out=haproxy "
            "deploy.upstreams=[10.0.0.1:8000,10.0.0.2:8000]",
            "launch deploy +exp=serve_smollm2 deploy=compose deploy.out=stack deploy.image=launcher:1 deploy.servers=2",
            "nginx -t -c $PWD/nginx/nginx.conf",
            "haproxy -c -f haproxy/haproxy.cfg",
        ),
        "deploy/test_proxies.py::test_the_commands_of_the_page",
    ),
    "launch deploy +exp=serve_smollm2 deploy=docker deploy.out=image deploy.image=registry/team/launcher:1": (
        "deploy/test_docker.py::test_the_command_of_the_page"
    ),
    "python scripts/bench/load_balancing.py --requests 300": (
        "deploy/test_load_balancing.py::test_no_request_fails_that_had_sent_no_token"
    ),
    "python scripts/bench/canary_rehearsal.py --kind haproxy": (
        "deploy/test_canary_proxies.py::test_a_bad_version_is_rolled_back_and_a_good_one_promoted"
    ),
    "python scripts/bench/provoke_alerts.py": (
        "deploy/monitoring/test_prometheus.py::test_alerts_fire_on_what_they_are_about_and_end"
    ),
    "python scripts/bench/draw_dashboards.py docs/images --seconds 120": (
        "deploy/monitoring/test_prometheus.py::test_every_query_of_every_panel_returns_data"
    ),
    "python scripts/bench/sparsity_reference.py runs/sparsify_smollm2/20260101-120000-abcd": (
        "jobs/test_sparsify.py::test_what_is_saved_is_what_others_load_and_int8_keeps_its_zeros"
    ),
    "scripts/test": "scripts/test_scripts.py::test_scripts_are_executable_and_parse",  # the rest is this very run
}
"""Command to ``file::test`` that runs it, or does the same with other paths."""


@dataclass
class Example:
    """A command as the pages show it; each runs once, for all of them."""

    command: str
    pages: set[str] = field(default_factory=set)
    output: set[str] = field(default_factory=set)


def examples() -> list[Example]:
    found: dict[str, Example] = {}
    for page in (page for page in PAGES if page.name not in WHOLE):
        shown: list[tuple[str, list[str]]] = []
        for block in re.findall(r"^```console\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
            for entry in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
                command, *output = entry.splitlines()
                shown.append((command.partition("  #")[0].strip(), output))
        for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
            shown += [(command, []) for command in re.sub(r"\s*\\\n\s*", " ", block).splitlines()]
        for command, output in shown:
            example = found.setdefault(command, Example(command))
            example.pages.add(page.name)
            example.output.update(line.strip() for line in output if line.strip() not in ("", "…"))
    return list(found.values())


def only_looks(command: str) -> bool:
    words = shlex.split(command.split("|")[0])
    program = words[:1] == ["launch"] or words[:3] == ["python", "-m", "launcher"]
    looking = {"plan", "list", "show", "diff", "dry_run=true", "--help"}
    return program and bool(looking.intersection(words))


def words_of(command: str) -> list[str]:
    """Return the arguments of a command that needs no shell and no process of its own; empty for others."""
    words = shlex.split(command)
    if re.search(r"[|&;<>$`*?]", command) or words[0] not in ("launch", "python"):
        return []
    return words[1:] if words[0] == "launch" else words[3:]


EXAMPLES = examples()


@pytest.mark.parametrize(
    "example", [e for e in EXAMPLES if only_looks(e.command)], ids=lambda e: f"{min(e.pages)}: {e.command}"
)
def test_command_prints_what_the_page_shows(example: Example, launch, launch_in_process, tmp_path: Path) -> None:
    given = tmp_path / "hostfile.example"  # pages name it as it lies in the repository
    given.symlink_to(REPOSITORY / given.name)
    if words := words_of(example.command):
        printed = launch_in_process(*words).expect(0).stdout
    else:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        command = ("bash", "-o", "pipefail", "-c", example.command)
        printed = launch(command=command, env={"PATH": path}).expect(0).stdout
    missing = example.output - {line.strip() for line in printed.splitlines()}
    assert not missing, f"not printed: {missing}\n{printed}"
    assert list(tmp_path.iterdir()) == [given], "a command that only looks has written something"


@pytest.mark.parametrize("command", [e.command for e in EXAMPLES if not only_looks(e.command)])
def test_slow_command_has_a_test(command: str) -> None:
    assert command in SLOW, "name the test that runs it in SLOW"


@pytest.mark.parametrize(("command", "test"), [*SLOW.items(), *WHOLE.items()])
def test_named_test_exists(command: str, test: str) -> None:
    shown = {example.command for example in EXAMPLES} | {page.name for page in PAGES}
    assert command in shown, "no page shows it any more"
    file, _, name = test.partition("::")
    tree = ast.parse((REPOSITORY / "tests" / file).read_text())
    assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            if not target.startswith(("http://", "https://")):
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_code_words_that_look_like_files_exist() -> None:
    """A path in backticks that starts in one of our folders is a file or folder."""
    for page in PAGES:
        for word in re.findall(r"`((?:launcher|conf|scripts|tests|docs)/[\w./-]*)`", page.read_text()):
            assert (REPOSITORY / word).exists(), f"{page.name} names {word}"


def test_the_readme_fits_three_screens() -> None:
    assert len((REPOSITORY / "README.md").read_text().splitlines()) <= 120


def python_blocks() -> list[tuple[str, str]]:
    blocks = [
        (page.name, re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)) for page in PAGES
    ]
    return [(name, text) for name, texts in blocks for text in texts]


@pytest.mark.parametrize(("page", "text"), python_blocks())
def test_python_blocks_name_what_exists(page: str, text: str) -> None:
    for node in ast.walk(ast.parse(text, page)):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("launcher"):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, name.name) for name in node.names)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "launcher":
            assert hasattr(launcher, node.attr)
