import numpy as np
import pytest

from rapidindex.store import Store, disk_bytes
from tests.store.content import CONFIG, LAYERS, K, content, create, write

SKIPPED = [{"line": 3, "reason": "The response is empty."}]


def size(path):
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file() and file.name != ".lock")


@pytest.mark.parametrize("tokens", [0, 3])
@pytest.mark.parametrize("shards", [1, 4, 20])
def test_the_bytes_of_an_index_are_predicted_within_two_per_cent(tmp_path, tokens, shards):
    level, ids = "token" if tokens else "sentence", [f"{number:016x}" for number in range(60)]
    store = create(tmp_path / "index", sentence=0, token=len(ids))
    for first in range(shards):
        write(store, ids[first::shards], level=level, tokens=tokens)
    predicted = disk_bytes(
        row_bytes=K,
        rows=len(ids) * (tokens or 1),
        records=content(ids).examples,
        shards=shards,
        description={"config": CONFIG, "layers": LAYERS, "skipped": SKIPPED},
    )
    assert set(predicted) == {"rows", "examples", "shards", "manifest"}
    assert sum(predicted.values()) == pytest.approx(size(store.path), rel=0.02)


@pytest.mark.parametrize("eigenvectors", [0, 5000])
def test_the_bytes_of_a_second_moment_are_predicted_within_two_per_cent(tmp_path, eigenvectors):
    layers = [{"name": "a", "size": 1000}]
    store = Store.create(tmp_path / "index", config=CONFIG, layers=layers, versions={}, planned={})
    store.write_second_moment(np.ones(1000, np.float32), np.ones(eigenvectors, np.float32) if eigenvectors else None)
    description = {"config": CONFIG, "layers": layers}
    predicted = disk_bytes(
        row_bytes=K,
        rows=0,
        records=[],
        shards=0,
        description=description,
        moment_entries=1000 + eigenvectors,
    )
    assert predicted["second moment"] == pytest.approx((store.path / "second_moment.h5").stat().st_size, rel=0.02)
