"""A folder that somebody sent: links, pipes, names that lead elsewhere, and values that no version writes.

Whoever makes such a folder can seal it as well, so checksums are no help.
"""

import contextlib
import copy
import os
import random
import signal

import numpy as np
import pytest

from rapidindex.errors import DamagedIndex, RapidIndexError, StoreError
from rapidindex.recipe import Recipe
from rapidindex.store import Store, check, container, folder, read_json, write_json, writing
from tests.store.content import K, content, make, reseal

FILES = ["manifest.json", "removed.json", "second_moment.h5", "sentence/shard-00000.h5"]
VALUES = [
    *(None, True, -1, 0, 7, 2**63, 10**30, 1.5, float("nan"), "", "x", "../../x", "\ud800", [], {}, [[]], {"a": 1}),
    *([None], [1, "a"], {"": None}, "shard-00000.h5", [{"name": "a", "size": 8}], "float16", "<f4", [2**40, 2**40]),
]
CONFIG = {
    "model": {"path": "m", "fingerprint": "1"},
    "adapter": {"path": None, "fingerprint": ""},
    "tokenizer": {"fingerprint": "2"},
    "quantize": None,
    "dtype": "float32",
    "encoding": {"template": "plain", "max_length": 64, "fingerprint": "3"},
    "gradient": {"normalize": "unit", "second_moment": "estimate", "moment_examples": 4, "seed": 0},
    "sketch": {"K": K, "shuffles": 2, "seed": 0},
    "data": {"path": "train.jsonl", "fingerprint": "4"},
    "added": [{"path": "more.jsonl", "fingerprint": "5", "examples": 2}],
    "token": {"K": K, "tokens": "all"},
    "tokens_of": "all",
}


@pytest.fixture
def path(tmp_path):
    """A complete index of the examples a to f, of which one is removed."""
    path = tmp_path / "index"
    store = make(path, "abc", "def")
    store.update_config(CONFIG)
    store.remove(["b"])
    return path


@pytest.fixture(autouse=True)
def limit():
    """End a test that waits for a pipe."""
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it waited too long"))
    signal.alarm(600)
    yield
    signal.alarm(0)


def use(path):
    """Every operation on an index, each of which works or says in words why not."""

    def read(store):
        for level in store.levels:
            rows = store.rows(level)
            store.complete(level)
            list(rows.blocks(2))
            rows.take(range(len(rows))), rows.norms(range(len(rows)))
            for number in range(len(rows.ids)):
                rows.record(number)

    def change(store):
        with store.lock():
            store.remove(store.rows("sentence").ids[:1])
            store.restore(list(store.removed)[:1])
            store.set_planned("sentence", 9)
            rows = store.rows("sentence")
            name = rows.write_shard(rows.next_number(), content(["new"], rejected=["bad"]))
            store.record_shard("sentence", name)

    operations = (
        lambda: read(Store.open(path)),
        lambda: Recipe.from_manifest(Store.open(path).config).to_manifest(),
        lambda: Store.open(path).second_moment(),
        lambda: Store.open(path).eigenvectors(),
        lambda: Store.open(path).refuse_lost_moment(),
        lambda: check(path),
        lambda: change(Store.open(path)),
        lambda: check(path, repair=True),
        lambda: read(Store.open(path)),
        lambda: Store.destroy(path),
    )
    for operation in operations:
        with contextlib.suppress(RapidIndexError):
            operation()


