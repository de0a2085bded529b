"""`DPConfig`: what a private training run is to spend and to do, in one object."""

import dataclasses
from dataclasses import dataclass

from dpkernels import _validate
from dpkernels.execution_plan import DPExecutionPlan, DPSGDConfig, PerformanceFlags


@dataclass(frozen=True, kw_only=True)
class DPConfig:
    """The numbers of a private training run: the torch counterpart of JAX Privacy's DPKerasConfig.

    Attributes:
        epsilon: The most that the run may spend at `delta`, positive and finite.
        delta: In (0, 1); well below 1 / `train_size`.
        clipping_norm: Bound on the L2 norm of each example's gradient.
        batch_size: Mean number of examples in a physical batch: the batch size of the loader.
        gradient_accumulation_steps: How many physical batches make one step.
        train_steps: How many times the optimizer may step. Not how many physical batches there
            are: with accumulation those are `gradient_accumulation_steps` times as many.
        train_size: How many examples there are.
        poisson_sampling_in_fit: Whether the loader draws Poisson samples. If not, it draws
            `effective_batch_size` examples without replacement, which is accounted as that: for
            neighbours that replace an example, so with more noise. Shuffled passes have no
            accounting here.
        noise_multiplier: Standard deviation of the noise over the sensitivity. None calibrates
            it to `epsilon`.
        rescale_to_unit_norm: Divides clipped gradients by `clipping_norm`, so that it does not
            change the step size.
        microbatch_size: How many examples are held in memory at once. Changes no result.
        seed: Of noise and sampling; by default the operating system's. Whoever knows it can take
            the noise away: give one for tests alone.

    Raises:
        TypeError: If a field has the wrong type.
        ValueError: If one is out of range, sizes contradict each other, or `noise_multiplier`
            spends more than `epsilon`.

    Guarantees:
        All of the plan's steps together spend at most `epsilon` at `delta`.
        A step of several physical batches is one draw, cut into parts, and is accounted as one.

    Example:
        >>> config = DPConfig(
        ...     epsilon=3.0, delta=1e-5, clipping_norm=1.0, batch_size=64,
        ...     gradient_accumulation_steps=4, train_steps=100, train_size=10_000)
        >>> config.effective_batch_size
        256
        >>> config.make().epsilon(1e-5) <= 3.0
        True
    """

    epsilon: float
    delta: float
    clipping_norm: float
    batch_size: int
    gradient_accumulation_steps: int
    train_steps: int
    train_size: int
    poisson_sampling_in_fit: bool = True
    noise_multiplier: float | None = None
    rescale_to_unit_norm: bool = True
    microbatch_size: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        _validate.positive("epsilon", self.epsilon, "0.1 to 10 is usual.")
        hint = "Choose it well below one over the number of examples."
        _validate.open_unit("delta", self.delta, hint)
        hint = "Pass the bound on one example's gradient norm."
        _validate.positive("clipping_norm", self.clipping_norm, hint)
        for name in ("batch_size", "gradient_accumulation_steps", "train_steps", "train_size"):
            _validate.integer(name, getattr(self, name), "Pass a count.", minimum=1)
        for name in ("poisson_sampling_in_fit", "rescale_to_unit_norm"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(
                    f"`{name}` must be True or False, got {getattr(self, name)!r}. Pass one."
                )
        self._check_sizes()
        if self.noise_multiplier is not None:
            self._check_noise()

    def _check_sizes(self) -> None:
        if self.effective_batch_size > self.train_size:
            raise ValueError(
                f"`batch_size * gradient_accumulation_steps` must be at most `train_size`, "
                f"{self.train_size}, got {self.effective_batch_size}. Use smaller batches."
            )
        if self.microbatch_size is not None:
            hint = "Pass how many examples fit in memory at once, or None."
            _validate.integer("microbatch_size", self.microbatch_size, hint, minimum=1)
            if self.microbatch_size > self.batch_size:
                raise ValueError(
                    f"`microbatch_size` must be at most `batch_size`, {self.batch_size}, got "
                    f"{self.microbatch_size}. {hint}"
                )
        if self.seed is not None:
            hint = "Leave it out to draw the seed from the operating system."
            _validate.integer("seed", self.seed, hint, minimum=0)

    def _check_noise(self) -> None:
        spent = self._plan_config().epsilon(self.delta)
        if spent > self.epsilon:
            raise ValueError(
                f"`noise_multiplier` must keep within epsilon={self.epsilon:g}, got "
                f"{self.noise_multiplier!r}, which spends {spent:.6g}. Leave it out to have it "
                "calibrated."
            )

    @property
    def effective_batch_size(self) -> int:
        """Mean number of examples in a step."""
        return self.batch_size * self.gradient_accumulation_steps

    def update_with_calibrated_noise_multiplier(self) -> "DPConfig":
        """Returns this config with the noise that `epsilon` needs, or as it is if it has some."""
        if self.noise_multiplier is not None:
            return self
        plan_config = self._plan_config().calibrate(epsilon=self.epsilon, delta=self.delta)
        return dataclasses.replace(self, noise_multiplier=plan_config.noise_multiplier)

    def get_noise_multiplier(self) -> float:
        """Returns the noise multiplier, calibrated if need be."""
        return float(self.update_with_calibrated_noise_multiplier().noise_multiplier or 0.0)

    def make(self) -> DPExecutionPlan:
        """Returns the plan, calibrated if need be."""
        calibrated = self.update_with_calibrated_noise_multiplier()
        flags = PerformanceFlags(noise_seed=self.seed, microbatch_size=self.microbatch_size)
        return calibrated._plan_config().make(flags)

    def _plan_config(self) -> DPSGDConfig:
        size = self.effective_batch_size
        is_poisson = self.poisson_sampling_in_fit
        return DPSGDConfig(
            iterations=self.train_steps,
            noise_multiplier=self.noise_multiplier,
            l2_clip_norm=self.clipping_norm,
            rescale_to_unit_norm=self.rescale_to_unit_norm,
            normalize_by=float(size),
            sampling_prob=size / self.train_size if is_poisson else None,
            batch_size=None if is_poisson else size,
            num_examples=None if is_poisson else self.train_size,
        )
