"""The schema of a recipe: YAML, dotted overrides, and one line for whatever cannot be."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from deit_kd import InputError
from deit_kd.cli import VERBS, main
from deit_kd.commands.data import DATA_VERBS
from deit_kd.commands.store import STORE_VERBS
from deit_kd.config import ANSWERS, FIT, NOTHING, VIEWS, Config, effects, known_keys, parse_config
from deit_kd.config.effects import RESULT, Effect
from deit_kd.config.sections import Section
from tests.helpers import REPOSITORY

RECIPES = sorted((REPOSITORY / "configs").glob("*.yaml"))


def config(*arguments: str) -> Config:
    return parse_config(list(arguments))[0]


def test_the_defaults_are_deits_recipe() -> None:
    defaults = config()
    assert (defaults.train.batch_size, defaults.train.epochs, defaults.optim.lr) == (1024, 300, 5e-4)
    assert (defaults.optim.weight_decay, defaults.optim.warmup_epochs, defaults.student.drop_path) == (0.05, 5, 0.1)
    assert (defaults.augment.mixup, defaults.augment.cutmix, defaults.augment.label_smoothing) == (0.8, 1.0, 0.1)
    assert (defaults.augment.erasing, defaults.augment.repeats) == (0.25, 3)
    assert (defaults.distill.kind, defaults.distill.alpha) == ("hard", 0.5)


def test_an_option_overrides_the_recipe_file(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("distill: {kind: soft, temperature: 5}\nseed: 3\n")
    parsed = config("--config", str(tmp_path / "mine.yaml"), "--distill.temperature", "2")
    assert (parsed.distill.kind, parsed.distill.temperature, parsed.seed) == ("soft", 2.0, 3)


@pytest.mark.parametrize(
    ("written", "cache"),
    [("in_memory: true", "memory"), ("in_memory: false", "none"), ("{in_memory: false, cache: memory}", "memory")],
)
def test_a_recipe_from_before_photos_had_a_cache_is_read(written: str, cache: str, tmp_path: Path) -> None:
    (tmp_path / "old.yaml").write_text(f"data: {written}" if "{" in written else f"data:\n  {written}\n")
    assert config("--config", str(tmp_path / "old.yaml")).data.cache == cache


@pytest.mark.parametrize(
    ("typed", "cache"),
    [
        (["--data.in_memory", "true"], "memory"),
        (["--data.in_memory=False"], "none"),
        (["--seed", "1", "--data.in_memory", "true", "--data.cache", "none"], "none"),
        (["--data.cache", "none", "--data.in_memory", "true"], "memory"),
    ],
)
def test_an_option_from_before_photos_had_a_cache_is_read(typed: list[str], cache: str) -> None:
    assert config(*typed).data.cache == cache


def test_the_recipe_is_named_after_its_file(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("seed: 3\n")
    assert config("--config", str(tmp_path / "mine.yaml")).recipe == "mine"
    assert config("--config", str(tmp_path / "mine.yaml"), "--recipe", "other").recipe == "other"


@pytest.mark.parametrize(
    ("arguments", "section", "key", "value"),
    [
        (["--student.args", "{patch_size: 8, depth: 2}"], "student", "args", {"patch_size": 8, "depth": 2}),
        (["--student.args", '{"embed_dim": 96}'], "student", "args", {"embed_dim": 96}),
        (["--augment.scale", "[0.5, 1.0]"], "augment", "scale", (0.5, 1.0)),
        (["--augment.auto_augment", "null"], "augment", "auto_augment", None),
        (["--train.precision", "off"], "train", "precision", "off"),
        (["--train.compile", "reduce-overhead"], "train", "compile", "reduce-overhead"),
        (["--data.root=a=b"], "data", "root", "a=b"),
        (["--optim.lr", "1e-3"], "optim", "lr", 1e-3),
        (["--data.mean", "[0.5, 0.5, 0.5]"], "data", "mean", (0.5, 0.5, 0.5)),
    ],
)
def test_values_of_every_shape(arguments: list[str], section: str, key: str, value: Any) -> None:
    assert getattr(getattr(config(*arguments), section), key) == value


def test_what_is_resolved_is_read_again(tmp_path: Path) -> None:
    first = config("--student.args", "{depth: 2}", "--teacher.fit.epochs", "3", "--train.precision", "off")
    (tmp_path / "run.yaml").write_text(first.to_yaml())
    assert config("--config", str(tmp_path / "run.yaml")) == first


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_valid_and_begin_with_their_command(recipe: Path) -> None:
    config("--config", str(recipe))
    assert f"python train.py --config configs/{recipe.name}" in recipe.read_text().splitlines()[0]


def test_known_keys_are_those_of_the_yaml() -> None:
    def paths(tree: dict[str, Any], prefix: str = "") -> set[str]:
        own = {prefix + key for key in tree}
        return own.union(*(paths(v, f"{prefix}{k}.") for k, v in tree.items() if isinstance(v, dict)))

    assert paths(yaml.safe_load(Config().to_yaml())) == set(known_keys())


@pytest.mark.parametrize("arguments", [["train", "--help"], ["eval", "--help"], ["predict", "--help"]])
def test_help_says_every_key(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    assert all(f"--{key}" in said for key in known_keys())


VERBS_WITH_HELP = [
    *([verb] for verb in VERBS),
    *(["data", verb] for verb in DATA_VERBS),
    *(["store", verb] for verb in STORE_VERBS),
]


@pytest.mark.parametrize("verb", VERBS_WITH_HELP, ids=" ".join)
@pytest.mark.parametrize("option", ["--help", "-h"])
def test_every_verb_answers_help(option: str, verb: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with suppress(SystemExit):
        main([*verb, option])
    said = capsys.readouterr()
    assert said.out.startswith("usage: deit-kd " + " ".join(verb))
    assert said.err == ""


def test_the_help_names_every_verb_about_photos(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert f"({', '.join(DATA_VERBS)})" in said
    assert f"({', '.join(STORE_VERBS)})" in said


GUIDED = ["--teacher.name", "resnet10t", "--distill.kind", "soft", "--distill.terms", "[{kind: guide}]"]


@pytest.mark.parametrize(
    ("section", "options", "expected"),
    [
        ("student", ["--student.args.embed_dim", "48"], {"embed_dim": 48}),
        ("student", ["--student.args.depth=2", "--student.args.qkv_bias", "false"], {"depth": 2, "qkv_bias": False}),
        ("teacher", ["--teacher.args.layers", "[1, 2]"], {"layers": [1, 2]}),
        ("guide", [*GUIDED, "--guide.name", "resnet18", "--guide.args.width", "8"], {"width": 8}),
        ("optim", ["--optim.name", "lamb", "--optim.args.trust_clip", "true"], {"trust_clip": True}),
        ("student", ["--student.args.act", '"48"'], {"act": "48"}),
        ("student", ["--student.args", "{depth: 2}", "--student.args.embed_dim", "48"], {"depth": 2, "embed_dim": 48}),
    ],
    ids=str,
)
def test_one_value_of_a_dict_is_yaml(section: str, options: list[str], expected: dict[str, Any]) -> None:
    assert getattr(config(*options), section).args == expected


def test_a_dict_without_a_space_after_its_colon_is_told_so() -> None:
    with pytest.raises(InputError, match=r"student\.args: .*; a space after a colon is missing: \{embed_dim: 48\}"):
        config("--student.args", "{embed_dim:48}")


def test_print_config_says_the_resolved_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--distill.temperature", "7", "--print_config"])
    assert stopped.value.code == 0
    assert yaml.safe_load(capsys.readouterr().out)["distill"]["temperature"] == 7


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_the_verbs_are_listed(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert [verb for verb in VERBS if f"\n  {verb} " not in said] == []


YAML_CASES = [
    ("distil: {kind: hard}", "distil.kind: unknown key (nearest: distill.kind"),
    ("distill: {kin: hard}", "distill.kin: unknown key (nearest: distill.kind"),
    ("train: {batchsize: 8}", "train.batchsize: unknown key (nearest: train.batch_size"),
    ("teacher: {fit: {epoch: 1}}", "teacher.fit.epoch: unknown key (nearest: teacher.fit.epochs"),
    ("data: {in_memory: 7}", "data.in_memory: unknown key (say data.cache memory)"),
    ("temperature: 3", "temperature: unknown key (nearest: distill.temperature"),
    ("train: {temperature: 3}", "train.temperature: unknown key (nearest: distill.temperature"),
    ("data: {lr: 3}", "data.lr: unknown key (nearest: optim.lr"),
    ("train: {epochs: many}", "train.epochs: 'many'"),
    ("train: {epochs: 0}", "train.epochs: '0'"),
    ("distill: {alpha: 1.5}", "distill.alpha: 1.5"),
    ("distill: {kind: medium}", "distill.kind: 'medium'"),
    ("student: {args: 7}", "student.args: '7'"),
    ("seed: -1", "seed: '-1'"),
    ("recipe: ../elsewhere", "recipe: '../elsewhere' must be the name of one folder"),
    ("student: other.Class", "student: 'other.Class' is not a mapping"),
    ("student: !!python/object/apply:os.getcwd []", "config: is not YAML (could not determine a constructor"),
    ("student: !!python/name:os.getcwd", "config: is not YAML (could not determine a constructor"),
    ("student: {args: {1: 2}}", "student.args.1"),
    ("student: {args: {a: !!binary aGVsbG8=}}", "student.args.a"),
    ("student: {args: &all {all: *all}}", "config: the alias *all contains itself"),
    ("seed: " + "[" * 100_000, "config: is nested more than 64 deep"),
    ("seed: '" + "[" * 100_000 + "'", "config: is nested more than 64 deep"),
    ("x0: &x0 1\n" + "".join(f"x{n}: &x{n} [{f'*x{n - 1}, ' * 9}]\n" for n in range(1, 12)), "100000 values"),
    ("seed: " + "9" * 5000, "config: holds a value that cannot be read"),
    ("train: {epochs: 1" + "0" * 400 + "}", "train.epochs: "),
    ("train: [1, 2", "config: is not YAML (while parsing a flow sequence in line 1, column 8"),
    ("- 1", "config: is not a recipe"),
]


@pytest.mark.parametrize(("text", "expected"), YAML_CASES)
def test_a_recipe_that_cannot_be_is_one_line(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(InputError) as caught:
        config("--config", str(tmp_path / "mine.yaml"))
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


CODE_CASES = [
    "student: planted.Planted",
    "student: {class_path: planted.Planted, init_args: {name: x}}",
    "student.class_path: planted.Planted",
    "student: {args: {class_path: planted.Planted}}",
    "student: {args: {a: [{class_path: planted.Planted, init_args: {b: 1}}]}}",
    "student: {args: {a: '{class_path: planted.Planted}'}}",
    "teacher: {fit: planted.Planted}",
    "teacher: {members: [planted.Planted]}",
    "teacher: {members: [{class_path: planted.Planted}]}",
    "teacher: {members: [{args: {a: {class_path: planted.Planted}}}]}",
    "optim: {args: {betas: {class_path: planted.Planted}}}",
]


@pytest.mark.parametrize("text", CODE_CASES)
def test_a_recipe_imports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    (tmp_path / "planted.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Planted: ...\n")
    (tmp_path / "mine.yaml").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with suppress(InputError):
        config("--config", str(tmp_path / "mine.yaml"))
    assert not (tmp_path / "ran").exists()


def test_an_alias_saves_typing(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("student: {args: &small {depth: 2}}\nteacher: {args: *small}\n")
    assert config("--config", str(tmp_path / "mine.yaml")).teacher.args == {"depth": 2}


def test_a_key_that_does_not_say_what_it_changes_is_no_key() -> None:
    with pytest.raises(TypeError, match=r"Silent\.lr: say what it changes"):

        class Silent(Section):
            lr: float = 0.1


@pytest.mark.parametrize(
    ("path", "effect"),
    [
        ("data.workers", NOTHING),
        ("data.image_size", VIEWS),
        ("teacher.fit.folder", NOTHING),
        ("teacher.fit.optim.lr", RESULT),
        ("teacher.name", ANSWERS | FIT),
        ("teacher.image_size", ANSWERS | FIT),
        ("augment.label_smoothing", RESULT),
        ("seed", VIEWS | FIT),
    ],
)
def test_a_key_says_what_it_changes(path: str, effect: Effect) -> None:
    assert effects()[path] == effect


def test_every_key_of_a_recipe_says_what_it_changes() -> None:
    sections = {name for name in known_keys() if any(key.startswith(f"{name}.") for key in known_keys())}
    assert set(effects()) == set(known_keys()) - sections


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "labels and the teacher's hard labels, alpha 0.5"),
        (["--distill.kind", "none"], "labels alone"),
        (["--distill.kind", "none", "--distill.terms", '[{"kind": "guide", "weight": 2}]'], "labels; guide, weight 2"),
        (["--distill.kind", "none", "--distill.terms", '[{"kind": "relations"}]'], "labels; relations, weight 1"),
        (
            ["--distill.kind", "soft", "--distill.terms", '[{"kind": "pooled", "weight": {"start": 1, "until": 0.5}}]'],
            "labels and the teacher's soft labels, alpha 0.5, temperature 3; pooled, weight 1 until 0.5 of the run, "
            "then 0",
        ),
        (
            ["--distill.kind", "none", "--distill.alpha", "1", "--distill.terms", '[{"kind": "pooled"}]'],
            "no labels; pooled, weight 1",
        ),
        (
            ["--distill.kind", "none", "--distill.alpha", '{"start": 1, "until": 0.5}'],
            "labels, weight 1 - alpha, alpha 1 until 0.5 of the run, then 0",
        ),
        (
            ["--distill.kind", "standardised"],
            "labels and the teacher's standardised logits, alpha 0.5, temperature by the classes",
        ),
        (
            ["--config", "photos", "--distill.kind", "standardised", "--distill.terms", "[]"],
            "labels and the teacher's standardised logits, alpha 0.9, temperature by the classes",
        ),
        (
            ["--distill.kind", "soft", "--distill.temperature", "null"],
            "labels and the teacher's soft labels, alpha 0.5, temperature 3",
        ),
    ],
)
def test_a_recipe_says_in_words_what_the_student_learns_from(options: list[str], words: str) -> None:
    assert parse_config(options)[0].distill.described() == words


def test_a_recipe_without_its_option_is_told_the_option() -> None:
    with pytest.raises(InputError, match=r"mine\.yaml: is not an option; a recipe is named with --config mine\.yaml"):
        parse_config(["mine.yaml"])
