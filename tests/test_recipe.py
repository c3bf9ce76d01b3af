"""Recipes: every message, merging, overrides, the resolved form, and all recipes of the repository."""

import copy
import os
import re
from pathlib import Path

import pytest
import torch
import yaml

import loaders
from engine import precision, strict_yaml
from engine import recipe as recipes
from engine.describe import describe
from engine.errors import RecipeError
from engine.recipe import micro_steps
from models import methods
from tests.processes import tool
from tests.tiny import RECIPE_IDS, RECIPES, ROOT, tiny

STAGE1 = ROOT / "recipes" / "burn_stage1.yaml"


@pytest.mark.parametrize("path", RECIPES, ids=RECIPE_IDS)
def test_recipe_resolves_and_its_dump_resolves_to_the_same(path, tmp_path):
    recipe = recipes.load(path)
    copied = tmp_path / "recipe.yaml"
    copied.write_text(recipe.dump())
    again = recipes.load(copied)
    assert again.dump() == recipe.dump() and again.hash == recipe.hash
    assert again.name == recipe.name


@pytest.mark.parametrize("path", RECIPES, ids=RECIPE_IDS)
def test_recipe_opens_with_its_command_and_status(path):
    head = path.read_text().split("\nmethod", 1)[0]
    assert f"tools/train.py {path.relative_to(ROOT)}" in head and "status:" in head


