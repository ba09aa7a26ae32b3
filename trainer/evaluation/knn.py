"""Weighted k-nearest-neighbour accuracy: how well labels follow from the neighbours in feature space."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

CHUNK = 1024  # queries compared with the whole bank at a time


def knn_accuracy(
    bank: Tensor, bank_label: Tensor, query: Tensor, query_label: Tensor, *, k: int = 20, temperature: float = 0.07
) -> float:
    """Top-1 accuracy of neighbours that vote with weight exp(cosine / temperature) (Wu et al. 2018, sec. 3.4).

    Args:
        bank, bank_label: features [M, D] and classes int64 [M] that vote.
        query, query_label: features [N, D] and classes int64 [N] to be guessed.
        k: neighbours that vote, at most M.
        temperature: of the weights.

    Returns: accuracy in per cent.
    """
    bank, query = normalize(bank.float(), dim=1), normalize(query.float(), dim=1)
    classes = int(bank_label.max()) + 1
    right = 0
    for rows, truth in zip(query.split(CHUNK), query_label.split(CHUNK), strict=True):
        cosine, neighbour = (rows @ bank.T).topk(min(k, len(bank)), dim=1)
        weight = ((cosine - 1) / temperature).exp()  # a constant factor on all votes keeps exp in range
        votes = torch.zeros(len(rows), classes).scatter_add_(1, bank_label[neighbour], weight)
        right += int((votes.argmax(dim=1) == truth).sum())
    return 100 * right / len(query)
