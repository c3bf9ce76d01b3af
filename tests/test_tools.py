"""What all tools have in common: every end is one line and an exit code, whatever the streams are."""

import errno
import io
import itertools
import json
import os
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import ExifTags, Image

from engine import dist
from engine.errors import RecipeError, Stopped, guarded
from loaders import DataError, LoaderError
from loaders.files import aside
from tests.images import picture, write_tree
from tests.processes import tool
from tests.tiny import ROOT

TOOLS = sorted(path.stem for path in (ROOT / "tools").glob("*.py") if path.stem != "_root")
LINES = {
    "recipe": (RecipeError("r.yaml: width: expected 1"), 2, "error: r.yaml: width: expected 1"),
    "data": (DataError("a: no such folder"), 2, "error: a: no such folder"),
    "loader": (LoaderError("DALI"), 6, "error: DALI"),
    "stopped": (Stopped("stopped, saved"), 75, "stopped, saved"),
    "no file": (FileNotFoundError(errno.ENOENT, "No such file", "x/y"), 2, "error: x/y: No such file"),
    "permission": (PermissionError(errno.EACCES, "Permission denied", b"x/y"), 2, "error: x/y: Permission denied"),
    "read-only": (OSError(errno.EROFS, "Read-only", "x"), 2, "error: x: Read-only"),
    "full disk": (OSError(errno.ENOSPC, "No space left", "x"), 6, "error: x: No space left"),
    "open files": (OSError(errno.EMFILE, "Too many open files", "x"), 6, "error: x: Too many open files"),
    "another pipe": (BrokenPipeError(errno.EPIPE, "Broken pipe"), 6, "test_tools.py, line "),
    "memory": (MemoryError("3 GiB"), 6, "error: out of memory: 3 GiB"),
    "Ctrl-C": (KeyboardInterrupt(), 130, "stopped"),
}


def outcome(name):
    """Exit code of a tool as its own `__main__` leaves."""
    main = tool(name).main
    if name != "train":
        return main()
    with pytest.raises(SystemExit) as left:
        dist.leave(main)
    return left.value.code


def raises(error):
    def anything(*_, **__):
        raise error

    return anything


@pytest.mark.parametrize("name", TOOLS)
def test_what_is_no_defect_is_one_line_of_every_tool(name, monkeypatch, capsys):
    for error, code, text in LINES.values():
        for parse in ("parse_args", "parse_intermixed_args"):
            monkeypatch.setattr(f"argparse.ArgumentParser.{parse}", raises(error))
        vars(error).pop("is_reported", None)
        assert outcome(name) == code, error
        said = capsys.readouterr()
        assert not said.out and said.err.count("\n") == 1 and text in said.err


@pytest.mark.parametrize("name", TOOLS)
@pytest.mark.parametrize("error", [KeyError("k"), RecursionError("deep"), OSError("of a library"), AssertionError()])
def test_a_defect_keeps_its_traceback(name, error, monkeypatch, capsys):
    for parse in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(f"argparse.ArgumentParser.{parse}", raises(error))
    vars(error).pop("is_reported", None)
    assert outcome(name) == 1
    said = capsys.readouterr().err
    assert "Traceback" in said and "in anything" in said and type(error).__name__ in said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_removes_what_is_half_written(number, tmp_path, capsys):
    def main():
        with aside(tmp_path / "x") as out:
            out.part.write_text("half")
            os.kill(os.getpid(), number)
            pytest.fail("went on")

    before = signal.getsignal(number)
    assert guarded(main)() == 128 + number
    assert capsys.readouterr().err == "stopped\n" and not list(tmp_path.iterdir())
    assert signal.getsignal(number) == before


def test_a_signal_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    try:
        assert guarded(lambda: os.kill(os.getpid(), signal.SIGHUP) or 7)() == 7
    finally:
        signal.signal(signal.SIGHUP, before)


def test_among_other_ranks_a_signal_is_left_to_the_system(monkeypatch):
    seen = []
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit):
        dist.leave(lambda: seen.append(signal.getsignal(signal.SIGTERM)) or 0)
    assert seen == [signal.SIG_DFL]


def onto(monkeypatch, name, descriptor):
    """Python's stream on a file of the system, as it is in a process of its own."""
    monkeypatch.setattr(sys, name, open(descriptor, "w", buffering=1 << 16))
    return getattr(sys, name)


def closed_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.mark.parametrize("size", [1, 1 << 20])  # found at the end, or on the way
@pytest.mark.parametrize("code", [0, 1])
def test_a_reader_that_has_gone_is_no_error(size, code, monkeypatch, capsys):
    stream = onto(monkeypatch, "stdout", closed_pipe())
    assert guarded(lambda: print("x" * size) or code)() == 141
    stream.close()  # as the end of Python does
    assert capsys.readouterr().err == ""


def test_an_error_is_said_though_nobody_reads_the_output(monkeypatch, capsys):
    onto(monkeypatch, "stdout", closed_pipe())

    def main():
        print("x")
        raise DataError("a: no such folder")

    assert guarded(main)() == 2 and capsys.readouterr().err == "error: a: no such folder\n"


def test_nobody_reads_the_errors(monkeypatch):
    onto(monkeypatch, "stderr", closed_pipe()).reconfigure(line_buffering=True)
    assert guarded(raises(DataError("a: no such folder")))() == 2


def test_a_full_disk_under_the_output_is_one_line(monkeypatch, capsys):
    stream = onto(monkeypatch, "stdout", os.open("/dev/full", os.O_WRONLY))
    assert guarded(lambda: print("x") or 0)() == 6
    stream.close()
    assert capsys.readouterr().err == "error: standard output: No space left on device\n"


