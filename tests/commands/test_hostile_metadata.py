"""Whatever the JSON of a cache says: every command does its work, or ends with an error of one line.

The checksums are made true again, so it is the tables of `cache_format.manifest.fields` that have to notice.
"""

from __future__ import annotations

import copy
import io
import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

import cache_format as cf
from benchmarks import fuzzed
from cache_format.write.convert import Conversion, convert_cache
from pipeline.inspection import cache_statistics, inspect_row
from pipeline.student.data.dataset import CacheDataset
from pipeline.student.train_config import TrainStudentConfig
from pipeline.student.validation.loss_checks import loss_for_cache
from pipeline.student.validation.run_checks import check_run
from pipeline.student.validation.suitability import realized_warnings
from pipeline.terminal.row_view import row_view
from pipeline.terminal.statistics_view import statistics_view
from runs import build_cache

EXTREMES: list[Any] = [
    *(None, True, False, 0, 1, -1, 3, 2**31, 2**63, 10**30),
    *(0.5, 2.5, -0.0, 1e308, float("inf"), float("nan")),
    *("", "x", "0" * 64, "../x", "\n", "-inf", "\ud800"),
    *([], [1], [[1]], {}, {"a": 1}, {"rows": {}}),
]
Place = tuple[str | int, ...]


def places(node: Any, here: Place = ()) -> Iterator[Place]:
    """Of every value in a JSON tree; of long lists of numbers the first ones."""
    inside = node.items() if isinstance(node, dict) else enumerate(node[:3]) if isinstance(node, list) else ()
    for key, value in inside:
        yield (*here, key)
        yield from places(value, (*here, key))


def mutated(tree: dict[str, Any], place: Place, change: Callable[[Any, Any], None]) -> dict[str, Any]:
    """A copy in which `change` was made to the object or list at `place`, and to the name of the value in it."""
    tree = copy.deepcopy(tree)
    holder: Any = tree
    for key in place[:-1]:
        holder = holder[key]
    change(holder, place[-1])
    return tree


def replaced(value: Any) -> Callable[[Any, Any], None]:
    return lambda holder, key: holder.__setitem__(key, copy.deepcopy(value))


def deleted(holder: Any, key: Any) -> None:
    del holder[key]


def doubled(holder: Any, key: Any) -> None:
    if isinstance(holder, list):
        holder.insert(key, copy.deepcopy(holder[key]))
    else:
        holder[key] = [holder[key], holder[key]]


CHANGES = [deleted, doubled, *map(replaced, EXTREMES)]


def resealed(files: fuzzed.Files, name: str, tree: dict[str, Any]) -> fuzzed.Files:
    """With another manifest or sidecar, and with checksums of the two that are true."""
    files = {**files, name: json.dumps(tree).encode()}
    if name != "manifest.json":
        manifest = json.loads(files["manifest.json"])
        manifest["shards"][0]["sidecar_sha256"] = cf.sha256(files[name])
        files["manifest.json"] = json.dumps(manifest).encode()
    return {**files, "manifest.json": fuzzed.with_own_digest(json.loads(files["manifest.json"]))}


@pytest.fixture(scope="module")
def caches(teacher_dir: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, fuzzed.Files]:
    """By name: a captured one, and made-up ones of other kinds."""
    path = tmp_path_factory.mktemp("hostile") / "captured"
    lines = text_file.read_text(encoding="utf-8").splitlines(keepends=True)
    few = path.with_name("few.txt")
    few.write_text("".join(lines[:12]), encoding="utf-8")
    build_cache(path, teacher_dir, few)
    captured = {str(f.relative_to(path)): f.read_bytes() for f in sorted(path.rglob("*")) if f.is_file()}
    return {
        "captured": captured,
        "packed": fuzzed.sound_cache("packed"),
        "hidden": fuzzed.sound_cache("hidden"),
    }


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch") / "now"


