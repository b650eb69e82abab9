"""A folder of indexes of several checkpoints of one training: each is an index of its own, and this file lists them.

    INDEX/checkpoints.json   {"format", "checkpoints": [{"name", "weight"}], "weighted": bool, "sha256"}
    INDEX/<name>/            an index

The first checkpoint is the one that is asked by default. Weights are those of their sum; `weighted` says whether they
are of learning rates, or merely equal.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypedDict

from msgspec import Meta

from rapidindex.errors import DamagedIndex, StoreError
from rapidindex.store import folder
from rapidindex.store.container import fitted
from rapidindex.store.writing import write_errors


class _Checkpoint(TypedDict):
    name: Annotated[str, Meta(pattern=r"^(?!\.\.?\Z)[^/\0]+\Z")]
    weight: Annotated[float, Meta(ge=0)]


class _Content(TypedDict):
    checkpoints: Annotated[list[_Checkpoint], Meta(min_length=1)]
    weighted: bool


_LIST_ANEW = "Give its `rapidindex build` command again: it lists the checkpoints anew."


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints that a folder lists."""

    path: Path
    weights: dict[str, float]
    """The weight of each in their sum, by its name, the default one first."""
    weighted: bool
    """Whether the weights are of learning rates."""

    @property
    def folders(self) -> dict[str, Path]:
        """The index of each, by its name."""
        return {name: self.path / name for name in self.weights}

    def folder(self, name: str) -> Path:
        """Return the index of a checkpoint. StoreError where its folder is gone, or a link to another place."""
        place = self.path / name
        if place.is_symlink():  # through which `check --repair` and `remove` would change what is not of this index
            raise StoreError(
                f"{place} is a link, where an index keeps a folder of its own.",
                hint="Put a copy of the folder in its place: `cp -rL` copies what links lead to.",
            )
        if not place.is_dir():
            rest = ", ".join(other for other, there in self.folders.items() if there.is_dir())
            raise StoreError(
                f"{self.path} lists the checkpoint {name}, and {place} is gone.",
                hint=f"Give its rapidindex build command again, or ask with --checkpoint: {rest or 'none is left'}.",
            )
        return place

    def create(self) -> None:
        """Write the list, and the folder where there is none. Raise as `writing.atomic_file` does."""
        with write_errors(self.path, 0):
            self.path.mkdir(parents=True, exist_ok=True)
        named = [{"name": name, "weight": weight} for name, weight in self.weights.items()]
        folder.write_json(self.path / folder.CHECKPOINTS, {"checkpoints": named, "weighted": self.weighted})


def checkpoints_at(path: str | Path) -> Checkpoints | None:
    """Read which checkpoints the folder `path` lists; None where it lists none.

    Raises DamagedIndex where the list was changed or has a name twice, a name that is not that of a folder, or a weight
    below 0, and StoreError where the folder of one is a link.
    """
    file = Path(path) / folder.CHECKPOINTS
    try:
        content = fitted(file, folder.read_json(file), _Content, "its content")
    except FileNotFoundError:
        return None
    except DamagedIndex as error:
        raise DamagedIndex(error.message, hint=_LIST_ANEW) from error
    weights = {one["name"]: one["weight"] for one in content["checkpoints"]}
    if len(weights) < len(content["checkpoints"]):
        raise DamagedIndex(f"{file} is damaged: it has a name twice.", hint=_LIST_ANEW)
    found = Checkpoints(Path(path), weights, content["weighted"])
    for name, place in found.folders.items():
        if place.is_dir():
            found.folder(name)
    return found


def indexes_at(path: str | Path) -> list[Path]:
    """Return the indexes at `path`: those of its checkpoints, or itself. StoreError where a checkpoint's is gone."""
    found = checkpoints_at(path)
    return [Path(path)] if found is None else [found.folder(name) for name in found.weights]
