"""Loss of each source of a mixture, added up while the loss of all is computed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from launcher.data.rows import IGNORE_INDEX
from launcher.engines.distributed import sum_over_ranks

if TYPE_CHECKING:
    from collections.abc import Callable


class SourceLosses:
    """Sums of one rank since they were last taken, by the number of the source.

    Nothing is copied from the device until then.

    Args:
        num_sources: whose numbers begin at 0.
        device: of the losses.
    """

    def __init__(self, num_sources: int, *, device: torch.device) -> None:
        self._numbers = torch.arange(num_sources, device=device)
        self._sums = torch.zeros((2, num_sources), dtype=torch.float64, device=device)

    def add(self, losses: Tensor, counts: Tensor, sources: Tensor) -> None:
        """Add tokens or pairs.

        Args:
            losses: of each, of shape (items,).
            counts: whether each counts.
            sources: of each, int64.
        """
        is_own = (sources == self._numbers[:, None]) & counts
        self._sums[0] += torch.where(is_own, losses.detach().double(), 0.0).sum(dim=1)  # NaN stays with its source
        self._sums[1] += is_own.sum(dim=1)

    def add_rows(self, labels: Tensor, sources: Tensor, loss_of: Callable[[Tensor], Tensor]) -> None:
        """Add rows of tokens whose loss is known of rows as a whole alone.

        Args:
            labels: of shape (rows, tokens).
            sources: of each row, int64, on the CPU.
            loss_of: of the rows of these numbers, summed over their tokens.
        """
        for source in sorted(set(sources.tolist())):
            rows = (sources == source).nonzero().squeeze(1).to(labels.device)
            with torch.no_grad():
                self._sums[0, source] += loss_of(rows).double()
            self._sums[1, source] += (labels[rows] != IGNORE_INDEX).sum()

    def take(self) -> list[float | None]:
        """Return the mean loss of each source over all ranks, and begin again.

        All ranks call it together. Of a source without a token it is ``None``.
        """
        losses_and_counts = sum_over_ranks(self._sums.flatten().tolist(), device=self._sums.device)
        self._sums.zero_()
        size = len(self._numbers)
        pairs = zip(losses_and_counts[:size], losses_and_counts[size:], strict=True)
        return [loss / count if count else None for loss, count in pairs]


@dataclass(frozen=True, kw_only=True)
class TokenSources:
    """Where the tokens of a forward pass come from, and where their losses are added up."""

    numbers: Tensor
    """Source of each token, int64 of shape (tokens,)."""
    sums: SourceLosses

    def at(self, places: Tensor | None) -> TokenSources:
        """Return those of the tokens at ``places``; ``None`` leaves out none."""
        return self if places is None else replace(self, numbers=self.numbers.index_select(0, places))

    def add(self, tokens: slice, losses: Tensor, labels: Tensor) -> None:
        """Add the losses of some tokens with their labels, both of shape (tokens,)."""
        self.sums.add(losses, labels != IGNORE_INDEX, self.numbers[tokens])


def sources_of_tokens(sums: SourceLosses | None, sources: Tensor | None, labels: Tensor) -> TokenSources | None:
    """Return where the losses of tokens are added up; ``None`` if nothing is.

    Args:
        sums: of the run, if it trains on a mixture.
        sources: of each row, int64 of shape (rows,), if the rows have any.
        labels: of shape (rows, tokens).
    """
    if sums is None or sources is None:
        return None
    numbers = sources.to(labels.device, non_blocking=True).unsqueeze(1).expand_as(labels)
    return TokenSources(numbers=numbers.reshape(-1), sums=sums)
