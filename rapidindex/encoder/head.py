"""What a distillation learns: from what an encoder makes of a text to where the text's gradient lies.

targets    coordinates of the stored rows along their leading principal directions: the inner products are nearly kept
features   the model's embeddings of the prompt and of the response, and the logarithms of their lengths
fit        ridge regression with a Gaussian kernel

The anchors are the landmarks of the directions (Nyström's method) and of the kernel (subset of regressors): Rasmussen
and Williams, Gaussian Processes for Machine Learning, 2006, chapter 8.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

HEAD = "head.safetensors"
"""The file of the head in the folder of an encoder."""
WIDTH = 128
"""Coordinates, at most: further ones no longer change the ranking (docs/influcoder.md)."""
_GAMMAS = (0.15, 0.3, 0.6)
_PENALTIES = (0.1, 0.3, 1.0, 3.0)
_LEAST = 1e-6
"""Share of the largest eigenvalue, or of the mean diagonal, below which a number is rounding."""


@dataclass(frozen=True)
class Head:
    """Σ_m weights_m exp(-γ |x - landmark_m|²), x the features after (features - mean) · scale."""

    mean: Float32[Tensor, " features"]
    scale: Float32[Tensor, " features"]
    landmarks: Float32[Tensor, "landmarks features"]
    weights: Float32[Tensor, "landmarks width"]
    gamma: Float32[Tensor, ""]

    def __call__(self, features: Float[Tensor, "texts features"]) -> Float[Tensor, "texts width"]:
        """Return the coordinates of texts."""
        return _kernel((features - self.mean) * self.scale, self.landmarks, self.gamma) @ self.weights

    def to(self, device: torch.device | str) -> "Head":
        """Return the head on a device."""
        return Head(*(getattr(self, one.name).to(device) for one in fields(self)))

    def save(self, folder: Path) -> None:
        """Write the head into the folder of its encoder."""
        from safetensors.torch import save_file

        save_file({one.name: getattr(self, one.name).contiguous() for one in fields(self)}, folder / HEAD)

    @classmethod
    def load(cls, folder: Path, device: torch.device | str = "cpu") -> "Head | None":
        """Read the head of an encoder; None where there is none."""
        from safetensors.torch import load_file

        return cls(**load_file(folder / HEAD, device=str(device))) if (folder / HEAD).exists() else None


def fit(
    products: Float32[np.ndarray, "landmarks texts"],
    features: Float32[Tensor, "texts features"],
    landmarks: list[int],
    quality: Callable[[Head], float],
) -> tuple[Head, float]:
    """Fit heads, and return the one of the best `quality`, with it.

    `products` are the inner products of the landmarks' rows with those of all texts; `landmarks` are the landmarks'
    numbers among the texts.
    """
    wanted = torch.from_numpy(coordinates(products, landmarks))
    mean, scale = features.mean(0), _scale(features)
    x = (features - mean) * scale
    best: tuple[Head, float] | None = None
    for gamma in _GAMMAS:
        kernel = _kernel(x, x[landmarks], gamma).double()
        for penalty in _PENALTIES:
            weights = _ridge(kernel, kernel[landmarks], wanted, penalty).float()
            head = Head(mean, scale, x[landmarks], weights, torch.tensor(gamma))
            found = quality(head)
            if best is None or found > best[1]:
                best = head, found
    assert best is not None
    return best


def coordinates(
    products: Float32[np.ndarray, "landmarks texts"], landmarks: list[int]
) -> Float[np.ndarray, "texts width"]:
    """Return the coordinates of all rows along the leading principal directions of the landmarks' rows."""
    values, vectors = np.linalg.eigh(products[:, landmarks].astype(np.float64))
    values, vectors = values[::-1][:WIDTH], vectors[:, ::-1][:, :WIDTH]
    kept = values > _LEAST * values[0]
    return products.T @ (vectors[:, kept] / np.sqrt(values[kept]))


def _scale(features: Float[Tensor, "texts features"]) -> Float[Tensor, " features"]:
    """Return factors that give both embeddings and the lengths the same weight.

    What is the same in all texts says nothing: its factor is 0.
    """
    width = (features.shape[1] - 2) // 2
    spread = features.std(0, correction=0) * torch.tensor([width] * 2 * width + [2, 2]).sqrt()
    return torch.where(spread > _LEAST, 1 / spread.clamp_min(_LEAST), 0.0)


def _kernel(x: Tensor, landmarks: Tensor, gamma: float | Tensor) -> Tensor:
    return torch.exp(-gamma * torch.cdist(x, landmarks) ** 2)


def _ridge(kernel: Tensor, own: Tensor, wanted: Tensor, penalty: float) -> Tensor:
    """Return the weights that minimize |kernel · weights - wanted|² + penalty · weightsᵀ own weights."""
    normal = kernel.T @ kernel + penalty * own
    normal.diagonal().add_(_LEAST * normal.diagonal().mean())
    return torch.linalg.solve(normal, kernel.T @ wanted)
