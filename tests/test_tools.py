"""What all tools have in common: every end is one line and an exit code, whatever the streams are."""

import argparse
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

import loaders
from engine import dist
from engine.errors import RecipeError, Stopped, guarded
from engine.results import figures
from loaders import DataError, LoaderError
from loaders.files import aside
from tests.images import picture, write_tree
from tests.loading import convert
from tests.processes import tool
from tests.tiny import ROOT

QUICK = ROOT / "recipes/quick"
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
    if "dist.leave(main)" not in (ROOT / f"tools/{name}.py").read_text():
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
def test_a_working_folder_that_is_gone_is_one_line(name, tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert outcome(name) == 2
    assert capsys.readouterr().err == (
        f"error: the working folder: {os.strerror(errno.ENOENT)}; cd to a folder that is there\n"
    )


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


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_streams_that_are_not_there_change_no_exit_code(name, monkeypatch):
    closed = open(os.devnull, "w")
    closed.close()
    for stream in (None, closed):
        monkeypatch.setattr(sys, name, stream)
        assert guarded(lambda: 7)() == 7 and guarded(raises(DataError("a")))() == 2


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
    done = shell("""PYTHONIOENCODING=utf-8:strict $python 'import _root, os; print(os.fsdecode(b"a\\xff"))'""")
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
    for kind in ("JPEG", "PNG", "WEBP", "TIFF"):  # that of a TIFF is applied
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


# ------------------------------------------------------------------------------------------------ slurm.sh

HARD = [
    "recipes/my $HOME.yaml",
    "data.options={num_images: 8192, side: '36'}",
    'name="a b"',
    *("x=`id`", "y=$(id)", "a=\\", "*", "", "z='; exit 3 #"),
]
STAND_INS = {
    "scontrol": 'printf "node%s\\n" 1 2',
    "srun": 'while [[ $1 == --* ]]; do shift; done; for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@"; done',
    "torchrun": 'printf "%s\\0" "$@" > "$OUT/node$SLURM_NODEID"; exit $CODE',
}


@pytest.mark.parametrize("code", [0, 5])
def test_the_slurm_script_hands_arguments_through(code, tmp_path):
    (tmp_path / "bin").mkdir()
    for name, text in STAND_INS.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "7"}
    env = {
        **os.environ,
        **slurm,
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
        "OUT": str(tmp_path),
        "CODE": str(code),
    }
    done = subprocess.run(["bash", ROOT / "tools/slurm.sh", *HARD], cwd=tmp_path, env=env, capture_output=True)
    assert (done.returncode, done.stderr) == (code, b"")
    for node in (0, 1):
        words = (tmp_path / f"node{node}").read_text().split("\0")[:-1]
        at = words.index("tools/train.py")
        assert words[at + 1 :] == [*HARD, "--resume"] and "--rdzv_endpoint=node1:29500" in words[:at]


# ------------------------------------------------------------------------------------------------ doctor


@pytest.fixture
def quick_doctor(monkeypatch):
    doctor = tool("doctor")
    monkeypatch.setattr(doctor, "_back_end", lambda name: "works")  # probing them takes its time
    monkeypatch.setattr(doctor, "_disk", lambda recipe: "100 MB/s")
    return doctor


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (FileNotFoundError(errno.ENOENT, "No such file", "/dev/shm"), "/dev/shm: No such file"),
        (KeyError("MemAvailable"), "KeyError: 'MemAvailable'"),
        (RuntimeError("NVML\nand more"), "RuntimeError: NVML"),
        (DataError("a: no images"), "a: no images"),
    ],
)
def test_what_the_doctor_cannot_tell_costs_nothing_else(error, text, quick_doctor, monkeypatch, capsys):
    monkeypatch.setattr(quick_doctor, "QUESTIONS", dict.fromkeys(quick_doctor.QUESTIONS, raises(error)))
    for question in ("_back_end", "_disk"):
        monkeypatch.setattr(quick_doctor, question, raises(error))
    assert call(monkeypatch, "doctor") == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == len(quick_doctor.QUESTIONS) + len(loaders.backends()) + 1
    assert all(line.endswith(f"cannot tell: {text}") for line in said)