def test_too_many_open_files_is_one_line(tmp_path, capsys):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = []

    def main():
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 4, hard))
        while True:
            held.append(open(tmp_path / "x", "a"))

    try:
        assert guarded(main)() == 6
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for file in held:
            file.close()
    assert capsys.readouterr().err == f"error: {tmp_path}/x: Too many open files\n"


# ------------------------------------------------------------------------------------------------ processes


def shell(script, **options):
    """A line of bash in which `$python` runs a text with tools/ on the path."""
    env = {**os.environ, "python": f"{sys.executable} -c", "PYTHONPATH": str(ROOT / "tools")}
    return subprocess.run(["bash", "-c", script], capture_output=True, env=env, **options)


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_open(closed, tmp_path):
    text = (
        "import _root, os, subprocess, sys, tempfile; print(1); print(2, file=sys.stderr); "
        "file = tempfile.TemporaryFile(); assert file.fileno() > 2; "
        "subprocess.run(['sh', '-c', 'echo 3; echo 4 >&2; cat'], check=True); sys.exit(7)"
    )
    done = shell(f"$python {text!r} {closed}".replace(f"{text!r}", f'"{text}"'))
    assert done.returncode == 7, done.stderr
    assert done.stdout == (b"" if ">&-" in closed.replace("2>&-", "") else b"1\n3\n")


def test_ctrl_c_in_an_import_is_one_line():
    done = shell("""$python 'import _root, os, signal; os.kill(os.getpid(), signal.SIGINT); import torch'; echo $?""")
    assert done.stderr == b"stopped\n" and done.stdout == b"130\n"


def test_any_name_of_a_file_can_be_printed():
    done = shell("""$python 'import _root, os; print(os.fsdecode(b"a\\xff"))'""")
    assert (done.returncode, done.stderr) == (0, b"") and b"a" in done.stdout


def test_a_line_that_cannot_be_logged_is_no_traceback():
    text = "import _root, logging, sys; logging.basicConfig(stream=sys.stdout); logging.warning(1); logging.warning(2)"
    done = shell(f"($python '{text}'; true) | true")
    assert b"Traceback" not in done.stderr


# ------------------------------------------------------------------------------------------------ scan_images


def call(monkeypatch, name, *arguments):
    """Exit code of a tool in this process."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
    return tool(name).main()


def animated(kind):
    """An image of several pictures as bytes."""
    first, *others = [Image.fromarray(picture(number, 24, 20)) for number in range(4)]
    out = io.BytesIO()
    first.save(out, kind, save_all=True, append_images=others)
    return out.getvalue()


def turned(orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


def with_exif(kind, orientation):
    out = io.BytesIO()
    Image.fromarray(picture(orientation, 24, 20)).save(out, kind, exif=turned(orientation))
    return out.getvalue()


def test_no_image_ends_the_scan(tmp_path, monkeypatch):
    rng, count = np.random.default_rng(0), 0
    (tmp_path / "data" / "class0").mkdir(parents=True)
    whole = {kind: animated(kind) for kind in ("GIF", "TIFF", "WEBP")}
    whole |= {"JPEG": with_exif("JPEG", 6)}
    for kind, content in whole.items():
        for _ in range(60):
            damaged = np.frombuffer(content, np.uint8).copy()
            damaged[rng.integers(8, len(damaged), 3)] = rng.integers(0, 256, 3)
            end = len(damaged) if rng.random() < 0.7 else rng.integers(8, len(damaged))
            (tmp_path / "data" / "class0" / f"{count:03d}.{kind.lower()}").write_bytes(damaged[:end].tobytes())
            count += 1
    assert call(monkeypatch, "scan_images", tmp_path / "data", "--report", tmp_path / "scan") in (0, 1)
    report = json.loads((tmp_path / "scan" / "report.json").read_text())
    assert report["complete"] and report["looked_at"] == report["images"] == count
    assert any("damaged after its first picture" in what for entry in report["odd"] for what in entry["what"])
    listed = (tmp_path / "scan" / "quarantine.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in listed] == report["unusable"]


def test_the_scan_lists_orientations(tmp_path, monkeypatch, capsys):
    (tmp_path / "class0").mkdir()
    for kind in ("JPEG", "PNG", "WEBP"):
        for orientation in (1, 6):
            (tmp_path / "class0" / f"{orientation}.{kind.lower()}").write_bytes(with_exif(kind, orientation))
    assert call(monkeypatch, "scan_images", tmp_path) == 0
    odd = sorted(line for line in capsys.readouterr().out.splitlines() if line.startswith("odd"))
    assert odd == [f"odd: class0/6.{k}: EXIF orientation 6 is not applied" for k in ("jpeg", "png", "webp")]


def test_a_scan_that_is_stopped_keeps_what_it_found(tmp_path, monkeypatch, capsys):
    root, scanner = write_tree(tmp_path / "data", count=8), tool("scan_images")
    (root / "class0" / "0000.jpg").write_bytes(b"no image")
    honest = scanner.scan

    def interrupted(*arguments, **options):
        yield from itertools.islice(honest(*arguments, **options), 3)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(scanner, "scan", interrupted)
    assert call(monkeypatch, "scan_images", root, "--report", tmp_path / "scan") == 143
    said = capsys.readouterr()
    assert "stopped: 3 of 8 images looked at" in said.out and said.err.endswith("stopped\n")
    report = json.loads((tmp_path / "scan" / "report.json").read_text())
    assert not report["complete"] and [entry["path"] for entry in report["unusable"]] == ["class0/0000.jpg"]
    assert len((tmp_path / "scan" / "quarantine.jsonl").read_text().splitlines()) == 1
