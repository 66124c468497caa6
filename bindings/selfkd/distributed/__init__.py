"""Losses of logits whose classes are sharded over a process group (vocabulary parallelism).

Each rank runs the ordinary operator on its shard, as if that were all classes, and the ranks exchange
what it saves for backward: a few float64 numbers for each row, in one all-gather. By the chain rule,

    KL(p||q) = KL(P||Q) + sum over shards r of P_r KL(p_r||q_r)

with P_r = exp(lse_r - lse) the mass of shard r and p_r the distribution within it. KL(P||Q) is the same
operator once more, on the shards' log-sum-exps. No term is negative and rows that agree give exactly
0, as without shards. The mixture of js_divergence gives no such rule: its ranks exchange log-sum-exps, and
then sums of the slopes that the backward operator finds within whole rows. Backward communicates nothing:
the ordinary backward operator, given the log-sum-exps of whole rows, leaves the gradient of the shard.
"""

from .distill import vocab_parallel_distill
from .js_divergence import vocab_parallel_js_divergence
from .sd_dropout_kl import vocab_parallel_sd_dropout_kl

__all__ = [
    "vocab_parallel_distill",
    "vocab_parallel_js_divergence",
    "vocab_parallel_sd_dropout_kl",
]