def test_the_doctor_looks_for_compilers(quick_doctor, tmp_path, monkeypatch):
    for name in ("g++", "gcc"):
        (tmp_path / name).write_text(f"#!/bin/sh\necho {name} 12.2\necho more\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.delenv("CXX", raising=False), monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    asked = quick_doctor.QUESTIONS["compiler"]
    assert quick_doctor.told(asked) == "g++ 12.2, gcc 12.2"
    monkeypatch.setenv("CXX", "icpc")
    assert quick_doctor.told(asked).startswith("MISSING: CXX=icpc is not there: apt-get install g++")
    monkeypatch.delenv("CXX")
    (tmp_path / "gcc").write_text("#!/bin/sh\nexit 1\n")
    assert quick_doctor.told(asked).startswith("cannot tell: CalledProcessError")
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert quick_doctor.told(asked).startswith("MISSING: no g++: apt-get install g++; nothing can be compiled")


def test_the_doctor_says_that_the_step_cannot_be_measured(quick_doctor, tmp_path, monkeypatch, capsys):
    measured = {"backends": {"turbo": {"whole": {"images_per_second": [0.25]}}}, "best": "turbo", "device": "cpu"}
    monkeypatch.setattr(quick_doctor.loader_bench, "measure", lambda *_, **__: measured)
    monkeypatch.setattr(quick_doctor, "step_speeds", raises(RuntimeError("no C++ compiler\nand 100 lines")))
    recipe = ROOT / "recipes/quick/supervised.yaml"
    overrides = ["data.backend=synthetic", "data.options={num_images: 200}"]
    assert call(monkeypatch, "doctor", recipe, *overrides) == 1
    said = capsys.readouterr()
    assert said.out.splitlines()[-1] == f"{'verdict':18} cannot tell: RuntimeError: no C++ compiler" and not said.err
    assert "loader turbo       0.25 images/s" in said.out


# ------------------------------------------------------------------------------------------------ demo, make_images


def test_digits_without_scikit_learn_are_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    for name, arguments in (("make_images", ["digits", "x"]), ("make_images", ["photos", "x"]), ("demo", [])):
        monkeypatch.chdir(tmp_path)
        assert call(monkeypatch, name, *arguments) == 2
        said = capsys.readouterr().err
        assert "scikit-learn, which holds these images, is missing" in said and said.count("\n") == 1
        assert "pip install scikit-learn" in said and not any(tmp_path.rglob("*.*"))


def test_a_demo_without_matplotlib_does_not_begin(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(tool("demo").train, "run", lambda *_, **__: pytest.fail("trained"))
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, "demo") == 2 and not list(tmp_path.iterdir())
    assert "matplotlib, which draws figures, is missing" in capsys.readouterr().err


@pytest.mark.parametrize("seeds", ["0", "-1"])
def test_a_demo_of_no_seeds_is_refused(seeds, monkeypatch, capsys):
    with pytest.raises(SystemExit) as left:
        call(monkeypatch, "demo", "--seeds", seeds)
    assert left.value.code == 2 and "--seeds: expected at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("holds", ["nothing", "splits", "classes", "one split"])
def test_a_set_without_images_is_not_taken_for_whole(holds, tmp_path, monkeypatch, capsys):
    out = tmp_path / "set"
    folders = {"nothing": [""], "splits": ["train", "val"], "classes": ["train/a", "val/a"], "one split": ["train/a"]}
    for folder in folders[holds]:
        (out / folder).mkdir(parents=True, exist_ok=True)
    if holds == "one split":
        (out / "train" / "a" / "0.jpg").touch()
    before = sorted(out.rglob("*"))
    assert call(monkeypatch, "make_images", "digits", out) == 2
    said = capsys.readouterr()
    assert "holds no images in train and val" in said.err and not said.out and sorted(out.rglob("*")) == before


# ------------------------------------------------------------------------------------------------ show_views, figures


def test_more_views_than_images_are_those_that_are_there(tmp_path, monkeypatch, capsys):
    recipe = ROOT / "recipes/quick/burn_stage1.yaml"
    overrides = [
        "data.backend=synthetic",
        "data.options={num_images: 3, side: 36}",
        "init=[]",
        "data.expect_images=null",
    ]
    out = tmp_path / "new" / "views.png"
    arguments = [recipe, *overrides, "--backends", "synthetic", "--out", out, "--count", "5"]
    assert call(monkeypatch, "show_views", *arguments) == 0
    said = capsys.readouterr()
    assert "the data set has 3 images; all are drawn" in said.err and "3 images, synthetic" in said.out and out.exists()
    monkeypatch.setattr(tool("show_views"), "views_of", lambda *_: pytest.fail("worked"))
    with pytest.raises(SystemExit) as left:
        call(monkeypatch, "show_views", *arguments, "--out", tmp_path / "views.xyz")
    assert left.value.code == 2 and "--out: expected the name of a picture" in capsys.readouterr().err


def test_bars_end_at_a_hundred_percent():
    plt = figures.pyplot()
    figure, axis = plt.subplots()
    figures.score_bars(axis, [2, 1, 0], [[99.9, 95.0], [100.0], [0.5, 3.5]], color="tab:blue")
    assert axis.get_xlim() == (0, 100)
    (errors,) = axis.collections
    ends = [point for path in errors.get_segments() for point in path[:, 0]]
    assert 0 <= min(ends) and max(ends) <= 100
    assert [text.get_text() for text in axis.texts] == ["97.5 ± 3.5", "100.0", "2.0 ± 2.1"]
    plt.close(figure)


# ------------------------------------------------------------------------------------------------ outputs

OUTPUTS = {
    "cache_teacher": (["{reg}", "{folder}", "data.backend=synthetic", "init=[]", "--views", "1"], "Maker"),
    "compare": (["{table}", "--out", "{folder}"], "Pool"),
    "convert_imagenet_to_ffcv": (["{data}", "{out}.beton"], "open_index"),
    "demo": (["--json", "{out}.json"], "run_demo"),
    "export": (["run", "{out}.bnn"], "open_trained"),
    "export, graph": (["run", "/dev/null", "--openvino", "{out}.xml"], "open_trained"),
    "embed": (["net.pth", "{data}", "{out}.npz"], "open_trained"),
    "embed, neighbors": (["net.pth", "{data}", "f.npz", "--neighbors", "{out}.png"], "open_trained"),
    "make_images": (["digits", "{out}"], "write"),
    "make_index": (["{data}", "{out}.index"], "open_index"),
    "make_lists": (["subset", "{data}", "{out}.txt", "--count", "1"], "files_of"),
    "probe": (["net.pth", "--task", "knn", "--data", "{data}", "--out", "{folder}"], "open_trained"),
    "scan_images": (["{data}", "--report", "{folder}"], "open_index"),
    "show_detections": (["{data}", "--out", "{out}.png"], "newest"),
    "show_views": (["{recipe}", "data.backend=synthetic", "--out", "{out}.png"], "views_of"),
    "train": (["{recipe}", "data.backend=synthetic", "--benchmark", "loader", "--json", "{out}.json"], "loader"),
    "train, figure": (["{recipe}", "data.backend=synthetic", "--benchmark", "step", "--figure", "{out}.png"], "step"),
}


TAKE_A_FOLDER = ("cache_teacher", "compare", "make_images", "probe", "scan_images")


@pytest.mark.parametrize(
    ("name", "place"),
    [(name, place) for name in OUTPUTS for place in ("below a file", "system")]
    + [(name, "folder") for name in OUTPUTS if name not in TAKE_A_FOLDER],
)
def test_an_output_that_cannot_be_written_is_found_before_the_work(name, place, tree, tmp_path, monkeypatch, capsys):
    arguments, work = OUTPUTS[name]
    name = name.split(",")[0]
    suffix = next((word.removeprefix("{out}") for word in arguments if word.startswith("{out}")), "")
    (tmp_path / "file").touch()
    out = {"folder": tmp_path / "x", "below a file": tmp_path / "file" / "x", "system": "/proc/x"}[place]
    if place == "folder":
        (tmp_path / f"x{suffix}").mkdir()
    table = tmp_path / "t.yaml"
    table.write_text(json.dumps({"title": "t", "views": 8, "seeds": 1, "probe": str(QUICK / "linear.yaml"),
                                 "tasks": [{"name": "linear"}],
                                 "rows": [{"name": "A", "stages": [str(QUICK / "supervised.yaml")]}]}))  # fmt: skip
    named = [
        word.format(
            out=out, folder=out, data=tree, table=table, recipe=QUICK / "supervised.yaml", reg=QUICK / "regress.yaml"
        )
        for word in arguments
    ]
    if name == "train":
        monkeypatch.setattr(f"engine.bench.{work}.measure", lambda *_: pytest.fail("worked"))
    else:
        monkeypatch.setattr(tool(name), work, lambda *_, **__: pytest.fail("worked"))
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *named])
    assert outcome(name) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {out}") and said.count("\n") == 1 and sorted(tmp_path.rglob("*")) == before


