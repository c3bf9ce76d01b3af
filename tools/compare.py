"""Make a table of methods: every row at the same budget of views, over seeds, each with the tasks that the table asks.

    python tools/compare.py recipes/tables/fashion.yaml --jobs 2
    python tools/compare.py recipes/tables/imagenet.yaml --launcher "torchrun --nproc_per_node=8"

Rates are tried on held-out training images before the rows run, where the table says so. Stopped at any time (Ctrl-C),
it continues where it left off when started again. It runs nothing that tools/train.py could not run one by one:
`--plan` prints those commands. Exit codes: 0 done; 1 a run failed, the other rows are done, or a difference that the
table expects is not there; 2 bad input; 75 stopped, start it again.
"""

import argparse
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import _root
import torch

from engine.errors import RecipeError, Stopped, guarded, line
from engine.folder import is_held
from engine.log import duration, rate
from engine.provenance import environment
from engine.recipe import Recipe
from engine.results import figures, runs, scores, table
from engine.results.chain import Chain, Run, check, forwards
from engine.results.scores import Entry, Outcome
from engine.results.table import Plan
from loaders.files import aside, check_writable

TRAIN = str(_root.ROOT / "tools" / "train.py")
STATUS_SECONDS = 30
HELD_SECONDS = 5
LAYERS = {
    "pooled": "the pooled map, which every network has (method.trains=pre-fc where a pooled MLP comes behind it)",
    "features": "each network's features, behind the pooled MLP where it has one",
}
"""What a task's `layer` means."""


class Left:
    """How long what is left will take, from finished runs of the same recipe."""

    def __init__(self) -> None:
        self._todo: dict[Path, tuple[Any, float]] = {}  # run folder -> kind, amount
        self._known: dict[Any, list[float]] = {}  # kind -> seconds for an amount of 1
        self._lock = threading.Lock()

    def add(self, run: Run) -> None:
        """A run that is still to be done, or was done by an earlier call."""
        kind, amount = _kind(run)
        folder = run.recipe().folder
        if not run.is_done():
            self._todo[folder] = kind, amount
        elif not run.tasks:
            took = [row["seconds"] for row in runs.metrics(folder) if "seconds" in row]
            self._known.setdefault(kind, []).append(took[-1] / amount)

    def done(self, run: Run, seconds: float) -> None:
        """It has taken so long."""
        kind, amount = _kind(run)
        with self._lock:
            self._todo.pop(run.recipe().folder, None)
            self._known.setdefault(kind, []).append(seconds / amount)

    def _each(self, kind: Any) -> list[float]:
        """Seconds for an amount of 1, of runs of this kind, or else of others that answer the same or train, too."""
        if kind in self._known:
            return self._known[kind]
        alike = [known for known in self._known if known[1:] == kind[1:]]
        return [seconds for known in alike for seconds in self._known[known]]

    def seconds(self, running: dict[Path, float], jobs: int) -> tuple[float, bool]:
        """Seconds until all is done, and whether something like each of it has been measured; what has not is left out.

        Args:
            running: run folder -> seconds that this run itself expects.
        """
        total, is_whole = 0.0, True
        with self._lock:
            for folder, (kind, amount) in self._todo.items():
                each = self._each(kind)
                is_whole &= folder in running or bool(each)
                total += running[folder] if folder in running else statistics.fmean(each or [0.0]) * amount
        return total / jobs, is_whole


def _kind(run: Run) -> tuple[Any, float]:
    """Runs whose time grows with their length alone, and that length, in images or in epochs."""
    recipe = run.recipe()
    length, unit = float(recipe.run.duration[:-2]), recipe.run.duration[-2:]
    return (run.path, run.tasks, unit), length * recipe.data.batch_size if unit == "it" else length