@pytest.mark.parametrize("path", RECIPES, ids=RECIPE_IDS)
def test_dry_run_touches_nothing_and_says_what_is_missing(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = describe(recipes.load(path))
    assert "of which trained" in text and "binary GMACs" in text
    assert "data.train: no folder" in text
    assert list(tmp_path.iterdir()) == []


def test_dry_run_of_stage2_has_the_papers_numbers(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    text = describe(recipes.load(ROOT / "recipes" / "burn_stage2.yaml"))
    for number in ("29,368,192", "6,056,000", "23,508,032", "8,104,000", "43,528,192", "1,281,167", "4.817"):
        assert number in text
    assert "init.0.from: runs/burn_stage1" in text and "moco_v2_800ep_pretrain.pth.tar" in text


def mutated(change):
    content = copy.deepcopy(strict_yaml.read(STAGE1))
    change(content)
    content.setdefault("name", "x")
    return content


def message(change):
    with pytest.raises(RecipeError) as caught:
        recipes.resolve(mutated(change), STAGE1)
    text = str(caught.value)
    assert "\n" not in text and text.startswith(str(STAGE1))
    return text


def setter(path, value):
    def change(content):
        *parents, last = path.split(".")
        for key in parents:
            content = content[int(key)] if key.isdigit() else content[key]
        content[last] = value

    return change


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("method.temprature", 0.1, "method.temprature: unknown key, did you mean 'temperature'?"),
        ("method.student.widht", 8, "method.student.widht: unknown key, did you mean 'width'?"),
        ("data.views.0.jiter", 0.1, "data.views.0.jiter: unknown key, did you mean 'jitter'?"),
        ("run.durration", "1ep", "run.durration: unknown key, did you mean 'duration'?"),
        ("metod", {}, "metod: unknown key, did you mean 'method'?"),
        ("schedules.lamda", 0.1, "schedules.lamda: unknown key"),
        ("method.temperature", "0.2", "method.temperature: expected a valid number, got '0.2'"),
        ("method.temperature", -1, "method.temperature: expected greater than 0, got -1"),
        ("method.temperature", True, "method.temperature: expected a valid number, got True"),
        ("data.batch_size", 4096.5, "data.batch_size: expected a valid integer"),
        ("data.batch_size", 4000, "data: batch_size 4000 is not a multiple of micro_batch 256"),
        ("method.target_gradient", "all", "method.target_gradient: expected 'none', 'kl' or 'both', got 'all'"),
        ("method.student.weights", "ternary", "method.student.weights: expected 'real' or 'binary'"),
        (
            "method.name",
            "brun",
            f"method.name: unknown value 'brun', expected one of {', '.join(methods.available())}",
        ),
        (
            "data.backend",
            "dalli",
            f"data.backend: unknown value 'dalli', expected one of {', '.join(loaders.backends())}",
        ),
        ("data.views.0.preset", "burnn", "unknown preset 'burnn', expected one of burn, moco_v2"),
        ("data.views.0.size", 112, "data.views.0.size: image side 112 does not fit ReActNet"),
        ("data.eval_view.size", 200, "data.eval_view.size: image side 200 does not fit ReActNet"),
        ("data.views.0.scale", [5, 9], "scale: expected 0 < low <= high <= 1, got [5.0, 9.0]"),
        ("data.views.0.scale", [0.5, 1.01], "scale: expected 0 < low <= high <= 1"),
        ("data.views.0.scale", [0, 1], "scale: expected 0 < low <= high <= 1"),
        ("data.views.0.ratio", [2, 1], "ratio: expected 0 < low <= high, got [2.0, 1.0]"),
        ("data.views.0.ratio", [-1, 1], "ratio: expected 0 < low <= high"),
        ("data.views.0.blur_sigma", [0, 0], "blur_sigma: expected 0 < low <= high"),
        ("data.views.0.size", 0, "data.views.0.size: expected"),
        ("data.views.0.size", 100000, "data.views.0.size: expected"),
        ("data.eval_view.resize", 100000, "data.eval_view.resize: expected"),
        ("data.views.0.flip", 1.5, "data.views.0.flip: expected less than or equal to 1, got 1.5"),
        ("run.duration", "200", "run.duration: expected a duration such as 200ep"),
        ("run.duration", "10%", "run.duration: expected epochs or steps such as 200ep"),
        ("name", "../elsewhere", "name: expected letters, digits"),
        ("name", "/absolute", "name: expected letters, digits"),
        ("name", "a\x00b", "name: expected letters, digits"),
        ("evals.0.kind", "accuracy", "evals.0.kind: method burn has no classifier"),
        ("optim.lr_scale", {"student": 0}, "optim.lr_scale.student: expected greater than 0"),
        ("schedules.lr", -1, "schedules.lr.start: expected greater than or equal to 0"),
        ("schedules.balance", 7, "schedules.balance: expected values from 0 to 1"),
        ("schedules.lr", {"shape": "step", "start": 1}, "schedules.lr: milestones: expected with shape: step"),
        ("run.duration", "0it", "run.duration: must be greater than zero"),
        ("run.log_every", "0ep", "run.log_every: must be greater than zero"),
        ("run.compile_options", {"combo_kernel": True}, "combo_kernel: not a setting of torch._inductor"),
        ("optim.betas", [5.0, 2.0], "optim.betas.0: expected less than 1"),
        ("optim.nesterov", True, "nesterov: true needs name: sgd"),
        ("data.std", [0, 1, 1], "data.std.0: expected greater than 0"),
        ("schedules.lr", float("inf"), "schedules.lr.start: expected a finite number"),
        ("init.0.load", [], "init.0.load: "),
        ("seed", -1, "seed: expected greater than or equal to 0"),
    ],
)
def test_messages(path, value, expected):
    assert expected in message(setter(path, value))


def test_missing_parts():
    assert "method.name: missing" in message(lambda content: content.pop("method"))
    assert "optim: missing" in message(lambda content: content.pop("optim"))
    assert "schedules.balance: missing" in message(lambda content: content["schedules"].pop("balance"))
    assert "data.views: expected 2 for method burn, got 1" in message(lambda content: content["data"]["views"].pop())


def keys(content, prefix=()):
    items = content.items() if isinstance(content, dict) else enumerate(content)
    for key, item in items:
        yield (*prefix, key)
        if isinstance(item, dict | list):
            yield from keys(item, (*prefix, key))


