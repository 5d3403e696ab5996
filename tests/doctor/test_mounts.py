"""Folders of file servers, from what the kernel lists."""

from pathlib import Path

import pytest

from launcher.doctor.host_facts import served_folder

LISTED = """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
30 22 0:40 / {home} rw,relatime - nfs4 server:/export/home rw,vers=4.2
31 30 8:2 / {home}/local rw - xfs /dev/sdb1 rw
32 22 0:41 /team {home}/with\\040space rw - lustre 10.0.0.1@tcp:/scratch rw
33 22 0:42 / {home}/twice rw - nfs server:/old rw
34 22 0:43 / {home}/twice rw - nfs server:/new rw
35 22 0:44 / {home}/keys rw - fuse.sshfs me@there: rw
"""


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("me/runs", "nfs4 server:/export/home /me/runs"),
        ("local/runs", ""),
        ("with space/runs", "lustre 10.0.0.1@tcp:/scratch /team/runs"),
        ("twice", "nfs server:/new /"),
        ("keys", ""),
        ("..", ""),
    ],
)
def test_the_server_of_a_folder(tmp_path: Path, name: str, expected: str) -> None:
    home, mounts = tmp_path / "home", tmp_path / "mountinfo"
    (home / name).mkdir(parents=True, exist_ok=True)
    mounts.write_text(LISTED.format(home=home))
    assert served_folder(home / name, mounts=mounts) == expected


def test_this_machine() -> None:
    assert served_folder(Path("/proc")) == ""
