import os
import stat

import pytest

from launcher.config.backend.local import local_host
from launcher.utils.hardware import Gpu, cpu_computes_bf16, list_gpus, memory_limit, visible_gpus

GPUS = [
    Gpu(index=str(n), uuid=f"GPU-{letter * 8}-0000", name="NVIDIA L4", memory_bytes=24 * 2**30)
    for n, letter in enumerate("abcd")
]


@pytest.mark.parametrize(
    ("setting", "shown"),
    [
        (None, ["0", "1", "2", "3"]),
        ("", []),
        ("-1", []),
        ("2", ["2"]),
        ("3,1", ["3", "1"]),
        (" 0 , 2 ", ["0", "2"]),
        ("0,9,1", ["0"]),
        ("0,-1,1", ["0"]),
        ("GPU-cccc", ["GPU-cccc"]),
        ("NoDevFiles", []),
    ],
)
def test_cuda_visible_devices_as_cuda_reads_it(setting, shown):
    assert [word for word, _ in visible_gpus(GPUS, setting)] == shown


def test_a_uuid_names_its_gpu():
    assert visible_gpus(GPUS, "GPU-cccc") == [("GPU-cccc", GPUS[2])]


def nvidia_smi(folder, script):
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)


def test_gpus_are_read_from_nvidia_smi(tmp_path, monkeypatch):
    nvidia_smi(
        tmp_path,
        'case "$1" in --query-gpu=*) printf "0, GPU-aa, NVIDIA H100, 81559\\n1, GPU-bb, NVIDIA H100, [N/A]\\n";; esac',
    )
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    first, second = list_gpus(tmp_path / "no-driver")
    assert first == Gpu(index="0", uuid="GPU-aa", name="NVIDIA H100", memory_bytes=81559 * 2**20)
    assert second.memory_bytes == 0


def test_gpus_are_read_from_the_driver_when_nvidia_smi_fails(tmp_path, monkeypatch):
    nvidia_smi(tmp_path, "echo 0, GPU-0, not to be believed, 1; exit 9")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    card = tmp_path / "gpus" / "0000:01:00.0"
    card.mkdir(parents=True)
    (card / "information").write_text("Model: \t\t NVIDIA A10G\nIRQ:   100\nGPU UUID: \t GPU-1234\n")
    assert list_gpus(tmp_path / "gpus") == [Gpu(index="0", uuid="GPU-1234", name="NVIDIA A10G", memory_bytes=0)]


def test_this_machine_takes_a_rank_for_each_gpu(tmp_path, monkeypatch):
    nvidia_smi(tmp_path, 'printf "0, GPU-aa, H100, 100\\n1, GPU-bb, H100, 90\\n2, GPU-cc, H100, 80\\n"')
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    host = local_host("auto", environ={"CUDA_VISIBLE_DEVICES": "1,0"})
    assert (host.slots, host.device_ids, host.device_bytes) == (2, ("1", "0"), 90 * 2**20)
    assert local_host(1, environ={}).slots == 1
    assert local_host("auto", environ={}).slots == 3


def test_this_machine_as_it_is():
    cores = len(os.sched_getaffinity(0))
    host = local_host("auto", environ={"CUDA_VISIBLE_DEVICES": ""})
    assert host.devices == ()
    assert host.slots == min(2, cores)
    assert host.cores == cores
    assert host.memory_bytes > 2**30
    assert host.name
    assert "." not in host.name
    assert local_host(5, environ={"CUDA_VISIBLE_DEVICES": ""}).slots == 5


@pytest.mark.parametrize(("text", "limited"), [("1048576", True), ("max", False), (str(2**63), False)])
@pytest.mark.parametrize("file", ["memory.max", "memory/memory.limit_in_bytes"])
def test_a_control_group_limits_memory(tmp_path, file, text, limited):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(f"{text}\n")
    assert memory_limit(tmp_path) == (1048576 if limited else memory_limit(tmp_path / "nothing"))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("flags\t\t: fpu avx2 avx512_bf16 sse", True),
        ("flags\t\t: fpu avx2 sse", False),
        ("Features\t: fp asimd bf16", True),
        ("model name\t: bf16", False),
    ],
)
def test_bfloat16_is_read_off_the_processors_flags(tmp_path, line, expected):
    file = tmp_path / "cpuinfo"
    file.write_text(f"processor\t: 0\n{line}\n")
    assert cpu_computes_bf16(file) == expected