def resolved():
    return yaml.safe_load(recipes.load(STAGE1).dump())


def test_misspelling_any_key_is_an_error_that_names_it():
    # reliability.md 21: a sweep over every key of a resolved recipe.
    paths = [path for path in keys(resolved()) if isinstance(path[-1], str)]
    assert len(paths) > 80
    for path in paths:
        if (path[:2] == ("init", 0) and path[-2:-1] == ("load",)) or "load" in path[:-1]:
            continue  # names of parts are the user's
        content = resolved()
        place = content
        for key in path[:-1]:
            place = place[key]
        place[path[-1] + "x"] = place.pop(path[-1])
        with pytest.raises(RecipeError) as caught:
            recipes.resolve(content, STAGE1)
        assert path[-1] in str(caught.value) or "missing" in str(caught.value), path


def test_a_wrong_type_anywhere_is_an_error():
    # reliability.md 21: every leaf replaced by a value of a type that no field takes.
    checked = 0
    for path in list(keys(resolved())):
        content = resolved()
        place = content
        for key in path[:-1]:
            place = place[key]
        if isinstance(place[path[-1]], dict | list) or place[path[-1]] is None or "load" in path:
            continue
        place[path[-1]] = {"a": 1}
        with pytest.raises(RecipeError):
            recipes.resolve(content, STAGE1)
        checked += 1
    assert checked > 80


def write(tmp_path, text, name="r.yaml"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed: 1\nseed: 2\n", "line 2: duplicate key 'seed'"),
        ("run: {amp: off, amp: bf16}", "duplicate key 'amp'"),
        ("seed: !!python/object/apply:os.system ['touch canary']", "tags"),
        ("a: &x [1]\nb: [*x, *x]", "line 2: aliases"),
        ("seed:\t1", "not valid YAML"),
        (b"seed: \xff\xfe", "is not UTF-8"),
        ("- 1\n- 2", "expected sections"),
        ("1: 2", "key 1 is not a string"),
        ("seed: [1", "not valid YAML: line"),
        (b"x: " + b"a" * 2_000_000, "larger than"),
        ("a: " + "[" * 5000, "nested too deeply"),
        ("base: missing.yaml", "missing.yaml: no such file"),
        ("base: r.yaml", "its own base"),
    ],
)
def test_hostile_or_broken_yaml(tmp_path, monkeypatch, text, expected):
    # reliability.md 21 and 22
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path, text)
    with pytest.raises(RecipeError, match=expected):
        recipes.load(path)
    assert not (tmp_path / "canary").exists()


def test_plain_scalars_mean_what_they_look_like():
    parsed = strict_yaml.parse(
        "{a: 3e-4, b: 010, c: on, d: yes, e: 1_000, f: 12:30, g: -2, h: .5, i: true, j: ~, k: 1e3}"
    )
    assert parsed == {
        "a": 3e-4, "b": "010", "c": "on", "d": "yes", "e": "1_000", "f": "12:30", "g": -2, "h": 0.5, "i": True,
        "j": None, "k": 1000.0,
    }  # fmt: skip


