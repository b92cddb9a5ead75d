"""The README.md of a cache: what it is, and how to read it without this package."""

from __future__ import annotations

from cache_format.manifest.manifest import Manifest
from cache_format.manifest.metadata import CacheMetadata
from cache_format.wording import quantity

# Read by the Hub and by `datasets.load_dataset` (for local directories too), which would otherwise guess the layout.
HEADER = """\
---
tags:
- knowledge-distillation
- distill-cache
configs:
- config_name: default
  data_files: "shards/*.arrow"
---
"""

TEMPLATE = """\
# Teacher targets of {teacher}

For each token of a tokenised corpus: {expected}. Written for knowledge distillation without the teacher.

| | |
|---|---|
| teacher | {teacher}, {precision} |
| data | {source} |
{prompts}| targets | {targets} |
| encoding | {encoding} |
| hidden states | {hidden} |
{head}| alignment | {alignment} |
| vocabulary | {vocab_size:,} |
| sequences | {rows:,} |
| tokens | {tokens:,}, {counted_tokens:,} of them loss tokens |
| target entries | {entries:,} |
| size | {bytes:,} bytes in {shards}, {bytes_per_token:.1f} per token |

## Reading it

{reading}
Position t refers to the prediction made *from* t: {about}.
{residual}`loss_mask` is true where that
prediction is in the loss. {sampled}`SPEC.md` of the package `cache_format` has all rules, and how to verify checksums.
"""

READING = {
    "columns": """\
`manifest.json` describes the cache. `shards/` holds Arrow IPC files, which any Arrow reader opens. A table row is a
token sequence, and every column of it is a list. The entries of all positions are concatenated, with
`target_counts[t]` entries for position t. With pyarrow:

```python
import numpy as np, pyarrow as pa

batch = pa.ipc.open_file(pa.memory_map("shards/shard-00000.arrow")).get_batch(0)
row = {name: np.array(batch[name][0].as_py()) for name in batch.schema.names}
ends = row["target_counts"].cumsum()
ids = np.split(row["target_ids"], ends[:-1])  # ids[t]: tokens that the teacher predicts from position t
logprobs = np.split(row["target_logprobs"], ends[:-1])
```
""",
    "packed": """\
`manifest.json` describes the cache. `shards/` holds Arrow IPC files with a table row per token sequence. Tokens, loss
mask and document lengths are columns that any Arrow reader can read. The targets are entropy-coded: the package
`cache_format` reads them, and `distill convert CACHE NEW --encoding columns` rewrites them as columns.

```python
import cache_format as cf

row = cf.open_cache(".")[0]
ids, logprobs = row.targets.at(0)  # tokens that the teacher predicts from position 0
```
""",
}

REBUILDING = """\
`manifest.json` describes the cache. `shards/` holds Arrow IPC files, which any Arrow reader opens, with a table row per
token sequence. There are no entries: the teacher's full distribution is computed from its last hidden state, which is a
column, and from its vocabulary head in `head.safetensors`. With pyarrow and safetensors:

```python
import pyarrow as pa, torch
from safetensors.torch import load_file

head = load_file("head.safetensors")
row = pa.ipc.open_file(pa.memory_map("shards/shard-00000.arrow")).get_batch(0).slice(0, 1).to_pylist()[0]
states = torch.tensor(row["hidden_{layer}"])  # of the positions where row["hidden_mask"] is true
{scales}logits = states.float() @ head["weight"].float().T
{bias}{scaled}{capped}logprobs = logits.log_softmax(1)  # [positions, {vocab_size}]
```
"""

SAMPLED = """\
The first `exact_counts[t]` entries of a position are exact. The others are
a sample of the tail, whose `logprobs` are logs of weights: Σ w f(i) over all entries is an unbiased estimate of
Σ p f(i) over the vocabulary.
"""

PROMPTS = "| prompts | the teacher read prompts of its own, which are not in this cache |\n"

EXPECTED = {
    "next": "the next tokens that the teacher predicts, with their\nlog-probabilities",
    "same": "the tokens that the teacher, a masked model, predicts in its place, with their\nlog-probabilities",
}

STATES = {
    "next": "the teacher's last hidden state, from which its head computes the\ndistribution of the next token",
    "same": "the hidden state from which the head of the teacher, a masked model,\ncomputes the token's distribution",
}

RESIDUAL = "`residual_logprob` is the log of the probability outside the exact entries. "

ABOUT = {
    "next": "the token at t + 1",
    "same": "the token at t, which is in `labels`",
}


def card(manifest: Manifest) -> str:
    metadata, spec = manifest.metadata, manifest.metadata.head
    hidden = ("hidden", "head")  # these have lines of their own
    return HEADER + TEMPLATE.format(
        teacher=metadata.teacher["name"],
        precision=metadata.teacher.get("dtype", "unknown precision"),
        source=metadata.corpus.get("source", "not recorded"),
        prompts="" if metadata.corpus.get("teacher_stream_sha256") is None else PROMPTS,
        targets=", ".join(f"{k} {v}" for k, v in sorted(metadata.targets.items()) if v is not None and k not in hidden),
        hidden="none"
        if metadata.hidden is None
        else ", ".join(f"{k} {v}" for k, v in metadata.hidden.to_json().items()),
        encoding=metadata.encoding,
        alignment=metadata.alignment,
        head="" if spec is None else f"| head | {spec.bytes:,} bytes of {spec.dtype}, once |\n",
        reading=READING[metadata.encoding] if spec is None else _rebuilding(metadata),
        residual=RESIDUAL if spec is None else "",
        sampled=SAMPLED if metadata.sampled else "",
        about=ABOUT[metadata.alignment],
        expected=(EXPECTED if spec is None else STATES)[metadata.alignment],
        vocab_size=metadata.vocab_size,
        rows=manifest.num_rows,
        tokens=manifest.num_tokens,
        counted_tokens=manifest.num_loss_tokens,
        entries=manifest.num_entries,
        bytes=manifest.stored_bytes,
        shards=quantity(len(manifest.shards), "shard"),
        bytes_per_token=manifest.stored_bytes / manifest.num_tokens,
    )


def _rebuilding(metadata: CacheMetadata) -> str:
    """How to compute distributions from states, with only the steps that this head needs."""
    spec, hidden = metadata.head, metadata.hidden
    assert spec is not None and hidden is not None
    scales = f'states = states * torch.tensor(row["hidden_{spec.layer}_scale"])[:, None]\n'
    return REBUILDING.format(
        layer=spec.layer,
        scales=scales if hidden.dtype == "int8" else "",
        bias='logits += head["bias"].float()\n' if spec.bias else "",
        scaled="" if spec.logit_scale == 1.0 else f"logits *= {spec.logit_scale!r}\n",
        capped="" if spec.softcap is None else f"logits = {spec.softcap!r} * (logits / {spec.softcap!r}).tanh()\n",
        vocab_size=f"{metadata.vocab_size:,}",
    )
