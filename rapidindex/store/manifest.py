"""The manifest of an index: its content, and what it says about the sealed files.

    {"format": 2, "id", "created", "revision", "versions", "config", "layers": [{"name", "size"}],
     "skipped": [{"line", "reason"}], "second_moment": {"sha256", "bytes", "length"} | null, "moment_means": {…},
     "levels": {"sentence": {"K", "planned", "rows": "int8", "shards": {"shard-00000.h5": {"sha256", "bytes", "rows",
     "examples", "rejected"}}}}, "sha256"}

Every sealed file keeps a copy of the manifest without the list of files; the copy of the highest `revision` is the
newest. `moment_means` are the means of eight slices of each array of the second moment that the rows were made with:
one that is made again differs by rounding, so that no hash can tell it. `removed.json` is {"format", "removed": [ids],
"sha256"}.
"""

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from secrets import token_hex
from shlex import quote
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import numpy as np
from msgspec import Meta

from rapidindex import typed
from rapidindex.config import LEVELS
from rapidindex.errors import DamagedIndex, NotAnIndex
from rapidindex.store import container, folder
from rapidindex.store.container import Layout, damaged, fitted
from rapidindex.store.shards import OLD_ROW_TYPE, ROW_TYPE, ROW_TYPES
from rapidindex.typed import Count, RowLength

_ROUNDING = 0.05
"""How far a slice's mean may be from the one noted. SmolLM2 with LoRA: other batches .0005 (in bfloat16), another dtype
.026, other examples of the same data .22."""
MOMENT_ARRAYS = {"v": 1, "means": 1, "eigenvectors": 1, "roots": 2}
"""The arrays that the second moment's file may hold, float32, each with the number of its axes."""


class Shard(TypedDict):
    """A finished shard."""

    sha256: str
    bytes: Count
    rows: Count
    examples: Count
    rejected: Count


class Level(TypedDict):
    """A level's rows."""

    K: RowLength
    planned: Count
    rows: NotRequired[Literal[*ROW_TYPES]]
    shards: dict[Annotated[str, Meta(pattern=rf"^{folder.SHARD.pattern}\Z")], Shard]


class Layer(TypedDict):
    """A layer that has a gradient."""

    name: str
    size: Count


class Skipped(TypedDict):
    """A row of the data that is no example."""

    line: Count | None
    reason: str


class Moment(TypedDict):
    """The file of the second moment."""

    sha256: str
    bytes: Count
    length: Count


class Config(TypedDict, total=False):
    """Of what `recipe.py` reads and writes, the one part that this room reads."""

    gradient: dict[str, Any]


class Manifest(TypedDict):
    """What every manifest has, that of format 1 too, and each copy of it in a sealed file."""

    id: str
    created: str
    revision: Count
    versions: dict[str, str]
    config: Config
    layers: list[Layer]
    skipped: list[Skipped]
    second_moment: Moment | None
    moment_means: NotRequired[dict[Literal["v", "means", "roots"], list[float]]]
    levels: dict[Literal[*LEVELS], Level]


OTHER_MOMENT = "it is not the second moment that the rows were made with"


def new(
    *,
    config: dict[str, Any],
    layers: Sequence[dict[str, Any]],
    planned: dict[str, tuple[int, int]],
    versions: dict[str, str] | None = None,
    skipped: Sequence[dict[str, Any]] = (),
) -> Manifest:
    """Return the manifest of an index without shards; arguments as for `Store.create`."""
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
    """Return the type of a level's rows, `int8` or `float16`; manifests of format 1 do not say it."""
    return plan.get("rows", OLD_ROW_TYPE)


def shard_form(manifest: Manifest, level: str) -> dict[str, Any]:
    """Return what each shard of a level has in common: the keyword arguments of `shards.read_shard`."""
    plan = manifest["levels"][level]
    form = {"index": manifest["id"], "level": level, "layers": len(manifest["layers"])}
    return {**form, "K": plan["K"], "row_type": row_type(plan)}


def as_json(value: Any) -> Any:
    """Return a copy of `value` as JSON gives it back: lists for tuples, strings for keys."""
    return json.loads(json.dumps(value))


def load(path: Path) -> Manifest:
    """Read the manifest of the index at `path`. Raise as `Store.open` does."""
    folder.refuse_links(path)
    try:
        content = folder.read_json(path / folder.MANIFEST)
        return fitting(path / folder.MANIFEST, content)
    except FileNotFoundError:
        if folder.is_index(path):
            file = path / folder.MANIFEST
            raise DamagedIndex(
                f"{file} is missing.", hint=f"Type `rapidindex check {quote(str(path))} --repair`."
            ) from None
        if (path / folder.CHECKPOINTS).exists():
            raise NotAnIndex(
                f"{path} holds the indexes of several checkpoints.", hint=f"Give one of them, such as {path}/NAME."
            ) from None
        raise NotAnIndex(
            f"There is no index at {path}.", hint=f"Make one: `rapidindex build DATA -m MODEL -o {path}`."
        ) from None


