"""What the options say about a training run, and the config of its plan."""

from dataclasses import dataclass

from dp_accounting import NeighboringRelation

from dpkernels import _validate
from dpkernels.execution_plan import BandMFConfig, DPSGDConfig

Config = DPSGDConfig | BandMFConfig

RELATIONS = {
    "add-or-remove-one": NeighboringRelation.ADD_OR_REMOVE_ONE,
    "zero-out": NeighboringRelation.REPLACE_SPECIAL,
    "replace-one": NeighboringRelation.REPLACE_ONE,
}
SAMPLINGS = ("poisson", "fixed")


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run as the options describe it, under the names of the configs; None is left out.

    Attributes:
        iterations: How many steps.
        noise_multiplier: Standard deviation of the noise over the sensitivity.
        sampling: One of `SAMPLINGS`.
        sampling_prob: Probability with which an example is in a batch.
        batch_size: Size of batches, or their expected size under Poisson sampling.
        num_examples: Size of the dataset.
        truncated_batch_size: Largest batch of Poisson sampling.
        num_bands: Bands of the strategy of a correlated noise.
        expected_participations: How often an example takes part, with `num_bands`.
        neighboring_relation: One of `RELATIONS`.
    """

    iterations: int | None = None
    noise_multiplier: float | None = None
    sampling: str = "poisson"
    sampling_prob: float | None = None
    batch_size: int | None = None
    num_examples: int | None = None
    truncated_batch_size: int | None = None
    num_bands: int | None = None
    expected_participations: float | None = None
    neighboring_relation: str | None = None

    @property
    def has_batches(self) -> bool:
        """Whether anything says how large batches are."""
        given = (self.sampling_prob, self.batch_size, self.expected_participations)
        return any(value is not None for value in given)

    def config(self) -> Config:
        """Returns the config of the run's plan.

        Raises:
            ValueError: If something is missing, contradicts something else, or is out of range.
        """
        hint = "Pass the number of optimizer steps."
        iterations = _validate.integer("iterations", self.iterations, hint, minimum=1)
        if self.num_bands is not None:
            return self._banded(iterations, self.num_bands)
        self._refuse("expected_participations", "`num_bands`", "Pass `sampling_prob`.")
        if self.sampling == "fixed":
            self._refuse("sampling_prob", "Poisson sampling", "Pass `batch_size`.")
            self._require("batch_size", "num_examples")
            return self._dpsgd(iterations, None, self.num_examples)
        public = self.truncated_batch_size is not None or self.sampling_prob is not None
        return self._dpsgd(
            iterations, self._share_of_dataset(), self.num_examples if public else None
        )

    def _dpsgd(
        self, iterations: int, sampling_prob: float | None, num_examples: int | None
    ) -> DPSGDConfig:
        return DPSGDConfig(
            iterations=iterations,
            noise_multiplier=self.noise_multiplier,
            sampling_prob=sampling_prob,
            batch_size=self.batch_size if sampling_prob is None else None,
            truncated_batch_size=self.truncated_batch_size,
            num_examples=num_examples,
            neighboring_relation=self._relation(),
        )

    def _banded(self, iterations: int, num_bands: int) -> BandMFConfig:
        hint = "Pass `expected_participations`, or `batch_size` and `num_examples`."
        # Of the whole dataset, or of the group whose turn it is? The two differ by `num_bands`.
        self._refuse("sampling_prob", "runs without `num_bands`, where it is not ambiguous", hint)
        if self.sampling != "poisson":
            raise ValueError(
                f"`sampling` must be poisson with `num_bands`, got {self.sampling}. Leave it out."
            )
        relation = self._banded_relation()
        is_public = relation is NeighboringRelation.REPLACE_SPECIAL
        return BandMFConfig.default(
            num_bands=num_bands,
            iterations=iterations,
            expected_participations=self._participations(iterations, num_bands, is_public),
            noise_multiplier=self.noise_multiplier,
            truncated_batch_size=self.truncated_batch_size,
            num_examples=self.num_examples if is_public else None,
        )

    def _banded_relation(self) -> NeighboringRelation:
        """Returns what is asked for if it goes with the sampling, which says it otherwise."""
        if self.truncated_batch_size is not None:
            allowed = [NeighboringRelation.REPLACE_SPECIAL]
        else:
            allowed = [NeighboringRelation.ADD_OR_REMOVE_ONE]
            allowed += [NeighboringRelation.REPLACE_SPECIAL] * (self.num_examples is not None)
        relation = self._relation() or allowed[0]
        if relation not in allowed:
            listed = " or ".join(map(relation_name, allowed))
            raise ValueError(
                f"`neighboring_relation` must be {listed} here, got {relation_name(relation)}. "
                "With `num_bands`, zero-out needs `num_examples`, `truncated_batch_size` needs "
                "zero-out, and there is no accounting of replace-one."
            )
        return relation

    def _participations(self, iterations: int, num_bands: int, is_public: bool) -> float:
        if self.expected_participations is not None:
            self._refuse("batch_size", "runs without `expected_participations`", "Leave one out.")
            if not is_public:
                self._refuse("num_examples", "`batch_size` or zero-out", "Leave it out.")
            return self.expected_participations
        if not is_public:
            return self._share_of_dataset() * iterations
        # Groups are of equal size, and the examples that are left over take no part.
        self._share_of_dataset()
        group = (self.num_examples or 0) // max(num_bands, 1)
        if group < (self.batch_size or 0):
            raise ValueError(
                f"`batch_size` must be at most `num_examples` // `num_bands`, {group}, got "
                f"{self.batch_size}. Draw smaller batches."
            )
        return (self.batch_size or 0) / group * iterations / num_bands

    def _share_of_dataset(self) -> float:
        """Returns the probability with which an example is in a batch."""
        if self.sampling_prob is not None:
            self._refuse("batch_size", "runs without `sampling_prob`", "Leave one of them out.")
            return self.sampling_prob
        self._require("batch_size", "num_examples")
        hint = "Pass the numbers of examples."
        size = _validate.integer("batch_size", self.batch_size, hint, minimum=1)
        total = _validate.integer("num_examples", self.num_examples, hint, minimum=1)
        if size > total:
            raise ValueError(
                f"`batch_size` must be at most `num_examples`, {total}, got {size}. "
                "Draw smaller batches."
            )
        return size / total

    def _relation(self) -> NeighboringRelation | None:
        return None if self.neighboring_relation is None else RELATIONS[self.neighboring_relation]

    def _refuse(self, name: str, goes_with: str, hint: str) -> None:
        value = getattr(self, name)
        if value is not None:
            raise ValueError(f"`{name}` must go with {goes_with}, got {value}. {hint}")

    def _require(self, *names: str) -> None:
        missing = [f"`{name}`" for name in names if getattr(self, name) is None]
        if missing:
            raise ValueError(
                f"{' and '.join(missing)} must be given to know how batches are drawn, got none. "
                "Pass `batch_size` and `num_examples`, or for Poisson sampling `sampling_prob`."
            )


def relation_name(relation: NeighboringRelation) -> str:
    """Returns the option's word for a relation."""
    return next(name for name, known in RELATIONS.items() if known is relation)
