import functools
import re
import subprocess

import hydra
import pytest
import yaml
from omegaconf import OmegaConf

from launcher.config.compose import compose
from launcher.config.folders import conf_folder, groups
from launcher.config.hydra_tree import compose_tree
from launcher.config.overrides import parse_overrides
from launcher.config.registry import KINDS
from launcher.config.snapshot import dump_run, load_run
from launcher.errors import ConfigErrors


def mistakes(*words, **options):
    with pytest.raises(ConfigErrors) as caught:
        compose(words, **options)
    return [str(error) for error in caught.value.errors]


@pytest.mark.parametrize("exp", groups()["exp"])
def test_every_experiment_composes_and_survives_its_snapshot(exp, tmp_path):
    run = compose([f"+exp={exp}"]).run
    file = tmp_path / "run.yaml"
    file.write_text(dump_run(run), encoding="utf-8")
    assert load_run(file) == run


OPTIONS = {group: options for group, options in groups().items() if group in KINDS}
NEEDED = {
    "backend/kubernetes": ["backend.image=x"],
    "deploy/kubernetes": ["deploy.out=x", "deploy.image=x"],
    "deploy/compose": ["deploy.out=x", "deploy.image=x"],
    "deploy/docker": ["deploy.out=x", "deploy.image=x"],
    "deploy/helm": ["deploy.out=x", "deploy.image=x"],
    "deploy/nginx": ["deploy.out=x"],
    "deploy/haproxy": ["deploy.out=x"],
    "deploy/monitoring": ["deploy.out=x"],
    "model/hf": ["model.name=x"],
    "data/hf": ["data.path=x"],
    "parallel/zero_infinity": ["parallel.nvme_path=x"],
}


@functools.cache
def composed_together(number):
    """Compose the options of this number of all groups at once: a tenth of a second, and what one needs is its own."""
    chosen = {group: options[number % len(options)] for group, options in OPTIONS.items()}
    words = [[f"{group}={option}", *NEEDED.get(f"{group}/{option}", [])] for group, option in chosen.items()]
    return compose([word for several in words for word in several]).run


@pytest.mark.parametrize(("group", "option"), [(group, option) for group in OPTIONS for option in OPTIONS[group]])
def test_every_option_composes(group, option):
    run = composed_together(OPTIONS[group].index(option))
    assert getattr(run, group).kind in KINDS[group]


def test_every_group_of_the_schema_has_options_and_the_other_way_round():
    assert set(groups()) == {*KINDS, "exp", "sweep"}


def test_an_experiment_can_be_named_with_or_without_plus():
    assert compose(["exp=ddp_gpt2"]).run == compose(["+exp=ddp_gpt2"]).run


def test_the_command_line_wins_over_the_experiment():
    assert compose(["job.steps=7", "+exp=ddp_gpt2"]).run.job.steps == 7


VALUES = (
    *("job.steps=7", "job.seed=null", "run.name=a${model.name}", "model.name='\\\\${HOME}'"),
    *("backend.env={A: 'b c', D: 1}", "backend.env.A=x", "parallel.deepspeed={zero_optimization: {stage: 3}}"),
    *("parallel.deepspeed.gradient_clipping=0.5", "tracker.tags=[a, 'b,c']", "optimizer.betas=[0.9, 0.95]"),
    *("optimizer.betas.1=0.99", "unknown.a.b=[{c: d}]"),
)


def test_no_shipped_option_sets_anything_outside_of_its_group():
    """Compositions are put together from the options of groups."""
    for group in KINDS:
        for file in (conf_folder() / group).glob("*.yaml"):
            text = file.read_text()
            assert "@package" not in text
            assert "defaults" not in yaml.safe_load(text)


@pytest.mark.parametrize(
    "choices",
    [
        (),
        ("parallel=zero3", "+exp=zero3_gpt2xl", "model=gpt2_tiny"),
        ("model=gpt2", "parallel=zero3", "optimizer=sgd"),
    ],
)
def test_options_get_the_values_that_hydra_gives_them(choices):
    mistakes = []
    for choice in choices:  # what is known of options by themselves is used for several
        if not choice.startswith("+"):
            compose([choice])
    overrides = parse_overrides([*choices, *VALUES], groups(), sweeping=False, report=mistakes.append)
    assert not mistakes
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(conf_folder())):
        expected = OmegaConf.to_container(hydra.compose("config", [override.word for override in overrides]))
    assert compose_tree(overrides, None, mistakes.append) == expected
    assert not mistakes


