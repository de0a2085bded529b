"""Who is compared: one small file a library."""

from collections.abc import Mapping

from benchmarks.contenders.base import Contender
from benchmarks.contenders.ours import Ours
from benchmarks.contenders.peer_jax_privacy import JaxPrivacy, JaxPrivacyBest
from benchmarks.contenders.peer_opacus import ExpandedWeights, Functorch, Ghost, Hooks
from benchmarks.contenders.plain_jax import PlainJax
from benchmarks.contenders.plain_torch import CompiledTorch, PlainTorch

CONTENDERS: Mapping[str, type[Contender]] = {
    "torch": PlainTorch,
    "compile": CompiledTorch,
    "jax": PlainJax,
    "ours": Ours,
    "hooks": Hooks,
    "functorch": Functorch,
    "ew": ExpandedWeights,
    "ghost": Ghost,
    "jax-privacy": JaxPrivacy,
    "jax-privacy-best": JaxPrivacyBest,
}
