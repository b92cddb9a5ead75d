"""Check that a causal language model predicts a token from the tokens before it, and from nothing else.

Both stages give it rows of several lengths, padded on the right, with position ids that begin at 0. An XLNet, or a BERT
that is loaded as a causal model without `is_decoder`, attends to the tokens that it would have to predict. A causal
RoBERTa counts positions from the id of its padding token.
"""

from __future__ import annotations

import torch

from pipeline.errors import ModelError
from pipeline.models.head import Head, deviation, deviation_of_most, probing, tolerance


def check_causal(head: Head) -> None:
    """Check that the states of a text do not depend on the tokens behind it, and are those it has by itself.

    The first comparison is strict in any dtype: only the tokens behind the text change. In the second one the model
    counts the positions of the text itself.

    Raises:
        ModelError: they do, or are not.
    """
    device, name = head.device, type(head.model).__name__
    generator = torch.Generator().manual_seed(3)
    text, end, other = (torch.randint(head.vocab_size, (1, n), generator=generator).to(device) for n in (7, 5, 5))
    rows = torch.cat([torch.cat([text, end], dim=1), torch.cat([text, other], dim=1)])
    positions = torch.arange(rows.shape[1], device=device).expand_as(rows)
    with probing(head.model):
        before_end, before_other = head.hidden_states(rows, positions)[:, : text.shape[1]]
        expected = head.body(input_ids=text, use_cache=False)[0][0].to(device)
    off, allowed = deviation(before_end, before_other), tolerance(expected, roundings=4)
    if not off <= allowed:
        raise ModelError(
            f"{name}: the states of a text change by {off:.2g} (allowed {allowed:.2g}) when other tokens follow it, so "
            "the model sees the tokens that it would have to predict. Use a causal language model (if its "
            "configuration has `is_decoder`, it must be true)."
        )
    off, allowed = deviation_of_most(before_end, expected), tolerance(expected, roundings=16)
    if not off <= allowed:
        raise ModelError(
            f"{name}: the states of a text differ by {off:.2g} (allowed {allowed:.2g}) from those it has without "
            "position ids and without padding, so its positions do not begin at 0 or depend on the length of its row. "
            "This architecture is not supported; use another model."
        )
