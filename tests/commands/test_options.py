"""Options are declared once: the command line, `--config`, the Python API and the saved file say the same."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import click
import numpy
import pandas
import pytest

from cli import main
from pipeline.commands import COMMANDS
from pipeline.errors import ConfigError
from pipeline.evaluation.evaluate_config import EvaluateConfig
from pipeline.evaluation.report.report_config import ReportConfig
from pipeline.options import RENAMED, build, check_ranges, flat, option, options_of, part, read_config
from pipeline.student.train_config import TrainStudentConfig
from pipeline.teacher.cache_config import CacheTeacherConfig
from pipeline.teacher.verify_config import TeacherCheckConfig
from pipeline.terminal.click_options import DistillCommand, with_flags
from runs import command as run

CONFIGS = {
    "cache-teacher": CacheTeacherConfig,
    "train-student": TrainStudentConfig,
    "evaluate": EvaluateConfig,
    "report": ReportConfig,
    "verify": TeacherCheckConfig,
}

ARGUMENTS = {("verify", "cache"), ("report", "source")}
"""Options that the command takes without a flag."""


def parameters(name: str) -> dict[str, click.Option]:
    found = main.get_command(click.Context(main), name)
    assert found is not None
    return {str(p.name): p for p in found.params if isinstance(p, click.Option)}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_option_is_a_flag_with_its_help(name: str) -> None:
    given = parameters(name)
    for each in options_of(CONFIGS[name]).values():
        if each.metadata.python_only or (name, each.name) in ARGUMENTS:
            assert each.name not in given
            continue
        parameter = given[each.name]
        assert each.flag in parameter.opts and parameter.help is not None
        assert parameter.help.startswith(each.metadata.help)
        assert parameter.default is None or parameter.multiple, f"{each.name}: the dataclass has the default"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_says_one_thing_once(name: str) -> None:
    text = run(name, "--help").stdout
    assert "--json [FILE]" in " ".join(text.split()) or name == "completion"  # which prints a script
    if name in CONFIGS:
        everything = run(name, "--help-all").stdout
        assert len(everything) > len(text) and "--help-all" in text
        for each in options_of(CONFIGS[name]).values():
            if not each.metadata.python_only and (name, each.name) not in ARGUMENTS:
                assert f"{each.flag} " in everything.replace("/", " ").replace("\n", " ").replace(",", " ")
            common = f" {each.flag} " in text.partition("Example:")[0].replace("/", " ").replace("\n", " ").replace(
                ",", " "
            )
            if not each.metadata.python_only and (name, each.name) not in ARGUMENTS:
                assert common == each.metadata.common, each.name


def test_defaults_are_those_of_the_dataclass() -> None:
    config = build(TrainStudentConfig, {"cache": "c", "output": "o"})
    plain = TrainStudentConfig(cache="c", output="o")
    assert config == plain and config.explicit == {"cache", "output"}
    teacher = build(CacheTeacherConfig, {"teacher": "t", "data": "d", "output": "o"})
    assert (
        teacher.data.data == "d" and teacher.masking is None and teacher.hidden is None and teacher.generation is None
    )
    assert teacher.targets.kind == "threshold" and teacher.targets.tail_threshold == 0.05


@pytest.mark.parametrize(
    "values",
    [
        {"teacher": "t", "data": "d", "output": "o"},
        {"teacher": "t", "data": "d", "output": "o", "top_k": 16, "packing": False, "seq_len": 64, "overwrite": True},
        {"teacher": "t", "data": "d", "output": "o", "generate": True, "gen_stop": ["a", "b"], "gen_top_p": 0.5},
        {"teacher": "t", "data": "d", "output": "o", "hidden_states": "last", "mask_copies": 2, "num_workers": 2}
        | {"worker_index": 0},
    ],
)
def test_a_saved_configuration_makes_the_same_one_again(values: dict[str, Any], tmp_path: Path) -> None:
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    config = build(CacheTeacherConfig, values)
    file = tmp_path / "run.json"
    file.write_text(json.dumps(flat(config)))
    assert build(CacheTeacherConfig, read_config(str(file), CacheTeacherConfig)) == config
    assert values.items() <= {n: tuple(v) if isinstance(v, list) else v for n, v in flat(config).items()}.items()


@pytest.mark.parametrize("data", [pandas.DataFrame({"text": ["a", "b"]}), numpy.array(["a", "b"])])
def test_objects_that_compare_item_by_item_may_be_given(data: Any) -> None:
    config = build(CacheTeacherConfig, {"teacher": "teacher", "data": data, "output": "cache"})
    assert flat(config)["data"] is data


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('cache = "c"\noutput = "o"\nlearning-rate = 1e-3\nearly_stopping = ["kl:0.5%:3"]\n')
    command = main.get_command(click.Context(main), "train-student")
    assert isinstance(command, DistillCommand)
    context = command.make_context("train-student", ["--config", str(file), "--learning-rate", "0.01"])
    given = {k: v for k, v in context.params.items() if k not in ("config_file", "json_file")}
    from pipeline.terminal.click_options import build_config

    config = build_config(TrainStudentConfig, given, context.params["config_file"])
    assert config.learning_rate == 0.01 and config.early_stopping == ("kl:0.5%:3",) and config.output == "o"


@pytest.mark.parametrize(
    "name, contents, expected",
    [
        ("a.toml", "x = ", "not TOML"),
        ("a.json", "{", "not JSON"),
        ("a.json", "[1]", "found a list, expected names with their values"),
        ("a.json", '{"learning_rat": 1}', "learning_rat: no such option. Did you mean learning_rate?"),
        ("a.json", '{"learning_rate": "fast"}', 'learning_rate is "fast", expected a number'),
        ("a.json", '{"max_steps": 1.5}', "max_steps is 1.5, expected a whole number"),
        ("a.json", '{"resume": 1}', "resume is 1, expected true or false"),
        ("a.json", '{"early_stopping": [1]}', "expected a string or a list of strings"),
        ("a.json", '{"tokenizer": "x"}', "tokenizer: no such option"),
        ("a.json", '{"num_train_epochs": 1}', "num_train_epochs is now epochs"),
    ],
)
def test_a_config_file_that_is_wrong_is_named(tmp_path: Path, name: str, contents: str, expected: str) -> None:
    file = tmp_path / name
    file.write_text(contents)
    with pytest.raises(ConfigError) as caught:
        read_config(str(file), TrainStudentConfig)
    assert str(file) in str(caught.value) and expected in str(caught.value) and caught.value.field == "config"
    line = run("train-student", "--config", file, status=1).stderr
    assert line.startswith("Error: --config ") and expected in line and "`" not in line


def test_a_config_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_config(str(tmp_path / "none.toml"), TrainStudentConfig)


def test_removed_names_answer_with_the_new_one() -> None:
    for old, new in RENAMED.items():
        for name, config in CONFIGS.items():
            if new in options_of(config) and old not in options_of(config):
                flag = f"--{old.replace('_', '-')}"
                line = run(name, *(["cache"] if name == "verify" else []), flag, 1, status=2).stderr
                assert f"{flag} is now {options_of(config)[new].flag}" in line
    with pytest.raises(ConfigError, match="`keep_if` is now `gen_keep_if`"):
        build(CacheTeacherConfig, {"teacher": "t", "data": "d", "output": "o", "keep_if": "f"})


def test_no_name_means_two_things() -> None:
    """An option that several configurations have is of one type everywhere."""
    types: dict[str, set[Any]] = {}
    for config in CONFIGS.values():
        for each in options_of(config).values():
            if each.name not in ("cache", "student"):  # one, or several at a time
                types.setdefault(each.name, set()).add(each.type)
    assert {name for name, found in types.items() if len(found) > 1} == set()
    assert "num_workers" not in options_of(TrainStudentConfig)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("`top_k` 3: too many", "--top-k 3: too many"),
        ("use `tail=bucket`, or `packing=False`", "use --tail bucket, or --no-packing"),
        ("add `overwrite=True`", "add --overwrite"),
        ("`tensor_parallel`: one process", "--tp: one process"),
        ("a `Class` and a b", "a `Class` and a b"),
    ],
)
def test_messages_name_flags_on_the_command_line(text: str, expected: str) -> None:
    flags = {each.name: each.flag for each in options_of(CacheTeacherConfig).values()}
    assert with_flags(text, flags) == expected


def test_ranges_and_choices() -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Inner:
        rate: float = option(0.5, help="A rate.", group="G", above=0, below=1)

        def __post_init__(self) -> None:
            check_ranges(self, "inner_")

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Outer:
        inner: Inner | None = part(Inner, prefix="inner_", optional=True)
        count: int = option(1, help="A count.", group="G", minimum=1, maximum=9)

        def __post_init__(self) -> None:
            check_ranges(self)

    globals().update(Inner=Inner, Outer=Outer)  # for their annotations
    assert list(options_of(Outer)) == ["inner_rate", "count"]
    assert build(Outer, {}) == Outer() and build(Outer, {"inner_rate": 0.25}).inner == Inner(rate=0.25)
    for values, expected in (
        ({"count": 10}, "`count` 10: expected 1 to 9."),
        ({"inner_rate": 1.0}, "`inner_rate` 1.0: expected a positive number and below 1."),
        ({"inner_rate": float("nan")}, "`inner_rate` nan"),
    ):
        with pytest.raises(ConfigError, match=expected):
            build(Outer, values)


def test_a_number_or_a_word(tmp_path: Path) -> None:
    given = {"teacher": "t", "data": "d", "output": "o"}
    for value in (64, "auto"):
        config = build(CacheTeacherConfig, {**given, "batch_tokens": value})
        file = tmp_path / "run.json"
        file.write_text(json.dumps(flat(config)))
        assert read_config(str(file), CacheTeacherConfig)["batch_tokens"] == value == config.batch_tokens
        kind = parameters("cache-teacher")["batch_tokens"].type
        assert kind.convert(str(value), None, None) == value
    words = [f"--{name}={value}" for name, value in given.items()]
    for value, expected in (("0", "0 is not in the range x>=1"), ("many", "'many' is neither a number nor auto")):
        assert expected in run("cache-teacher", *words, "--batch-tokens", value, status=2).stderr
    (tmp_path / "run.toml").write_text('batch_tokens = "many"\n')
    with pytest.raises(ConfigError, match='batch_tokens is "many", expected a whole number or auto'):
        read_config(str(tmp_path / "run.toml"), CacheTeacherConfig)


def test_options_of_a_part_need_its_switch() -> None:
    with pytest.raises(ConfigError, match="`gen_top_k`: only with `generate=True`"):
        build(CacheTeacherConfig, {"teacher": "t", "data": "d", "output": "o", "gen_top_k": 3})
    with pytest.raises(ConfigError, match="`packing`: cannot be combined with `generate`"):
        build(CacheTeacherConfig, {"teacher": "t", "data": "d", "output": "o", "generate": True, "packing": True})


def test_a_missing_option_is_wrong_usage(tmp_path: Path) -> None:
    assert "Missing option '--teacher'" in run("cache-teacher", "--data", "d", "--output", "o", status=2).stderr
    file = tmp_path / "run.toml"
    file.write_text('teacher = "t"\n')
    assert "Missing option '--data'" in run("cache-teacher", "--config", file, "--output", "o", status=2).stderr