def test_base_and_overrides(tmp_path):
    write(tmp_path, f"base: {STAGE1}\nrun: {{keep: 5}}\n", "mid.yaml")
    path = write(
        tmp_path, "base: mid.yaml\nschedules: {lr: {start: 1.0}}\ndata: {views: [{preset: moco_v2}, {preset: burn}]}\n"
    )
    recipe = recipes.load(path, ["data.views.1.size=96", "run.amp=bf16", "init=[]", "schedules.balance=0.5"])
    assert recipe.name == "r" and recipe.run.keep == 5 and recipe.run.amp == "bf16"
    assert recipe.schedules["lr"].start == 1.0 and recipe.schedules["lr"].shape == "cosine"
    assert recipe.schedules["balance"].shape == "constant" and recipe.schedules["balance"].start == 0.5
    assert recipe.data.views[0].blur == 0.5 and recipe.data.views[1].size == 96
    assert recipe.init == ()


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("run.keep", "expected section.key=value"),
        ("=3", "expected section.key=value"),
        ("run.keep=[", "not a YAML value"),
        (f"run.keep={'[' * 5000}", "not a YAML value: nested too deeply"),
        ("data.views.7.size=3", "expected a number from 0 to 1"),
        ("data.views.².size=3", "expected a number from 0 to 1"),
        ("init.0.from=x", "the list has no item .0., it is empty"),
        ("run=null", "run: expected an object, got None"),
        (f"seed={'9' * 5000}", "seed: expected a valid integer, got '9+$"),
        (f"run.duration={'9' * 400}ep", "run.duration: expected a duration"),
        ("run.duration=٣ep", "run.duration: expected a duration"),
        ("run.kep=3", "run.kep: unknown key, did you mean 'keep'?"),
        ("run.keep.deeper=3", "run.keep"),
        ("run={duration: 1ep, compile_options: {combo_kernels: true}}", "compile_options: expected compile: true"),
    ],
)
def test_bad_overrides(override, expected):
    with pytest.raises(RecipeError, match=expected.replace("?", r"\?")):
        recipes.load(STAGE1, ["init=[]", override])


@pytest.mark.parametrize("value", ["!!int a", "!!bool maybe", "!!timestamp 9999-99-99", "!!binary aGk=", "!x y", "! z"])
def test_what_yaml_makes_of_a_tag_is_refused(value, tmp_path):
    with pytest.raises(RecipeError, match=r"r.yaml: line 2: tags \('.*'\) are not allowed"):
        recipes.load(write(tmp_path, f"base: {STAGE1}\nname: {value}\n"))


@pytest.mark.parametrize("text", [r"a\0b", r"\ud800", r"a\udfffb"])
@pytest.mark.parametrize("key", ["base: {}", "name: {}", "data: {{train: {}}}", "run: {{folder: {}}}", "{}: 1"])
def test_text_that_no_file_can_be_named_is_refused(key, text, tmp_path):
    with pytest.raises(RecipeError, match=r"r.yaml: line 1: '.*' holds \\0 or half a surrogate pair"):
        recipes.load(write(tmp_path, key.format(f'"{text}"')))


def test_a_recipe_named_in_another_encoding_is_refused_by_its_name(tmp_path):
    path = write(tmp_path, f"base: {STAGE1}\n", os.fsdecode(b"caf\xe9.yaml"))
    with pytest.raises(RecipeError, match=r"name: expected letters"):
        recipes.load(path)


def test_a_device_is_no_recipe():
    with pytest.raises(RecipeError, match="/dev/zero: larger than"):
        recipes.load(Path("/dev/zero"))


def test_a_recipe_cannot_be_changed():
    recipe = recipes.load(STAGE1)
    with pytest.raises(Exception, match="frozen"):
        recipe.seed = 3


def test_accumulation_follows_from_the_number_of_ranks():
    recipe = recipes.load(STAGE1)
    assert [micro_steps(recipe, n) for n in (1, 2, 8, 16)] == [16, 8, 2, 1]
    with pytest.raises(RecipeError, match="64 ranks do not divide data.batch_size 4096; set data.micro_batch to 64"):
        micro_steps(recipe, 64)
    with pytest.raises(RecipeError, match="set data.batch_size to a multiple of 3"):
        micro_steps(recipe, 3)


def test_tiny_versions_keep_what_makes_a_recipe(tmp_path):
    tinier = tiny("burn_stage2.yaml", tmp_path)
    assert tinier.method.student.weights == "binary" and tinier.method.target_gradient == "kl"


