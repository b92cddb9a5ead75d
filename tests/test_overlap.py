"""An input in the output of a run is found however it is named; one next to it is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.errors import ConfigError
from pipeline.overlap import check_inputs_apart


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A student in an output directory, and links and adapters that lead to it."""
    (tmp_path / "out/student").mkdir(parents=True)
    (tmp_path / "out/student/weights").write_text("")
    (tmp_path / "link").symlink_to("out/student")
    (tmp_path / "other").mkdir()
    (tmp_path / "out/to-other").symlink_to("../other")
    (tmp_path / "linked-files").mkdir()
    (tmp_path / "linked-files/weights").symlink_to("../out/student/weights")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "out/student"}))
    (tmp_path / "also-out").symlink_to("out")
    (tmp_path / "outside").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("output", ["out", "./other/../out/", "also-out", "file://{}/out"])
@pytest.mark.parametrize(
    "path",
    ["out", "out/student", "~/out", "link", "out/to-other", "linked-files", "adapter", "file://{}/out/student"],
)
def test_input_in_the_output(here: Path, path: str, output: str):
    path = path.format(here)
    with pytest.raises(ConfigError, match="nothing was changed") as error:
        check_inputs_apart(output.format(here), {"data": None, "student": ["outside", path]})
    assert f"`student` {path} in it" in str(error.value)


def test_other_inputs(here: Path):
    apart = [".", "outside", "other", "out/nothing", "owner/name", "memory://out", Path("outside"), object(), None]
    check_inputs_apart("out", {"data": apart, "student": object()})
    (here / "owner").mkdir()
    check_inputs_apart("owner", {"data": "owner/name"})  # on the hub
