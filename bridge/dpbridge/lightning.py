"""Private training in Lightning: a callback, and the module and its data as they are.

Lightning makes optimizers and loaders by itself, so the callback puts itself where both have just
been made: `on_fit_start` comes after the optimizers and before a checkpoint goes into them, and
the strategy's `process_dataloader` is where Lightning lets a train loader be exchanged, whichever
way the loader came in. What it yields is drawn when the first batch is asked for.

Example:
    >>> import torch
    >>> class Regression(pl.LightningModule):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.layer = torch.nn.Linear(2, 1)
    ...     def training_step(self, batch, batch_idx):
    ...         return torch.nn.functional.mse_loss(self.layer(batch[0]), batch[1])
    ...     def configure_optimizers(self):
    ...         return torch.optim.SGD(self.parameters(), lr=0.1)
    >>> dataset = torch.utils.data.TensorDataset(torch.randn(100, 2), torch.randn(100, 1))
    >>> privacy = PrivacyCallback(epsilon=2.0, delta=1e-3, l2_clip_norm=1.0)
    >>> trainer = pl.Trainer(
    ...     max_epochs=2, callbacks=[privacy], logger=False, enable_checkpointing=False,
    ...     enable_progress_bar=False, enable_model_summary=False, accelerator="cpu")
    >>> trainer.fit(Regression(), torch.utils.data.DataLoader(dataset, batch_size=10))
    >>> trainer.global_step, 1.98 < privacy.epsilon() <= 2.0
    (20, True)
"""

import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from dpbridge.budget import PrivacyBudget, PrivacyBudgetExceeded, needed_delta
from dpbridge.conversion import check_loader, private_loader_of
from dpbridge.foreign_gradients import Regularizer
from dpbridge.journal import checked_path
from dpbridge.optimizer import DPOptimizer
from dpbridge.plan_batches import PlanBatches
from dpbridge.plan_ledger import PlanLedger
from dpbridge.plan_loader import PlanLoader
from dpbridge.private import make_public
from dpbridge.private_forward import attached_to
from dpbridge.private_loop import REDUCTIONS
from dpbridge.trainable import check_seed
from dpkernels import _validate
from dpkernels.execution_plan import DPExecutionPlan, DPSGDConfig, PerformanceFlags

try:
    import lightning.pytorch as pl
    from lightning.pytorch import callbacks, strategies
    from lightning.pytorch.utilities import rank_zero_info
except ModuleNotFoundError:
    try:
        import pytorch_lightning as pl
        from pytorch_lightning import callbacks, strategies
        from pytorch_lightning.utilities import rank_zero_info
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "dpbridge.lightning needs Lightning, which is not installed. "
            "Run pip install dpbridge[lightning]."
        ) from error

_PRECISIONS = ("32-true", "64-true", "bf16-true", "16-true", "bf16-mixed")
_VERSION = 1


