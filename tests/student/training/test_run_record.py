"""A damaged record of a training run is an error that names it."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import ConfigError
from pipeline.options import CONFIG_FILE
from pipeline.student.train_config import TrainStudentConfig
from pipeline.student.training.run_record import check_base_weights, record_seen


@pytest.mark.parametrize("contents", ["", '{"config": {', "[]"])
def test_damaged_records_are_named(contents: str, tmp_path: Path):
    (tmp_path / CONFIG_FILE).write_text(contents)
    config = TrainStudentConfig(cache=("cache",), student="student", output=str(tmp_path))
    for use in (lambda: check_base_weights(config, "0123"), lambda: record_seen(config, [])):
        with pytest.raises(ConfigError, match=f"{CONFIG_FILE}: .*expected the record of a training run.*`overwrite"):
            use()
