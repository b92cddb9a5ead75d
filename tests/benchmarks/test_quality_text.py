"""The text of the quality benchmark: what becomes of pages, packages and files, and what is said without them."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks import files
from benchmarks.quality import sources
from benchmarks.quality.__main__ import main
from benchmarks.quality.r_data import read_strings


def test_pages_of_html_become_paragraphs_without_navigation():
    page = sources._Page()
    page.feed(
        "<html><head><title>no</title></head><body><div class='navheader'><table><tr><td>no</td></tr></table><hr></div>"
        "<h2>Title</h2><p>One <b>bold</b>\n word.</p><pre>\nkept\n  as it is\n</pre><br/>"
        "<table><tr><td>a</td><td>b &amp; c</td></tr></table><div class='toc'><p>no</p></div><p>End</p></body></html>"
    )
    assert page.paragraphs == ["Title", "One bold word.", "kept\n  as it is", "a | b & c", "End"]


def test_documents_are_cut_at_blank_lines():
    assert list(sources.cut(["aaa", "", "bbb", "cc"], 5)) == ["aaa\n\nbbb", "cc"]


def test_character_vectors_of_an_r_package_are_read(tmp_path: Path):
    def integer(*values: int) -> bytes:
        return struct.pack(f">{len(values)}i", *values)

    def chars(text: str) -> bytes:
        return integer(9 | 1 << 18, len(text.encode())) + text.encode()

    def strings(*texts: str, names: bytes = b"") -> bytes:
        return integer(16, len(texts)) + b"".join(map(chars, texts)) + names

    names_of = integer(2 | 1 << 10) + integer(1) + chars("names")
    end, header = integer(254), b"X\n" + integer(3, 0x40200, 0x30500) + integer(5) + b"UTF-8"
    packed = zlib.compress(header + strings("It is a truth", "", "Zoë"))
    variable = integer(19 | 1 << 9, 1) + integer(13, 2, 3, 4 + len(packed)) + names_of + strings("novel") + end
    index = integer(19 | 1 << 9, 1) + variable + integer(2 | 1 << 10) + integer(255 | 1 << 8)
    index += strings("variables") + end
    compressor = zlib.compressobj(wbits=31)
    (tmp_path / "Rdata.rdx").write_bytes(compressor.compress(header + index) + compressor.flush())
    (tmp_path / "Rdata.rdb").write_bytes(b"xyz" + integer(99) + packed)
    assert read_strings(tmp_path) == {"novel": ["It is a truth", "", "Zoë"]}


def test_without_apt_the_error_names_the_other_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    found = CliRunner().invoke(main, ["--quick", "--work", str(tmp_path / "work")])
    assert found.exit_code == 1 and "apt-get" in found.output and "--text" in found.output
    assert len(found.output.strip().splitlines()) == 1


def test_a_file_of_the_work_directory_is_never_seen_half_written(tmp_path: Path):
    file = tmp_path / "text/train.jsonl"
    files.write_text(file, "whole\n")
    with pytest.raises(UnicodeEncodeError):
        files.write_text(file, "half \ud800")  # a plain write has emptied the file by then
    assert file.read_text() == "whole\n"
