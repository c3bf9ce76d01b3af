"""File systems without locks or syncs, full, read-only or remote; links and odd names; what a killed writer leaves."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
import torch

from engine import checkpoint, folder
from engine.errors import CheckpointError, FolderError
from engine.folder import RunFolder
from engine.results.runs import metrics
from loaders import files
from loaders.files import aside
from tests.processes import PATIENCE, start_process
from tests.tiny import tiny


def refuses(code):
    def call(*arguments, **options):
        raise OSError(code, os.strerror(code))

    return call


def state_of(step):
    return {"method": {"w": torch.full((100,), float(step))}, "optimizer": {}, "meter": {}}


def names(place):
    return sorted(path.name for path in place.iterdir())


# ------------------------------------------------------------------------------------------------ locks


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.EIO])
def test_a_run_goes_on_where_locks_do_not_work(code, tmp_path, monkeypatch, caplog):
    # reliability 40: Lustre without flock, NFS without lockd
    recipe = tiny("quick/linear.yaml", tmp_path)
    monkeypatch.setattr(fcntl, "lockf", refuses(code))
    RunFolder(recipe).close()
    assert f"locks do not work here ({os.strerror(code)}); two runs in one folder" in caplog.text
    assert len(caplog.messages) == 1 and "\n" not in caplog.messages[0]


@pytest.mark.parametrize("code", [errno.EACCES, errno.EAGAIN])
def test_a_lock_that_is_held_is_one(code, tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "lockf", refuses(code))
    with pytest.raises(FolderError, match="another process is running here"):
        RunFolder(tiny("quick/linear.yaml", tmp_path))


# ------------------------------------------------------------------------------------------------ syncs


def syncs(patch, code, *, of_folders):
    """`os.fsync` fails, of folders or of files."""
    honest = os.fsync

    def fsync(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}") == of_folders:
            raise OSError(code, os.strerror(code))
        honest(descriptor)

    patch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize(
    ("code", "of_folders", "is_saved"),
    [
        *((code, True, True) for code in (errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EBADF, errno.ENOSYS)),
        *((code, True, False) for code in (errno.EIO, errno.ENOSPC)),
        *((code, False, True) for code in (errno.EINVAL, errno.ENOSYS)),
        *((code, False, False) for code in (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EACCES)),
    ],
)
def test_a_sync_that_is_not_supported_costs_nothing(code, of_folders, is_saved, tmp_path, monkeypatch):
    # reliability 11: CIFS and FUSE know no sync of a folder
    checkpoint.save(tmp_path, 1, state_of(1), keep=1)
    syncs(monkeypatch, code, of_folders=of_folders)
    if is_saved:
        checkpoint.save(tmp_path, 2, state_of(2), keep=1)
        assert [name[:14] for name in names(tmp_path)] == ["step-000000002"]
        return
    with pytest.raises(CheckpointError, match=f"step 2 cannot be saved: {os.strerror(code)}"):
        checkpoint.save(tmp_path, 2, state_of(2), keep=1)
    assert checkpoint.latest(tmp_path)[0] is not None and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("call", ["replace", "open"])
def test_a_rename_or_an_open_that_is_refused_is_one_line(call, tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 1, state_of(1), keep=1)
    before = names(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuses(errno.EPERM))
        with pytest.raises(CheckpointError, match="step 2 cannot be saved: Operation not permitted"):
            checkpoint.save(tmp_path, 2, state_of(2), keep=1)
    assert names(tmp_path) == before


def test_old_checkpoints_that_cannot_be_deleted_do_not_fail_a_save(tmp_path, monkeypatch, caplog):
    checkpoint.save(tmp_path, 1, state_of(1), keep=1)
    honest = Path.unlink

    def unlink(path, **options):
        if path.suffix == ".pt":
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        honest(path, **options)

    monkeypatch.setattr(Path, "unlink", unlink)
    path = checkpoint.save(tmp_path, 2, state_of(2), keep=1)
    assert checkpoint.latest(tmp_path) == (path, [])
    assert "step-000000001" in caplog.text and "cannot be deleted: Operation not permitted" in caplog.text


def test_a_checkpoint_that_may_not_be_read_is_not_a_damaged_one(tmp_path, monkeypatch):
    for step in (1, 2):
        newest = checkpoint.save(tmp_path, step, state_of(step), keep=2)
    monkeypatch.setattr("builtins.open", refuses(errno.EACCES))
    with pytest.raises(CheckpointError, match=rf"{newest.name}: cannot be read: Permission denied"):
        checkpoint.latest(tmp_path)
    monkeypatch.setattr(os, "listdir", refuses(errno.EACCES))
    with pytest.raises(CheckpointError, match="cannot be listed: Permission denied"):
        checkpoint.latest(tmp_path)


@pytest.mark.parametrize(
    "make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path), lambda path: os.symlink(path.name, path)]
)
def test_what_is_no_file_is_no_checkpoint(make, tmp_path):
    whole = checkpoint.save(tmp_path, 1, state_of(1), keep=2)
    make(odd := tmp_path / "step-000000002-0123456789abcdef.pt")
    assert checkpoint.latest(tmp_path) == (whole, [odd])


def test_lines_that_are_no_rows_are_left_out_and_named(tmp_path, caplog):
    recipe = tiny("quick/linear.yaml", tmp_path)
    recipe.folder.mkdir()
    row = '{"step": 1, "epoch": 0.5, "images": 16}'
    odd = ["[1]", "null", '{"images": 16}', '{"step": 1, "epoch": 0.5, "images": "16"}', "[" * 100_000, "\udcff"]
    path, text = recipe.folder / "metrics.jsonl", "\n".join([row, *odd, row, '{"st'])
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    assert metrics(recipe.folder) == [json.loads(row)] * 2
    held = RunFolder(recipe)
    held.open_rows(16)[0].close()
    held.close()
    assert path.read_text() == f"{row}\n{row}\n"
    said = [record.getMessage() for record in caplog.records]
    assert said == [f"{path}: line {number} is no row of metrics; left out" for number in range(2, 8)]


def test_a_link_in_place_of_a_checkpoint_is_never_written_through(tmp_path, monkeypatch):
    # reliability 25
    kept = tmp_path / "kept"
    kept.write_text("mine")
    place = tmp_path / "checkpoints"
    path = checkpoint.save(place, 1, state_of(1), keep=1)
    path.unlink()
    for target in (kept, tmp_path / "nowhere", path):
        path.symlink_to(target)
        assert checkpoint.save(place, 1, state_of(1), keep=1) == path
        assert not path.is_symlink() and checkpoint.is_intact(path)
        path.unlink()
    assert kept.read_text() == "mine" and not (tmp_path / "nowhere").exists()


# ------------------------------------------------------------------------------------------------ the run folder


def test_a_folder_that_is_a_link_is_followed(tmp_path):
    recipe = tiny("quick/linear.yaml", tmp_path)
    (tmp_path / "scratch").mkdir()
    recipe.folder.mkdir(parents=True)
    for name in folder.LATER:
        (recipe.folder / name).symlink_to(tmp_path / "scratch")
    RunFolder(recipe).close()
    checkpoint.save(recipe.folder / "checkpoints", 1, state_of(1), keep=1)
    assert len(names(tmp_path / "scratch")) == 1


@pytest.mark.parametrize("name", ["", *folder.LATER])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.symlink_to("/purged/scratch"), "is a link to /purged/scratch, which is not there"),
        (lambda path: path.symlink_to(path.name), "is a link to .*, which is not there"),  # itself
        (lambda path: path.write_text(""), "is not a folder"),
    ],
)
def test_a_folder_that_a_later_step_needs_is_tried_at_the_start(name, make, message, tmp_path):
    recipe = tiny("quick/linear.yaml", tmp_path)
    path = recipe.folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    make(path)
    with pytest.raises(FolderError, match=rf"^run\.folder: {path} {message}") as caught:
        RunFolder(recipe)
    assert "\n" not in str(caught.value) and not (recipe.folder / "recipe.yaml").exists()


@pytest.mark.parametrize("name", folder.LATER)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_a_folder_that_cannot_be_written_is_found_at_the_start(name, code, tmp_path, monkeypatch):
    recipe = tiny("quick/linear.yaml", tmp_path)
    honest = tempfile.TemporaryFile
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda dir: refuses(code)() if dir.name == name else honest(dir=dir))
    with pytest.raises(FolderError, match=rf"{name} cannot be created or written: {os.strerror(code)}"):
        RunFolder(recipe)
    assert names(recipe.folder) == [".lock"]
    monkeypatch.undo()
    RunFolder(recipe).close()  # the lock is not held any more


@pytest.mark.parametrize("name", [".lock", "recipe.yaml", "metrics.jsonl"])
def test_a_file_of_a_run_folder_that_is_not_ours_is_named(name, tmp_path):
    recipe = tiny("quick/linear.yaml", tmp_path)
    (recipe.folder / name).mkdir(parents=True)  # as root may open what another user's is
    with pytest.raises(FolderError, match=rf"{name} cannot be created or written: {os.strerror(errno.EISDIR)}"):
        RunFolder(recipe).open_rows(3)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_what_a_run_folder_holds_is_never_cut(code, tmp_path, monkeypatch):
    recipe = tiny("quick/linear.yaml", tmp_path)
    held = RunFolder(recipe)
    held.open_rows(None)[0].close()
    (recipe.folder / "metrics.jsonl").write_text('{"images": 3}\n')
    held.list_bad_images({"a.jpg": "odd"})
    held.close()
    before = {path: path.read_bytes() for path in recipe.folder.iterdir()}
    assert len(before) == 5
    changed = tiny("quick/linear.yaml", tmp_path, "seed=3")
    honest = Path.write_text
    with monkeypatch.context() as patch:

        def half(path, text, **options):
            honest(path, text[: len(text) // 2], **options)
            raise OSError(code, os.strerror(code))

        patch.setattr(Path, "write_text", half)
        with pytest.raises(FolderError, match=f"cannot be created or written: {os.strerror(code)}"):
            RunFolder(changed)
        held.list_bad_images({"a.jpg": "odd", "b.jpg": "odd"})  # no reason to end
        with pytest.raises(FolderError, match=os.strerror(code)):
            held.open_rows(3)
    kept = recipe.folder / "before_step_0"
    assert (kept / "recipe.yaml").read_bytes() == before[recipe.folder / "recipe.yaml"]
    assert {path: path.read_bytes() for path in recipe.folder.iterdir() if path != kept} == before
    RunFolder(changed).close()
    assert (recipe.folder / "recipe.yaml").read_text() == changed.dump()


# ------------------------------------------------------------------------------------------------ parts


def is_killed(path, make_folder):
    with aside(Path(path)) as out:
        if make_folder:
            (out.part / "deep").mkdir(parents=True)
        else:
            out.part.write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)


def killed(path, make_folder=False):
    process = start_process(is_killed, str(path), make_folder)
    process.join(PATIENCE)
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("name", ["x.beton", "photos", "é" * 127, "[a]*?"], ids=["file", "folder", "long", "pattern"])
def test_what_a_killed_writer_left_goes_with_the_next(name, tmp_path):
    path = tmp_path / name
    killed(path, make_folder=name == "photos")
    left = names(tmp_path)
    assert len(left) == 2 and all(name.startswith(".") for name in left)
    with aside(tmp_path / "other") as out:
        out.part.write_text("other")
    assert [name for name in names(tmp_path) if name != "other"] == left  # another name's
    with pytest.raises(KeyboardInterrupt), aside(path) as out:
        assert not set(left) & set(names(tmp_path))
        out.part.write_text("half")
        raise KeyboardInterrupt
    assert names(tmp_path) == ["other"]


def test_a_part_that_may_be_written_somewhere_is_left(tmp_path, monkeypatch):
    path = tmp_path / "x.beton"
    with aside(path) as out:  # this process, whose lock says so
        out.part.write_text("one")
        with aside(path) as second:
            assert out.part.exists()
            second.part.write_text("two")
        assert path.read_text() == "two"
    assert path.read_text() == "one" and names(tmp_path) == ["x.beton"]
    killed(path)
    left = [place for place in tmp_path.iterdir() if place.name.startswith(".")]
    with monkeypatch.context() as patch:  # no locks: nobody knows
        patch.setattr(fcntl, "flock", refuses(errno.ENOLCK))
        with aside(path) as out:
            out.part.write_text("three")
        assert all(place.exists() for place in left)
    monkeypatch.setattr(files, "kernel", lambda: "another0")  # a machine whose locks are not seen here
    for age, is_left in ((3600, True), (2 * 86_400, False)):
        for place in left:
            os.utime(place, (time.time() - age,) * 2)
        with aside(path) as out:
            out.part.write_text("four")
        assert [place.exists() for place in left] == [is_left] * 2


def test_a_name_of_any_legal_length(tmp_path):
    for name in ("x" * 255, "ß" * 127, "y" * 101):
        with aside(tmp_path / name) as out:
            out.part.write_text("whole")
        assert (tmp_path / name).read_text() == "whole"
    with pytest.raises(OSError, match="File name too long"), aside(tmp_path / ("z" * 256)) as out:
        out.part.write_text("")
    assert len(names(tmp_path)) == 3
    recipe = tiny("quick/linear.yaml", tmp_path / ("z" * 256))
    with pytest.raises(FolderError, match="cannot be created or written: File name too long"):
        RunFolder(recipe)


def test_a_folder_is_not_replaced_by_a_file(tmp_path):
    (tmp_path / "x.json").mkdir()
    with pytest.raises(IsADirectoryError), aside(tmp_path / "x.json") as out:
        out.part.write_text("")
    assert names(tmp_path) == ["x.json"]


def test_a_pipe_is_written_as_it_is(tmp_path):
    from engine.results.runs import write_json

    os.mkfifo(tmp_path / "pipe")
    reader = subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE)
    write_json({"a": 1}, tmp_path / "pipe")
    assert json.loads(reader.communicate(timeout=PATIENCE)[0]) == {"a": 1} and (tmp_path / "pipe").is_fifo()
    for device in ("/dev/stdout", "/dev/null"):  # the first is a link to a file where output goes to one
        with aside(Path(device)) as out:
            assert out.part == Path(device)