def test_the_machine_decides_what_a_recipe_leaves_to_it(monkeypatch):
    recipe = recipes.load(ROOT / "recipes/quick/burn_stage1.yaml")
    assert recipe.data.backend == loaders.choose(False, None) != "auto"  # stored, hashed and compared on resume
    assert "backend: auto" not in recipe.dump()
    assert recipes.load(ROOT / "recipes/burn_stage1.yaml").run.amp == precision.choose(on_gpu=False)
    monkeypatch.setattr(recipes.torch.cuda, "is_available", lambda: True)
    on_gpu = recipes.load(ROOT / "recipes/burn_stage1.yaml", ["data.backend=auto", "data.options={}"])
    assert on_gpu.run.amp == "fp16" and on_gpu.data.backend == loaders.choose(True, None)
    on_cpu = recipes.load(ROOT / "recipes/burn_stage1.yaml", ["data.backend=auto", "run.device=cpu"])
    assert on_cpu.run.amp == precision.choose(on_gpu=False) and on_cpu.data.backend == loaders.choose(False, None)


def test_auto_takes_the_fastest_that_is_there(monkeypatch):
    missing = {"turbo": False, "dali": False}
    for name in missing:
        options = loaders.load(name).Options
        monkeypatch.setattr(options, "missing", classmethod(lambda cls, name=name: "gone" if missing[name] else ""))
    assert loaders.choose(False, None) == "turbo" and loaders.choose(True, None) == "dali"
    assert loaders.choose(False, Path("x.beton")) == loaders.choose(True, Path("x.beton")) == "ffcv"
    missing["dali"] = True
    assert loaders.choose(True, None) == "turbo"
    missing["turbo"] = True
    assert loaders.choose(True, None) == loaders.choose(False, Path("photos")) == "folder"


