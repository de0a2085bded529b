"""`DPOptimizer`: a torch optimizer whose gradients are clipped and noised in JAX."""

import functools
import os
import secrets
import threading
from collections.abc import Callable, Mapping
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from dpbridge.batches import take_apart
from dpbridge.budget import PrivacyBudget, needed_delta
from dpbridge.endless_run import EndlessRun, make_mechanism
from dpbridge.foreign_gradients import Regularizer
from dpbridge.journal import Journal, checked_path
from dpbridge.journal_lines import name_of
from dpbridge.ledger import Ledger
from dpbridge.optimizer_state import KEY, VERSION, check_shapes, checked_state, shapes_of
from dpbridge.plan_ledger import PlanLedger
from dpbridge.plan_loader import PlanLoader
from dpbridge.planned_run import PlannedRun, check_layers
from dpbridge.private_gradient import PrivateGradient
from dpbridge.private_loop import REDUCTIONS, PrivateLoop
from dpbridge.scaling import ScaledOptimizer
from dpbridge.threads import one_thread_for_few
from dpbridge.trainable import (
    check_model,
    check_optimizer,
    check_processes,
    check_seed,
    device_of,
    is_module_class,
    names_of,
)
from dpkernels import _validate
from dpkernels.execution_plan import DPExecutionPlan
from dpkernels.tapped.explain import Explanation

_P = ParamSpec("_P")
_T = TypeVar("_T")


