"""Words of the command line: text as typed, and messages whose advice works in a real shell."""

import shlex
import subprocess
from pathlib import Path

import pytest

from launcher.__main__ import main
from launcher.config.compose import compose
from launcher.config.folders import groups
from launcher.config.option_text import quoted_word
from launcher.config.overrides import suggest_overrides
from launcher.config.snapshot import dump_run, load_run
from launcher.errors import ConfigErrors
from launcher.execution.sweep import SweepConfig, expand_grid, plan_sweep, render_sweep
from launcher.protocol.outcome import RunOutcome
from launcher.protocol.rundir import RunDir
from launcher.runs.config_source import load_saved_run
from launcher.supervision.finalize import closing_message
from launcher.utils.text import printable


def mistakes(*words, **options):
    with pytest.raises(ConfigErrors) as caught:
        compose(words, **options)
    return [str(error) for error in caught.value.errors]


AS_TYPED = [
    "epoch=3-step=87.ckpt",
    "we#ird%d@x",
    "ünï/日本/😀",
    "a b  c",
    " spaces at both ends ",
    "gpu[01-03]",
    "[unbalanced",
    "unbalanced]",
    "{a}",
    "}{",
    "a$b",
    "$HOME",
    "${unclosed",
    "$(id)",
    "`id`",
    "it's",
    'say "hello"',
    "'begun",
    r"back\slash",
    r"two\\slashes",
    "ends with\\",
    "C:\\x\\",
    "a:b:c",
    "http://u:p@h:1/x?y=z&w",
    "a~b",
    "(x)",
    "x(1)",
    "a;b|c>d<e*f?g!h^i",
    "1e5",
    "007",
    "1_000",
    "0x10",
    "3.10",
    "true",
    "False",
    "null",
    "NaN",
    "-inf",
    "-x",
    "--x",
    "",
    "tab\there",
]


def variables(run):
    return [run.backend.env[f"K{number}"] for number in range(len(run.backend.env))]


def words_of(texts):
    """Return an override that takes text for each of ``texts``; one composition then checks all."""
    return [f"backend.env.K{number}={text}" for number, text in enumerate(texts)]


def test_text_is_taken_as_typed_and_kept(tmp_path):
    """In a composition, in run.yaml, and in a stored run that is changed."""
    words = words_of(AS_TYPED)
    run = compose(words).run
    assert variables(run) == AS_TYPED
    stored = tmp_path / "run.yaml"
    stored.write_text(dump_run(run), encoding="utf-8")
    assert load_run(stored) == run
    assert variables(load_saved_run(tmp_path, ["job.seed=1"])) == AS_TYPED
    assert variables(load_saved_run(tmp_path, words[::-1])) == AS_TYPED


def test_quoted_words_pasted_into_a_shell_set_the_text():
    texts = [*AS_TYPED, *OTHER_MEANINGS]
    words = [quoted_word(f"backend.env.K{number}", text) for number, text in enumerate(texts)]
    shell = ["sh", "-c", f"printf '%s\\0' {' '.join(words)}"]
    parsed = subprocess.run(shell, capture_output=True, text=True, check=True, timeout=60).stdout.split("\0")[:-1]
    assert variables(compose(parsed).run) == texts


OTHER_MEANINGS = {
    "a,b": "several values",
    "it's, well": "several values",
    "range(1,3)": "several values",
    "choice(a,b)": "several values",
    "[a]": "a list",
    "[a,b]": "a list",
    "{a:b}": "a mapping",
    "${job.nothing}": "not found",
    "${oc.env:NO_SUCH_VARIABLE_HERE}": "not found",
}


def test_what_means_something_else_is_refused_with_a_word_that_works():
    errors = mistakes(*words_of(OTHER_MEANINGS))
    assert len(errors) == len(OTHER_MEANINGS)
    advised = []
    for text, meaning in OTHER_MEANINGS.items():
        number = list(OTHER_MEANINGS).index(text)
        said = next(said for said in errors if said.startswith(f"backend.env.K{number}={text} (command line): "))
        assert meaning in said
        advised.append(shlex.split(said[said.index(quoted_word(f"backend.env.K{number}", text)) :])[0])
    assert variables(compose(advised).run) == list(OTHER_MEANINGS)


def test_interpolations_are_resolved_where_they_lead_somewhere(monkeypatch, tmp_path):
    monkeypatch.setenv("SOME_FOLDER", "/data")
    words = ["data.path=${oc.env:SOME_FOLDER}/ünï=1.txt", "job.sample_prompt=${job.seed}"]
    run = compose(words).run
    assert (run.data.path, run.job.sample_prompt) == ("/data/ünï=1.txt", "0")
    (tmp_path / "run.yaml").write_text(dump_run(run), encoding="utf-8")
    assert load_saved_run(tmp_path, words[:1]).data.path == "/data/ünï=1.txt"
    with pytest.raises(ConfigErrors, match=r"job\.sample_prompt=.*name a variable that exists"):
        load_saved_run(tmp_path, words[1:])


