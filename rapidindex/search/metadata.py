"""`ann.json`: what a vector index was made from and how, and the recall that was measured. Plain data; no FAISS."""

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rapidindex.errors import DamagedIndex
from rapidindex.search.calibration import Calibration
from rapidindex.store import ANN, Rows, index_of, read_json, write_json

NAME = f"{ANN}.json"


@dataclass(frozen=True)
class IndexMetadata:
    """What `ann.json` says of an index."""

    asked: str | None
    """The factory asked for; None: chosen by size."""
    factory: str
    """`exact`, or FAISS's `index_factory` string."""
    dim: int
    """Length of the folded rows."""
    K: int
    shards: list[tuple[str, str, int]]
    """(name, sha256, rows) of each shard whose rows it holds, in order."""
    live: int
    """Live rows when it was built or updated: more may have been removed since."""
    target_recall: float
    seed: int
    file: str | None = None
    """FAISS's file beside the metadata; None where every search is exact."""
    file_bytes: int = 0
    file_sha256: str = ""
    faiss: str = ""
    """FAISS's version."""
    proponents: Calibration | None = None
    """None where nothing could be measured; searches are exact then."""
    opponents: Calibration | None = None

    @property
    def rows(self) -> int:
        """Rows covered, removed ones included."""
        return sum(rows for _, _, rows in self.shards)

    def calibration(self, largest: bool) -> Calibration | None:
        """Of proponents or of opponents."""
        return self.proponents if largest else self.opponents

    def covers(self, rows: Rows) -> bool:
        """Whether all rows it covers are still there under the same numbers; there may be more after them."""
        return rows.K == self.K and rows.shards[: len(self.shards)] == self.shards

    def verify(self, folder: Path) -> None:
        """Read FAISS's file in `folder` through; DamagedIndex where it is not as it was written."""
        if self.file is None:
            return
        try:
            with open(folder / self.file, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise self.damaged(folder, f"it cannot be read ({error.strerror})") from error
        if found != self.file_sha256:
            raise self.damaged(folder, "it was changed after it was written")

    def damaged(self, folder: Path, what: str) -> DamagedIndex:
        """The error for FAISS's file."""
        return DamagedIndex(f"{folder / str(self.file)} is damaged: {what}.", hint=rebuild_hint(folder))

    def write(self, folder: Path) -> None:
        """Replace the metadata in `folder`. Raises ResourceError and StoreError as the store does."""
        write_json(folder / NAME, asdict(self))

    @classmethod
    def read(cls, folder: Path) -> "IndexMetadata | None":
        """The metadata in `folder`; None where there is none. Raises as the store does where it was changed."""
        try:
            said = read_json(folder / NAME)
        except FileNotFoundError:
            return None
        try:
            return cls(**{**said, **_typed(said)})
        except (TypeError, KeyError) as error:
            said = f"{folder / NAME} is of another version, or damaged ({error})."
            raise DamagedIndex(said, hint=rebuild_hint(folder)) from error


def rebuild_hint(folder: Path) -> str:
    """What to type to make the vector index in a level's `folder` anew."""
    return f"Type `rapidindex index {index_of(folder / NAME)}`."


def _typed(said: dict[str, Any]) -> dict[str, Any]:
    directions = {name: said[name] and Calibration(**said[name]) for name in ("proponents", "opponents")}
    return {"shards": [tuple(shard) for shard in said["shards"]], **directions}
