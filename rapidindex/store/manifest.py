"""What the index's JSON files say, and how the manifest follows from the finished shards.

    {"format": 2, "id", "created", "revision", "versions", "config", "layers": [{"name", "size"}],
     "skipped": [{"line", "reason"}], "second_moment": {"sha256", "bytes", "length"} | null, "levels": {"sentence":
     {"K", "planned", "rows": "int8", "shards": {"shard-00000.h5": {"sha256", "bytes", "rows", "examples",
     "rejected"}}}}, "sha256"}

Every sealed file keeps a copy of it without the shards; `revision` says which copy is the newest.
"""

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from secrets import token_hex
from typing import Any

from rapidindex.config import LEVELS
from rapidindex.errors import DamagedIndex, NotAnIndex
from rapidindex.store import container, folder
from rapidindex.store.container import Layout, damaged
from rapidindex.store.shards import OLD_ROW_TYPE, ROW_TYPE

Manifest = dict[str, Any]


def new(
    *,
    config: dict[str, Any],
    layers: Sequence[dict[str, Any]],
    planned: dict[str, tuple[int, int]],
    versions: dict[str, str] | None = None,
    skipped: Sequence[dict[str, Any]] = (),
) -> Manifest:
    """The manifest of an index without shards; arguments as for `Store.create`."""
    unknown = set(planned) - set(LEVELS)
    if unknown:
        raise ValueError(f"{unknown.pop()!r} is not a level: {', '.join(LEVELS)}")
    return as_json(
        {
            "id": token_hex(8),
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "revision": 0,
            "versions": versions or {},
            "config": config,
            "layers": list(layers),
            "skipped": list(skipped),
            "second_moment": None,
            "levels": {
                level: {"K": K, "planned": n, "rows": ROW_TYPE, "shards": {}} for level, (K, n) in planned.items()
            },
        }
    )


def row_type(plan: dict[str, Any]) -> str:
    """How a level keeps its rows; before format 2 it did not say."""
    return plan.get("rows", OLD_ROW_TYPE)


def as_json(value: Any) -> Any:
    """A copy of `value` as it will be after writing and reading: lists for tuples, strings for keys."""
    return json.loads(json.dumps(value))


def load(path: Path) -> Manifest:
    """The manifest of the index at `path`; raises as `Store.open` does."""
    try:
        return folder.read_json(path / folder.MANIFEST)
    except FileNotFoundError:
        if folder.is_index(path):
            file = path / folder.MANIFEST
            raise DamagedIndex(f"{file} is missing.", hint=f"Type `rapidindex check {path} --repair`.") from None
        raise NotAnIndex(
            f"There is no index at {path}.", hint=f"Make one: `rapidindex build DATA -m MODEL -o {path}`."
        ) from None


def load_removed(path: Path) -> list[str]:
    """The removed ids of the index at `path`. DamagedIndex where their file was changed."""
    try:
        return folder.read_json(path / folder.REMOVED)["removed"]
    except FileNotFoundError:
        return []


def copy_for_files(manifest: Manifest) -> Manifest:
    """What every sealed file keeps of the manifest: all but the list of files."""
    levels = {level: plan | {"shards": {}} for level, plan in manifest["levels"].items()}
    return manifest | {"levels": levels, "second_moment": None}


def shard_names(manifest: Manifest, level: str) -> list[str]:
    """The listed shards of a level in the order of their rows."""
    return sorted(manifest["levels"][level]["shards"], key=folder.shard_number)


def check_sizes(path: Path, manifest: Manifest) -> None:
    """DamagedIndex, naming it, where a listed file is missing or of another size."""
    listed = {
        path / level / name: entry["bytes"]
        for level, plan in manifest["levels"].items()
        for name, entry in plan["shards"].items()
    }
    if manifest["second_moment"]:
        listed[path / folder.MOMENT] = manifest["second_moment"]["bytes"]
    for file, expected in listed.items():
        with container.read_errors(file):
            found = os.stat(file).st_size
        if found != expected:
            raise damaged(file, f"it should have {expected} bytes and has {found}")


def read_moment(path: Path, manifest: Manifest) -> Layout:
    """The contents of the second moment's file. DamagedIndex where it is not this index's, or not what was written."""
    layout = container.read_layout(path / folder.MOMENT)
    length = sum(layer["size"] for layer in manifest["layers"])
    if layout.attributes.get("index") != manifest["id"]:
        raise damaged(layout.path, f"it belongs to another index ({layout.attributes.get('index')})")
    if "v" not in layout.extents or (layout.extents["v"].shape, layout.extents["v"].dtype) != ((length,), "<f4"):
        raise damaged(layout.path, f"it does not hold {length} numbers")
    return layout


def moment_entry(layout: Layout) -> dict[str, Any]:
    """What the manifest says of the second moment."""
    return {"sha256": layout.sha256, "bytes": layout.size, "length": layout.extents["v"].shape[0]}