def test_a_composition_changes_nothing_for_the_next():
    words = ("model=gpt2_tiny", "backend.env={A: b}")
    first = compose(words)
    compose([*words, "backend.env.A=c", "backend.env.B=d", "job.steps=7"])
    first.tree["backend"]["env"]["A"] = "changed"
    again = compose(words[::-1])
    assert again.run == first.run
    assert again.tree["backend"]["env"] == {"A": "b"}


def test_a_file_of_the_users_is_read_at_each_composition(own):
    file = own / "exp" / "mine.yaml"
    for steps in (3, 4):
        file.write_text(f"# @package _global_\njob:\n  steps: {steps}\n")
        assert compose(["+exp=mine"], config_dir=own).run.job.steps == steps


def test_article_settings_of_zero3_gpt2xl():
    run = compose(["+exp=zero3_gpt2xl"]).run
    assert (run.job.global_batch, run.job.clip_norm, run.optimizer.lr) == (16, 1.0, 5e-5)
    assert (run.optimizer.betas, run.optimizer.eps, run.optimizer.weight_decay) == ((0.9, 0.999), 1e-8, 0.01)
    assert (run.parallel.stage, run.parallel.offload_optimizer, run.parallel.offload_parameters) == (3, "cpu", "cpu")
    assert run.parallel.pin_memory
    assert run.parallel.overlap_comm
    assert run.parallel.contiguous_gradients
    assert run.parallel.reduce_bucket_size == 1_000_000_000


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("modle=gpt2", "modle (command line): no such option; did you mean model?"),
        ("model=gtp2", "model=gtp2: no such option; did you mean gpt2?"),
        ("+exp=zero3_gpt2x", "exp=zero3_gpt2x: no such option; did you mean zero3_gpt2xl"),
        ("job.stpes=3", "job.stpes (command line): no such option; did you mean steps?"),
        ("+job.stpes=3", "job.stpes (command line): no such option; did you mean steps?"),
        ("++job.stpes=3", "job.stpes (command line): no such option; did you mean steps?"),
        ("+typo=1", "typo (command line): no such option"),
        ("job.steps=many", "job.steps=many (command line): is text; give a whole number"),
        ("job.steps=0", "job.steps=0 (command line): must be at least 1; set job.steps=1"),
        ("job.seed=1,2", "job.seed=1,2 (command line): is several values in Hydra's grammar; add -m"),
        ("~tracker", "removes an option"),
        ("job.steps", "is not an override of the form option=value"),
        ("optimizer.betas=[0.9]", "optimizer.betas"),
        ("optimizer.betas=[0.9,1.5]", "each must be at least 0 and below 1"),
        ("parallel.kind=zero", "follows from the option chosen; set parallel=<option>"),
        ("hydra.run.dir=x", "has no effect here"),
        ("data.path=${nowhere}", "data.path=${nowhere} (command line): Interpolation key 'nowhere' not found"),
        ("model.hidden_size=130", "is not a multiple of model.num_attention_heads=4; set model.hidden_size=128"),
        ("schedule.final_factor=2", "must lie between 0 and 1"),
        ("precision=half", "precision=half: no such option"),
    ],
)
def test_a_bad_word_is_one_message(word, message):
    assert any(message in text for text in mistakes(word)), mistakes(word)


def test_several_mistakes_come_in_one_pass():
    assert len(mistakes("job.steps=x", "job.micro_batch=0", "model=gtp2", "+typo=1", "optimizer.lr=fast")) == 5


@pytest.fixture
def own(tmp_path):
    (tmp_path / "exp").mkdir()
    return tmp_path


def test_a_folder_of_the_users_own(own):
    (own / "exp" / "mine.yaml").write_text("# @package _global_\njob:\n  steps: 3\n")
    assert compose(["+exp=mine"], config_dir=own).run.job.steps == 3


def test_a_mistake_in_a_file_names_file_and_line(own):
    (own / "exp" / "mine.yaml").write_text("# @package _global_\njob:\n  steps: 3\n  stpes: 4\n")
    (message,) = mistakes("+exp=mine", config_dir=own)
    assert "exp/mine.yaml:4" in message
    assert "did you mean steps?" in message