def fitting(file: Path, content: Any) -> Manifest:
    """Return a manifest that was read from `file`. Raise DamagedIndex where it has not the form of one."""
    fitted(file, content, Manifest, "the manifest")
    return content  # with the fields that a newer version may have added


def load_removed(path: Path) -> list[str]:
    """Read the removed ids of the index at `path`. Raise DamagedIndex where their file was changed."""
    file = path / folder.REMOVED
    try:
        content = folder.read_json(file)
    except FileNotFoundError:
        return []
    return fitted(file, content.get("removed"), list[str], "the list of removed examples")


def read_copy(layout: Layout) -> Manifest:
    """Read a sealed file's copy of the manifest, which lists no files. Raise DamagedIndex where it is none."""
    try:
        content = typed.loads(layout.read("index").tobytes())
    except (KeyError, ValueError):
        raise damaged(layout.path, "its copy of the manifest cannot be read") from None
    return fitting(layout.path, content)


def copy_for_files(manifest: Manifest) -> Manifest:
    """Return the copy of the manifest for a sealed file: everything but the list of files."""
    levels = {level: plan | {"shards": {}} for level, plan in manifest["levels"].items()}
    return manifest | {"levels": levels, "second_moment": None}


def lost_moment(manifest: Manifest) -> bool:
    """Return whether there are rows, the index's options want a second moment or roots, and there are none."""
    config = manifest["config"]
    corrected = config.get("gradient", {}).get("second_moment", "none") != "none" or config.get("task")
    wanted = bool(corrected) and not config.get("encoder")
    return wanted and has_rows(manifest) and manifest["second_moment"] is None


def has_rows(manifest: Manifest) -> bool:
    """Return whether a finished shard holds a row."""
    return any(entry["rows"] for plan in manifest["levels"].values() for entry in plan["shards"].values())


def check_sizes(path: Path, manifest: Manifest) -> None:
    """Raise DamagedIndex where a listed file is missing or has another size."""
    listed = {
        path / level / name: entry["bytes"]
        for level, plan in manifest["levels"].items()
        for name, entry in plan["shards"].items()
    }
    if manifest["second_moment"]:
        listed[path / folder.MOMENT] = manifest["second_moment"]["bytes"]
    for file, expected in listed.items():
        with container.read_errors(file):
            size = os.lstat(file).st_size
        if size != expected:
            raise damaged(file, f"it should have {expected} bytes and has {size}")


def read_moment(path: Path, manifest: Manifest) -> Layout:
    """Read the table of contents of the second moment's file. Raise DamagedIndex where it does not fit the index."""
    layout = container.read_layout(path / folder.MOMENT)
    length = sum(layer["size"] for layer in manifest["layers"])
    if layout.attributes.get("index") != manifest["id"]:
        raise damaged(layout.path, f"it belongs to another index ({layout.attributes.get('index')})")
    whole, roots = layout.extents.get("v"), layout.extents.get("roots")
    nothing = whole is None and roots is None and "means" not in layout.extents
    if nothing or whole and (whole.shape, whole.dtype) != ((length,), "<f4"):
        raise damaged(layout.path, f"it does not hold {length} numbers")
    for name in layout.extents.keys() & MOMENT_ARRAYS.keys():
        if (len(layout.extents[name].shape), layout.extents[name].dtype) != (MOMENT_ARRAYS[name], "<f4"):
            raise damaged(layout.path, f"its {name} are of another type")
    rows = {plan["K"] for plan in manifest["levels"].values()}
    if roots and ({roots.shape[0]} != rows or not 0 < roots.shape[1] <= roots.shape[0]):
        raise damaged(layout.path, "its roots do not fit the rows")
    return layout


def moment_entry(layout: Layout) -> dict[str, Any]:
    """Return the manifest's entry for the second moment."""
    numbers = next(layout.extents[name] for name in ("v", "means", "roots") if name in layout.extents)
    return {"sha256": layout.sha256, "bytes": layout.size, "length": numbers.shape[0]}


def moment_means(arrays: dict[str, np.ndarray]) -> dict[str, list[float]]:
    """Return the means of eight slices of each array of a second moment's file; eigenvectors have signs by chance."""
    return {name: _slice_means(arrays[name]) for name in ("v", "means", "roots") if name in arrays}


def _slice_means(array: np.ndarray) -> list[float]:
    return [float(np.abs(part).mean(dtype=np.float64)) for part in np.array_split(array, 8) if len(part)]


def are_of_rows(manifest: Manifest, arrays: dict[str, np.ndarray]) -> bool:
    """Return whether the rows were made with this second moment. Where an earlier version did not note it: True."""
    known = manifest.get("moment_means")
    if known is None or not has_rows(manifest):
        return True
    means = moment_means(arrays)
    return means.keys() == known.keys() and all(_alike(means[name], known[name]) for name in known)


def _alike(means: list[float], known: list[float]) -> bool:
    least = 1e-6 * max(known, default=0.0)
    return len(means) == len(known) and np.allclose(means, known, rtol=_ROUNDING, atol=least)
