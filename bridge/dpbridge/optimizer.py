"""`DPOptimizer`: a torch optimizer whose gradients are clipped and noised in JAX."""

import copy
import secrets
from collections.abc import Callable, Mapping
from typing import Any

import torch
from scipy import special
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from dpbridge.batches import take_apart
from dpbridge.ledger import Ledger
from dpbridge.private_gradient import Mechanism, PrivateGradient
from dpbridge.trainable import check_model, check_optimizer, check_seed, device_of, names_of
from dpkernels import _validate

_KEY = "dpbridge"
_VERSION = 1


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
        microbatch_size: How many examples JAX works on at once: memory against speed, with no
            effect on the result.
        self_check: Whether to compare the first batch of each compiled program with torch's own
            gradients. Turn it off only to save the seconds it takes.
        seed: Of noise and dropout, a non-negative integer below 2**64. By default 64 bits of the
            operating system. Whoever knows it can take the noise away: keep it, and the
            `state_dict` that holds it, as secret as the data. Two optimizers with one seed draw
            the same noise: give one for tests alone.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If one is out of range, the optimizer holds a parameter that is not the
            model's, or parameters lie on several devices.
        NotImplementedError: If the model has batch normalisation, or the optimizer needs a
            closure.

    Guarantees:
        A step adds N(0, (noise_multiplier · l2_clip_norm)²) to each coordinate of the sum of
        gradients clipped to `l2_clip_norm`, and divides by `expected_batch_size`.
        Noise is drawn once a step, however many `backward` calls came before it.
        A step on an empty draw releases noise alone, and counts.
        No example's gradient depends on another example.
        The ledger records a step before its gradient is released.
        The noise stream continues after `load_state_dict` and never goes back; a copy or a pickle
        has a stream of its own: no noise is used twice.

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
        optimizer: Optimizer,
        model: nn.Module,
        *,
        loss_fn: Callable[..., Any] | None = None,
        l2_clip_norm: float,
        noise_multiplier: float,
        expected_batch_size: float,
        sampling_prob: float | None = None,
        microbatch_size: int | None = None,
        self_check: bool = True,
        seed: int | None = None,
    ) -> None:
        check_optimizer(optimizer)
        check_model(model)
        if loss_fn is not None and not callable(loss_fn):
            raise TypeError(
                f"`loss_fn` must be callable, got {loss_fn!r}. Pass a loss module or a function."
            )
        mechanism = Mechanism(
            l2_clip_norm=_validate.positive(
                "l2_clip_norm", l2_clip_norm, "Pass the bound on one example's gradient norm."
            ),
            noise_multiplier=_validate.non_negative(
                "noise_multiplier", noise_multiplier, "Calibrate it with dpbridge.accounting."
            ),
            expected_batch_size=_validate.positive(
                "expected_batch_size", expected_batch_size, "Pass sampling_prob * len(dataset)."
            ),
        )
        if sampling_prob is not None:
            hint = "Pass expected_batch_size / len(dataset)."
            sampling_prob = _validate.probability("sampling_prob", sampling_prob, hint)
        if microbatch_size is not None:
            hint = "Pass how many examples fit in memory at once, or None."
            microbatch_size = _validate.integer("microbatch_size", microbatch_size, hint, minimum=1)
        seed = secrets.randbits(64) if seed is None else check_seed(seed)

        self.base_optimizer = optimizer
        self._sampling_prob = sampling_prob
        self.ledger = Ledger()
        self._names = names_of(model)
        self._gradient = PrivateGradient(
            model, loss_fn, mechanism, seed, microbatch_size, bool(self_check)
        )
        for group in optimizer.param_groups:
            self._check_membership(group["params"])
        self._released: dict[str, int] = {}
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
    def sampling_prob(self) -> float | None:
        """Probability with which each example is in a batch, if known."""
        return self._sampling_prob

    @property
    def noise_multiplier(self) -> float:
        """Standard deviation of the noise over `l2_clip_norm`."""
        return self._gradient.mechanism.noise_multiplier

    @property
    def l2_clip_norm(self) -> float:
        """Bound on the L2 norm of each example's gradient."""
        return self._gradient.mechanism.l2_clip_norm

    @property
    def expected_batch_size(self) -> float:
        """What the noised sum is divided by."""
        return self._gradient.mechanism.expected_batch_size

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
            NotImplementedError: If the model uses an op that cannot be lowered, or autocast or
                inference mode is on.
            RuntimeError: If torch's gradients differ from the compiled program's. After an error
                all parts of the logical batch are forgotten.
        """
        if (
            torch.is_inference_mode_enabled()
            or torch.is_autocast_enabled("cpu")
            or (torch.is_autocast_enabled("cuda"))
        ):
            raise NotImplementedError(
                "`backward` must run outside torch.autocast and torch.inference_mode, which JAX "
                "does not follow. Give the model parameters of the type to compute in."
            )
        if self._gradient.loss_fn is not None and not args:
            raise TypeError(
                "`backward` must be given the target last, got no positional argument. "
                "Call backward(*inputs, target)."
            )
        trainable = self._trainable(self._grouped())
        device = device_of(self._gradient.model)
        return self._gradient.add(take_apart(args, kwargs, device), trainable)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Noises the sum, steps the wrapped optimizer with it, and records the event.

        Args:
            closure: Called once, before anything else; should call `zero_grad` and `backward`.

        Returns:
            What the closure returns, or None.

        Raises:
            RuntimeError: If there was no `backward` since the last step, or something else put a
                gradient into `p.grad`.
        """
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        if not self._gradient.is_pending:
            raise RuntimeError(
                "`step` must follow a call of `backward`, got none since the last step or "
                "zero_grad. Call backward(x, y) on each batch, on an empty draw too."
            )
        grouped = self._grouped()
        trainable = self._trainable(grouped)
        self._gradient.check_names(trainable)
        self._check_grads(grouped)
        self.ledger.record(
            noise_multiplier=self.noise_multiplier,
            sampling_prob=self.sampling_prob if self._is_plausible_draw() else None,
        )
        released = self._gradient.release(trainable)
        for name, parameter in grouped.items():
            # One that was frozen since the last step keeps no gradient, whosever it is.
            parameter.grad = released.get(name)
        self._released = {name: grad.data_ptr() for name, grad in released.items()}
        self.base_optimizer.step()
        return result

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears `p.grad`, and what `backward` has added up since the last step."""
        self._gradient.discard()
        super().zero_grad(set_to_none)

    def epsilon(self, delta: float, *, accountant: str = "pld") -> float:
        """Returns the epsilon spent so far, by add-or-remove-one.

        Args:
            delta: In (0, 1); well below 1 / len(dataset).
            accountant: `"pld"` or `"rdp"`.

        Raises:
            ValueError: If `delta` or `accountant` is out of range, `sampling_prob` is unknown, or a
                step held more examples than a Poisson draw of that probability can.
        """
        if self.sampling_prob is not None and self.ledger.unknown_steps:
            raise ValueError(
                "`epsilon` must follow from how batches were drawn, got "
                f"{self.ledger.unknown_steps} steps with more examples than Poisson subsampling "
                f"with sampling_prob={self.sampling_prob} and expected_batch_size="
                f"{self.expected_batch_size} draws. Make one step of one draw of a PoissonLoader "
                "with the same sampling_prob."
            )
        return self.ledger.epsilon(delta, accountant=accountant)

    def state_dict(self) -> dict[str, Any]:
        """Returns the wrapped optimizer's state with the ledger and the noise stream.

        All of plain types and tensors. It holds the seed of the noise: keep it as secret as the
        data.

        Raises:
            RuntimeError: Between `backward` and `step`.
        """
        self._refuse_mid_step("state_dict")
        own = {
            "version": _VERSION,
            "ledger": self.ledger.state_dict(),
            "noise": {"seed": self._gradient.seed, "steps": self._gradient.steps},
        }
        return {**self.base_optimizer.state_dict(), _KEY: own}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned.

        What was released stays released: going back to an earlier state of this same run restores
        the wrapped optimizer, and keeps the longer ledger and the later place in the noise stream.

        Raises:
            ValueError: If a part is missing or malformed, or this optimizer has made steps of
                another run. Nothing is changed then.
            RuntimeError: Between `backward` and `step`.
        """
        self._refuse_mid_step("load_state_dict")
        ledger, seed, steps = _read_state(state_dict.get(_KEY))
        gradient = self._gradient
        if self.ledger.steps and seed != gradient.seed:
            raise ValueError(
                f"`state_dict` must be of this run, got one of another run with {self.ledger.steps}"
                " steps made here, which would be forgotten. Load it into a new DPOptimizer."
            )
        rest = {name: value for name, value in state_dict.items() if name != _KEY}
        self.base_optimizer.load_state_dict(rest)
        if ledger.steps >= self.ledger.steps:
            self.ledger = ledger
        gradient.steps = steps if seed != gradient.seed else max(steps, gradient.steps)
        gradient.seed = seed

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
        gradient = self._gradient
        return {
            "base_optimizer": self.base_optimizer,
            "sampling_prob": self.sampling_prob,
            "ledger": self.ledger,
            "model": gradient.model,
            "loss_fn": gradient.loss_fn,
            "mechanism": gradient.mechanism,
            "microbatch_size": gradient.microbatch_size,
            "self_check": gradient.self_check,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        model, mechanism = state["model"], state["mechanism"]
        DPOptimizer.__init__(
            self,
            state["base_optimizer"],
            model,
            loss_fn=state["loss_fn"],
            sampling_prob=state["sampling_prob"],
            microbatch_size=state["microbatch_size"],
            self_check=state["self_check"],
            **vars(mechanism),
        )
        self.ledger = copy.deepcopy(state["ledger"])

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

    def _is_plausible_draw(self) -> bool:
        """Whether a Poisson draw can have as many examples as this step: once in 1e12, if not."""
        if self.sampling_prob is None:
            return True
        drawn = self._gradient.drawn
        population = max(1, round(self.expected_batch_size / self.sampling_prob))
        if drawn == 0:
            return True
        if drawn > population:
            return False
        tail = special.betainc(drawn, population - drawn + 1, self.sampling_prob)
        return bool(tail > 1e-12)

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
            if grad is not None and grad.data_ptr() != self._released.get(name):
                raise RuntimeError(
                    f"`{name}.grad` must be left to DPOptimizer, got one from elsewhere. It would "
                    "bypass clipping and noise. Call zero_grad(), and leave out loss.backward()."
                )

    def _refuse_mid_step(self, what: str) -> None:
        if self._gradient.is_pending:
            raise RuntimeError(
                f"`{what}` must not fall between `backward` and `step`, got a sum that is not "
                "noised yet. Call step() first."
            )


def _read_state(own: Any) -> tuple[Ledger, int, int]:
    """Checks all of a checkpoint's private part before any of it is used."""
    parts = {"version", "ledger", "noise"}
    if not isinstance(own, dict) or set(own) != parts or not isinstance(own["noise"], dict):
        raise ValueError(
            f"`state_dict` must hold `{_KEY}` with {', '.join(sorted(parts))}, got {own!r:.80}. "
            "Load what DPOptimizer.state_dict returned: without its ledger no epsilon holds."
        )
    if own["version"] != _VERSION:
        raise ValueError(
            f"`state_dict` must be of version {_VERSION}, got {own['version']!r}. "
            "Load it with the release that wrote it."
        )
    ledger = Ledger()
    ledger.load_state_dict(own["ledger"])
    hint = "The checkpoint is damaged."
    steps = _validate.integer("noise.steps", own["noise"].get("steps"), hint, minimum=0)
    if steps >= 2**32:
        raise ValueError(f"`noise.steps` must be below 2**32, got {steps}. {hint}")
    return ledger, check_seed(own["noise"].get("seed")), steps
