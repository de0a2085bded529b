"""What stands in the place of a trainer's loader: the draws of a plan, epoch by epoch."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch.utils.data import DataLoader

from dpbridge.plan_loader import PlanLoader


class PlanBatches:
    """Stands where Lightning had a train loader, and yields the draws of a plan.

    Its length is known from the start, what is drawn only when all steps are counted.

    Args:
        loader: The loader in whose place it stands.
        accumulation_steps: How many of its batches make one step.
    """

    def __init__(self, loader: DataLoader[Any], accumulation_steps: int) -> None:
        self.loader, self.accumulation_steps = loader, accumulation_steps
        # As many steps as Lightning makes of the loader's batches; the last of an epoch is whole.
        self._length = math.ceil(len(loader) / accumulation_steps) * accumulation_steps
        self._epoch = self._length  # and so many of them are taken
        self._plan_loader: PlanLoader | None = None
        self._may_go_on: Callable[[], bool] = lambda: True

    @property
    def dataset(self) -> Any:
        """The dataset."""
        return self.loader.dataset

    @property
    def batch_size(self) -> int:
        """Mean number of examples in a batch."""
        return self.loader.batch_size or 1

    @property
    def draw_size(self) -> int:
        """Mean number of examples in a step."""
        return self.batch_size * self.accumulation_steps

    @property
    def plan_loader(self) -> PlanLoader:
        """What draws.

        Raises:
            RuntimeError: Before training.
        """
        if self._plan_loader is None:
            raise RuntimeError(
                "The batches of a private fit are drawn once training starts, got asked for one "
                "before. Look at the dataset instead, or make a DataLoader for it."
            )
        return self._plan_loader

    def check_same(self, loader: DataLoader[Any]) -> None:
        """Raises unless the loader is one of the same examples.

        Raises:
            NotImplementedError: If it has another dataset or batch size.
        """
        here, there = (self.loader, loader)
        if here.dataset is not there.dataset or here.batch_size != there.batch_size:
            raise NotImplementedError(
                "`train_dataloader` must return a loader of the same dataset each time, got "
                "another one or another `batch_size`. Make the dataset in `setup`, or leave out "
                "`reload_dataloaders_every_n_epochs`."
            )

    def limit(self, batches: int) -> None:
        """Says how many batches Lightning takes of each epoch.

        Raises:
            ValueError: If the last step of an epoch would not be whole.
        """
        if batches % self.accumulation_steps:
            raise ValueError(
                "`limit_train_batches` must leave a multiple of `accumulate_grad_batches`, "
                f"{self.accumulation_steps}, got {batches} batches: each step is one whole draw. "
                "Choose another limit."
            )
        self._epoch = batches

    def start(self, plan_loader: PlanLoader, may_go_on: Callable[[], bool]) -> None:
        """Has batches come from a loader, for as long as `may_go_on` says so."""
        self._plan_loader, self._may_go_on = plan_loader, may_go_on

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Any]:
        """Yields what is left of the epoch; runs nothing before the first batch is asked for."""
        loader, parts = self.plan_loader, self.accumulation_steps
        left = self._epoch - loader.draws_begun * parts % self._epoch
        batches = _without_end(loader)
        for number in range(left):
            if number % parts == 0 and not self._may_go_on():
                return
            yield next(batches)

    # With these Lightning knows that a loader goes on where it was. The place itself is saved by
    # the callback, which is asked in time.

    def state_dict(self) -> dict[str, Any]:
        """Returns nothing: see PrivacyCallback.state_dict."""
        return {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Does nothing: see PrivacyCallback.load_state_dict."""


def _without_end(loader: PlanLoader) -> Iterator[Any]:
    """Goes on with a loader pass after pass: an epoch may be shorter than its pass."""
    while True:
        yield from loader
