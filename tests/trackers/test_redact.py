"""Secrets of the environment do not travel in the configuration."""

from __future__ import annotations

from launcher.trackers.redact import HIDDEN, redact

ENVIRON = {"HF_TOKEN": "hf_abcdefgh", "MY_PASSWORD": "hunter2hunter2", "API_KEY": "1", "HOME": "/home/user"}


def test_a_secret_is_hidden_wherever_it_occurs() -> None:
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
