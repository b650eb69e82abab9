"""The sample of training examples, and its second moment."""

from collections.abc import Iterator, Sequence

import numpy as np

from rapidindex.caching.batches import Item, as_batch, plan_batches
from rapidindex.caching.job import Job
from rapidindex.errors import ModelError
from rapidindex.gradients.eigenbases import Eigenbases, estimate_eigenbases
from rapidindex.gradients.losses import Batch, with_drawn_labels
from rapidindex.gradients.second_moment import KRONECKER, estimate_second_moment, read_second_moment
from rapidindex.progress import Progress
from rapidindex.store import Store


def drawn(job: Job) -> list[Item]:
    """The examples from which the second moment is estimated: drawn by seed, whatever their order."""
    options = job.request.gradient
    ordered = sorted(job.items, key=lambda item: item.example.id)
    numbers = np.random.default_rng(options.seed).permutation(len(ordered))[: options.moment_examples]
    return [ordered[number] for number in numbers]


def ensure_second_moment(job: Job, store: Store, progress: Progress) -> None:
    """Compute or read the second moment that the correction takes, unless the store holds it already."""
    how = job.request.gradient.second_moment
    if how == "none" or store.second_moment() is not None:
        return
    vectors = None
    if how == KRONECKER:
        batches = _with_drawn_labels(job, progress)
        vectors = estimate_eigenbases(job.gradients, _each(batches, "eigenvectors", progress))
        bases = Eigenbases(job.layers, vectors.to(job.loaded.device))
        moment = estimate_second_moment(job.gradients, _each(batches, "second moment", progress), bases)
    elif how == "estimate":
        moment = estimate_second_moment(job.gradients, _each(_sample(job), "second moment", progress))
    else:
        moment = read_second_moment(how, job.loaded.model, job.layers)
    if not moment.isfinite().all():
        raise ModelError(f"The second moment ({how}) is not finite.", hint="Build with --second-moment none.")
    store.write_second_moment(moment.cpu().numpy(), None if vectors is None else vectors.numpy())


def _with_drawn_labels(job: Job, progress: Progress) -> list[Batch]:
    """The sample with tokens that the model draws: what it taught itself is not taken out of the gradients."""
    seed = 2**20 * job.request.gradient.seed
    batches = enumerate(_each(_sample(job), "draw tokens", progress))
    return [with_drawn_labels(job.gradients.model, batch, seed + number) for number, batch in batches]


def _sample(job: Job) -> list[Batch]:
    """The batches of the examples from which the second moment is estimated."""
    planned = plan_batches(drawn(job), job.request.work.batch_tokens)
    return [as_batch(batch, job.loaded.device) for batch in planned]


def _each(batches: Sequence[Batch], stage: str, progress: Progress) -> Iterator[Batch]:
    for number, batch in enumerate(batches):
        progress(stage, number, len(batches))
        yield batch
    progress(stage, len(batches), len(batches))
