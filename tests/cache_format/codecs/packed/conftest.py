"""What reads single symbols, or bytes that nobody wrote, is tested with both implementations of the loops."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cache_format.codecs.packed import numpy_loops
from packed_samples import use_loops


@pytest.fixture(scope="module", params=["numpy", "numba"])
def implementation(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.param == "numba":
        pytest.importorskip("numba")
        from cache_format.codecs.packed import numba_loops as chosen
    else:
        chosen = numpy_loops
    with pytest.MonkeyPatch.context() as patch:
        use_loops(patch, chosen)
        yield