def uses(path: Path, student: Path) -> Iterator[Callable[[], Any]]:
    """All that the commands do with what a manifest says."""

    def opened() -> cf.Cache:
        return cf.open_cache(path)

    def batches() -> None:
        dataset = CacheDataset(opened())
        order = iter(dataset.sampler(seed=0, multiple_of=2))
        dataset.collate([dataset[index] for index in itertools.islice(order, 2)])

    def realized() -> None:
        realized_warnings(opened())
        loss_for_cache(opened(), kd_weight=0.9, tail="realized", divergence="forward-kl")

    def merged() -> None:
        partial = path.with_name("partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(path, partial)
        (partial / "manifest.json").rename(partial / "manifest.partial.json")
        cf.finish_cache(partial)

    def converted(change: Conversion) -> None:
        output = path.with_name("converted")
        shutil.rmtree(output, ignore_errors=True)
        for _ in convert_cache(path, output, change):
            pass

    def shown(view: Any) -> None:
        Console(file=io.StringIO()).print(view)

    yield lambda: fuzzed.read_all(opened())
    yield lambda: cf.verify_cache(path, deep=True)
    yield lambda: shown(statistics_view(cache_statistics(opened())))
    yield lambda: shown(row_view(inspect_row(opened(), 0, str, candidates=2, start=0, positions=4)))
    yield batches
    yield realized
    yield merged
    yield lambda: converted(Conversion(levels=32))
    yield lambda: converted(Conversion(top_k=1, samples=1))
    yield lambda: converted(Conversion(rows_per_shard=64))
    output = str(path.with_name("trained"))
    yield lambda: check_run(TrainStudentConfig(cache=str(path), output=output, student=str(student), device="cpu"))


def written(files: fuzzed.Files, folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    for name, data in files.items():
        (folder / "cache" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "cache" / name).write_bytes(data)
    return folder / "cache"


def outcome(files: fuzzed.Files, folder: Path, student: Path) -> set[str]:
    """Whether the uses were refused, or went well; raises anything else."""
    seen = set()
    for use in uses(written(files, folder), student):
        try:
            use()
            seen.add("well")
        except cf.DistillError as error:
            assert "\n" not in str(error) and str(error).endswith("."), error
            seen.add("refused")
    return seen


KINDS = [("captured", "manifest.json"), ("hidden", "manifest.json"), ("packed", fuzzed.SIDECAR)]


@pytest.mark.long
@pytest.mark.parametrize("kind, name", KINDS)
@settings(max_examples=12, derandomize=True)
@given(data=st.data())
def test_no_value_of_the_json_gives_anything_but_an_error(
    data: st.DataObject, kind: str, name: str, caches: dict[str, fuzzed.Files], student_dir: Path, scratch: Path
):
    try_one(data, caches[kind], name, student_dir, scratch)


@pytest.mark.long
@pytest.mark.parametrize("name", ["manifest.json", fuzzed.SIDECAR])
@pytest.mark.parametrize("kind", ["captured", "packed", "hidden"])
@settings(max_examples=50)
@given(data=st.data())
def test_nor_do_many_values(
    data: st.DataObject, kind: str, name: str, caches: dict[str, fuzzed.Files], student_dir: Path, scratch: Path
):
    try_one(data, caches[kind], name, student_dir, scratch)


def try_one(data: st.DataObject, files: fuzzed.Files, name: str, student: Path, scratch: Path) -> None:
    tree = json.loads(files[name])
    place = data.draw(st.sampled_from(list(places(tree))))
    change = data.draw(st.sampled_from(CHANGES))
    outcome(resealed(files, name, mutated(tree, place, change)), scratch, student)


def test_a_threshold_of_null_is_one_that_is_not_there(
    caches: dict[str, fuzzed.Files], student_dir: Path, scratch: Path
) -> None:
    files = caches["packed"]
    tree = mutated(json.loads(files["manifest.json"]), ("targets", "tail_threshold"), replaced(None))
    outcome(resealed(files, "manifest.json", tree), scratch, student_dir)


LIES: dict[str, tuple[Place, Callable[[Any, Any], None]]] = {
    "a kind of targets that there is not": (("targets", "kind"), replaced("weird")),
    "text for a temperature": (("targets", "temperature"), replaced("x")),
    "text for a threshold": (("targets", "tail_threshold"), replaced("x")),
    "a fraction of an entry": (("targets", "max_entries"), replaced(9.7)),
    "a teacher that is a name": (("teacher",), replaced("name")),
    "no tokenizer": (("tokenizer",), replaced(None)),
    "a vocabulary in floating point": (("vocab_size",), replaced(1000.0)),
    "half a row": (("rows_per_record_batch",), replaced(2.5)),
    "a list of how it was captured": (("capture",), replaced([1])),
    "a number of conversions": (("capture", "converted"), replaced(5)),
    "a list for the corpus": (("corpus",), replaced([["rows", 10]])),
    "no codebooks": (("codebooks",), deleted),
    "a level that is no number": (("codebooks", "entropy", "values"), replaced([True])),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_refused_by_every_use(lie: str, caches: dict[str, fuzzed.Files], student_dir: Path, scratch: Path):
    place, change = LIES[lie]
    tree = mutated(json.loads(caches["captured"]["manifest.json"]), place, change)
    assert outcome(resealed(caches["captured"], "manifest.json", tree), scratch, student_dir) == {"refused"}


@pytest.mark.parametrize("annotations", [[1], 3, None, {"lexicon_sha256": 3}])
def test_so_are_lies_of_a_sidecar(annotations: Any, caches: dict[str, fuzzed.Files], scratch: Path):
    tree = {**json.loads(caches["packed"][fuzzed.SIDECAR]), "annotations": annotations}
    with pytest.raises(cf.CorruptShardError, match="annotations"):
        fuzzed.read_all(cf.open_cache(written(resealed(caches["packed"], fuzzed.SIDECAR, tree), scratch)))


@pytest.mark.long
@pytest.mark.parametrize("kind", ["captured", "packed", "hidden"])
def test_what_is_not_changed_is_not_refused(
    kind: str, caches: dict[str, fuzzed.Files], student_dir: Path, scratch: Path
):
    for name in ("manifest.json", fuzzed.SIDECAR):
        same = resealed(caches[kind], name, json.loads(caches[kind][name]))
        assert "well" in outcome(same, scratch, student_dir)