def test_a_file_that_overrides_a_missing_option_is_refused(own):
    (own / "exp" / "mine.yaml").write_text("# @package _global_\ndefaults:\n  - override /model: gtp2\n")
    (message,) = mistakes("+exp=mine", config_dir=own)
    assert "gtp2" in message


@pytest.mark.parametrize(
    ("line", "right", "cause"),
    [
        ("- override model: gpt2", "- override /model: gpt2", "has no slash before the group"),
        ("- model: gpt2", "- override /model: gpt2", "has no slash before the group"),
        ("- /model: gpt2", "- override /model: gpt2", "lacks `override`"),
        ("- model=gpt2", "- override /model: gpt2", "is not written as GROUP: OPTION"),
        ("- override compile: true", '- override /compile: "true"', "has no slash"),
        ("- sweep: lr_batch", "- /sweep: lr_batch", "has no slash"),
        ("- override /sweep: lr_batch", "- /sweep: lr_batch", "has `override`"),
        ("- exp: base", "- base", "names the group exp"),
        ("- /exp: base", "- base", "names the group exp"),
    ],
)
def test_a_line_of_defaults_that_hydra_reads_otherwise_is_one_message_with_the_right_line(own, line, right, cause):
    file = own / "exp" / "mine.yaml"
    text = f"# @package _global_\ndefaults:\n  {line}\n  - _self_\njob:\n  steps: 3\n"
    (own / "exp" / "base.yaml").write_text("# @package _global_\nmodel:\n  hidden_size: 64\n")
    file.write_text(text)
    (own / "exp" / "more.yaml").write_text("# @package _global_\ndefaults:\n  - mine\n")
    for word in ("+exp=mine", "+exp=more"):
        file.write_text(text)
        (message,) = mistakes(word, config_dir=own)
        assert message == f"exp=mine: `{line}` (line 3 of {file}) {cause}{message.partition(cause)[2]}"
        assert message.endswith(f"; write `{right}`")
        file.write_text(text.replace(line, right))
        composed = compose([word], config_dir=own)
        assert composed.run.job.steps == 3
        sizes = (composed.run.model.kind, composed.run.model.hidden_size, composed.run.compile.kind)
        expected = {"model": ("gpt2", 768, "false"), "compile": ("gpt2", 128, "true"), "exp": ("gpt2", 64, "false")}
        assert sizes == expected.get(re.findall(r"model|compile|exp|sweep", line)[0], ("gpt2", 128, "false"))


def test_a_file_that_is_not_yaml_is_refused(own):
    (own / "exp" / "mine.yaml").write_text("# @package _global_\njob: [1\n")
    (message,) = mistakes("+exp=mine", config_dir=own)
    assert "mine.yaml" in message


def test_a_snapshot_that_changed_is_refused(tmp_path):
    run = compose([]).run
    file = tmp_path / "run.yaml"
    file.write_text(dump_run(run), encoding="utf-8")
    with pytest.raises(Exception, match="it changed after the plan was made"):
        load_run(file, expected_hash="0" * 64)


def test_conf_is_where_the_code_looks():
    assert (conf_folder() / "config.yaml").is_file()


@pytest.mark.parametrize(("word", "kind"), [("true", "true"), ("false", "false"), ("True", "true")])
def test_an_option_that_looks_like_a_truth_value(word, kind):
    assert compose([f"compile={word}"]).run.compile.kind == kind


def test_such_an_option_in_an_experiment(tmp_path):
    (tmp_path / "exp").mkdir()
    quoted, bare = (tmp_path / "exp" / f"{name}.yaml" for name in ("quoted", "bare"))
    quoted.write_text('# @package _global_\ndefaults:\n  - override /compile: "true"\n')
    bare.write_text("# @package _global_\ndefaults:\n  - override /compile: true\n")
    assert compose(["+exp=quoted"], config_dir=tmp_path).run.compile.kind == "true"
    assert compose(["+exp=quoted", "compile=false"], config_dir=tmp_path).run.compile.kind == "false"
    (said,) = mistakes("+exp=bare", config_dir=tmp_path)
    place = f"`- override /compile: true` (line 3 of {bare})"
    assert f'{place} has a boolean in YAML for its option; write `- override /compile: "true"`' in said


_GLOBAL = b"# @package _global_\n"