class Pool:
    """Worker threads that run chains, each its processes one after the other on its share of the cores and GPUs."""

    def __init__(self, plan: Plan, chains: list[Chain], launcher: list[str], jobs: int) -> None:
        self.plan, self.launcher, self.jobs = plan, launcher, jobs
        self.results: dict[tuple[str, int | str], Outcome] = {}
        self.failures: list[str] = []
        self.running: dict[int, tuple[str, Path, subprocess.Popen[bytes]]] = {}
        self.stopping = threading.Event()
        self.total = len(chains)
        self.left = Left()
        self._keys = {chain.key for chain in chains}
        self._ended: set[tuple[str, int | str]] = set()
        self._failed: set[tuple[str, int | str]] = set()
        self._waiting = list(chains)
        self._change = threading.Condition()

    def run(self, on_change: Callable[[], object]) -> None:
        """Run everything; returns when all is done, has failed or was stopped.

        Args:
            on_change: called in this thread after a chain has ended.
        """
        for chain in self._waiting:
            for run in chain.make():
                self.left.add(run)
        workers = [threading.Thread(target=self._work, args=(number,)) for number in range(self.jobs)]
        for worker in workers:
            worker.start()
        seen, said = 0, time.monotonic()
        while any(worker.is_alive() for worker in workers):
            with self._change:
                self._change.wait(1.0)
            if len(self.results) > seen:
                seen = len(self.results)
                on_change()
            if time.monotonic() - said > STATUS_SECONDS and not self.stopping.is_set():
                said = time.monotonic()
                self._status()

    def stop(self) -> None:
        """Let the processes save and end."""
        self.stopping.set()
        for _, _, process in list(self.running.values()):
            process.send_signal(signal.SIGTERM)

    def _status(self) -> None:
        for title, row in ((title, _newest(folder)) for title, folder, _ in list(self.running.values())):
            if row:
                speed = f", {rate(row['images_per_second'])} images/s" if "images_per_second" in row else ""
                print(f"    {title}: step {row['step']}, {row['images']:,} images{speed}", flush=True)
        if said := self._time_left():
            print(f"    {len(self._ended)} of {self.total} done{said}", flush=True)

    def _time_left(self) -> str:
        newest = {folder: _newest(folder) for _, folder, _ in list(self.running.values())}
        seconds, is_whole = self.left.seconds(
            {f: row["eta_seconds"] for f, row in newest.items() if "eta_seconds" in row}, self.jobs
        )
        return f", {'about' if is_whole else 'more than'} {duration(seconds)} left" if seconds else ""

    def _work(self, number: int) -> None:
        if self.jobs > 1 and not self.launcher:  # on Linux a thread's affinity is its own and its children's
            cores = sorted(os.sched_getaffinity(0))
            os.sched_setaffinity(0, cores[number % len(cores) :: self.jobs] or cores)
        while (chain := self._next()) is not None:
            failed = True
            try:
                if lacks := [need for need in chain.needs if need in self._failed]:
                    name, seed = lacks[0]
                    which = (
                        "its teacher"
                        if name != chain.name
                        else "its tries"
                        if isinstance(seed, str)
                        else f"seed {seed}"
                    )
                    raise ChainError(f"{chain.title}: {which} failed")
                self._run_chain(chain, number)
                failed = False
            except Stopped:
                return
            except Exception as error:  # one row must not take the others with it
                said = (line(error) or repr(error)).removeprefix("error: ")
                text = str(error) if isinstance(error, ChainError) else f"{chain.title}: {said}"
                self.failures.append(text)
                print(f"FAILED {text}", flush=True)
            finally:
                with self._change:
                    self._ended.add(chain.key)
                    if failed:
                        self._failed.add(chain.key)
                    self._change.notify_all()

    def _next(self) -> Chain | None:
        """The first chain that can run; None when there is none left."""
        with self._change:
            while not self.stopping.is_set():
                for place, chain in enumerate(self._waiting):
                    if all(need in self._ended or need not in self._keys for need in chain.needs):
                        return self._waiting.pop(place)
                if not self._waiting:
                    return None
                self._change.wait(0.5)
        return None

    def _run_chain(self, chain: Chain, number: int) -> None:
        started = time.perf_counter()
        count = sum(1 for _ in chain.make())

        def start(run: Run, recipe: Recipe, place: int) -> None:
            title = f"{chain.title}, {recipe.name if run.cell is None else f'try {run.cell}, {recipe.name}'}"
            print(f"{title} ({place} of {count})", flush=True)
            begun = time.perf_counter()
            self._run_one(run, recipe.folder, title, number)
            self.left.done(run, time.perf_counter() - begun)

        chain.run(start)
        if isinstance(chain.seed, str):
            said = f"{chain.title} done"
        else:
            self.results[chain.key] = outcome = self.plan.outcome(chain)
            numbers = ", ".join(f"{name} {score:.2f}" for name, score in outcome.scores.items())
            said = f"{chain.title}: {numbers}"
        done = f"[{len(self._ended) + 1} of {self.total}]"
        print(f"{done} {said}, {duration(time.perf_counter() - started)}{self._time_left()}", flush=True)

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


def _newest(folder: Path) -> dict[str, Any]:
    """The last row of a run; empty where it has only begun, or is writing this very line."""
    try:
        return runs.metrics(folder)[-1]
    except (OSError, ValueError, IndexError):
        return {}


class ChainError(RuntimeError):
    """A run of a chain ended with an error."""


