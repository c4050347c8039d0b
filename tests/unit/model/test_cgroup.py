"""What control groups allow, as the kernel's files tell it."""

from __future__ import annotations

from pathlib import Path

import pytest

from parleyd.model.cgroup import cpu_quota, free_memory
from parleyd.model.memory import free_main_memory


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def test_pages_of_files_do_not_count_as_used_memory(tmp_path: Path) -> None:
    pod = {"memory.max": "1000\n", "memory.current": "700\n", "memory.stat": "anon 400\ninactive_file 300\n"}
    box = {"memory.max": "max\n", "memory.current": "200\n"}
    write(tmp_path, {f"pod/{name}": text for name, text in pod.items()})
    write(tmp_path, {f"pod/box/{name}": text for name, text in box.items()})
    assert free_memory(tmp_path, "0::/pod/box\n") == 600


def test_limits_of_memory_are_read_in_version_1(tmp_path: Path) -> None:
    stat = "inactive_file 20\ntotal_inactive_file 50\n"
    files = {"memory.limit_in_bytes": "500", "memory.usage_in_bytes": "100", "memory.stat": stat}
    write(tmp_path, {f"memory/box/{name}": text for name, text in files.items()})
    assert free_memory(tmp_path, "5:cpu:/box\n4:memory:/box\n") == 450


@pytest.mark.parametrize(
    ("files", "own", "quota"),
    [
        ({"pod/cpu.max": "150000 100000\n", "pod/box/cpu.max": "max 100000\n"}, "0::/pod/box\n", 1.5),
        ({"pod/cpu.max": "300000 100000\n", "pod/box/cpu.max": "100000 50000\n"}, "0::/pod/box\n", 2.0),
        ({"cpu.max": "50000 100000\n"}, "0::/seen/from/outside\n", 0.5),
        ({"pod:box/cpu.max": "50000 100000\n"}, "0::/pod:box\n", 0.5),
        (
            {"cpu/box/cpu.cfs_quota_us": "250000\n", "cpu/box/cpu.cfs_period_us": "100000\n"},
            "3:cpu,cpuacct:/box\n",
            2.5,
        ),
        ({"cpu/box/cpu.cfs_quota_us": "9\n", "cpu/box/cpu.cfs_period_us": "9\n"}, "4:memory:/box\n3:cpu:/\n", None),
        ({"cpu/box/cpu.cfs_quota_us": "-1\n", "cpu/box/cpu.cfs_period_us": "100000\n"}, "3:cpu:/box\n", None),
    ],
)
def test_the_tightest_quota_of_processor_time_counts(
    tmp_path: Path, files: dict[str, str], own: str, quota: float | None
) -> None:
    write(tmp_path, files)
    assert cpu_quota(tmp_path, own) == quota


def test_without_groups_the_machine_is_the_limit(tmp_path: Path) -> None:
    assert free_memory(tmp_path, "0::/\n") is None
    assert cpu_quota(tmp_path, "") is None
    assert free_main_memory() > 2**20
