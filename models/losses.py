"""Losses as pure functions. Letters of shapes: B images, C classes of a head, D embedding, K queue.

Everything is computed in at least float32, whatever autocast hands over.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from models.collectives import all_reduce_sum
from models.precision import at_least_float32


def kl_divergence(student_BC: Tensor, teacher_BC: Tensor, temperature: float) -> Tensor:
    """KL(teacher || student) at one temperature for each image: [B]. No T² factor (BURN, KLDivMSE head)."""
    log_p = F.log_softmax(at_least_float32(teacher_BC) / temperature, dim=1)
    log_q = F.log_softmax(at_least_float32(student_BC) / temperature, dim=1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=1)


def feature_similarity(student_BC: Tensor, teacher_BC: Tensor) -> Tensor:
    """‖s/‖s‖ - t/‖t‖‖² = 2 - 2 cos(s, t) for each image: [B] (BURN, L_FS)."""
    s = F.normalize(at_least_float32(student_BC), dim=1, eps=1e-12)
    t = F.normalize(at_least_float32(teacher_BC), dim=1, eps=1e-12)
    return (s - t).square().sum(dim=1)


def info_nce(query_BD: Tensor, key_BD: Tensor, queue_DK: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """InfoNCE of unit vectors against their keys and a queue (MoCo, eq. 1).

    Returns:
        The mean loss and the share of queries that are nearest to their own key, both 0-d.
    """
    query, key, queue = at_least_float32(query_BD), at_least_float32(key_BD), at_least_float32(queue_DK)
    with torch.autocast(query.device.type, enabled=False):  # it would take the product in 16 bits
        positive = (query * key).sum(dim=1, keepdim=True)  # [B, 1]
        logits = torch.cat((positive, query @ queue), dim=1) / temperature  # [B, 1 + K]
    target = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    hits = (logits.detach()[:, 1:] < logits.detach()[:, :1]).all(dim=1).float().mean()
    return F.cross_entropy(logits, target), hits


def cross_entropy_with(target_BC: Tensor, logits_BC: Tensor, temperature: float) -> Tensor:
    """-Σ_c target_c · log softmax(logits / T)_c for each image: [B]; rows of the target sum to 1."""
    return -(at_least_float32(target_BC) * F.log_softmax(at_least_float32(logits_BC) / temperature, dim=1)).sum(dim=1)


def soft_cross_entropy(student_BC: Tensor, teacher_BC: Tensor, temperature: float) -> Tensor:
    """H(softmax(t / T), softmax(s / T)) for each image: [B]. KL divergence plus the teacher's entropy, so with a
    frozen teacher its gradient (S2-BNN, eq. 4; ReActNet's distributional loss at T = 1)."""
    return cross_entropy_with(F.softmax(at_least_float32(teacher_BC) / temperature, dim=1), student_BC, temperature)


@torch.no_grad()
def sinkhorn(scores_GBK: Tensor, rows_GB: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Assign images to K prototypes so that each prototype gets an equal share (SwAV, eq. 3 and appendix A.1).

    Over all ranks: each holds its own images, and every rank's part is that of one process on all of them.

    Args:
        scores_GBK: [G, B, K], cosines of G independent assignments.
        rows_GB: [G, B], 1 for an image that takes part and 0 for one that does not, whose result means nothing.
        epsilon: the smaller, the nearer to a hard assignment.

    Returns:
        [G, B, K] in at least float32, rows sum to 1.
    """
    # Cosines are at most 1, so exp of (s - 1)/ε cannot overflow; a common factor changes nothing.
    plan = torch.exp((at_least_float32(scores_GBK) - 1) / epsilon) * rows_GB[..., None]
    for _ in range(iterations):
        plan = plan / all_reduce_sum(plan.sum(dim=1, keepdim=True))  # each prototype: 1
        plan = plan / (plan.sum(dim=2, keepdim=True) + (1 - rows_GB[..., None]))  # each image: 1
    return plan


@torch.no_grad()
def collapse_meters(logits_BC: Tensor, temperature: float) -> dict[str, Tensor]:
    """How far a head is from collapse, for the log.

    Returns:
        `entropy`: mean entropy of the images' distributions, in nats; `entropy_of_mean`: entropy of the mean
        distribution; `information`: the latter minus the former, which is the mutual information of image and answer
        (0 when all images get one answer, flat or not); `std`: mean over the C outputs of their standard deviation
        over the batch (0 when constant).
    """
    logits = at_least_float32(logits_BC)
    log_p = F.log_softmax(logits / temperature, dim=1)
    mean = log_p.exp().mean(dim=0)
    entropy = -(log_p.exp() * log_p).sum(dim=1).mean()
    entropy_of_mean = -torch.special.xlogy(mean, mean).sum()
    return {
        "entropy": entropy,
        "entropy_of_mean": entropy_of_mean,
        "information": (entropy_of_mean - entropy).clamp(min=0),
        "std": logits.std(dim=0, correction=0).mean(),
    }
