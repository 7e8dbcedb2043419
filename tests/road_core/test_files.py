"""What the system refuses is one sentence, and leaves nothing half written."""

import errno
import os

import pytest

from road_core import AdapterError
from road_core._command import run
from road_core._files import write_files


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


def test_a_command_ends_with_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as caught:
        run(lambda: (tmp_path / "file" / "x").read_bytes())
    assert caught.value.code == 2
    line = capsys.readouterr().err
    assert line == f"error: {tmp_path / 'file' / 'x'}: expected what can be read and written, found Not a directory\n"