def test_the_forms_that_the_options_name_work():
    slurm = compose(["backend=slurm", "backend.sbatch_options=[--mail-type=FAIL,'--comment=a,b',--x=007]"]).run.backend
    assert slurm.sbatch_options == ("--mail-type=FAIL", "--comment=a,b", "--x=007")
    nodes = compose(["backend=slurm", "backend.nodelist=gpu[01-03,07]", "backend.exclude=n1,n2"]).run.backend
    assert (nodes.nodelist, nodes.exclude) == ("gpu[01-03,07]", "n1,n2")
    hosts = compose(["backend=ssh", "backend.include=work1:0,1", "backend.exclude=work2@work3:0"]).run.backend
    assert (hosts.include, hosts.exclude) == ("work1:0,1", "work2@work3:0")
    run = compose(["backend.env={PROXY: http://u=p#x%y, N: 007}", "data.path=[a=b.txt, ü.txt,1e5]", "run.dir=null"]).run
    assert run.backend.env == {"PROXY": "http://u=p#x%y", "N": "007"}
    assert run.data.path == ("a=b.txt", "ü.txt", "1e5")
    assert run.run.dir is None
    assert compose(["backend.env={N: 007}"]).run.backend.env == {"N": "007"}


def test_values_that_are_no_text_keep_their_types():
    run = compose(["optimizer.lr=1e-4", "job.steps=1e3", "optimizer.betas=[0.9,0.99]", "backend.ranks=auto"]).run
    assert (run.optimizer.lr, run.job.steps, run.optimizer.betas, run.backend.ranks) == (
        1e-4,
        1000,
        (0.9, 0.99),
        "auto",
    )
    assert mistakes("job.seed=1,2") == [
        "job.seed=1,2 (command line): is several values in Hydra's grammar; add -m to run them all"
    ]


def test_a_list_is_suggested_where_one_is_taken():
    (said,) = mistakes("data.path=a.txt,b.txt")
    assert "write 'data.path=[a.txt,b.txt]' for a list" in said
    assert compose(["data.path=[a.txt,b.txt]"]).run.data.path == ("a.txt", "b.txt")


def test_a_sweep_takes_each_text_as_typed():
    words = ["job.sample_prompt=1e5,007,'a,b',ünï=1,x[1,2]", "job.seed=1,2"]
    combinations = expand_grid(words, {}, None)
    assert len(combinations) == 10
    prompts = [compose([*combination]).run.job.sample_prompt for combination in combinations[::2]]
    assert prompts == ["1e5", "007", "a,b", "ünï=1", "x[1,2]"]


def test_what_is_no_override_says_how_one_looks():
    assert mistakes("nothing") == ["nothing: is not an override of the form option=value; write it as option=value"]
    (said,) = mistakes("data.path=/tmp/\udcff")
    assert "contains bytes that are not UTF-8" in said


def test_a_yaml_file_gives_text_as_it_is_written(tmp_path):
    (tmp_path / "exp").mkdir()
    (tmp_path / "exp" / "mine.yaml").write_text(
        "# @package _global_\nrun:\n  name: 007\njob:\n  sample_prompt: 1e5\n"
        "data:\n  path: [1e5, 0x10, a.txt]\nbackend:\n  env: {}\ntracker:\n  project: true\n",
        encoding="utf-8",
    )
    run = compose(["+exp=mine"], config_dir=tmp_path).run
    assert (run.run.name, run.job.sample_prompt, run.tracker.project) == ("007", "1e5", "true")
    assert run.data.path == ("1e5", "0x10", "a.txt")
    assert compose(["+exp=mine", "run.name=8e1"], config_dir=tmp_path).run.run.name == "8e1"


def test_an_experiment_without_its_package_is_named_with_the_line_it_lacks(tmp_path):
    file = tmp_path / "exp" / "mine.yaml"
    file.parent.mkdir()
    file.write_text("job:\n  steps: 3\n", encoding="utf-8")
    (said,) = mistakes("+exp=mine", config_dir=tmp_path)
    assert said.startswith("exp=mine")
    advised = said.split("`")[-2]
    file.write_text(f"{advised}\n{file.read_text()}", encoding="utf-8")
    assert compose(["+exp=mine"], config_dir=tmp_path).run.job.steps == 3


