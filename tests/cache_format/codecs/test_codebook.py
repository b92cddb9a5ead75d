"""Quantisation: every codebook keeps the bound it states, and the values that must be exact are."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cache_format as cf

PROBABILITIES = st.one_of(st.floats(0, 1), st.floats(-40, 0).map(lambda x: float(np.exp(x))), st.just(0.0))


def logs(probabilities: list[float]) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(np.array(probabilities)).astype(np.float32)


@pytest.mark.long
@pytest.mark.parametrize("smallest", [1e-12, 1e-4, None])
@pytest.mark.parametrize("levels", [256, 255, 64])
@given(st.lists(PROBABILITIES, min_size=1))
def test_logprob_error_stays_within_the_stated_bound(levels, smallest, probabilities):
    book = cf.sqrt_probability_codebook(levels, smallest=smallest)
    decoded = book.decode(book.encode(logs(probabilities)))
    error = np.abs(np.exp(decoded.astype(np.float64) / 2) - np.sqrt(probabilities))
    assert error.max() <= book.max_error + 1e-7  # float32 rounding of the input


def test_bound_is_tight():
    """The default's bound is half a uniform step of 1/234, reached in the middle of a gap."""
    book = cf.sqrt_probability_codebook()
    roots = np.exp(book.values.astype(np.float64) / 2)
    middle = (roots[-1] + roots[-2]) / 2
    decoded = book.decode(book.encode([2 * np.log(middle)]))
    error = abs(float(np.exp(decoded[0] / 2)) - middle)
    assert book.max_error == pytest.approx(0.5 / 234, rel=0.003)
    assert error == pytest.approx(book.max_error, rel=0.01)


@given(st.floats(-27.6, 0))
def test_small_probabilities_keep_their_size(logprob):
    book = cf.sqrt_probability_codebook()
    decoded = book.decode(book.encode([logprob]))[0]
    assert abs(decoded - logprob) <= 2 * np.log(1.25) + 1e-5


@given(st.lists(PROBABILITIES, min_size=1))
def test_residual_error_stays_within_the_stated_bound(probabilities):
    book = cf.residual_codebook()
    decoded = book.decode(book.encode(logs(probabilities)))
    error = np.abs(np.exp(decoded.astype(np.float64) / 2) - np.sqrt(probabilities))
    assert error.max() <= book.max_error + 1e-7


@given(st.floats(0, 1), st.sampled_from([2, 50, 49_152, 256_000]))
def test_entropy_error_stays_within_the_stated_bound(share, vocab_size):
    book = cf.entropy_codebook(vocab_size)
    entropy = share * np.log(vocab_size)
    decoded = book.decode(book.encode([entropy]))[0]
    assert abs(np.sqrt(decoded) - np.sqrt(entropy)) <= book.max_error + 1e-3 * book.max_error


def test_values_that_must_be_exact():
    logprob, residual = cf.weight_codebook(64, 0.05), cf.residual_codebook()
    assert logprob.decode(logprob.encode([0.0]))[0] == 0
    assert logprob.decode(logprob.encode([np.log(0.05)]))[0] == np.float32(np.log(0.05))
    assert list(residual.decode(residual.encode([-np.inf, 0.0]))) == [-np.inf, 0.0]
    assert cf.entropy_codebook(100).decode(np.array([0, 255], np.uint8))[0] == 0


def test_a_probability_is_never_quantised_to_zero():
    book = cf.sqrt_probability_codebook()
    assert book.decode(book.encode([-np.inf]))[0] == book.values[0] < np.log(1e-12)


@pytest.mark.parametrize("levels", [76, 256])
@given(st.lists(PROBABILITIES, min_size=1))
def test_weights_have_the_stated_error_and_a_smaller_one_near_certainty(levels, probabilities):
    """Halfway between two levels of √p = sin(π/2 · i/n), 1 - p is off by a multiple of √(1 - p)/n and of 1/n²."""
    book, p = cf.weight_codebook(levels, 0.05), np.array(probabilities)
    decoded = np.exp(book.decode(book.encode(logs(probabilities))).astype(np.float64))
    assert np.abs(np.sqrt(decoded) - np.sqrt(p)).max() <= book.max_error + 1e-7
    n = levels - 30  # and some levels more: 27 to 29 are geometric ones
    bound = np.pi / 2 / n * np.sqrt(1 - p) + 2 * (np.pi / 2 / n) ** 2
    assert (np.abs(decoded - p) <= bound + 1e-6).all()


@given(st.floats(1e-9, 1.0, exclude_max=True))
def test_a_further_value_changes_no_other_unless_the_table_is_full(probability):
    book = cf.weight_codebook(76, 0.05)
    more = book.including(np.log(probability))
    assert set(more.values.tolist()) == {*book.values.tolist(), float(np.float32(np.log(probability)))}
    full = cf.sqrt_probability_codebook()
    again = full.including(np.log(probability))
    assert np.float32(np.log(probability)) in again.values and again.values[-1] == 0 and len(again.values) == 256
    assert len(set(full.values.tolist()) - set(again.values.tolist())) <= 1


def test_too_many_levels():
    for make in (cf.sqrt_probability_codebook, functools.partial(cf.weight_codebook, weight=0.5)):
        with pytest.raises(ValueError, match="up to 256"):
            make(257)
        with pytest.raises(ValueError, match="too few to reach"):
            make(30)


@pytest.mark.parametrize("book", [cf.sqrt_probability_codebook(), cf.residual_codebook(), cf.entropy_codebook(1000)])
def test_every_level_is_its_own_nearest_and_survives_json(book):
    np.testing.assert_array_equal(book.encode(book.values), np.arange(256))
    again = cf.Codebook.from_json(book.to_json())
    assert again.values.tobytes() == book.values.tobytes() and again.domain == book.domain


def test_rounding_above_the_range_is_clipped_and_more_is_refused():
    book = cf.sqrt_probability_codebook()
    assert book.decode(book.encode([1e-6]))[0] == 0
    for bad in (0.01, np.nan, np.inf):
        with pytest.raises(ValueError, match="out of range"):
            book.encode([bad])
    with pytest.raises(ValueError, match="out of range"):
        cf.entropy_codebook(10).encode([-0.1])


@pytest.mark.parametrize(
    "values, complaint",
    [
        (np.zeros(0), "up to 256"),
        (-np.arange(257.0)[::-1], "up to 256"),
        ([0.0, -1.0], "ascend"),
        ([-1.0, -1.0], "ascend"),
        ([-1.0, np.nan], "ascend"),
        ([-1.0, 0.5], "above 0"),
    ],
)
def test_bad_tables_are_refused(values, complaint):
    with pytest.raises(ValueError, match=complaint):
        cf.Codebook("bad", "sqrt_probability", np.array(values, np.float32))