def commands(plan: Plan, chains: list[Chain], launcher: list[str]) -> str:
    """What each task asks, and the commands, one per line; what depends on a choice is that of its first cell."""
    lines = [f"# {text}" for text in asked(plan.spec)]
    for chain in chains:
        for run in chain.make():
            words = [*(launcher or ["python"]), "tools/train.py", str(run.path), *run.overrides, "--resume"]
            lines.append(shlex.join(words))
    return "\n".join(lines)


def asked(spec: table.Table) -> list[str]:
    """What each task asks, in a line."""
    found = []
    for task in spec.tasks:
        recipe = Path(task.recipe or spec.probe).name
        if task.measure is None:
            what = f"{recipe}, {task.evaluation} {task.score}, on {LAYERS[task.layer]}"
        else:
            how = {"knn": f"{task.measure.neighbors} nearest neighbors by cosine", "ridge": "linear in closed form"}
            centered = ", centered" if task.measure.center else ""
            said = how.get(task.measure.kind, task.measure.kind)
            what = f"{said}{centered}, of {LAYERS[task.layer]}; images of {recipe}"
        chosen = {"held_out": "held-out training images", "val": "the images that are measured"}[task.chosen_on]
        found.append(f"{task.name}: {what}" + (f"; chosen on {chosen}" if task.grid else ""))
    return found


