"""What a cache stores of a head: its entry in the manifest and its file, under the right layer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_heads import LINEAR, OWN, V, build

import cache_format as cf
from masked_runs import load
from pipeline.models import head_export
from pipeline.models.head import open_head
from pipeline.models.head_export import export_head
from tiny_masked import VOCAB


@pytest.mark.parametrize("name", ["llama-tied", "phi, bias", "gemma2, soft-capping", "granite, logits_scaling"])
def test_the_file_holds_the_weights_of_the_head(name: str) -> None:
    model = build({**LINEAR, **OWN}[name])
    export = export_head(open_head(model, V))
    assert export.spec.layer == export.layer == 2 and not export.transforms and export.width == 32
    assert (export.spec.logit_scale, export.spec.softcap) == (export.logit_scale, export.softcap)
    assert export.spec.sha256 == cf.sha256(export.contents) and export.spec.bytes == len(export.contents)
    stored = cf.StoredHead.of(memoryview(export.contents), export.spec, V, 32, "x")
    weight = model.get_output_embeddings().weight[:V].detach()
    assert torch.equal(torch.tensor(stored.rows(slice(None))), weight)


def test_the_output_of_a_transform_is_stored_behind_the_last_layer(masked_dir: Path) -> None:
    export = export_head(open_head(load(masked_dir / "bert").float(), VOCAB, masked=True))
    assert export.transforms and export.layer == 3


def test_weights_are_copied_only_if_they_are_asked_for_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    export = export_head(open_head(build(LINEAR["llama"]), V))
    written: list[int] = []
    contents = cf.head_contents
    monkeypatch.setattr(head_export.cf, "head_contents", lambda *given: written.append(1) or contents(*given))
    export.logits(torch.randn(3, 32))
    assert not written
    assert export.contents is export.contents and export.spec is export.spec and len(written) == 1
