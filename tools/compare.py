"""Make a table of methods: every row at the same budget of images, over seeds, with linear evaluation and k-NN.

    python tools/compare.py recipes/tables/fashion.yaml --jobs 2
    python tools/compare.py recipes/tables/imagenet.yaml --launcher "torchrun --nproc_per_node=8"

Stopped at any time (Ctrl-C), it continues where it left off when started again. It runs nothing that tools/train.py
could not run one by one: `--plan` prints those commands. Exit codes: 0 done; 1 a run failed, the other rows are done;
2 bad input; 75 stopped, start it again.
"""

import argparse
import itertools
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from queue import Empty, Queue

import _root
import torch

from engine.errors import RecipeError, Stopped, guarded, line
from engine.folder import is_held
from engine.log import duration, rate
from engine.provenance import environment
from engine.recipe import Recipe
from engine.results import figures, runs, scores, table
from engine.results.chain import Chain, Run, check
from engine.results.scores import Entry, Outcome
from loaders.files import check_writable

TRAIN = str(_root.ROOT / "tools" / "train.py")
STATUS_SECONDS = 30
HELD_SECONDS = 5
LAYERS = {
    "pooled": "Linear evaluation is of the pooled map, which every network has: with method.trains=pre-fc where a "
    "pooled MLP comes behind it, as in BURN's students.",
    "features": "Linear evaluation is of each network's features, behind the pooled MLP where it has one.",
}
"""What a table's `layer` means, for its heading and its plan."""


class Pool:
    """Worker threads that run chains, each its processes one after the other on its share of the cores and GPUs."""

    def __init__(self, chains: list[Chain], out: Path, launcher: list[str], jobs: int) -> None:
        self.out, self.launcher, self.jobs = out, launcher, jobs
        self.results: dict[tuple[str, int], Outcome] = {}
        self.failures: list[str] = []
        self.running: dict[int, tuple[str, Path, subprocess.Popen[bytes]]] = {}
        self.stopping = threading.Event()
        self.teacher_done = threading.Event()
        self.has_teacher = any(chain.name == "teacher" for chain in chains)
        if not self.has_teacher:
            self.teacher_done.set()
        self.total = len(chains)
        self._waiting: Queue[Chain] = Queue()
        for chain in chains:
            self._waiting.put(chain)

    def run(self) -> None:
        """Run everything; returns when all is done, has failed or was stopped."""
        workers = [threading.Thread(target=self._work, args=(number,)) for number in range(self.jobs)]
        for worker in workers:
            worker.start()
        while any(worker.is_alive() for worker in workers):
            for worker in workers:
                worker.join(STATUS_SECONDS / len(workers))
            if not self.stopping.is_set():
                self._status()

    def stop(self) -> None:
        """Let the processes save and end."""
        self.stopping.set()
        for _, _, process in list(self.running.values()):
            process.send_signal(signal.SIGTERM)
        self.teacher_done.set()

    def _status(self) -> None:
        for title, folder, _ in list(self.running.values()):
            try:
                row = runs.metrics(folder)[-1]
            except (OSError, ValueError, IndexError):
                continue  # it has only begun, or is writing this very line
            speed = f", {rate(row['images_per_second'])} images/s" if "images_per_second" in row else ""
            print(f"    {title}: step {row['step']}, {row['images']:,} images{speed}", flush=True)

    def _work(self, number: int) -> None:
        if self.jobs > 1 and not self.launcher:  # on Linux a thread's affinity is its own and its children's
            cores = sorted(os.sched_getaffinity(0))
            os.sched_setaffinity(0, cores[number % len(cores) :: self.jobs] or cores)
        while not self.stopping.is_set():
            try:
                chain = self._waiting.get_nowait()
            except Empty:
                return
            if chain.needs_teacher:
                self.teacher_done.wait()
            if self.stopping.is_set():
                return
            try:
                if chain.needs_teacher and self.has_teacher and ("teacher", 0) not in self.results:
                    raise ChainError(f"{chain.name}, seed {chain.seed}: its teacher failed")
                self._run_chain(chain, number)
            except Stopped:
                return
            except Exception as error:  # one row must not take the others with it
                said = (line(error) or repr(error)).removeprefix("error: ")
                text = str(error) if isinstance(error, ChainError) else f"{chain.name}, seed {chain.seed}: {said}"
                self.failures.append(text)
                print(f"FAILED {text}", flush=True)
            finally:
                if chain.name == "teacher":
                    self.teacher_done.set()

    def _run_chain(self, chain: Chain, number: int) -> None:
        started = time.perf_counter()

        def start(run: Run, recipe: Recipe, place: int) -> None:
            title = f"{chain.name}, seed {chain.seed}, {recipe.name}"
            print(f"{title} ({place} of {len(chain.runs)})", flush=True)
            self._run_one(run, recipe.folder, title, number)

        self.results[chain.name, chain.seed] = outcome = chain.run(start)
        print(
            f"[{len(self.results)} of {self.total}] {chain.name}, seed {chain.seed}: linear {outcome.linear:.2f}, "
            f"k-NN {outcome.knn:.2f}, {duration(time.perf_counter() - started)}",
            flush=True,
        )

    def _run_one(self, run: Run, folder: Path, title: str, number: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._wait_for_others(folder, title)
        log = folder / "output.txt"
        env = dict(os.environ)
        if torch.cuda.device_count() and self.jobs > 1:
            everyone = [str(place) for place in range(torch.cuda.device_count())]
            visible = env["CUDA_VISIBLE_DEVICES"].split(",") if env.get("CUDA_VISIBLE_DEVICES") else everyone
            env["CUDA_VISIBLE_DEVICES"] = visible[number % len(visible)]
        command = [*(self.launcher or [sys.executable]), TRAIN, str(run.path), *run.overrides, "--resume"]
        with open(log, "ab") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=env)
            self.running[number] = (title, folder, process)
            if self.stopping.is_set():
                process.send_signal(signal.SIGTERM)
            code = process.wait()
            del self.running[number]
        if self.stopping.is_set() and code in (Stopped.exit_code, -signal.SIGTERM, -signal.SIGINT):
            raise Stopped("saved")
        if self.stopping.is_set() and code and self.launcher:  # its own code hides that of the run
            raise Stopped("saved")
        if code:
            last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
            raise ChainError(f"{title}: exit code {code}: {' '.join(last)} (all of it: {log})")

    def _wait_for_others(self, folder: Path, title: str) -> None:
        """A run outlives a call that is killed; its row waits for its end, and goes on from there."""
        if is_held(folder):
            print(f"{title}: waits for another process that is running in {folder}", flush=True)
        while is_held(folder):
            if self.stopping.wait(HELD_SECONDS):
                raise Stopped("saved")


