"""Zeros in one matrix: by magnitude, Wanda and SparseGPT, unstructured or N:M.

Matrices are (outputs, inputs) here, whatever the layer that holds them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from launcher.config.sparsity import GroupPattern, Magnitude, Pruning, SparseGpt, num_zeros
from launcher.errors import JobError


def smallest(scores: Tensor, count: int) -> Tensor:
    """Return a mask of the ``count`` smallest scores of each row; of equal ones the first."""
    order = scores.argsort(dim=-1, stable=True)[..., :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, True)


def smallest_of_all(scores: Tensor, count: int) -> Tensor:
    """Return a mask of the ``count`` smallest of all scores; of equal ones the first."""
    flat = scores.flatten()
    threshold = flat.kthvalue(count).values
    mask = flat < threshold
    ties = (flat == threshold).nonzero().squeeze(-1)
    mask[ties[: count - int(mask.sum())]] = True
    return mask.view_as(scores)


def group_mask(scores: Tensor, groups: GroupPattern) -> Tensor:
    """Return a mask of the smallest scores of each group of consecutive inputs."""
    grouped = scores.reshape(scores.shape[0], -1, groups.size)
    return smallest(grouped, groups.size - groups.kept).view_as(scores)


class InputStatistics(ABC):
    """What a method needs to know of a layer's inputs, summed over batches."""

    def __init__(self) -> None:
        self.num_rows = 0
        """Tokens that have been added."""

    def add(self, inputs: Tensor) -> None:
        """Add the inputs (…, inputs) of one forward pass."""
        rows = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        self.num_rows += rows.shape[0]
        self._add(rows)

    @abstractmethod
    def _add(self, rows: Tensor) -> None:
        """Add rows (tokens, inputs) in fp32."""

    @property
    @abstractmethod
    def squares(self) -> Tensor:
        """Sum of the squares of each input, float64 (inputs)."""

    @property
    def norms(self) -> Tensor:
        """L2 norm of each input over all tokens, fp32 (inputs)."""
        return self.squares.sqrt().float()