def test_a_full_disk_names_what_was_being_written(tree, tmp_path, monkeypatch, capsys):
    converter = tool("convert_imagenet_to_ffcv")
    monkeypatch.setattr(converter.beton._Writer, "finish", raises(OSError(errno.ENOSPC, "No space left on device")))
    assert call(monkeypatch, "convert_imagenet_to_ffcv", tree, tmp_path / "x.beton") == 6
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {tmp_path}/x.beton: No space left on device"
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------ converter


@pytest.mark.parametrize("limit", ["0", "-3"])
def test_a_conversion_of_nothing_is_refused(limit, tree, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as left:
        call(monkeypatch, "convert_imagenet_to_ffcv", tree, tmp_path / "x.beton", "--limit", limit)
    assert left.value.code == 2 and "--limit: expected 1 to" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_conversion_that_leaves_out_all_writes_nothing(tmp_path, monkeypatch, capsys):
    root = write_tree(tmp_path / "data", count=6)
    for path in root.rglob("*.jpg"):
        path.write_bytes(path.read_bytes()[:-300])
    arguments = [root, tmp_path / "x.beton", "--on-bad-image", "skip"]
    assert call(monkeypatch, "convert_imagenet_to_ffcv", *arguments) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"{root}: none of 6 images can be used, " in said and "cannot be decoded" in said
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_conversion_onto_its_source_is_refused(tree, tmp_path, monkeypatch, capsys):
    convert(tree, tmp_path / "x.beton")
    (tmp_path / "y.beton").symlink_to("x.beton")
    before = (tmp_path / "x.beton").read_bytes()
    for out in ("x.beton", "y.beton"):
        assert call(monkeypatch, "convert_imagenet_to_ffcv", tmp_path / "x.beton", tmp_path / out) == 2
        assert "is the source; expected another name" in capsys.readouterr().err
    assert (tmp_path / "x.beton").read_bytes() == before


def test_a_page_that_is_too_small_names_the_image_and_obeys_skip(tmp_path, monkeypatch, capsys):
    root = write_tree(tmp_path / "data", count=6)
    Image.fromarray(np.zeros((900, 900, 3), np.uint8)).save(root / "class0" / "big.jpg")
    arguments = [root, tmp_path / "x.beton", "--mode", "raw", "--max-side", "0", "--page-mib", "2"]
    assert call(monkeypatch, "convert_imagenet_to_ffcv", *arguments) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "big.jpg: takes 2,430,000 bytes, a page has 2,097,152; give --page-mib or --max-side" in said
    assert call(monkeypatch, "convert_imagenet_to_ffcv", *arguments, "--on-bad-image", "skip") == 0
    assert "x.beton: 6 images" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_conversion_that_is_stopped_leaves_nothing(number, tree, tmp_path, monkeypatch, capsys):
    converter, seen = tool("convert_imagenet_to_ffcv"), []
    honest = converter.beton._Writer.add

    def add(writer, sample):
        honest(writer, sample)
        seen.append(len(list(tmp_path.iterdir())))
        if len(seen) == 5:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(converter.beton._Writer, "add", add)
    assert call(monkeypatch, "convert_imagenet_to_ffcv", tree, tmp_path / "x.beton") == 128 + number
    assert capsys.readouterr().err.endswith("stopped\n") and seen[-1] > 0 and not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------ benchmarks


@pytest.mark.parametrize("mode", ["loader", "train"])
@pytest.mark.parametrize("data", ["nowhere", "empty"])
def test_a_benchmark_without_data_says_so_first(mode, data, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr("engine.bench.step.gate", lambda *_: pytest.fail("compiled"))
    monkeypatch.setattr("engine.bench.loader.interleave", lambda *_, **__: pytest.fail("measured"))
    arguments = [QUICK / "supervised.yaml", f"data.train={tmp_path / data}", "--benchmark", mode]
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
    assert outcome("train") == 2
    said = capsys.readouterr().err
    assert str(tmp_path / data) in said and said.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize("name", ["train", "compare", "show_views", "doctor", "evaluate"])
def test_overrides_are_optional_and_stand_anywhere(name, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        call(monkeypatch, name, "--nonsense")
    usage, said = capsys.readouterr().err.rsplit("\n", 2)[:2]
    assert "[override ...]" in usage and "override" not in said
    seen = []
    honest = argparse.ArgumentParser.parse_intermixed_args

    def parse(parser):
        seen.append(honest(parser))
        raise KeyboardInterrupt

    monkeypatch.setattr("argparse.ArgumentParser.parse_intermixed_args", parse)
    options = {"train": ["--resume"], "compare": ["--jobs", "1"], "show_views": ["--count", "1"]}.get(name, [])
    for words, expected in ((["x.yaml"], []), (["x.yaml", "a=1", *options, "b=2"], ["a=1", "b=2"])):
        monkeypatch.setattr(sys, "argv", ["tool", *words])
        outcome(name)
        assert list(seen.pop().override) == expected


@pytest.mark.parametrize("option", ["--json", "--figure"])
def test_what_only_a_benchmark_writes_is_refused_without_one(option, monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        call(monkeypatch, "train", "x.yaml", option, "out")
    assert ended.value.code == 2 and f"{option} " in capsys.readouterr().err.splitlines()[-1]
