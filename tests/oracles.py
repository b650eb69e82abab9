"""The slow, obviously right ways that tests of several rooms hold the fast ones against."""

import weakref

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rapidindex.config import BuildRequest, GradientConfig, ModelConfig, SketchConfig
from rapidindex.gradients.losses import trainable
from rapidindex.store import Store
from tests import tiny

LENGTHS = [(3, 4), (9, 2), (1, 12), (6, 6)]


def examples(lengths=LENGTHS, seed=0):
    """Token ids and weights of examples with (prompt, response) lengths; the weights are 1/G on the response."""
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, tiny.VOCABULARY, (p + g,), generator=generator).numpy() for p, g in lengths]
    weights = [torch.tensor([0.0] * p + [1 / g] * g).numpy() for p, g in lengths]
    return ids, weights


def prefixes(seed=0, lengths=(12, 11, 9, 5, 5)):
    """Token ids and weights of the first tokens of a text, so many each, with the last of them alone in the loss."""
    text = torch.randint(3, tiny.VOCABULARY, (max(lengths),), generator=torch.Generator().manual_seed(seed)).numpy()
    return [text[:length] for length in lengths], [np.eye(length, dtype=np.float32)[-1] for length in lengths]


def autograd(model, ids, weights, labels=None):
    """The slow, obviously right way: one example at a time, the whole model, no padding."""
    tokens = torch.as_tensor(ids).long().unsqueeze(0)
    logits = model(input_ids=tokens).logits[0, :-1].float()
    losses = F.cross_entropy(logits, tokens[0, 1:] if labels is None else labels[1:], reduction="none")
    loss = (losses * torch.as_tensor(weights)[1:]).sum()
    found = torch.autograd.grad(loss, list(trainable(model).values()), allow_unused=True)
    shapes = trainable(model).values()
    return loss.detach(), [torch.zeros_like(p) if g is None else g for g, p in zip(found, shapes, strict=True)]


def drawn(model, ids, weights, seed, number=0):
    """One example's labels, drawn by a pass of their own, and its weights in the drawn loss: int64 [T], float [T]."""
    tokens, weights = torch.as_tensor(ids).long(), torch.as_tensor(weights)
    with torch.no_grad():
        logits = model(input_ids=tokens.unsqueeze(0)).logits[0]
    places = weights.nonzero()[:, 0]
    sums = logits[places - 1].float().softmax(-1).double().cumsum(-1)
    points = torch.from_numpy(np.random.default_rng((seed, number)).random((len(places), 1)))
    found = torch.searchsorted(sums, points * sums[:, -1:], right=True)[:, 0]
    return tokens.index_copy(0, places, found), weights.sqrt()


def collected(gradients, batch):
    rows = [None] * len(gradients.layers)

    def consume(number, values):
        assert rows[number] is None, "a layer came twice"
        rows[number] = values.clone()

    losses = gradients(batch, consume)
    assert all(values is not None for values in rows), "a layer never came"
    return losses, torch.cat(rows, dim=1)


def make(name, way, dtype=torch.float32):
    model = tiny.make_model(name)
    return (tiny.with_lora(model) if way == "lora" else model).to(dtype)


def oracle(model, ids, weights, v, normalize):
    """One example: autograd, correct, normalise; no sketch."""
    _, parts = autograd(model, ids, weights)
    if v is not None:
        factor = 1 / (v + 1e-3 * v.mean()).sqrt()
        ends = torch.tensor([0] + [part.numel() for part in parts]).cumsum(0)
        parts = [part.flatten() * factor[a:b] for part, a, b in zip(parts, ends, ends[1:], strict=False)]
    if normalize == "layer":
        parts = [part.flatten() / part.norm() if part.norm() > 0 else part.flatten() for part in parts]
    flat = torch.cat([part.flatten() for part in parts])
    return flat / flat.norm() if normalize == "unit" else flat


def request(data, output, folders, **changes):
    model = ModelConfig(str(folders[0]), str(folders[1]))
    return BuildRequest(str(data), str(output), model, **{"sketch": SketchConfig(K=1024), **changes})


def all_rows(path):
    rows = Store.open(path).rows("sentence")
    ids = [rows.ids[number] for number in rows.example]
    return dict(zip(ids, rows.take(np.arange(len(rows))), strict=True))


RECIPES = {
    "the default": GradientConfig("unit", "estimate", moment_examples=8),
    "the paper's": GradientConfig(normalize="layer", second_moment="none"),
    "plain TracIn": GradientConfig(normalize="none", second_moment="none"),
}


PROMPT, ANSWER = "Tell me about tea", "tea is from Japan, and rice is from Japan"


class LiveTensorMeter(TorchDispatchMode):
    """While open, counts the bytes of the live tensors made within (`now`), and their peak."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        given = {storage._cdata for storage in _storages((args, kwargs))}  # a view is nothing new
        for storage in _storages(made):
            if storage._cdata not in given | self._known:
                self._count(storage)
        return made

    def _count(self, storage):
        size = storage.nbytes()
        self._known.add(storage._cdata)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, storage._cdata, size).atexit = False

    def _freed(self, number, size):
        self._known.discard(number)
        self.now -= size


def _storages(tree):
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