def places(value, place=()):
    """The keys that lead to each value inside `value`."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        yield (*place, key)
        yield from places(inner, (*place, key))


def spoil(value, draw):
    """Return a copy of `value` in which one thing is another, is missing, or has another name."""
    value = copy.deepcopy(value)
    *way, last = draw.choice(list(places(value)))
    inner = value
    for key in way:
        inner = inner[key]
    how = draw.choice(["set", "set", "set", "delete", "rename"])
    if how == "delete":
        del inner[last]
    elif how == "rename" and isinstance(inner, dict):
        inner[draw.choice(["../../x", "shard-00009.h5", "", "token"])] = inner.pop(last)
    else:
        inner[last] = copy.deepcopy(draw.choice(VALUES))
    return value


def spoil_json(file, draw):
    write_json(file, spoil(read_json(file), draw))


def spoil_shard(file, draw):
    """Seal a shard again with one array, or one entry of its table of contents, that is another."""
    layout = container.read_layout(file)
    arrays = {name: np.array(array) for name, array in container.map_arrays(layout).items()}
    how = draw.choice(["values", "array", "text", "table", "attributes"])
    name = draw.choice(sorted(arrays))
    array = arrays[name]
    if how == "values" and array.size and array.dtype.kind in "if":
        array.reshape(-1)[draw.randrange(array.size)] = draw.choice([-1, -(2**7), 99, 127])
        reseal(file, **{name: array})
    elif how == "array":
        reseal(
            file, **{name: draw.choice([array[:0], array[:1], array.astype("<f4"), array[None], np.zeros(3, "<i8")])}
        )
    elif how == "text":
        name = draw.choice(["ids", "rejected", "index", "examples"])
        text = writing.encode_json(draw.choice(VALUES) if draw.random() < 0.7 else [draw.choice(VALUES)] * 3)
        reseal(file, **{name: np.frombuffer(draw.choice([text, text[:-1], b"[" * 2000]), "u1")})
    else:
        reseal_table(file, draw, how)


def reseal_table(file, draw, how):
    layout = container.read_layout(file)
    table = {"attributes": dict(layout.attributes), "bytes": layout.size, "sha256": layout.sha256, "arrays": {}}
    table["arrays"] = {name: {**vars(extent), "shape": list(extent.shape)} for name, extent in layout.extents.items()}
    table = spoil(table, draw) if how == "table" else table | {"attributes": spoil(table["attributes"], draw)}
    line = {"format": "rapidindex.shard/1", **{key: table[key] for key in ("bytes", "sha256") if key in table}}
    line |= {key: table[key] for key in ("attributes", "arrays") if key in table}
    with contextlib.suppress(ValueError):
        seal = container.hashlib.sha256(container._json(line)).hexdigest()
        block = container._json({**line, "seal": seal}).ljust(container.USER_BLOCK, b"\0")
        if len(block) == container.USER_BLOCK:
            file.write_bytes(block + file.read_bytes()[container.USER_BLOCK :])


def fuzz(tmp_path, seeds):
    for seed in seeds:
        draw = random.Random(seed)
        path = tmp_path / f"index{seed}"
        store = make(path, "abc", "def")
        store.update_config(CONFIG)
        store.remove(["b"])
        kind = draw.choice(["manifest", "manifest", "removed", "shard", "shard", "moment", "config"])
        if kind in ("manifest", "removed"):
            spoil_json(path / f"{kind}.json", draw)
        elif kind == "config":
            held = read_json(path / "manifest.json")
            write_json(path / "manifest.json", held | {"config": spoil(held["config"], draw)})
        else:
            spoil_shard(path / ("second_moment.h5" if kind == "moment" else "sentence/shard-00001.h5"), draw)
            if draw.random() < 0.7:  # whoever spoilt the file lists it as well
                list_as_it_is(path)
        try:
            use(path)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {kind}") from error


def list_as_it_is(path):
    """List the spoilt files in the manifest with their new sizes and checksums."""
    held = read_json(path / "manifest.json")
    for entry, file in (
        (held["levels"]["sentence"]["shards"]["shard-00001.h5"], path / "sentence/shard-00001.h5"),
        (held["second_moment"], path / "second_moment.h5"),
    ):
        with contextlib.suppress(StoreError):
            layout = container.read_layout(file)
            entry |= {"bytes": layout.size, "sha256": layout.sha256}
            if "v" in layout.extents and layout.extents["v"].shape:
                entry |= {"length": layout.extents["v"].shape[0]}
    write_json(path / "manifest.json", held)


def test_resealed_files_of_wrong_values_end_in_words(tmp_path):
    fuzz(tmp_path, range(24))


@pytest.mark.slow
def test_hundreds_of_resealed_files_of_wrong_values_end_in_words(tmp_path):
    fuzz(tmp_path, range(1000, 1400))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_links_and_pipes_in_the_place_of_files_are_refused(path, tmp_path, name, kind):
    file, elsewhere = path / name, tmp_path / "elsewhere"
    file.rename(elsewhere)
    before = elsewhere.read_bytes()
    if kind == "link":
        file.symlink_to(elsewhere)
    else:
        os.mkfifo(file)
    with pytest.raises(DamagedIndex, match=name):
        Store.open(path).rows("sentence")
    assert name in [problem.where for problem in check(path)]
    check(path, repair=True)
    assert not file.is_symlink() and elsewhere.read_bytes() == before
    use(path)


@pytest.mark.parametrize("kind", ["link", "dangling", "pipe", "folder"])
def test_a_lock_that_is_no_file_is_refused_and_what_it_leads_to_stays(path, tmp_path, kind):
    lock, precious = path / ".lock", tmp_path / "precious"
    lock.unlink()
    precious.write_text("years of work")
    if kind in ("link", "dangling"):
        lock.symlink_to(precious if kind == "link" else tmp_path / "new")
    elif kind == "pipe":
        os.mkfifo(lock)
    else:
        lock.mkdir()
    with pytest.raises(StoreError, match=r"\.lock is not an ordinary file") as caught:
        Store.open(path).remove(["a"])
    assert "Delete it" in caught.value.hint
    with pytest.raises(StoreError):
        check(path, repair=True)
    assert check(path) == [] and folder.writer(path) is None
    assert precious.read_text() == "years of work" and not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["sentence", "token", "damaged"])
def test_a_folder_of_the_index_that_is_a_link_is_refused(path, tmp_path, name):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "shard-00000.h5").write_text("precious")
    (elsewhere / "x.0123abcd.part").write_text("precious")
    if (path / name).exists():
        (path / name).rename(tmp_path / "before")
    (path / name).symlink_to(elsewhere)
    for operation in (Store.open, check, lambda path: check(path, repair=True), Store.destroy):
        with pytest.raises(StoreError, match=name):
            operation(path)
    assert len(os.listdir(elsewhere)) == 2


@pytest.mark.parametrize("name", ["../../elsewhere.h5", "shard-00000.h5/../../../elsewhere.h5", "shard-٠٠٠٠٠.h5"])
def test_a_shard_with_a_name_that_leads_elsewhere_is_refused_and_nothing_is_moved(path, tmp_path, name):
    (tmp_path / "elsewhere.h5").write_text("precious")
    held = read_json(path / "manifest.json")
    shards = held["levels"]["sentence"]["shards"]
    shards[name] = shards.pop("shard-00000.h5") | {"bytes": 8}
    write_json(path / "manifest.json", held)
    with pytest.raises(DamagedIndex, match="manifest"):
        Store.open(path)
    check(path, repair=True)
    assert (tmp_path / "elsewhere.h5").read_text() == "precious"
    assert Store.open(path).rows("sentence").ids == list("abcdef")


def test_a_list_of_removed_examples_that_is_none_is_refused(path):
    write_json(path / "removed.json", {"removed": "abc"})
    with pytest.raises(DamagedIndex, match="list of removed examples"):
        Store.open(path)
    assert [problem.where for problem in check(path)] == ["removed.json"]


def test_deep_nesting_is_damage(path):
    for depth in (200, 900, 5_000, 200_000):
        (path / "manifest.json").write_text('{"format": 2, "sha256": "", "x": ' + "[" * depth + "]" * depth + "}")
        with pytest.raises(DamagedIndex):
            Store.open(path)