class ChainError(RuntimeError):
    """A run of a chain ended with an error."""


def plan(chains: list[Chain], launcher: list[str], layer: str) -> str:
    """The commands, one per line, and what they probe."""
    commands = [
        shlex.join([*(launcher or ["python"]), "tools/train.py", str(run.path), *run.overrides, "--resume"])
        for chain in chains
        for run in chain.runs
    ]
    return "\n".join([f"# {LAYERS[layer]}", *commands])


@guarded
def main() -> int:
    """Run a table and write `table.md`, `table.json` and `table.png` into its folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, help="a file of recipes/tables/")
    parser.add_argument("override", nargs="*", default=[], help="section.key=value, changes every recipe of the table")
    parser.add_argument(
        "--out",
        type=Path,
        help="folder of all runs and of the table (runs/table_<name>, with another budget runs/table_<name>_<images>)",
    )
    parser.add_argument("--seeds", type=int, help="instead of the table's number")
    parser.add_argument("--images", type=int, help="images of each row, instead of the table's")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="only these rows")
    parser.add_argument("--jobs", type=int, default=1, help="rows at once, sharing cores and GPUs (1)")
    parser.add_argument("--launcher", default="", help='how to start a run, such as "torchrun --nproc_per_node=8"')
    parser.add_argument("--plan", action="store_true", help="print the commands and run nothing")
    arguments = parser.parse_intermixed_args()
    try:
        launcher = shlex.split(arguments.launcher)
    except ValueError as error:
        raise RecipeError(f"--launcher: {arguments.launcher!r} is no command line: {error}") from None
    spec = table.load(arguments.table)
    changes = {key: getattr(arguments, key) for key in ("seeds", "images") if getattr(arguments, key) is not None}
    for key, item in changes.items():
        if item < 1:
            raise RecipeError(f"--{key}: expected at least 1, got {item}")
    if arguments.jobs < 1:
        raise RecipeError(f"--jobs: expected at least 1, got {arguments.jobs}")
    if launcher and not shutil.which(launcher[0]):
        raise RecipeError(f"--launcher: no program {launcher[0]!r} on this machine")
    if launcher and arguments.jobs > 1:
        raise RecipeError("--jobs: expected 1 with --launcher, which uses the machine by itself")
    spec = spec.model_copy(update=changes)
    names = [row.name for row in spec.rows]
    given = arguments.only or []
    only = [word for word in given if word in names or "=" not in word]  # `--only ROW key=value` takes both
    for name in only:
        if name not in names:
            raise RecipeError(f"--only: no row {name!r}, expected some of {', '.join(map(repr, names))}")
    if given and not only:
        raise RecipeError(f"--only: expected some of {', '.join(map(repr, names))}, got only overrides")
    rows = [row for row in spec.rows if not only or row.name in only]
    # Another budget is another table.
    budget = f"_{spec.images}" if spec.images != table.load(arguments.table).images else ""
    out = arguments.out or Path("runs") / f"table_{arguments.table.stem}{budget}"
    extra = [*arguments.override, *(word for word in given if word not in only)]
    chains = [
        table.chain(spec, row, seed, arguments.table, out, extra)
        for seed, row in itertools.product(range(spec.seeds), rows)
    ]
    # Rows that wait for the teacher come last, so that the others fill the time.
    chains.sort(key=lambda chain: chain.needs_teacher)
    teacher = table.teacher_chain(spec, arguments.table, out, extra)
    if teacher and any(chain.needs_teacher for chain in chains):
        chains.insert(0, teacher)
    if arguments.plan:
        print(plan(chains, launcher, spec.layer))
        return 0
    figures.pyplot()
    check_writable(out / "table.md")
    check(chain for chain in chains if chain.seed == 0)  # the others differ in their seed alone

    pool = Pool(chains, out, launcher, min(arguments.jobs, len(chains)))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: pool.stop())
    pool.run()
    if pool.stopping.is_set():
        for failure in pool.failures:
            print(f"failed: {failure}", file=sys.stderr)
        print("stopped; what ran is saved, start this command again to continue", file=sys.stderr)
        return 1 if pool.failures else Stopped.exit_code
    results = {**before(spec, arguments.table, out, extra), **pool.results}
    if any(name != "teacher" for name, _ in results):
        write(spec, results, out)
    for failure in pool.failures:
        print(f"failed: {failure}", file=sys.stderr)
    return 1 if pool.failures else 0


def before(spec: table.Table, path: Path, out: Path, extra: list[str]) -> dict[tuple[str, int], Outcome]:
    """What is done of all rows and seeds, by this call or an earlier one of the same settings: tables never shrink."""
    found = {}
    for row in spec.rows:
        seeds = (place.name.removeprefix("seed") for place in (out / table.slug(row.name)).glob("seed*"))
        for seed in sorted(int(seed) for seed in seeds if seed.isdecimal()):
            chain = table.chain(spec, row, seed, path, out, extra)
            if all(run.is_done() for run in chain.runs):
                found[row.name, seed] = chain.outcome()
    teacher = table.teacher_chain(spec, path, out, extra)
    if teacher and all(run.is_done() for run in teacher.runs):
        found["teacher", 0] = teacher.outcome()
    return found


def write(spec: table.Table, results: dict[tuple[str, int], Outcome], out: Path) -> None:
    """Write the table as Markdown, JSON and a figure, and print it."""
    entries = [
        Entry(row.name, row.paper, row.ablation, [results[key] for key in sorted(results) if key[0] == row.name])
        for row in spec.rows
    ]
    entries = [entry for entry in entries if entry.outcomes]
    if ("teacher", 0) in results:
        entries.append(Entry("its teacher (floating point)", None, True, [results["teacher", 0]]))
    baselines = entries[0].outcomes[0].baselines
    if baselines:  # the same for every row: no network
        pixels = Outcome(baselines["pixels_top1"], baselines["pixels_knn"], 0, 0.0, {}, [])
        entries.append(Entry("raw pixels (logistic regression)", None, True, [pixels]))
    text, seeds = scores.comparison(entries, spec.layer), max(len(entry.outcomes) for entry in entries)
    heading = (
        f"# {spec.title}\n\n{spec.images:,} training images per row, {seeds} seed(s), mean ± standard deviation. "
        f"{LAYERS[spec.layer]}\n"
    )
    (out / "table.md").write_text(f"{heading}\n{text}\n\n![figure](table.png)\n", encoding="utf-8")
    record = {
        "title": spec.title,
        "images": spec.images,
        "seeds": seeds,
        "rows": {entry.name: {"paper": entry.paper, "runs": list(map(asdict, entry.outcomes))} for entry in entries},
        "environment": environment(),
    }
    runs.write_json(record, out / "table.json")
    curves = {row.name: _stages(row, out) for row in spec.rows if (row.name, 0) in results}
    figures.draw_comparison(out / "table.png", spec.title, entries, curves)
    print(f"\n{text}\n\n{out / 'table.md'}, {out / 'table.json'} and {out / 'table.png'}")


def _stages(row: table.Row, out: Path) -> list[Path]:
    return [out / table.slug(row.name) / "seed0" / f"stage{number + 1}" for number in range(len(row.stages))]


if __name__ == "__main__":
    sys.exit(main())
