"""Options, declared once: as fields of frozen dataclasses that carry their help, group and range as metadata.

    field of a dataclass ─▶ click option (`pipeline.terminal.click_options`), keyword argument of the Python API,
                            key in a `config` file, key in the saved distill_config.json

    declarations.py      what an option is
    plain_values.py      its value, as a file can hold it, of the right type
    configurations.py    from values to a configuration, and back
    config_files.py      values from a TOML or JSON file

Standard library only: commands read options before anything heavy is imported.
"""

from pipeline.options.config_files import CONFIG_FILE, NOT_REPEATED, NOT_SAVED, read_config, read_table
from pipeline.options.configurations import TracksExplicit, build, check_ranges, flat
from pipeline.options.declarations import (
    MAX_SEED,
    RENAMED,
    Metadata,
    Option,
    Part,
    option,
    options_of,
    part,
    unknown_option,
)

__all__ = [
    "CONFIG_FILE",
    "MAX_SEED",
    "NOT_REPEATED",
    "NOT_SAVED",
    "RENAMED",
    "Metadata",
    "Option",
    "Part",
    "TracksExplicit",
    "build",
    "check_ranges",
    "flat",
    "option",
    "options_of",
    "part",
    "read_config",
    "read_table",
    "unknown_option",
]