@pytest.mark.parametrize(
    ("content", "message"),
    {
        b"job:\n  sample_prompt: caf\xe9\n": "mine.yaml is not UTF-8: byte 0xe9 at position",
        b"\xef\xbb\xbf": "mine.yaml begins with a byte order mark; remove it: sed -i",
        b"defaults: gpt2\n": "mine.yaml: defaults is not a list; write `- override /model: gpt2`",
        b"- a\n": "mine.yaml holds no options",
        b"hello\n": "mine.yaml holds no options",
        b"job:\n  steps: " + b"[" * 2000: "mine.yaml is nested too deeply",
        b"5: 6\n": "5 (FOLDER/exp/mine.yaml:2): is a number in YAML, not the name of an option",
        b"job:\n  yes: 3\n": "job.yes (FOLDER/exp/mine.yaml:3): is a boolean in YAML, not the name of an option",
        b"job: {}\ndata: {}\njob: {}\n": "job (FOLDER/exp/mine.yaml:4): is already set in line 2, and a mapping",
        b"job:\n  steps: 3\n  steps: 4\n": "job.steps (FOLDER/exp/mine.yaml:4): is already set in line 3",
        b"defaults:\n  - yes\n": "`- yes` (line 3 of FOLDER/exp/mine.yaml) is a boolean in YAML, not a name",
        b"defaults: [3]\n": "`defaults: [3]` (line 2 of FOLDER/exp/mine.yaml) is a number in YAML, not a name",
        b"defaults:\n  -\n": "`-` (line 3 of FOLDER/exp/mine.yaml) is nothing in YAML, not a name",
        b"defaults:\n  - on: gpt2\n": "`- on: gpt2` (line 3 of FOLDER/exp/mine.yaml) begins with what is a boolean",
        b"defaults:\n  - override /compile: False\n": "has a boolean in YAML for its option; write `- over",
        b"defaults:\n  - override /model: [gpt2, hf]\n": "names no option: a group takes one; write `- over",
        b"defaults:\n  - override /model: gpt2\n    override /data: text\n": "holds several groups in one entry",
        b"defaults:\n  - [gpt2]\n": "`- [gpt2]` (line 3 of FOLDER/exp/mine.yaml) is a list, not a group and its option",
        b"job.steps: 5\n": "is written with a dot, which YAML does not split; write job: {steps: …}",
        b"data:\n  path: ${nope/x\n": "data.path=${nope/x (FOLDER/exp/mine.yaml): holds ${ without the name and }",
    }.items(),
    ids=lambda value: value[:20] if isinstance(value, bytes) else "",
)
def test_a_file_of_the_user_that_cannot_be_used_is_named(tmp_path, content, message):
    (tmp_path / "exp").mkdir()
    file = tmp_path / "exp" / "mine.yaml"
    file.write_bytes(content + _GLOBAL if content.startswith(b"\xef") else _GLOBAL + content)
    with pytest.raises(ConfigErrors) as caught:
        compose(["+exp=mine"], config_dir=tmp_path)
    (said,) = map(str, caught.value.errors)
    assert message.replace("FOLDER", str(tmp_path)) in said


def test_an_option_of_the_user_that_sets_a_key_twice_is_refused(tmp_path):
    (tmp_path / "model").mkdir()
    file = tmp_path / "model" / "mine.yaml"
    file.write_text("kind: gpt2\nname: a\nname: b\n")
    (tmp_path / "exp").mkdir()
    (tmp_path / "exp" / "own.yaml").write_text("# @package _global_\ndefaults:\n  - override /model: mine\n")
    for word in ("model=mine", "exp=own"):
        (said,) = mistakes(word, config_dir=tmp_path)
        assert said.startswith(f"model.name ({file}:3): is already set in line 2")


def test_the_advice_for_such_a_file_works(tmp_path):
    (tmp_path / "exp").mkdir()
    file = tmp_path / "exp" / "mine.yaml"
    file.write_bytes(b"\xef\xbb\xbf" + _GLOBAL + b"job: {steps: 5}\ndata:\n  path: \\${nope/x\n")
    with pytest.raises(ConfigErrors) as caught:
        compose(["+exp=mine"], config_dir=tmp_path)
    subprocess.run(caught.value.errors[0].fix.partition(": ")[2], shell=True, check=True)
    run = compose(["+exp=mine"], config_dir=tmp_path).run
    assert (run.job.steps, run.data.path) == (5, "${nope/x")
