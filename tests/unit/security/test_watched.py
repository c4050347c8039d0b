"""Files that are read again when they change, also where that fails at first."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from parleyd.config import SecuritySettings
from parleyd.errors import Unauthenticated
from parleyd.security import guard, watched
from parleyd.security.guard import Guard
from parleyd.security.new_key import entry_for, new_key
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


def test_a_file_that_is_gone_again_is_logged_again(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    one = Watched([str(file)], lambda: int(file.read_text()))
    for number in (1, 2):
        file.unlink()
        assert not one.refresh()
        assert sum(record.levelname == "ERROR" for record in caplog.records) == number
        write(file, "2")
        assert one.refresh()


def test_a_file_of_the_same_length_and_age_in_its_place_is_read(file: Path) -> None:
    one = Watched([str(file)], lambda: int(file.read_text()))
    other, status = file.with_suffix(".other"), file.stat()
    other.write_text("2")
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.rename(file)
    assert one.refresh()
    assert one.value == 2


async def test_files_are_read_again_after_a_time_without_threads(
    file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(guard, "_REFRESH_S", 0.01)
    kept, revoked = new_key(), new_key()
    write(file, entry_for("kept", kept) + entry_for("revoked", revoked))
    guarding = Guard(SecuritySettings(api_keys=str(file)), [])
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", raise_no_thread)
        fresh = asyncio.create_task(guarding.keep_fresh())
        await asyncio.sleep(0.1)
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    write(file, entry_for("kept", kept))
    async with asyncio.timeout(20):
        while is_known(guarding, revoked):
            await asyncio.sleep(0.01)
    assert is_known(guarding, kept)
    fresh.cancel()


def is_known(guarding: Guard, key: str) -> bool:
    with suppress(Unauthenticated):
        return guarding.check_credentials([("authorization", f"Bearer {key}")]) is not None
    return False


def raise_no_thread(thread: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


def raise_too_many_files(path: Path) -> bytes:
    raise OSError(24, "Too many open files")
