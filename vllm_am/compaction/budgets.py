"""How the pages of a compacted span are divided among its heads (paper, non-uniform budgets).

Budgets are whole pages and add up to what there is, to the page: the memory a sequence holds is the
sum of its heads' budgets, known before any score is, and no slot is wasted on padding.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Norm of the attention weights over the queries by which global budgets compare keys of all heads:
#: the one that ranks the keys of a head as well. A maximum hangs on a single query, and in a mean
#: a key that few queries need drowns. ``benchmarks/results/quality.md`` compares it with uniform
#: budgets: with queries of ``repeat-prefill`` it answers no less at any ratio and more at 50x; with
#: queries as they were captured (``context-prefill``) uniform budgets answer more at 50x.
GLOBAL_SCORE = "rms"

#: Share of the pages that global budgets spread evenly, whatever the scores say: attention peaks
#: show what single facts need; what many keys carry together needs some slots in every head.
EVEN_SHARE = 0.1


def pages_by_shares(shares: Tensor, total: int, most: int, least: int = 0) -> Tensor:
    """Pages in proportion to ``shares``, no head above ``most``: what is cut off goes to the rest.

    The cap is water-filling (reference code, ``max_ratio_per_head``): heads that would exceed it
    are set to it, and the others share what is left in proportion, until nobody exceeds it.
    Fractions of a page go to the largest remainders, of equal ones to the first.

    Args:
        shares: [H] finite numbers >= 0, not all zero.
        total: pages to hand out.
        most: most pages that a head can use.
        least: pages that every head gets before the rest is shared out.

    Returns:
        int64 [H] on the CPU, in [least, most], with sum ``total``.

    Raises:
        ValueError: a share is not as said, or ``total`` is more than all heads can use or too
            little to give each of them ``least``.
    """
    weights = shares.detach().double().cpu()
    heads = len(weights)
    if not bool((weights.isfinite() & (weights >= 0)).all()) or not bool((weights > 0).any()):
        raise ValueError("shares: expected finite numbers >= 0, not all of them zero")
    if not 0 <= total <= heads * most:
        raise ValueError(f"total: {total} pages for {heads} heads of at most {most} each")
    if not 0 <= least <= most or total < heads * least:
        raise ValueError(
            f"least: {least} pages for each of {heads} heads, of {total}, at most {most} each"
        )
    if least > 0:
        return least + pages_by_shares(weights, total - heads * least, most - least)
    exact = torch.zeros_like(weights)
    open_heads = torch.ones(heads, dtype=torch.bool)
    for _ in range(heads):
        left = total - float(exact[~open_heads].sum())
        weight = torch.where(open_heads, weights, 0.0)
        if not bool((weight > 0).any()):  # those without a share take what nobody else can
            weight = open_heads.double()
        level = weight / weight.sum() * max(left, 0.0)  # in this order: sums may be tiny
        over = open_heads & (level > most)
        exact = torch.where(open_heads, level, exact)
        if not bool(over.any()):
            break
        exact = torch.where(over, float(most), exact)
        open_heads &= ~over
    pages = exact.floor().long()
    # Rounding noise must not decide: 2.9999999 is three pages.
    pages = torch.where(exact - pages > 1 - 1e-9, pages + 1, pages)
    remainder = torch.where(pages < most, exact - pages, -1.0)
    missing = total - int(pages.sum())
    pages[remainder.argsort(descending=True, stable=True)[:missing]] += 1
    return pages


def global_pages(
    scores: Tensor, total: int, page_size: int, weights: Tensor | None = None
) -> Tensor:
    """Pages in proportion to how many of the best keys of all heads together a head holds.

    Attention weights of different heads are comparable: each query spends one unit in every head.
    It follows the sequence. A share of :data:`EVEN_SHARE` is spread evenly.

    Args:
        scores: [H, T], a norm over the queries of the attention weight on each key.
        total: pages to hand out.
        page_size: slots per page.
        weights: [H], by which the scores of each head count; None: all alike (see
            :mod:`vllm_am.compaction.copying_heads`).

    Returns, Raises: as :func:`pages_by_shares`.
    """
    heads, keys = scores.shape
    best = min(scores.numel(), total * page_size)
    if weights is not None:
        scores = scores * weights.to(scores).unsqueeze(1)
    index = scores.flatten().topk(best).indices
    counts = torch.bincount(index // max(keys, 1), minlength=heads).double().cpu()
    shares = (1 - EVEN_SHARE) * counts / max(best, 1) + EVEN_SHARE / heads
    return pages_by_shares(shares, total, -(-keys // page_size))
