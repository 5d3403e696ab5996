import pytest

from launcher.config.component import class_title, field_docs
from launcher.config.folders import groups
from launcher.config.registry import KINDS, component_class
from launcher.errors import ConfigError
from tests.helpers import launch_verb

run = launch_verb("list")


def listed(capsys, *words):
    assert run(words) == 0
    return capsys.readouterr().out


def test_groups_with_their_options(capsys):
    lines = listed(capsys).splitlines()
    shown = {line.split()[0]: line for line in lines if line}
    assert set(groups()) <= set(shown)
    assert all(option in shown["precision"] for option in ("bf16", "fp16", "fp32"))


def test_experiments_with_their_first_comment(capsys):
    rows = dict(line.split(maxsplit=1) for line in listed(capsys, "exp").splitlines() if not line.startswith(" "))
    assert set(rows) == set(groups()["exp"])
    assert rows["ddp_gpt2"] == "GPT-2 124 M, data parallel."
    assert not any("@package" in comment for comment in rows.values())


def test_keys_with_type_default_and_meaning(capsys):
    text = " ".join(listed(capsys, "backend").split())
    assert "backend.agent torchrun torchrun or deepspeed Which launcher starts the ranks of one host." in text
    meaning = "Ranks on each host; auto takes the hostfile's count, else one per visible GPU."
    assert f"backend.ranks auto a whole number or auto {meaning}" in text


@pytest.mark.parametrize("width", [60, 80, 200])
def test_names_are_whole_and_lines_fit(capsys, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    names = {f"{group}.{name}" for group in KINDS for cls in _classes(group) for name in field_docs(cls)}
    words = [word for group in KINDS for word in listed(capsys, group).split()]
    assert names <= {word.rstrip(":") for word in words}
    assert max(len(line) for line in listed(capsys, "backend", "parallel", "job").splitlines()) <= width


def _classes(group):
    return [component_class(group, kind) for kind in KINDS[group]]


def test_every_kind_of_a_group(capsys):
    text = listed(capsys, "parallel")
    assert all(f"\nkind {kind}: " in text for kind in KINDS["parallel"])
    assert "kind train: " in listed(capsys, "job")


def test_values_an_option_sets_are_marked(capsys):
    lines = listed(capsys, "parallel/zero3_offload").splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines if line.startswith("  parallel.")}
    assert rows["parallel.offload_optimizer"][:2] == ["cpu", "*"]
    assert rows["parallel.overlap_comm"][:2] == ["true", "true"]


def test_an_experiment_is_shown_as_written(capsys):
    assert "  - override /model: gpt2_xl" in listed(capsys, "exp/zero3_gpt2xl")


def test_options_of_the_run_itself(capsys):
    assert listed(capsys, "run").startswith("Where a run is kept.\n  run.root")


def test_options_of_the_user(capsys, tmp_path):
    (tmp_path / "model").mkdir()
    sizes = "num_hidden_layers: 1\nnum_attention_heads: 1\nhidden_size: 8\n"
    (tmp_path / "model" / "mine.yaml").write_text(f"# My own.\nkind: gpt2\nname: mine\n{sizes}")
    (tmp_path / "model" / "bare.yaml").write_text(f"# @package _global_\nkind: gpt2\nname: bare\n{sizes}")
    of_group = [line.split() for line in listed(capsys, "model", "--config-dir", str(tmp_path)).splitlines()]
    assert ["mine", "My", "own."] in of_group
    assert ["bare"] in of_group, "a directive of Hydra's is no comment"
    shown = [line.split()[:3] for line in listed(capsys, "model/mine", "--config-dir", str(tmp_path)).splitlines()]
    assert ["model.num_hidden_layers", "1", "*"] in shown


def test_misspelt_names_are_guessed():
    with pytest.raises(ConfigError, match="did you mean parallel"):
        run(["paralel"])
    with pytest.raises(ConfigError, match="did you mean zero3"):
        run(["parallel/zer3"])


def test_help(capsys):
    assert "launch list parallel/zero3" in listed(capsys, "--help")


@pytest.mark.parametrize(("group", "kind"), [(group, kind) for group, kinds in KINDS.items() for kind in kinds])
def test_every_option_is_documented(group, kind):
    cls = component_class(group, kind)
    assert class_title(cls)
    assert [name for name, text in field_docs(cls).items() if not text] == []


@pytest.mark.parametrize("group", groups())
def test_every_file_says_what_it_is(group, capsys):
    for option in groups()[group]:
        first = listed(capsys, f"{group}/{option}").splitlines()[0]
        assert len(first.removeprefix(f"{group}/{option}:").split()) >= 1, f"{group}/{option}.yaml has no first comment"