def test_precision_that_a_cpu_emulates_is_told(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for flags, best in (({"avx2"}, "off"), ({"avx512_bf16"}, "bf16"), ({"amx_bf16"}, "bf16")):
        monkeypatch.setattr(precision.machine, "cpu_flags", lambda flags=flags: flags)
        assert precision.choose(on_gpu=False) == best and precision.choose(on_gpu=True) == "fp16"
        assert precision.warning("off", cpu) == precision.warning(best, cpu) == precision.warning("fp16", gpu) == ""
        assert "run.amp=fp16 is emulated on this CPU" in precision.warning("fp16", cpu)
        assert f"set run.amp={best}" in precision.warning("fp16", cpu)


def test_old_names_of_keys_load_and_say_the_new_one(tmp_path, caplog):
    caplog.set_level("WARNING", "burn")
    old = recipes.load(STAGE1).dump().replace("neighbors:", "neighbours:").replace("neighbors: 20", "neighbors: 7")
    path = write(tmp_path, old.replace("neighbours: 20", "neighbours: 7"))
    assert recipes.load(path).evals[0].neighbors == 7
    assert "evals.0.neighbours is called evals.0.neighbors now" in caplog.text
    assert recipes.current_name("evals.3.neighbours") == "evals.3.neighbors"
    assert recipes.current_name("run.neighbours") == "run.neighbours"


def test_several_bases_are_merged_in_order(tmp_path):
    write(tmp_path, "a: {x: 1, y: 1}\nl: [1]\n", "one.yaml")
    write(tmp_path, "a: {y: 2, z: 2}\nl: [2, 2]\n", "two.yaml")
    path = write(tmp_path, "base: [one.yaml, two.yaml]\na: {z: 3}\n")
    assert strict_yaml.read(path) == {"a": {"x": 1, "y": 2, "z": 3}, "l": [2, 2]}
    with pytest.raises(RecipeError, match="base: expected the path of a recipe or a list of them, got 3"):
        strict_yaml.read(write(tmp_path, "base: [one.yaml, 3]"))


def test_the_page_of_keys_is_that_of_the_code(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train.py", "--keys"])
    with pytest.raises(SystemExit) as left:
        tool("train").main()
    page = (ROOT / "docs/recipe_keys.md").read_text()
    assert left.value.code == 0 and capsys.readouterr().out == page, (
        "python tools/train.py --keys > docs/recipe_keys.md"
    )
    keys = set((ROOT / "tests/recipe_keys.txt").read_text().split())
    leaves = {key.removesuffix(".*").rpartition(".")[2] for key in keys}
    assert leaves <= set(re.findall(r"^\| `(\w+)` \|", page, re.M))


def test_all_errors_are_listed_once(tmp_path):
    def change(content):
        content["method"]["temprature"] = content["method"].pop("temperature")
        content["run"]["durration"] = content["run"].pop("duration")
        content["optim"]["eps"] = -1
        del content["schedules"]

    said = message(change).removeprefix(f"{STAGE1}: ").split("; ")
    assert said == [
        "method.temprature: unknown key, did you mean 'temperature'?",
        "run.durration: unknown key, did you mean 'duration'?",
        "optim.eps: expected greater than 0, got -1",
        "schedules: missing",
    ]  # and not that what was misspelled is missing
    both = message(lambda content: [content["data"]["views"].pop(), content["schedules"].pop("balance")])
    assert "data.views: expected 2" in both and "schedules.balance: missing" in both


def test_an_error_in_an_inherited_key_names_its_file(tmp_path):
    content = yaml.safe_dump(strict_yaml.read(STAGE1))
    lowest = write(tmp_path, content.replace("temperature: 0.2", "temprature: 0.2"), "lowest.yaml")
    middle = write(tmp_path, "base: lowest.yaml\noptim: {eps: -1.0}\n", "middle.yaml")
    path = write(tmp_path, "base: middle.yaml\nseed: -1\n")
    with pytest.raises(RecipeError) as caught:
        recipes.load(path, ["run.keep=0"])
    said = str(caught.value).removeprefix(f"{path}: ").split("; ")
    assert f"method.temprature: unknown key, did you mean 'temperature'? (inherited from {lowest})" in said
    assert f"optim.eps: expected greater than 0, got -1.0 (inherited from {middle})" in said
    assert "seed: expected greater than or equal to 0, got -1" in said
    assert "run.keep: expected greater than or equal to 1, got 0" in said  # on the command line
    for change, key in (("num_views", "data.views"), ("name", "method.name")):
        text = yaml.safe_load(content)
        if change == "name":
            text["method"]["name"] = "brun"
        else:
            text["data"]["views"] = text["data"]["views"][:1]
        write(tmp_path, yaml.safe_dump(text), "lowest.yaml")
        with pytest.raises(RecipeError, match=rf"{key}: .* \(inherited from .*lowest\.yaml\)"):
            recipes.load(write(tmp_path, "base: lowest.yaml\n", "r2.yaml"))


def test_a_tilde_is_the_home_folder_in_every_path(tmp_path, monkeypatch):
    # A shell expands it at the start of a word only, not behind `data.train=`.
    monkeypatch.setenv("HOME", str(tmp_path))
    changes = {
        "data.train": "~/a", "data.val": "~/b/*.tar", "data.quarantine": "~/q", "run.folder": "~/runs",
        "evals.0.train": "~/c", "evals.0.val": "~/d",
    }  # fmt: skip
    recipe = tiny("quick/burn_stage1.yaml", tmp_path, *(f"{key}={value}" for key, value in changes.items()),
                  "init=[{from: ~/e, load: [student]}]")  # fmt: skip
    said = [recipe.data.train, recipe.data.val, recipe.data.quarantine, recipe.run.folder, recipe.evals[0].train,
            recipe.evals[0].val, recipe.init[0].source]  # fmt: skip
    assert said == [f"{tmp_path}{rest}" for rest in ("/a", "/b/*.tar", "/q", "/runs", "/c", "/d", "/e")]
    assert "~" not in recipe.dump()
    assert tiny("quick/burn_stage1.yaml", tmp_path, "data.train=a~b", "data.val=~nobody/x").data.train == "a~b"
