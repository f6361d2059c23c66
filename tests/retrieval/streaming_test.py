"""What does not fit is streamed; the work says how far it is."""

import jax
import numpy as np
import pytest
from double_loop import units

from abe_jax import retrieval
from abe_jax.retrieval import counting

KS = (1, 2, 4, 1000)
DEVICES = jax.devices()


@pytest.mark.parametrize("devices", [1, 8])
def test_memory_map_is_streamed_within_the_memory_given(tmp_path, monkeypatch, devices):
    e, y = units(7, 1200, 40, 90)
    np.save(tmp_path / "e.npy", e)
    mapped = np.load(tmp_path / "e.npy", mmap_mode="r")
    sizes = []
    put = counting.Plan.put

    def recording(self, value, *rest):
        sizes.append(value.nbytes)
        return put(self, value, *rest)

    options = {"devices": DEVICES[:devices], "block_memory_mb": 0.1}
    want = retrieval.evaluate_retrieval(e, y, KS, devices=DEVICES[:1])
    wanted = retrieval.top_k(e[:50], e, 7)
    monkeypatch.setattr(counting.Plan, "put", recording)
    assert retrieval.recall_at_k(mapped, y, KS, **options) == want.recall
    result = retrieval.recall_at_k(
        mapped, y, KS, gallery_embeddings=mapped, gallery_labels=y, **options
    )
    assert result[1] == 1.0  # an explicit gallery holds the query itself
    assert max(sizes) <= 0.1 * 2**20 / 4 < mapped.nbytes / 7
    sims, index = retrieval.top_k(mapped[:50], mapped, 7, **options)
    assert max(sizes) <= 0.1 * 2**20 / 4 * devices  # a shard on each
    np.testing.assert_allclose(sims, wanted[0], atol=1e-6)
    np.testing.assert_array_equal(index, wanted[1])


def test_progress_reaches_the_end():
    e, y = units(8, 500, 8, 40)
    for memory in (None, 0.05):
        seen = []
        options = {
            "block_memory_mb": memory,
            "progress": lambda a, b, seen=seen: seen.append((a, b)),
        }
        retrieval.evaluate_retrieval(e, y, (1,), **options)
        assert seen == sorted(seen) and seen[-1] == (500, 500)
        seen.clear()
        retrieval.top_k(e, e, 3, **options)
        assert seen == sorted(seen) and seen[-1] == (500, 500)
    assert len(seen) > 2
