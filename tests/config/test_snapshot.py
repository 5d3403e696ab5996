"""run.yaml holds exactly the run that was written."""

from dataclasses import replace

import pytest
import yaml

from launcher.config.compose import compose
from launcher.config.run import run_to_tree
from launcher.config.snapshot import load_run, save_run
from launcher.errors import ConfigErrors


def test_every_text_reads_back_as_it_was(tmp_path, nasty_strings):
    run = compose(()).run
    texts = (*nasty_strings, *map(chr, (0x85, 0x2028, 0x2029, 0xFEFF, 0x1F600)), "a\x85b \x85", "x\u2028 y")
    run = replace(run, backend=replace(run.backend, env={f"X{number}": text for number, text in enumerate(texts)}))
    save_run(run, tmp_path / "run.yaml")
    assert load_run(tmp_path / "run.yaml") == run


def test_a_run_of_before_a_group_is_read_as_what_it_did(tmp_path):
    run = compose(()).run
    tree = run_to_tree(run)
    assert tree.pop("quantization")["kind"] == "none"
    assert tree.pop("profile")["kind"] == "false"
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    assert load_run(tmp_path / "run.yaml") == run
    del tree["model"]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigErrors, match="model: is not a set of options"):
        load_run(tmp_path / "run.yaml")
