"""Files that are read again when they change, also where that fails at first."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from parleyd.security import watched
from parleyd.security.watched import Watched


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_text("1")
    return path


def write(path: Path, text: str) -> None:
    new = path.with_suffix(".new")
    new.write_text(text)
    new.rename(path)


def test_a_change_that_cannot_be_read_at_first_is_read_once_it_can(
    file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    one = Watched([str(file)], lambda: int(watched.read_file("--file", str(file))))
    write(file, "2")
    with monkeypatch.context() as patch, caplog.at_level(logging.ERROR):
        patch.setattr(Path, "read_bytes", raise_too_many_files)
        assert [one.refresh() for _ in range(3)] == [False] * 3
    assert (one.value, len(caplog.records)) == (1, 1)
    assert one.refresh()
    assert one.value == 2
    assert not one.refresh()


def test_each_broken_content_is_logged_once(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    one = Watched([str(file)], lambda: int(file.read_text()))
    for number, text in enumerate(("broken", "broken too"), 1):
        write(file, text)
        for _ in range(2):
            assert not one.refresh()
        assert (one.value, len(caplog.records)) == (1, number)


def raise_too_many_files(path: Path) -> bytes:
    raise OSError(24, "Too many open files")
