"""A refusal by the system becomes one sentence, and nothing is left half written."""

import errno
import io
import os
import signal
import time

import pytest

from road_core import AdapterError
from road_core._command import run
from road_core._files import check_free, inside, open_alone, write_files


def refuse(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_full_disk(overwrite, tmp_path, monkeypatch):
    target = tmp_path / "out"
    if overwrite:
        target.mkdir()
        (target / "a").write_bytes(b"old")
    monkeypatch.setattr(os, "replace", refuse)
    monkeypatch.setattr(type(target), "write_bytes", refuse)
    with pytest.raises(AdapterError, match=r"out: expected a folder that can be written to, found No space left"):
        write_files(target, {"a": b"new"}, overwrite=overwrite)
    assert [path.name for path in tmp_path.rglob("*")] == (["out", "a"] if overwrite else [])


@pytest.mark.parametrize("path", [None, b"bytes", "x" * 300, "a\0b", "a\ud800"])
def test_what_is_no_path(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    calls = [check_free, lambda folder: inside(folder, "x")]
    calls += [lambda folder, over=over: write_files(folder, {"x": b""}, overwrite=over) for over in (True, False)]
    for call in calls:
        with pytest.raises(AdapterError, match="expected a path"):
            call(path)
    assert not any(tmp_path.iterdir())


def test_a_folder_with_the_longest_name(tmp_path):
    write_files(tmp_path / ("é" * 127), {"x": b""}, overwrite=False)
    assert [path.name for path in tmp_path.iterdir()] == ["é" * 127]


def test_a_file_is_one_processes(tmp_path):
    path = tmp_path / "file"
    with open_alone(path) as file:
        file.write(b"mine")
        file.flush()
        with pytest.raises(AdapterError, match="file: expected a file that no other process writes, found one that an"):
            open_alone(path)
    with open_alone(path) as file:
        assert file.read() == b"mine"


def test_a_command_that_is_told_to_stop_is_interrupted(capsys):
    before = signal.getsignal(signal.SIGTERM)

    def stopped():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    with pytest.raises(SystemExit) as caught:
        run(stopped)
    assert caught.value.code == 130
    assert capsys.readouterr().err == "error: interrupted\n"
    assert signal.getsignal(signal.SIGTERM) == before


def test_what_the_terminal_cannot_say_costs_nothing_else(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding="ascii", write_through=True))
    run(lambda: print("θ = 0"))
    assert raw.getvalue() == b"? = 0\n"


def test_a_command_ends_with_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as caught:
        run(lambda: (tmp_path / "file" / "x").read_bytes())
    assert caught.value.code == 2
    line = capsys.readouterr().err
    assert line == f"error: {tmp_path / 'file' / 'x'}: expected what can be read and written, found Not a directory\n"