def test_home_is_expanded_in_every_option_that_holds_a_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    run = compose(["run.root=~/runs", "data.path=['~/a.txt',b~c]", "data.cache='~/c'", "run.name=a~b"]).run
    assert (run.run.root, run.data.path, run.data.cache) == ("/home/me/runs", ("/home/me/a.txt", "b~c"), "/home/me/c")
    assert run.run.name == "a~b"
    pods = compose(["backend=kubernetes", "backend.image=x", "run.root=~/runs", "data.path=~/a.txt"]).run
    assert (pods.run.root, pods.data.path) == ("/home/me/runs", "~/a.txt"), "a pod has a home of its own"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        (
            "optimizer.lr=interval(0,1)",
            "optimizer.lr=interval(0,1) (command line): is an interval, not a list",
        ),
        ("job.steps=glob(*)", "is a pattern of a group's options, and this is not a group; write the values: a,b,c"),
        ("job.sample_prompt=glob(*)", "or quote it if it is one text: \"job.sample_prompt='glob(*)'\""),
        ("parallel=glob(x*)", "parallel=glob(x*) (command line): matches no option; choose from: ddp"),
        ("job..steps=5", "job..steps=5: is not an override of the form option=value; write job.steps=5"),
        ("job.steps =5", "write job.steps=5"),
        ("=5", "=5: is not an override of the form option=value"),
        ("", "'': is not an override of the form option=value"),
        ("hydra/launcher=x", "hydra/launcher: has no effect here"),
        ("zero2", "zero2: is not an override of the form option=value; write parallel=zero2"),
    ],
)
@pytest.mark.parametrize("sweeping", [False, True])
def test_words_that_hydra_would_end_at_are_one_message(word, message, sweeping):
    (said,) = mistakes(word, sweeping=sweeping)
    assert message in said


def test_a_pattern_is_a_sweep_over_the_options_that_match():
    assert expand_grid(["parallel=glob(zero?)"], {}, None) == [(f"parallel=zero{stage}",) for stage in range(4)]


@pytest.mark.parametrize(
    ("word", "written"),
    {
        "gpt2": "model=gpt2",
        "zero1_gpt2": "+exp=zero1_gpt2",
        "job": "job=<option>",
        "job.steps": "job.steps=<value>",
        "job.steps:5": "job.steps=5",
        "model/gpt2": "model=gpt2",
        "model.gpt2": "model=gpt2",
        "~job": "job=<option>",
    }.items(),
)
def test_a_word_without_an_equals_sign_is_written_out(word, written):
    assert suggest_overrides(word, groups()) == [written]
    compose([written.replace("<option>", "train").replace("<value>", "5").replace("~", "")])


def test_quoted_words_with_line_ends_are_one_line_that_a_shell_reads_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ["two\nlines", "it's\r\n\x1b[31m \\n", "tab\tonly", "a\u202egpj.exe"]
    for text in texts:
        word = quoted_word("data.path", text)
        assert "\n" not in printable(word)
        assert printable(word) == word
        answer = subprocess.run(["bash", "-c", f"printf '%s\\0' {word}"], capture_output=True, check=True)
        assert compose([answer.stdout.decode().removesuffix("\0")]).run.data.path == text  # type: ignore[attr-defined]
    assert main(["plan", "data.path=[a\nb,c]", "data.format=two\nlines", "job.steps=1\n,2"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == len([line for line in said if line.startswith("error: ")]) >= 2, said
    for word, meant in (
        ("lr=1\n e", "optimizer.lr"),
        ("job.lr=1\n e", "optimizer.lr"),
        ("job .seed=1\n e", "job.seed"),
    ):
        assert main(["plan", word]) == 2
        assert f"$'{meant}=1\\n e'" in capsys.readouterr().err
    words = RunDir(tmp_path / "two\nlines" / "x")
    assert "\n" not in continue_or_rerun(words)


def continue_or_rerun(run_dir: RunDir) -> str:
    """Return the last command that a cancelled run prints."""
    return closing_message(RunOutcome(status="cancelled", exit_code=130), run_dir).partition("next: ")[2]


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("job.ünï=3", "is not an override of the form option=value"),
        ("~model}", "is not an override of the form option=value"),
        ("backend.env={A: 'it''s'}", "its quotes and brackets do not match in Hydra's grammar"),
        ("""unknown.key=[%a~"],~]""", "its quotes and brackets do not match in Hydra's grammar"),
        ("backend.env={A: x, B: y, A: z}", "backend.env={A: x, B: y, A: z} (command line): has the name A twice"),
        ("job.adapters={'a': x, a: y}", "has the name a twice; keep one of them, or choose another name"),
        (
            "backend.env={'1a': x, b: y}",
            "has the name 1a, which a mapping in a word cannot have; begin it with a letter",
        ),
        ("""deploy.volumes={"a'b": x}""", "deploy.volumes={\"a'b\": x} (command line): has the name a'b, which"),
        ("model@x=gpt2", "model@x: has a package after @, and the package of each group is fixed; write model=gpt2"),
        ("+model@=gpt2", "+model@: has a package after @"),
    ],
)
def test_words_that_hydra_cannot_read_or_reads_otherwise(word, said):
    (error,) = mistakes(word)
    assert said in error