class InputNorms(InputStatistics):
    """Norms of the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self._squares: Tensor | None = None

    def _add(self, rows: Tensor) -> None:
        found = rows.square().sum(dim=0).double()
        self._squares = found if self._squares is None else self._squares + found

    @property
    def squares(self) -> Tensor:
        """Sum of the squares of each input."""
        assert self._squares is not None, "no inputs were added"
        return self._squares


class InputHessian(InputStatistics):
    """Hessian of a layer's squared error in its weights: the sum of the inputs' outer products."""

    def __init__(self) -> None:
        super().__init__()
        self._matrix: Tensor | None = None

    def _add(self, rows: Tensor) -> None:
        if self._matrix is None:
            self._matrix = rows.new_zeros(rows.shape[1], rows.shape[1])
        self._matrix.addmm_(rows.t(), rows)

    @property
    def matrix(self) -> Tensor:
        """Sum of the outer products, fp32 (inputs, inputs)."""
        assert self._matrix is not None, "no inputs were added"
        return self._matrix

    @property
    def squares(self) -> Tensor:
        """Sum of the squares of each input."""
        return self.matrix.diagonal().double()


def statistics_of(method: Pruning) -> InputStatistics:
    """Return what a calibrated method collects of a layer."""
    return InputHessian() if isinstance(method, SparseGpt) else InputNorms()


def pruned(weight: Tensor, method: Pruning, *, share: float, inputs: InputStatistics | None, name: str) -> Tensor:
    """Return a matrix with zeros.

    Args:
        weight: (outputs, inputs).
        method: by which.
        share: of zeros, in an unstructured pattern.
        inputs: of the layer; ``None`` for a method without calibration.
        name: of the layer, for messages.

    Returns:
        fp32, of the same shape.

    Raises:
        JobError: the inputs are not finite, or of too few tokens.
    """
    weight = weight.detach().float()
    if isinstance(method, Magnitude):
        return _masked(weight, weight.abs(), method.groups, share=share, by_row=False)
    assert inputs is not None, "this method is calibrated"
    _check(inputs, name)
    if isinstance(inputs, InputHessian):
        assert isinstance(method, SparseGpt), "which collects it"
        return sparsegpt(weight, inputs.matrix, method, share=share, name=name)
    return _masked(weight, wanda_scores(weight, inputs), method.groups, share=share, by_row=True)


def wanda_scores(weight: Tensor, inputs: InputStatistics) -> Tensor:
    """Return ``|weight| * norm of its input`` (Sun et al., 2024, arXiv:2306.11695, equation 1)."""
    return weight.abs() * inputs.norms


def _masked(weight: Tensor, scores: Tensor, groups: GroupPattern | None, *, share: float, by_row: bool) -> Tensor:
    if groups is not None:
        mask = group_mask(scores, groups)
    elif by_row:
        mask = smallest(scores, num_zeros(scores.shape[1], share))
    else:
        mask = smallest_of_all(scores, num_zeros(scores.numel(), share))
    return weight.masked_fill(mask, 0.0)


def _check(inputs: InputStatistics, name: str) -> None:
    if not bool(torch.isfinite(inputs.squares).all()):
        raise JobError(f"sparsity: the inputs of {name} are not finite; set precision=fp32, or check the weights")
    if not bool(inputs.squares.any()):
        raise JobError(
            f"sparsity.calibration_sequences: all inputs of {name} are zero in the calibration text; "
            "set it to more, or leave the layer as it is with sparsity.skip"
        )


def sparsegpt(weight: Tensor, hessian: Tensor, method: SparseGpt, *, share: float, name: str) -> Tensor:
    """Return a matrix with zeros, its other weights updated to make up for them.

    Algorithm 1 of Frantar and Alistarh, 2023 (arXiv:2301.00774). Inputs are taken in order. Those of a block choose
    their zeros by ``w^2 / d^2``, d being the diagonal of the Cholesky factor of the inverse Hessian; the error of each
    input is spread over the inputs after it.

    Args:
        weight: fp32 (outputs, inputs).
        hessian: fp32 (inputs, inputs), not damped.
        method: block size, damping and pattern.
        share: of zeros, in an unstructured pattern.
        name: of the layer, for messages.

    Raises:
        JobError: the Hessian has no inverse.
    """
    rows = weight.t().contiguous()  # (inputs, outputs): an input is contiguous
    dead = hessian.diagonal() == 0
    rows[dead] = 0.0
    factor = _inverse_factor(hessian, dead, damping=method.damping, name=name)
    groups, num_inputs = method.groups, rows.shape[0]
    for start in range(0, num_inputs, method.block_size):
        stop = min(start + method.block_size, num_inputs)
        block, local = rows[start:stop], factor[start:stop, start:stop]
        diagonal, errors = local.diagonal(), torch.empty_like(block)
        if groups is None:
            scores = (block / diagonal[:, None]).square()
            mask = smallest_of_all(scores, num_zeros(scores.numel(), share))
        else:
            mask = torch.zeros_like(block, dtype=torch.bool)
        for at in range(stop - start):
            if groups is not None and at % groups.size == 0:
                group = slice(at, at + groups.size)
                scores = (block[group] / diagonal[group, None]).square()
                mask[group] = group_mask(scores.t(), groups).t()
            kept = block[at].masked_fill(mask[at], 0.0)
            errors[at] = (block[at] - kept) / diagonal[at]
            block[at:].addr_(local[at, at:], errors[at], alpha=-1)
            block[at] = kept
        rows[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
    return rows.t().contiguous()


def _inverse_factor(hessian: Tensor, dead: Tensor, *, damping: float, name: str) -> Tensor:
    """Return the upper Cholesky factor of the inverse of the damped Hessian, fp32."""
    damped = hessian.double()
    diagonal = damped.diagonal()
    diagonal[dead] = 1.0
    diagonal += damping * diagonal.mean()
    try:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
        factor: Tensor = torch.linalg.cholesky(inverse, upper=True).float()
    except torch.linalg.LinAlgError as error:
        fix = "set sparsity.damping=0.1, or sparsity.calibration_sequences to more"
        raise JobError(f"sparsity.damping={damping:g}: the Hessian of {name} has no inverse; {fix}") from error
    return factor
