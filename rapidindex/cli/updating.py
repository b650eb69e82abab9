"""The commands that add to an index and take out of it."""

import shlex
from functools import partial
from typing import Annotated, Any

from rapidindex.cli import options as opt
from rapidindex.cli.app import command
from rapidindex.cli.printing import print_members
from rapidindex.config import BuildConfig, ModelConfig
from rapidindex.errors import UsageError
from rapidindex.views.tables import build_tables


@command(
    "Keep",
    "rapidindex add index more.jsonl",
)
def add(
    path: opt.IndexPath,
    data: opt.DataPath,
    model: opt.MovedModel = None,
    adapter: opt.MovedAdapter = None,
    encoder: opt.MovedEncoder = None,
    device: opt.Device = ModelConfig.device,
    batch_tokens: opt.BatchTokens = BuildConfig.batch_tokens,
    workers: opt.Workers = BuildConfig.workers,
    shard_seconds: opt.ShardSeconds = BuildConfig.shard_seconds,
    limit: opt.Limit = None,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Add data to an index, with the model and the options that it was built with. What it holds is not added twice.

    Building from A and adding B gives the rows of building from A and B: exactly with --second-moment none, and
    otherwise but for the second moment, which stays that of A. Examples that were removed, and are in the data, come
    back.
    """
    work = BuildConfig(batch_tokens, workers, shard_seconds)

    from rapidindex.caching.update import add as run  # takes seconds: wrong options are refused before
    from rapidindex.progress import Bars
    from rapidindex.store import indexes_at

    moved = {"model": model, "adapter": adapter, "encoder": encoder, "device": device}
    indexes = indexes_at(path)
    if len(indexes) > 1 and adapter:
        raise UsageError(
            f"{path} has several adapters.",
            hint=f"Add to each: rapidindex add {shlex.quote(str(indexes[0]))} … -a ADAPTER",
        )
    with Bars(quiet=quiet) as bars:
        each = {one.name: run(one, str(data), **moved, work=work, limit=limit, progress=bars) for one in indexes}
    print_members(each, as_json, partial(build_tables, asked=str(path)))


@command(
    "Keep",
    "rapidindex remove index --where source=web",
    "rapidindex remove index --ids ids.txt",
)
def remove(
    path: opt.IndexPath,
    ids: Annotated[
        list[str] | None,
        opt.in_data("--ids", **opt.PLACE, help="An example's id, or a file with one a line; may be repeated."),
    ] = None,
    where: Annotated[
        list[str] | None, opt.in_data(metavar="COLUMN=VALUE", help="Examples like this; repeated: all of it.")
    ] = None,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Take examples out of an index: no search finds them any more. Adding their data again brings them back."""
    from rapidindex.caching.update import remove as run
    from rapidindex.progress import Bars
    from rapidindex.store import indexes_at

    with Bars(quiet=quiet) as bars:
        each = {one.name: run(one, ids=ids or (), where=where or (), progress=bars) for one in indexes_at(path)}
    print_members(each, as_json, _removal_tables)


def _removal_tables(removal: Any) -> dict[str, dict[str, str]]:
    lines = {"removed": f"{removal.removed:,} examples", "examples": f"{removal.examples:,} are left"}
    return {f"Index {removal.index}": lines}
