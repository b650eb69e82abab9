"""The second moment of an index: estimated from a sample of its examples, or read from a training checkpoint."""

from collections.abc import Iterator, Sequence

import numpy as np
from torch import Tensor

from rapidindex.caching.batches import Item, as_batch, does_not_fit, most_items, padded_tokens, plan_batches
from rapidindex.caching.job import Job
from rapidindex.errors import ModelError, StoreError
from rapidindex.gradients.losses import Batch, is_out_of_memory
from rapidindex.gradients.second_moment import preconditioner_of, read_second_moment
from rapidindex.progress import Progress
from rapidindex.recipe import Recipe
from rapidindex.store import Store

ESTIMATES = ("estimate", "factored", "kronecker", "kfac")
"""Second moments that are estimated from a sample; others are read from a training checkpoint."""


def moment_sample(job: Job) -> list[Item]:
    """Draw the examples of the second moment by seed, whatever the order of the data."""
    options = job.request.gradient
    ordered = sorted(job.items, key=lambda item: item.example.id)
    numbers = np.random.default_rng(options.seed).permutation(len(ordered))[: options.moment_examples]
    return [ordered[number] for number in numbers]


def refuse_without_second_moment(store: Store, recipe: Recipe) -> None:
    """Raise StoreError where the recipe wants a second moment that `store` lacks: other data would give another one."""
    if recipe.task is not None:
        store.refuse_lost_moment()
    if recipe.encoder is None and recipe.gradient.second_moment != "none" and store.second_moment() is None:
        raise StoreError(
            f"{store.path} lacks its second moment, and one from other data would not fit its rows.",
            hint=f"Give its rapidindex build command with the data of {recipe.data.path} again, which makes it.",
        )


def ensure_second_moment(job: Job, store: Store, progress: Progress) -> None:
    """Compute or read the second moment that the recipe wants, and store it, unless the locked `store` has one.

    One that was lost is made again, from the same examples: the job's are those that the index was built from.
    ModelError where it cannot be read or is not finite.
    """
    source = job.request.gradient.second_moment
    if source == "none" or store.second_moment() is not None:
        return
    if source == "kronecker" and store.lost_second_moment and "moment_means" not in store.manifest:
        raise StoreError(
            f"{store.path} lacks its second moment, whose tokens an earlier version drew in another way.",
            hint="Put second_moment.h5 back, or give the build command with --overwrite.",
        )
    vectors, kind = None, preconditioner_of(job.recipe)
    if source in ESTIMATES:
        moment, vectors = _estimate(job, progress)
    else:
        moment = read_second_moment(source, job.loaded.model, job.layers, kind)
    if not moment.isfinite().all():
        raise ModelError(f"The second moment ({source}) is not finite.", hint="Build with --second-moment none.")
    vectors = None if vectors is None else vectors.numpy()
    store.write_second_moment(moment.cpu().numpy(), vectors, means=kind.moment_of_means)


def _estimate(job: Job, progress: Progress) -> tuple[Tensor, Tensor | None]:
    """Return v and its eigenvectors, if any. ResourceError where a single example does not fit into memory."""
    sample, most = moment_sample(job), job.request.work.batch_tokens
    while True:
        batches = plan_batches(sample, most, most_items(job.layers))
        try:
            return _estimate_in(batches, job, progress)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if max(map(len, batches)) == 1:
                raise does_not_fit(batches[0], job.loaded.device) from error
        most = max(map(padded_tokens, batches)) // 2


def _estimate_in(batches: list[list[Item]], job: Job, progress: Progress) -> tuple[Tensor, Tensor | None]:

    def track(batches: Sequence[Batch], stage: str) -> Iterator[Batch]:
        for number, batch in enumerate(batches):
            progress(stage, number, len(batches))
            yield batch
        progress(stage, len(batches), len(batches))

    sample = [as_batch(batch, job.loaded.device) for batch in batches]
    return preconditioner_of(job.recipe).estimate(job.gradients, sample, job.recipe.gradient.seed, track)
