"""How much memory may still be taken, on systems and in containers that are made up."""

import ctypes
from types import SimpleNamespace

import pytest

from utils import memory

GIB = 2**30


@pytest.fixture
def system(tmp_path, monkeypatch):
    """A system that says nothing: no /proc/meminfo, no control groups, no sysconf."""
    groups = [(tmp_path / str(n), *group[1:]) for n, group in enumerate(memory.CONTROL_GROUPS, 1)]
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(memory, "CONTROL_GROUPS", groups)
    monkeypatch.setattr(memory, "os", SimpleNamespace())
    return tmp_path


def write_group(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / f"memory.{name}").write_text(f"{content}\n")


def test_here_it_is_plausible():
    available = memory.available_memory()
    assert available is None or 2**20 < available < 2**50


def test_a_system_that_says_nothing(system):
    assert memory.available_memory() is None


def test_linux(system):
    (system / "meminfo").write_text("MemTotal: 900 kB\nMemAvailable:     500 kB\nHugePages: 0\n")
    assert memory.available_memory() == 500 * 1024


def test_linux_before_it_told_what_is_available(system, monkeypatch):
    (system / "meminfo").write_text("MemTotal: 900 kB\n")
    monkeypatch.setattr(
        memory,
        "os",
        SimpleNamespace(
            sysconf={"SC_PHYS_PAGES": 8 * GIB // 4096, "SC_PAGE_SIZE": 4096}.__getitem__
        ),
    )
    assert memory.available_memory() == 4 * GIB


@pytest.mark.parametrize(("pages", "expected"), [(4 * GIB // 4096, 2 * GIB), (-1, None)])
def test_other_systems_with_sysconf(system, monkeypatch, pages, expected):
    values = {"SC_PHYS_PAGES": pages, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(memory, "os", SimpleNamespace(sysconf=values.__getitem__))
    assert memory.available_memory() == expected


@pytest.mark.parametrize(("is_told", "expected"), [(1, 3 * GIB), (0, None)])
def test_windows(system, monkeypatch, is_told, expected):
    def fill(pointer):
        status = pointer._obj
        assert status.length == ctypes.sizeof(status) == 64  # as its documentation says
        status.all_physical, status.free_physical = 8 * GIB, 3 * GIB
        return is_told

    kernel = SimpleNamespace(kernel32=SimpleNamespace(GlobalMemoryStatusEx=fill))
    monkeypatch.setattr(memory.ctypes, "windll", kernel, raising=False)
    monkeypatch.setattr(memory.sys, "platform", "win32")
    assert memory.available_memory() == expected


@pytest.mark.parametrize(
    ("version", "files", "expected"),
    [
        (1, {"max": "max", "current": 5, "stat": "inactive_file 3"}, 1000 * 1024),
        (1, {"max": 9000, "current": 5000}, 4000),
        (1, {"max": 9000, "current": 5000, "stat": "anon 7\ninactive_file 3000"}, 7000),
        (1, {"max": 4000, "current": 5000, "stat": "inactive_file 500"}, 0),
        (1, {"max": 2**62, "current": 5000, "stat": "inactive_file 3"}, 1000 * 1024),
        (2, {"limit_in_bytes": 9000, "usage_in_bytes": 5000,
             "stat": "inactive_file 1\ntotal_inactive_file 3000"}, 7000),
        (2, {"limit_in_bytes": 2**63 - 4096, "usage_in_bytes": 5000, "stat": ""}, 1000 * 1024),
    ],
)  # fmt: skip
def test_containers(system, version, files, expected):
    """What the kernel holds of files that were read once is not in the way of a cache."""
    (system / "meminfo").write_text("MemAvailable: 1000 kB\n")
    write_group(system / str(version), **files)
    assert memory.available_memory() == expected


V1, V2 = "5:cpu,cpuacct:/other\n4:memory:/jobs/a\n1:name=systemd:/b\n", "0::/jobs/a\n"


@pytest.mark.parametrize(
    ("membership", "limits", "expected"),
    [
        pytest.param(V2, {"1/jobs/a": 9000}, 9000, id="own"),
        pytest.param(V2, {"1/jobs/a": "max", "1/jobs": 8000}, 8000, id="parent"),
        pytest.param(V2, {"1/jobs/a": 9000, "1/jobs": 8000}, 8000, id="least"),
        pytest.param(V2, {"1/jobs/b": 5000}, 1000 * 1024, id="not own"),
        pytest.param(V2, {"1": 7000}, 7000, id="path outside the container"),
        pytest.param("0::/../b\n", {"1": 7000}, 7000, id="path above the container"),
        pytest.param("damaged\n", {"1": 7000}, 7000, id="damaged"),
        pytest.param(V1, {"2/jobs/a": 9000, "2": 2**62}, 9000, id="version 1"),
        pytest.param(V1, {"2/jobs": 8000, "1/jobs/a": 5000}, 8000, id="version 1 parent"),
        pytest.param(V1 + V2, {"2/jobs/a": 9000, "1/jobs/a": 8000}, 8000, id="both"),
    ],
)
def test_nested_groups(system, membership, limits, expected):
    """As of a job of Slurm, or a service of systemd: the root has no limit."""
    (system / "meminfo").write_text("MemAvailable: 1000 kB\n")
    (system / "membership").write_text(membership)
    for folder, limit in limits.items():
        names = {"1": ("max", "current"), "2": ("limit_in_bytes", "usage_in_bytes")}[folder[0]]
        write_group(system / folder, **dict(zip(names, (limit, 0), strict=True)))
    assert memory.available_memory() == expected