def _one_at_a_time(
    method: Callable[Concatenate["DPOptimizer", _P], _T],
) -> Callable[Concatenate["DPOptimizer", _P], _T]:
    """Makes other threads wait: two steps at once would take one place in the noise stream."""

    @functools.wraps(method)
    def locked(self: "DPOptimizer", /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        with self._lock:
            return method(self, *args, **kwargs)

    return locked


class DPOptimizer(Optimizer):
    """Wraps a torch optimizer so that it trains on private gradients.

    `backward(x, y)` takes the place of `loss.backward()`: it ships parameters and batch to JAX,
    clips the gradient of every example and adds them up there. `step()` noises the sum, puts the
    result into `p.grad`, steps the wrapped optimizer and records the event in the ledger.

    Everything a `torch.optim.Optimizer` has is here: parameter groups, state, defaults and
    learning-rate schedulers are those of the wrapped optimizer.

    Args:
        optimizer: Any torch optimizer over parameters of `model`, but for those that call a
            closure more than once a step (LBFGS). Parameters that it does not hold are frozen.
            Or what `scale_then_privatize` makes of one.
        model: The module.
        loss_fn: Called as `loss_fn(model(*inputs), target)` for one example at a time, with a
            leading axis of 1; returns a scalar. None if the model returns the loss, or something
            with a `loss` attribute.
        l2_clip_norm: Bound on the L2 norm of each example's gradient.
        noise_multiplier: Standard deviation of the noise over `l2_clip_norm`. 0 is not private.
        expected_batch_size: What the noised sum is divided by: the mean size of a draw, a public
            number. Never the size drawn.
        sampling_prob: Probability with which each example is in a batch, independently. Without
            it, training works and `epsilon` refuses.
        plan: A plan of `dpkernels.execution_plan`, in place of the four numbers above: it says
            how gradients are clipped and noised, and how many steps there are.
        loader: The `PlanLoader` of the plan. Each step must be one of its draws. Without it,
            training works and `epsilon` refuses.
        epsilon: The most that may be spent, at `delta`: the step that would pass it raises.
        delta: For `epsilon`, in (0, 1).
        microbatch_size: How many examples JAX works on at once: memory against speed, with no
            effect on the result.
        self_check: Whether to compare the first batch of each compiled program with torch's own
            gradients. Turn it off only to save the seconds it takes.
        journal: A file that gets a line for each step before its gradient is released, and is made
            if there is none. With it, a run that goes on from a checkpoint after a crash counts
            the steps that were lost in between. Without a plan they are spent: new steps have new
            noise, and must have new draws, so make a new loader rather than load the state of the
            old one. With a plan they are made again, with the same noise, and refused if anything
            else would come out. It costs a write to the disk each step, and with a plan a hash of
            the gradient. Keep it beside the checkpoints, and as secret.
        seed: Of noise and dropout, a non-negative integer below 2**64. By default 64 bits of the
            operating system. Whoever knows it can take the noise away: keep it, and the
            `state_dict` that holds it, as secret as the data. Two optimizers with one seed draw
            the same noise: give one for tests alone.

    Raises:
        TypeError: If an argument has the wrong type, is missing or contradicts `plan`.
        ValueError: If one is out of range, the optimizer holds a parameter that is not the
            model's, parameters lie on several devices, or `journal` cannot be opened or is
            damaged.
        NotImplementedError: If the model has batch normalisation, the optimizer needs a closure,
            or torch.distributed runs several processes.

    Guarantees:
        A step adds N(0, (noise_multiplier · l2_clip_norm)²) to each coordinate of the sum of
        gradients clipped to `l2_clip_norm`, and divides by `expected_batch_size`.
        Noise is drawn once a step, however many `backward` calls came before it.
        A step on an empty draw releases noise alone, and counts.
        No example's gradient depends on another example.
        The ledger records a step before its gradient is released.
        The noise stream continues after `load_state_dict` and never goes back; a copy or a pickle
        has a stream of its own: no noise is used twice.
        With a plan, its clipping and noise are applied, there are at most its steps, and a step
        on anything but the next whole draw of `loader` raises before noise is drawn.
        With `journal`, from `load_state_dict` of any checkpoint of the run on, or from the first
        step without one, the ledger holds at least the steps that were released before a crash; no
        noise is on two gradients; and a step whose line cannot be written is not released.
        With `epsilon`, the step that would pass it raises PrivacyBudgetExceeded before noise is
        drawn, and leaves model and ledger as they were.

    Source:
        Abadi et al. 2016, algorithm 1; Poisson subsampling, add-or-remove-one neighbours.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> optimizer = DPOptimizer(
        ...     torch.optim.SGD(model.parameters(), lr=0.1), model, loss_fn=nn.MSELoss(),
        ...     l2_clip_norm=1.0, noise_multiplier=1.1,
        ...     expected_batch_size=4, sampling_prob=0.01,
        ... )
        >>> loss = optimizer.backward(torch.ones(4, 2), torch.zeros(4, 1))
        >>> optimizer.step()
        >>> optimizer.epsilon(delta=1e-5) < 1
        True
    """

    def __init__(
        self,
        optimizer: Optimizer | ScaledOptimizer,
        model: nn.Module,
        *,
        loss_fn: Callable[..., Any] | None = None,
        l2_clip_norm: float | None = None,
        noise_multiplier: float | None = None,
        expected_batch_size: float | None = None,
        sampling_prob: float | None = None,
        plan: DPExecutionPlan | None = None,
        loader: PlanLoader | None = None,
        epsilon: float | None = None,
        delta: float | None = None,
        microbatch_size: int | None = None,
        self_check: bool = True,
        journal: str | os.PathLike[str] | None = None,
        seed: int | None = None,
    ) -> None:
        scaling = None
        if isinstance(optimizer, ScaledOptimizer):
            scaling, optimizer = optimizer, optimizer.base_optimizer
        check_processes()
        check_optimizer(optimizer)
        check_model(model)
        is_loss = callable(loss_fn) and not is_module_class(loss_fn)
        if loss_fn is not None and not is_loss:
            raise TypeError(
                f"`loss_fn` must be callable, got {loss_fn!r}. Pass a loss module or a function: "
                "nn.CrossEntropyLoss(), with its brackets."
            )
        if journal is not None:
            checked_path(journal)
        seed = secrets.randbits(64) if seed is None else check_seed(seed)
        budget = None if epsilon is None else PrivacyBudget(epsilon, needed_delta(delta))
        self._run: EndlessRun | PlannedRun
        if plan is None:
            hint = "Pass expected_batch_size / len(dataset)."
            if sampling_prob is not None:
                sampling_prob = _validate.probability("sampling_prob", sampling_prob, hint)
            _refuse_given("without a plan", loader=loader)
            mechanism = make_mechanism(
                l2_clip_norm=l2_clip_norm,
                noise_multiplier=noise_multiplier,
                expected_batch_size=expected_batch_size,
                microbatch_size=microbatch_size,
            )
            self._run = EndlessRun(mechanism, sampling_prob, budget)
        else:
            if not isinstance(plan, DPExecutionPlan):
                raise TypeError(
                    f"`plan` must be a DPExecutionPlan, got {type(plan).__name__}. Pass what the "
                    "`make` of a config returns."
                )
            _refuse_given(
                "with a plan",
                l2_clip_norm=l2_clip_norm,
                noise_multiplier=noise_multiplier,
                expected_batch_size=expected_batch_size,
                sampling_prob=sampling_prob,
                microbatch_size=microbatch_size,
            )
            self._run = PlannedRun(plan, loader, budget)

        self._lock = threading.RLock()  # a closure calls backward within step
        self.base_optimizer = optimizer
        self._names = names_of(model)
        self._gradient = PrivateGradient(
            model, loss_fn, self._run.mechanism, seed, scaling, bool(self_check)
        )
        for group in optimizer.param_groups:
            self._check_membership(group["params"])
        self._released: dict[str, tuple[int, int]] = {}
        self._loop: PrivateLoop | None = None
        if plan is not None:
            check_layers(plan, self._trainable(self._grouped()))
        self._journal = None if journal is None else Journal(journal)
        if self._journal is not None and self._journal.is_of(self._name, 0):
            self._catch_up(self._journal)  # With a given seed the run may be known already.
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self._is_ready = True

    # The wrapped optimizer owns groups, state and defaults, so that it does not matter which of
    # the two a scheduler or a checkpoint goes to. What Optimizer.__init__ assigns is dropped.
    _is_ready = False

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Parameter groups of the wrapped optimizer."""
        return self.base_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        if self._is_ready:
            self.base_optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        """State of the wrapped optimizer."""
        return self.base_optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        if self._is_ready:
            self.base_optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """Defaults of the wrapped optimizer."""
        return self.base_optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        if self._is_ready:
            self.base_optimizer.defaults = defaults

    @property
    def ledger(self) -> Ledger | PlanLedger:
        """The record of what was released."""
        return self._run.ledger

    @property
    def plan(self) -> DPExecutionPlan | None:
        """The plan that is followed, if there is one."""
        return self._run.plan if isinstance(self._run, PlannedRun) else None

    @property
    def sampling_prob(self) -> float | None:
        """Probability with which each example is in a batch, if known."""
        return self._number("sampling_prob")

    @property
    def noise_multiplier(self) -> float | None:
        """Standard deviation of the noise over the sensitivity; None if the plan does not say."""
        return self._number("noise_multiplier")

    @property
    def l2_clip_norm(self) -> Any:
        """Bound on the L2 norm of each example's gradient; None if the plan does not say."""
        return self._number("l2_clip_norm")

    @property
    def expected_batch_size(self) -> float | None:
        """The mean size of a draw, by which the noised sum is divided where there is no plan."""
        return self._run.mechanism.expected_batch_size

    def _number(self, name: str) -> Any:
        if isinstance(self._run, PlannedRun):
            return getattr(self._run.plan.config, name, None)
        return getattr(self._run if name == "sampling_prob" else self._run.mechanism, name)

    @_one_at_a_time
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the wrapped optimizer.

        Raises:
            ValueError: If a parameter is not the model's.
            RuntimeError: Between `backward` and `step`.
        """
        if not self._is_ready:
            return  # Called by Optimizer.__init__ for groups that are there already.
        self._refuse_mid_step("add_param_group")
        params = param_group["params"]
        params = [params] if isinstance(params, torch.Tensor) else list(params)
        self._check_membership(params)
        self.base_optimizer.add_param_group({**param_group, "params": params})

    @_one_at_a_time
    def backward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Clips the gradient of every example of a batch and adds them up, in JAX.

        May be called several times before `step`, with parts of one logical batch: of one draw.
        Several draws in one step would be several releases, accounted as one; `epsilon` refuses
        to answer where a step held more examples than a draw can.

        Args:
            *args: Inputs of the model and, last, the target; or inputs alone if `loss_fn` is
                None. Nested tuples, lists and dicts of tensors with one row an example, and
                bools, strings and None.
            **kwargs: Keywords of the model, likewise.

        Returns:
            The mean loss of this batch, a detached scalar; 0 for an empty batch. It is not
            private.

        Raises:
            TypeError: If a leaf is neither a tensor nor a bool, string or None.
            ValueError: If leaves disagree on the first axis or lie on another device than the
                parameters, or the loss is not a scalar.
            IndexError: If a label or token is out of range.
            NotImplementedError: If the model uses an op that cannot be lowered, or inference mode
                is on.
            RuntimeError: If torch's gradients differ from the compiled program's. After an error
                all parts of the logical batch are forgotten.
        """
        if torch.is_inference_mode_enabled():
            raise NotImplementedError(
                "`backward` must run outside torch.inference_mode, under which torch keeps no "
                "gradients. Leave it before."
            )
        if self._gradient.loss_fn is not None and not args:
            raise TypeError(
                "`backward` must be given the target last, got no positional argument. "
                "Call backward(*inputs, target)."
            )
        trainable = self._trainable(self._grouped())
        batch = take_apart(args, kwargs, device_of(self._gradient.model))
        self._run.check_part(self._gradient.parts, batch.size)
        return self._gradient.add(self._gradient.part_of(batch), trainable)

    def explain(self, *args: Any, **kwargs: Any) -> Explanation:
        """Says why a step costs what it costs: how each parameter's gradient is clipped.

        Nothing is trained or recorded.

        Args:
            *args: As in `backward`. Only shapes and types count.
            **kwargs: Likewise.

        Returns:
            What prints as a table: each parameter, the equations that use it, the form chosen,
            floating point operations and bytes.

        Raises:
            NotImplementedError: If the model uses an op that cannot be lowered, or the gradient
                of every example is formed, as `scale_then_privatize` needs.
            TypeError, ValueError: As `backward`.
        """
        batch = take_apart(args, kwargs, device_of(self._gradient.model))
        part = self._gradient.part_of(batch)
        return self._gradient.explain(part, self._trainable(self._grouped()))

    @_one_at_a_time
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Noises the sum, steps the wrapped optimizer with it, and records the event.

        Args:
            closure: Called once, before anything else; should call `zero_grad` and `backward`.

        Returns:
            What the closure returns, or None.

        Raises:
            RuntimeError: If there was no `backward` since the last step, something else put a
                gradient into `p.grad`, the plan's steps are used up, this is not its draw, or
                `journal` is of another run, was changed by another process or holds another
                gradient for this step of the plan.
            OSError: If `journal` cannot be written. Nothing was released; the step counts.
            PrivacyBudgetExceeded: If the step would pass the budget.
        """
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        if not self._is_pending:
            raise RuntimeError(
                "`step` must follow a call of `backward`, got none since the last step or "
                "zero_grad. Call backward(x, y) on each batch, on an empty draw too."
            )
        grouped = self._grouped()
        trainable = self._trainable(grouped)
        if self._loop is not None:
            self._loop.settle(trainable)
        self._gradient.check_names(trainable)
        self._check_grads(grouped)
        penalties = {} if self._loop is None else self._loop.foreign.gradients(trainable)
        released = self._release(trainable)
        for name, grad in penalties.items():
            released[name] += grad
        for name, parameter in grouped.items():
            # One that was frozen since the last step keeps no gradient, whosever it is.
            parameter.grad = released.get(name)
        with one_thread_for_few(grouped.values()):
            self.base_optimizer.step()
        self._released = {n: (grad.data_ptr(), grad._version) for n, grad in released.items()}
        return result

    def _release(self, trainable: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
        """Returns the noised gradient, once ledger and journal have it."""
        if self._journal is not None:
            self._catch_up(self._journal)
        self._run.check_step(self._gradient.drawn)
        try:
            self._run.record(self._gradient.drawn)
            released = self._gradient.release(trainable)
            if self._journal is not None:
                line = self._run.line(self._gradient.steps, released)
                self._journal.write(self._name, line)
        except BaseException:
            self._run.fail()
            raise
        return released

    @_one_at_a_time
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears `p.grad`, and what `backward` has added up since the last step."""
        self._gradient.discard()
        if self._loop is not None:
            self._loop.discard()
        super().zero_grad(set_to_none)

    def take_over_forward(
        self, *, loss_reduction: str = "mean", regularizer: Regularizer | None = None
    ) -> None:
        """Has the model's forward run in JAX, for loops that call it and `loss.backward()`.

        `make_private` does this, and says what it means; `make_public` takes it back.

        Args:
            loss_reduction: "mean" or "sum": what the loss does over the examples.
            regularizer: Returns a scalar of the model's weights, or None.

        Raises:
            ValueError: If there is no plan with a loader, or the model is private already.
        """
        _validate.one_of("loss_reduction", loss_reduction, REDUCTIONS)
        if not isinstance(self._run, PlannedRun) or self._run.loader is None:
            raise ValueError(
                "`take_over_forward` must be called with a plan and its loader, got none: which "
                "rows are one draw, only the loader can say. Pass plan and loader to DPOptimizer."
            )
        self._loop = PrivateLoop(
            self._gradient,
            self._run,
            lambda: self._trainable(self._grouped()),
            loss_reduction=loss_reduction,
            regularizer=regularizer,
        )

    def epsilon(self, delta: float, *, accountant: str | None = None) -> float:
        """Returns the epsilon spent so far.

        By add-or-remove-one, or by the plan's own neighbouring relation.

        Args:
            delta: In (0, 1); well below 1 / len(dataset).
            accountant: `"pld"` or `"rdp"`; by default the tightest that can answer.

        Raises:
            ValueError: If `delta` or `accountant` is out of range, `sampling_prob` is unknown, a
                step held more examples than a Poisson draw of that probability can, or batches
                did not come from the plan's loader.
        """
        return self._run.epsilon(delta, accountant)

    @_one_at_a_time
    def state_dict(self) -> dict[str, Any]:
        """Returns the wrapped optimizer's state with the ledger and the noise stream.

        All of plain types and tensors. It holds the seed of the noise: keep it as secret as the
        data.

        Raises:
            RuntimeError: Between `backward` and `step`.
        """
        self._refuse_mid_step("state_dict")
        grouped = self._grouped()
        trainable = {name: p for name, p in grouped.items() if p.requires_grad}
        own = {
            "version": VERSION,
            "ledger": self.ledger.state_dict(),
            "noise": self._gradient.noise_state(trainable),
            "parameters": shapes_of(grouped),
            "journal": self._journal.last if self._journal and self._journal.run else None,
        }
        return {**self.base_optimizer.state_dict(), KEY: own}

    @_one_at_a_time
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned.

        What was released stays released: going back to an earlier state of this same run restores
        the wrapped optimizer, and keeps the longer ledger and the later place in the noise stream.
        With a journal the ledger then holds the steps that were released after the checkpoint, too.
        Without one it cannot know of them.

        Raises:
            ValueError: If a part is missing or malformed, this optimizer has made steps of another
                run, or `journal` is of another run or has fewer steps than it had when the
                checkpoint was saved. Nothing is changed then.
            RuntimeError: Between `backward` and `step`.
        """
        self._refuse_mid_step("load_state_dict")
        own = checked_state(state_dict)
        gradient, noise = self._gradient, own["noise"]
        is_same_run = noise["seed"] == gradient.seed and noise.get("run") == gradient.mechanism.run
        if self.ledger.steps and not is_same_run:
            raise ValueError(
                f"`state_dict` must be of this run, got one of another run with {self.ledger.steps}"
                " steps made here, which would be forgotten. Load it into a new DPOptimizer."
            )
        grouped = self._grouped()
        check_shapes(own.get("parameters"), shapes_of(grouped))
        if self._journal is not None:
            name = name_of(noise["seed"], noise.get("run"))
            self._journal.check_state(name, noise["steps"], own.get("journal"))
        place, restore_ledger = self._run.read_state(own["ledger"], noise["steps"], self._journal)
        go_to_saved_noise = gradient.read_noise_state(noise, self._trainable(grouped))
        rest = {name: value for name, value in state_dict.items() if name != KEY}
        self.base_optimizer.load_state_dict(rest)
        # The ledger first: an interrupt here must not leave noise that was used uncounted.
        restore_ledger()
        if noise["steps"] >= gradient.steps or not is_same_run:
            go_to_saved_noise()
        gradient.steps = max(gradient.steps, place)

    # The wrapped optimizer makes and reads the state, so its machinery runs the hooks; they see
    # this optimizer, which they were registered on.

    def register_state_dict_pre_hook(self, hook: Any, prepend: bool = False) -> RemovableHandle:
        """See `torch.optim.Optimizer.register_state_dict_pre_hook`."""
        forward = self.base_optimizer.register_state_dict_pre_hook
        return forward(lambda _, *args: hook(self, *args), prepend)

    def register_state_dict_post_hook(self, hook: Any, prepend: bool = False) -> RemovableHandle:
        """See `torch.optim.Optimizer.register_state_dict_post_hook`."""
        forward = self.base_optimizer.register_state_dict_post_hook
        return forward(lambda _, *args: hook(self, *args), prepend)

    def register_load_state_dict_pre_hook(
        self, hook: Any, prepend: bool = False
    ) -> RemovableHandle:
        """See `torch.optim.Optimizer.register_load_state_dict_pre_hook`."""
        forward = self.base_optimizer.register_load_state_dict_pre_hook
        return forward(lambda _, *args: hook(self, *args), prepend)

    def register_load_state_dict_post_hook(
        self, hook: Any, prepend: bool = False
    ) -> RemovableHandle:
        """See `torch.optim.Optimizer.register_load_state_dict_post_hook`."""
        forward = self.base_optimizer.register_load_state_dict_post_hook
        return forward(lambda _, *args: hook(self, *args), prepend)

    # Copies and pickles have a noise stream of their own: with one stream, two optimizers could
    # release the same noise on different data, and the difference would be free of noise.

    def __getstate__(self) -> dict[str, Any]:
        self._refuse_mid_step("copying")
        gradient, run = self._gradient, self._run
        if isinstance(run, PlannedRun):
            raise NotImplementedError(
                "An optimizer with a plan must not be copied or pickled: two runs would draw from "
                "one plan, which accounts for one. Make a new one from the plan; to go on with "
                "this run, load its state_dict there."
            )
        return {
            "optimizer": gradient.scaling or self.base_optimizer,
            "model": gradient.model,
            "loss_fn": gradient.loss_fn,
            "self_check": gradient.self_check,
            "ledger": run.ledger,
            "options": {
                **vars(run.mechanism),
                "sampling_prob": run.sampling_prob,
                "epsilon": run.budget and run.budget.epsilon,
                "delta": run.budget and run.budget.delta,
            },
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        DPOptimizer.__init__(
            self,
            state["optimizer"],
            state["model"],
            loss_fn=state["loss_fn"],
            self_check=state["self_check"],
            **state["options"],
        )
        self.ledger.load_state_dict(state["ledger"].state_dict())

    @property
    def _name(self) -> str:
        """Under which this run stands in a journal."""
        return name_of(self._gradient.seed, self._gradient.mechanism.run)

    def _catch_up(self, journal: Journal) -> None:
        """Counts what the journal says was released and this run does not know of.

        Raises:
            RuntimeError: If it is of another run, or changed by another process.
        """
        gradient = self._gradient
        journal.check(self._name, gradient.steps)
        gradient.steps = self._run.count_lost(journal, gradient.steps)

    def _grouped(self) -> dict[str, nn.Parameter]:
        """Returns the parameters of all groups by name."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        self._check_membership(parameters)  # Groups can be added to the wrapped optimizer too.
        return dict(sorted((self._names[p], p) for p in parameters))

    def _trainable(self, grouped: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        found = {name: p for name, p in grouped.items() if p.requires_grad}
        if not found:
            raise ValueError(
                "The optimizer must hold a parameter that requires a gradient, got none. "
                "Unfreeze one with requires_grad_(True)."
            )
        return found

    def _check_membership(self, params: list[Any]) -> None:
        if any(p not in self._names for p in params):
            self._names = names_of(self._gradient.model)  # It may have got new layers.
        strangers = [p for p in params if isinstance(p, torch.Tensor) and p not in self._names]
        if strangers:
            shapes = ", ".join(str(tuple(p.shape)) for p in strangers)
            raise ValueError(
                "`optimizer` must hold parameters of `model` alone, got others of shape "
                f"{shapes}. Build it from model.parameters()."
            )

    def _check_grads(self, grouped: Mapping[str, nn.Parameter]) -> None:
        for name, parameter in grouped.items():
            grad = parameter.grad
            if grad is None or (grad.data_ptr(), grad._version) == self._released.get(name):
                continue
            if grad.data_ptr() != self._released.get(name, (0, 0))[0]:
                raise RuntimeError(
                    f"`{name}.grad` must be left to DPOptimizer, got one from elsewhere. It would "
                    "bypass clipping and noise. Call zero_grad(), and leave out loss.backward()."
                )
            if grad.count_nonzero():  # zero_grad(set_to_none=False) is no loss.
                raise RuntimeError(
                    f"`{name}.grad` must stay as it is between `backward` and `step`, which puts "
                    "the noised gradient there, got a write to it. Leave out what clips or scales "
                    "gradients; it would be lost."
                )

    @property
    def _is_pending(self) -> bool:
        return self._gradient.is_pending or (self._loop is not None and self._loop.is_waiting)

    def _refuse_mid_step(self, what: str) -> None:
        if self._is_pending:
            raise RuntimeError(
                f"`{what}` must not fall between `backward` and `step`, got a sum that is not "
                "noised yet. Call step() first."
            )


def _refuse_given(where: str, **arguments: Any) -> None:
    given = [name for name, value in arguments.items() if value is not None]
    if given:
        raise TypeError(
            f"`{given[0]}` must be left out {where}, got {arguments[given[0]]!r}. "
            "A plan and its loader say how batches are drawn, clipped and noised."
        )