class PrivacyCallback(pl.Callback):
    """Makes a `Trainer.fit` private: `Trainer(callbacks=[PrivacyCallback(...)])`.

    LightningModule, datamodule and loaders stay as they are. From the first epoch on the train
    loader draws Poisson batches of its dataset, each example with probability batch_size /
    len(dataset), and as many batches an epoch as before. One Lightning batch is one step (with
    `accumulate_grad_batches=k`, k of them are one draw and one step). In training the module's
    forward runs in JAX as `dpbridge.make_private` says, and `optimizer.step` noises; validation,
    test and prediction run in torch. After `fit` the module is public again.

    Epsilon is logged as `epsilon`, in the progress bar too, every `log_every_n_steps` of the
    trainer and at the end of each epoch. Ledger, noise and the place in the draws are in
    Lightning's checkpoints, which are therefore as secret as the data: `fit(ckpt_path=...)` with
    a new callback of the same numbers goes on as if there had been no interruption.

    A module is trained as a whole: `self(x)`, or `self.net(x)` if `net` holds all parameters. One
    that calls several of its parts in `training_step` gets an error at the first backward: put
    them into `forward`. Manual optimization works with `self.manual_backward(loss)`, and with
    `self.optimizers().backward(*inputs, target)`, which runs `loss_fn` for each example by itself.

    **A loss in which one example's value depends on others breaks the guarantee**, as
    `make_private` says. What the module logs of the training data, such as its loss, is not
    private, and neither is what is chosen by it.

    Args:
        epsilon: The most that may be spent, at `delta`. Without `noise_multiplier` and `plan` the
            noise is calibrated so that all steps of the fit spend it; with one of them training
            stops before the step that would pass it.
        delta: In (0, 1); well below 1 / len(dataset). Without it nothing is logged.
        noise_multiplier: Standard deviation of the noise over `l2_clip_norm`.
        l2_clip_norm: Bound on the L2 norm of each example's gradient.
        plan: A plan, whose draws the loader then makes, with at least as many iterations as the
            fit has steps.
        loss_reduction: "mean" or "sum": what the loss does over the examples of a batch.
        regularizer: Returns a scalar of the module's weights that the loss has as a term. Its
            gradient is added after the noise.
        loss_fn: For `optimizer.backward`, as in `DPOptimizer`.
        microbatch_size: How many examples JAX works on at once in backward.
        self_check: As in `DPOptimizer`.
        journal: As in `DPOptimizer`.
        seed: Of noise and dropout, as in `DPOptimizer`; for tests alone.

    Raises:
        TypeError: If an argument has the wrong type, or arguments are missing or contradict each
            other.
        ValueError: If an argument is out of range.

    Guarantees:
        What `make_private` guarantees, for the steps of one `fit`: they spend at most `epsilon`.
        Noise is calibrated for `max_epochs * len(train_dataloader)` steps, or `max_steps` if
        that is less.
        A `fit` that is resumed makes the draws and the noise that it would have made.
        Settings that would change what is released or how it is accounted raise before training.
    """

    def __init__(
        self,
        *,
        epsilon: float | None = None,
        delta: float | None = None,
        noise_multiplier: float | None = None,
        l2_clip_norm: float | None = None,
        plan: DPExecutionPlan | None = None,
        loss_reduction: str = "mean",
        regularizer: Regularizer | None = None,
        loss_fn: Callable[..., Any] | None = None,
        microbatch_size: int | None = None,
        self_check: bool = True,
        journal: str | os.PathLike[str] | None = None,
        seed: int | None = None,
    ) -> None:
        _validate.one_of("loss_reduction", loss_reduction, REDUCTIONS)
        if regularizer is not None and not callable(regularizer):
            raise TypeError(
                f"`regularizer` must be callable, got {regularizer!r:.80}. Pass a function of the "
                "module that returns a scalar."
            )
        if microbatch_size is not None:
            hint = "Pass how many examples fit in memory at once, or None."
            _validate.integer("microbatch_size", microbatch_size, hint, minimum=1)
        if delta is not None:
            hint = "Choose it well below one over the number of examples."
            delta = _validate.open_unit("delta", delta, hint)
        self._budget = None if epsilon is None else PrivacyBudget(epsilon, needed_delta(delta))
        self._delta = delta
        self._numbers: dict[str, Any] = {
            "noise_multiplier": noise_multiplier,
            "l2_clip_norm": l2_clip_norm,
            "microbatch_size": microbatch_size,
        }
        self._plan = plan
        self._check_numbers()
        self._seed = None if seed is None else check_seed(seed)
        self._loss_reduction, self._regularizer = loss_reduction, regularizer
        self._options: dict[str, Any] = {
            "loss_fn": loss_fn,
            "self_check": self_check,
            "journal": None if journal is None else checked_path(journal),
            "seed": self._seed,
        }
        self._batches: PlanBatches | None = None
        self._optimizer: DPOptimizer | None = None
        self._saved: Mapping[str, Any] | None = None
        self._steps = math.inf  # that the fit will make
        self._spent: float | None = None  # when it was last asked for

    def _check_numbers(self) -> None:
        if self._plan is not None:
            given = [name for name, value in self._numbers.items() if value is not None]
            if given:
                raise TypeError(
                    f"`{given[0]}` must be left out with `plan`, which says it, got "
                    f"{self._numbers[given[0]]!r}. Pass one form of what is to be spent."
                )
            if not isinstance(self._plan, DPExecutionPlan):
                raise TypeError(
                    f"`plan` must be a DPExecutionPlan, got {type(self._plan).__name__}. Pass what "
                    "the `make` of a config returns."
                )
            return
        if self._numbers["noise_multiplier"] is None and self._budget is None:
            raise TypeError(
                "`epsilon` or `noise_multiplier` must be given, got neither. Pass what may be "
                "spent."
            )
        if self._numbers["l2_clip_norm"] is None:
            raise TypeError("`l2_clip_norm` must be given without a plan, got None. Pass it.")
        # Its checks are those of the numbers; how many steps and how large they are is known later.
        DPSGDConfig(iterations=1, sampling_prob=1.0, **self._config_numbers())

    def _config_numbers(self) -> dict[str, Any]:
        return {name: self._numbers[name] for name in ("noise_multiplier", "l2_clip_norm")}

    @property
    def optimizer(self) -> DPOptimizer:
        """The private optimizer of the fit.

        Raises:
            RuntimeError: Before `Trainer.fit`.
        """
        if self._optimizer is None:
            raise RuntimeError(
                "The private optimizer is made by `Trainer.fit`, got asked for before. Call fit "
                "first."
            )
        return self._optimizer

    def epsilon(self, delta: float | None = None) -> float:
        """Returns the epsilon spent so far.

        Args:
            delta: By default that of the callback.

        Raises:
            TypeError: If neither has a delta.
            RuntimeError: Before `Trainer.fit`.
        """
        optimizer, delta = self.optimizer, self._delta if delta is None else delta
        if delta is None:
            raise TypeError(
                "`delta` must be given to the callback or to `epsilon`, got None. Pass one well "
                "below 1 / len(dataset)."
            )
        return optimizer.epsilon(delta)

    # Where Lightning calls: set-up.

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuses what would break the guarantee, and takes the train loader's place."""
        if stage != "fit":
            return
        if self._optimizer is not None and self._optimizer.ledger.steps:
            raise RuntimeError(
                "A PrivacyCallback must serve one `fit`, got a second one after "
                f"{self._optimizer.ledger.steps} steps, whose epsilon would be forgotten. Make a "
                "new Trainer and PrivacyCallback; to go on with this run pass `ckpt_path`."
            )
        _check_trainer(trainer, pl_module, self._regularizer)
        self._batches, self._optimizer, self._saved = None, None, None
        self._spent = None

        def process(loader: Any) -> Any:
            return self._in_place_of(loader, trainer) if trainer.training else original(loader)

        original = trainer.strategy.process_dataloader
        trainer.strategy.process_dataloader = process

    def _in_place_of(self, loader: Any, trainer: pl.Trainer) -> PlanBatches:
        """Returns what yields the draws; again the same one when a loader is made again."""
        check_loader(loader)
        if self._batches is None or self._optimizer is None:
            self._batches = PlanBatches(loader, trainer.accumulate_grad_batches)
        self._batches.check_same(loader)
        return self._batches

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Makes the optimizer private: module and optimizer are on their device by now."""
        if trainer.limit_train_batches == 0:
            return
        if len(trainer.optimizers) != 1:
            raise NotImplementedError(
                f"`configure_optimizers` must return one optimizer, got {len(trainer.optimizers)}: "
                "each would be a release of its own. Put all parameters into groups of one."
            )
        self._steps = trainer.estimated_stepping_batches
        if trainer.train_dataloader is None:  # Without a limit of epochs it was not needed yet.
            trainer.fit_loop.setup_data()
        batches = trainer.train_dataloader
        if not isinstance(batches, PlanBatches):
            raise NotImplementedError(
                f"`train_dataloader` must be one DataLoader, got {type(batches).__name__}. Put the "
                "datasets into one: each example is to be drawn from one."
            )
        self._batches = batches
        batches.limit(trainer.num_training_batches)
        plan = self._plan_for(batches)
        loader = private_loader_of(
            batches.loader, plan, accumulation_steps=batches.accumulation_steps
        )
        self._optimizer = self._private(trainer.optimizers[0], pl_module, plan, loader)
        if self._saved is not None:
            loader.load_state_dict(self._saved)
        batches.start(loader, self._may_go_on)
        trainer.optimizers = [self._optimizer]

    def _plan_for(self, batches: PlanBatches) -> DPExecutionPlan:
        if self._plan is not None:
            if self._plan.iterations < self._steps < math.inf:
                raise ValueError(
                    f"`plan.iterations` must be at least the {self._steps} steps of the fit, got "
                    f"{self._plan.iterations}. Make a plan of more iterations, or set `max_steps`."
                )
            return self._plan
        if not 0 < self._steps < math.inf:
            raise ValueError(
                "`Trainer` must say how many steps there will be, which noise and epsilon depend "
                f"on, got {self._steps}. Set `max_epochs` or `max_steps`."
            )
        size, total = batches.draw_size, len(batches.dataset)
        if size > total:
            raise ValueError(
                f"`batch_size * accumulate_grad_batches` must be at most the dataset's {total} "
                f"examples, got {size}. Make it smaller: it is the mean size of a draw."
            )
        numbers = DPSGDConfig(
            iterations=int(self._steps),
            sampling_prob=size / total,
            # A sum over a draw is what Lightning divides by the number of its parts.
            normalize_by=float(
                size if self._loss_reduction == "mean" else batches.accumulation_steps
            ),
            **self._config_numbers(),
        )
        if numbers.noise_multiplier is None and self._budget is not None:
            numbers = numbers.calibrate(epsilon=self._budget.epsilon, delta=self._budget.delta)
        microbatch_size = self._numbers["microbatch_size"]
        return numbers.make(
            PerformanceFlags(noise_seed=self._seed, microbatch_size=microbatch_size)
        )

    def _private(
        self,
        optimizer: torch.optim.Optimizer,
        pl_module: pl.LightningModule,
        plan: DPExecutionPlan,
        loader: PlanLoader,
    ) -> DPOptimizer:
        budget = self._budget
        private = DPOptimizer(
            optimizer,
            _trained_part(pl_module),
            plan=plan,
            loader=loader,
            epsilon=None if budget is None else budget.epsilon,
            delta=None if budget is None else budget.delta,
            **self._options,
        )
        private.take_over_forward(
            loss_reduction=self._loss_reduction, regularizer=self._regularizer
        )
        return private

    # Where Lightning calls: training.

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Checks that a checkpoint was whole, and stops if nothing may be spent any more."""
        del pl_module
        loader, steps = self._loader, self._ledger.position
        if loader.draws_begun != steps:
            raise RuntimeError(
                f"The checkpoint must hold the loader's place beside the ledger of {steps} steps, "
                f"got place {loader.draws_begun}. Save it with PrivacyCallback among the "
                "trainer's callbacks."
            )
        self._stop_if_spent(trainer)

    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: torch.Tensor
    ) -> None:
        """Takes back the division by `accumulate_grad_batches`, which the plan makes itself.

        Otherwise each example's gradient would be clipped at a multiple of `l2_clip_norm`.
        """
        del trainer, pl_module
        parts = 1 if self._batches is None else self._batches.accumulation_steps
        if parts > 1 and loss.requires_grad:
            loss.register_hook(lambda cotangent: cotangent * parts)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Logs what is spent, and stops the training at the budget."""
        del outputs, batch, batch_idx
        self._stop_if_spent(trainer)
        if self._delta is None or trainer.barebones:
            return
        # It takes some hundredths of a second: only when it goes to a logger.
        every = trainer.log_every_n_steps
        if self._spent is None or (every and trainer.global_step % every == 0):
            self._spent = self.epsilon()
        pl_module.log("epsilon", self._spent, prog_bar=True, on_step=True, on_epoch=False)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Logs what is spent."""
        if self._delta is not None and not trainer.barebones:
            self._spent = self.epsilon()
            pl_module.log("epsilon", self._spent, prog_bar=True, on_step=False, on_epoch=True)

    def _may_go_on(self) -> bool:
        """Whether there may be another step."""
        ledger, iterations = self._ledger, self._loader.plan.iterations
        if ledger.position >= iterations:
            return False
        if self._budget is None or ledger.position < ledger.steps:
            return True
        try:
            self._budget.check(ledger, most=iterations)
        except PrivacyBudgetExceeded:
            return False
        return True

    def _stop_if_spent(self, trainer: pl.Trainer) -> None:
        steps = self._ledger.position
        if steps < self._steps and not trainer.should_stop and not self._may_go_on():
            rank_zero_info(
                f"`Trainer.fit` stopped: what may be spent is spent after {steps} private steps."
            )
            trainer.should_stop = True

    # Where Lightning calls: checkpoints and the end.

    def state_dict(self) -> dict[str, Any]:
        """Returns the place in the draws after the last step. It is as secret as the data."""
        if self._optimizer is None:
            return {}
        state = self._loader.state_dict()
        steps = self._ledger.position
        if self._loader.draws_begun > steps:
            # In a step that was not finished, as after an interrupt: it is to be made again.
            state["position"] = steps * self._loader.accumulation_steps
            state["digest"] = self._loader.digest_before
        return {"version": _VERSION, "loader": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps a saved place until `fit` has made the loader.

        Raises:
            ValueError: If it is not what `state_dict` returned.
        """
        if set(state_dict) != {"version", "loader"} or state_dict["version"] != _VERSION:
            raise ValueError(
                "`state_dict` must be that of a PrivacyCallback of this release, got "
                f"{state_dict!r:.80}. Load an unchanged checkpoint."
            )
        self._saved = state_dict["loader"]

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Makes the module public again."""
        if stage == "fit":
            self._detach(trainer, pl_module)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Likewise; and drops what is not noised, so that a checkpoint can be saved."""
        del exception
        if self._optimizer is not None:
            self._optimizer.zero_grad()
        self._detach(trainer, pl_module)

    def _detach(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        vars(trainer.strategy).pop("process_dataloader", None)
        part = _trained_part(pl_module)
        if self._optimizer is not None and attached_to(part) is not None:
            make_public(part)

    @property
    def _ledger(self) -> PlanLedger:
        ledger = self.optimizer.ledger
        assert isinstance(ledger, PlanLedger)
        return ledger

    @property
    def _loader(self) -> PlanLoader:
        assert self._batches is not None
        return self._batches.plan_loader


def _trained_part(pl_module: pl.LightningModule) -> nn.Module:
    """Returns what is to run in JAX: the module, or the child that it calls instead of itself.

    Of a module without a forward nothing is read there but that child, and so nothing is compiled
    again when a metric or a list in the module changes from step to step.
    """
    if type(pl_module).forward is not pl.LightningModule.forward:
        return pl_module
    everything = set(pl_module.parameters())
    holders = [child for child in pl_module.children() if set(child.parameters())]
    if len(holders) == 1 and set(holders[0].parameters()) == everything:
        return holders[0]
    return pl_module


def _check_trainer(
    trainer: pl.Trainer, pl_module: pl.LightningModule, regularizer: Regularizer | None
) -> None:
    """Raises for settings under which a step would not be what is accounted."""
    if not isinstance(trainer, pl.Trainer):
        raise TypeError(
            f"`trainer` must be a {pl.__name__}.Trainer, got one of {type(trainer).__module__}. "
            f"Import Lightning as {pl.__name__}."
        )
    _check_devices(trainer)
    if trainer.precision not in _PRECISIONS:
        raise NotImplementedError(
            f"`precision` must be one of {', '.join(_PRECISIONS)}, got {trainer.precision!r}. In "
            '"16-mixed" a scaler of the loss would divide the noised gradient: pass '
            'precision="bf16-mixed".'
        )
    if trainer.gradient_clip_val:
        raise ValueError(
            f"`gradient_clip_val` must be left out, got {trainer.gradient_clip_val}. Each "
            "example's gradient is clipped already: set `l2_clip_norm` of PrivacyCallback."
        )
    own = type(pl_module).configure_gradient_clipping
    if own is not pl.LightningModule.configure_gradient_clipping:
        raise ValueError(
            f"`configure_gradient_clipping` must be left as it is, got one of "
            f"{type(pl_module).__name__}. Each example's gradient is clipped already: set "
            "`l2_clip_norm` of PrivacyCallback."
        )
    if trainer.overfit_batches:
        raise ValueError(
            f"`overfit_batches` must be 0, got {trainer.overfit_batches}: it repeats batches, "
            "which are drawn anew here. Use `limit_train_batches`."
        )
    if trainer.accumulate_grad_batches > 1 and regularizer is not None:
        raise NotImplementedError(
            "`accumulate_grad_batches` must be 1 with `regularizer`, whose gradient would be added "
            f"in each part, got {trainer.accumulate_grad_batches}. Set `microbatch_size` to save "
            "memory."
        )
    _check_callbacks(trainer)


def _check_devices(trainer: pl.Trainer) -> None:
    strategy = trainer.strategy
    if trainer.world_size > 1 or not isinstance(strategy, strategies.SingleDeviceStrategy):
        raise NotImplementedError(
            f"`Trainer` must run on one device, got {trainer.world_size} with "
            f"{type(strategy).__name__}; several are not supported yet. Pass devices=1 and leave "
            "`strategy` out."
        )


def _check_callbacks(trainer: pl.Trainer) -> None:
    others = {
        callbacks.GradientAccumulationScheduler: "Set `accumulate_grad_batches` of the Trainer.",
        callbacks.LearningRateFinder: "Search without data that is to be protected.",
        callbacks.BatchSizeFinder: "Set `microbatch_size`: a batch of any size fits then.",
    }
    for callback in trainer.callbacks:
        for kind, remedy in others.items():
            if isinstance(callback, kind):
                raise NotImplementedError(
                    f"`callbacks` must not hold a {kind.__name__}, which makes steps that are "
                    f"not those of the plan. {remedy}"
                )