@guarded
def main() -> int:
    """Run a table and write `table.md`, `table.json` and `table.png` into its folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, help="a file of recipes/tables/")
    parser.add_argument("override", nargs="*", default=[], help="section.key=value, changes every recipe of the table")
    parser.add_argument(
        "--out",
        type=Path,
        help="folder of all runs and of the table (runs/table_<name>, with another budget runs/table_<name>_<budget>)",
    )
    parser.add_argument("--seeds", type=int, help="of every row that trains, instead of the table's numbers")
    parser.add_argument("--views", type=int, help="views of each row, instead of the table's")
    parser.add_argument("--images", type=int, help="images of each row, of a table that counts them")
    parser.add_argument(
        "--only", nargs="+", metavar="ROW", help="only these rows, under each teacher or, as `BURN, T2`, one"
    )
    parser.add_argument("--jobs", type=int, default=1, help="rows at once, sharing cores and GPUs (1)")
    parser.add_argument("--launcher", default="", help='how to start a run, such as "torchrun --nproc_per_node=8"')
    parser.add_argument("--plan", action="store_true", help="print the commands and run nothing")
    arguments = parser.parse_intermixed_args()
    try:
        launcher = shlex.split(arguments.launcher)
    except ValueError as error:
        raise RecipeError(f"--launcher: {arguments.launcher!r} is no command line: {error}") from None
    spec = table.load(arguments.table)
    changes = {key: value for key in ("seeds", "views", "images") if (value := getattr(arguments, key)) is not None}
    for key, item in changes.items():
        if item < 1:
            raise RecipeError(f"--{key}: expected at least 1, got {item}")
        if getattr(spec, key) is None:
            raise RecipeError(f"--{key}: {arguments.table} counts {'images' if key == 'views' else 'views'}")
    if arguments.jobs < 1:
        raise RecipeError(f"--jobs: expected at least 1, got {arguments.jobs}")
    if launcher and not shutil.which(launcher[0]):
        raise RecipeError(f"--launcher: no program {launcher[0]!r} on this machine")
    if launcher and arguments.jobs > 1:
        raise RecipeError("--jobs: expected 1 with --launcher, which uses the machine by itself")
    if "seeds" in changes:
        changes["rows"] = tuple(row.model_copy(update={"seeds": None}) for row in spec.rows)
    labels = [variant.label for variant in Plan(spec, arguments.table, Path()).variants]
    names = list(dict.fromkeys([*(row.name for row in spec.rows), *labels]))
    given = arguments.only or []
    only = [word for word in given if word in names or "=" not in word]  # `--only ROW key=value` takes both
    for name in only:
        if name not in names:
            raise RecipeError(f"--only: no row {name!r}, expected some of {', '.join(map(repr, names))}")
    if given and not only:
        raise RecipeError(f"--only: expected some of {', '.join(map(repr, names))}, got only overrides")
    # Another budget is another table.
    now = spec.model_copy(update=changes)
    budget = "" if (now.views, now.images) == (spec.views, spec.images) else f"_{now.views or now.images}"
    out = arguments.out or Path("runs") / f"table_{arguments.table.stem}{budget}"
    extra = [*arguments.override, *(word for word in given if word not in only)]
    plan = Plan(now, arguments.table, out, extra)
    chains = plan.chains(only)
    if arguments.plan:
        print(commands(plan, chains, launcher))
        return 0
    figures.pyplot()
    check_writable(out / "table.md")
    check(
        (chain for chain in chains if chain.seed in (0, "tries")), plan.kinds
    )  # the others differ in their seed alone

    pool = Pool(plan, chains, launcher, min(arguments.jobs, len(chains)))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: pool.stop())
    earlier = plan.finished()
    pool.run(lambda: write(plan, {**earlier, **pool.results}))
    results = {**earlier, **pool.results}
    text, lacking = write(plan, results, figure=True) if results else ("", [])
    for failure in pool.failures:
        print(f"failed: {failure}", file=sys.stderr)
    if pool.stopping.is_set():
        print("stopped; what ran is saved, start this command again to continue", file=sys.stderr)
        return 1 if pool.failures else Stopped.exit_code
    print(f"\n{text}\n{out / 'table.md'}, {out / 'table.json'} and {out / 'table.png'}" if text else "nothing is done")
    for said in lacking:
        print(f"not as expected: {said}", file=sys.stderr)
    return 1 if pool.failures or lacking else 0


def write(plan: Plan, results: dict[tuple[str, int | str], Outcome], *, figure: bool = False) -> tuple[str, list[str]]:
    """Write the table as Markdown, as JSON and, if asked, as a figure.

    Args:
        results: (name, seed) of chains -> what they gave.

    Returns:
        The table as text, and what of `expect` is not there.
    """
    spec, out = plan.spec, plan.out
    entries = plan.entries(results)
    tasks = [task.name for task in spec.tasks]
    found = scores.differences(entries, spec.pairs, tasks)
    lacking = unmet(spec, entries)
    text = scores.comparison(entries, tasks, spec.meters) + "\n"
    if found:
        text += f"\n{scores.pairs_table(found, tasks)}\n"
    (out / "table.md").parent.mkdir(parents=True, exist_ok=True)
    with aside(out / "table.md") as file:
        file.part.write_text(f"{heading(spec, entries)}\n{text}\n![figure](table.png)\n", encoding="utf-8")
    record = {
        "title": spec.title,
        "views": spec.views,
        "images": spec.images,
        "rows": {
            entry.name: {
                "paper": entry.paper,
                "seeds": {seed: asdict(outcome) for seed, outcome in entry.outcomes.items()},
                "choices": entry.choices,
            }
            for entry in entries
        },
        "pairs": [{**d._asdict(), "mean": d.mean, "interval": d.interval} for d in found],
        "not_as_expected": lacking,
        "environment": environment(),
    }
    runs.write_json(record, out / "table.json")
    if figure:
        curves = {
            variant.label: [
                (run.recipe().folder, forwards(run.recipe())) for run in plan.chain(variant, 0).make() if not run.tasks
            ]
            for variant in plan.variants
            if (variant.label, 0) in results
        }
        figures.draw_comparison(out / "table.png", spec.title, entries, tasks, found, curves)
    return text, lacking


def heading(spec: table.Table, entries: list[Entry]) -> str:
    """What a reader has to know before the numbers."""
    counts = sorted({len(entry.outcomes) for entry in entries if entry.outcomes})
    seeds = " or ".join(map(str, counts))
    budget = f"{spec.views:,} views of the network that is evaluated" if spec.views else f"{spec.images:,} images"
    lines = [f"# {spec.title}", "", f"Every row trains on {budget}; {seeds} seed(s), mean ± standard deviation.", ""]
    lines += [f"- {text}" for text in asked(spec)]
    if spec.tries:
        cells, share = len(table.cells(spec.grid)), f"{table.HELD_OUT:.0%}"
        rates = f"Rates: {cells} cells a row, {spec.tries:,} views each, one seed, the best by {spec.judging.name} on"
        lines += ["", f"{rates} {share} of the training images that the tries do not train on."]
    chosen = [(entry.name, name, choice) for entry in entries for name, choice in entry.choices.items()]
    lines += ["", "Chosen, and what every cell scored:", ""] if chosen else []
    for row, name, choice in chosen:
        on = {"held_out": "held-out training images", "val": "the images that are measured"}[choice["on"]]
        tried = ", ".join(f"{_said(cell['cell'])}: {cell['score']:.1f}" for cell in choice["cells"])
        lines.append(f"- {row}, {name}: {_said(choice['chosen'])} by {choice['judge']} on {on} ({tried})")
    return "\n".join(lines) + "\n"


def _said(cell: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in cell.items())


def unmet(spec: table.Table, entries: list[Entry]) -> list[str]:
    """What of `expect` is not there, among the rows that have been run."""
    said = []
    for wanted in spec.expect:
        for found in scores.differences(entries, [(wanted.row, wanted.over)], [wanted.task]):
            if found.mean < wanted.by:
                said.append(f"{found.name}, {found.task}: {found.mean:+.1f} points, expected at least {wanted.by:g}")
    return said


if __name__ == "__main__":
    sys.exit(main())