def test_two_experiments():
    (error,) = mistakes("+exp=zero1_gpt2", "+exp=ddp_gpt2")
    assert error == (
        "exp=ddp_gpt2 (command line): exp=zero1_gpt2 is already given, and only one can be used; "
        "leave one out, or name it in the defaults of the other"
    )


@pytest.mark.parametrize("name", ["ünï", "sp ace", "d.ot", "a=b", "it's"])
def test_an_experiment_of_any_name(name, tmp_path):
    (tmp_path / "exp").mkdir()
    (tmp_path / "exp" / f"{name}.yaml").write_text("# @package _global_\njob:\n  steps: 7\n")
    assert compose([f"+exp={name}"], config_dir=tmp_path).run.job.steps == 7
    assert expand_grid([f"+exp={name},ddp_gpt2"], {}, tmp_path) == [(f"exp={name}",), ("exp=ddp_gpt2",)]


def test_a_variable_inside_a_list():
    (error,) = mistakes("backend=slurm", "backend.sbatch_options=[--comment=${HOME}]")
    assert error.endswith(r"to pass this text literally: write it in quotes, with \${ for ${")
    run = compose(["backend=slurm", r"backend.sbatch_options=['--comment=\${HOME}']"]).run
    assert run.backend.sbatch_options == ("--comment=${HOME}",)


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["model=gpt2", "plan"], "launch plan model=gpt2"),
        (["-m", "plan", "job.steps=2,3"], "launch plan -m job.steps=2,3"),
        (["--config-dir", "runs", "+exp=a b", "status"], "launch status --config-dir runs '+exp=a b'"),
    ],
    ids=" ".join,
)
def test_a_verb_that_does_not_come_first(words, meant, capsys):
    assert main(words) == 2
    assert capsys.readouterr().err.endswith(f"is a verb, and must come first; write {meant}\n")


def test_a_sweep_in_the_directory_of_one_run(tmp_path):
    with pytest.raises(ConfigErrors, match=r"run\.dir=.*/x: is the directory of one run, and each trial has its own"):
        plan_sweep([f"run.dir={tmp_path}/x", "job.seed=1,2"], config_dir=None)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("defaults:\n  - nonexist\n", "`- nonexist` (line 3 of FILE) names no experiment nonexist; choose from: "),
        ("defaults:\n  - override /modell: gpt2\n", "(line 3 of FILE) names no group modell; did you mean model?"),
        (
            "defaults:\n  - override /model: gpt22\n",
            "(line 3 of FILE) names no option of the group model; did you mean gpt2 or gpt2_xl?",
        ),
        ("job:\n  steps: 5\n run: x\n", "line 4 of FILE is not YAML: expected <block end>"),
        ("job:\n\tsteps: 5\n", "line 3 of FILE is not YAML: found character '\\t' that cannot start any token; indent"),
        ("hydra: {run: {dir: x}}\n", "hydra (FILE): has no effect here; use run.root, run.name and run.dir"),
        ("model: gpt2\n", "model=gpt2 (own/exp/mine.yaml:2): is not a set of options; choose one: model=<option>"),
    ],
    ids=["experiment", "group", "option", "indentation", "tab", "hydra", "group as a key"],
)
def test_what_an_experiment_of_the_user_says_wrongly(text, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = Path("own/exp/mine.yaml")
    file.parent.mkdir(parents=True)
    file.write_text(f"# @package _global_\n{text}")
    (error,) = mistakes("+exp=mine", config_dir=Path("own"))
    assert said.replace("FILE", str(file)) in error


def test_a_group_of_the_users_own(tmp_path):
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster" / "ours.yaml").write_text("# @package _global_\njob:\n  steps: 7\n")
    assert compose(["+cluster=ours"], config_dir=tmp_path).run.job.steps == 7
    (tmp_path / "cluster" / "odd.yaml").write_text("a: 1\n")
    (error,) = mistakes("cluster=odd", config_dir=tmp_path)
    assert "cluster" in error
    assert "no such option; choose from: activation" in error


def test_a_model_without_a_kind_is_one_error(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("num_hidden_layers: 2\n")
    (error,) = mistakes("model=mine", config_dir=tmp_path)
    assert error.startswith("model.kind: is not known")


def test_the_table_of_a_sweep_ends_with_the_command_for_its_report(tmp_path):
    text = render_sweep(SweepConfig(), [], tmp_path / "a b")
    assert text.splitlines()[-1] == f"next: launch report '{tmp_path}/a b'"
