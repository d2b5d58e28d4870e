"""SparseGPT and OATS on one matrix at a time; magnitude and Wanda are in rpca.py.

All see what CAP sees: the weight W [m, n], and G [n, n], the Gram matrix of the dense model's own inputs (in
the papers each block sees the outputs of the pruned blocks before it).
"""
import torch

from rpca import keep_largest


def sparsegpt(W, G, ratio, damping=0.01, block=128):
    """SparseGPT (Frantar & Alistarh 2023, arXiv 2301.00774, algorithm 1): prune column by column, each time
    pushing the error on to the columns not yet reached."""
    W, G = W.clone(), G.clone()
    dead = G.diagonal() == 0
    G[dead, dead] = 1
    W[:, dead] = 0
    G.diagonal().add_(damping * G.diagonal().mean())
    H = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(G)), upper=True)
    for start in range(0, W.shape[1], block):
        stop = min(start + block, W.shape[1])
        error = torch.zeros_like(W[:, start:stop])
        saliency = W[:, start:stop].square() / H.diagonal()[start:stop].square()
        drop = saliency <= saliency.flatten().kthvalue(max(round(ratio * saliency.numel()), 1)).values
        for j in range(start, stop):
            kept = W[:, j].masked_fill(drop[:, j - start], 0)
            error[:, j - start] = (W[:, j] - kept) / H[j, j]
            W[:, j] = kept
            W[:, j + 1:stop] -= torch.outer(error[:, j - start], H[j, j + 1:stop])
        W[:, stop:] -= error @ H[start:stop, stop:]
    return W


def oats(W, G, ratio, rank_share=0.25, rounds=80):
    """OATS (Zhang & Papyan 2025, arXiv 2409.13652): truncated SVD and row-wise hard threshold of W D in turn.

    D [n]: root mean square of the inputs. rank_share: of the parameters kept, for the low-rank part. The SVD
    is one step of subspace iteration from the round before.
    """
    (m, n), D = W.shape, G.diagonal().sqrt()
    A, rank = W * D, int(rank_share * (1 - ratio) * m * n / (m + n))
    S, V = torch.zeros_like(A), torch.linalg.svd(A, full_matrices=False)[2][:rank].T
    for _ in range(rounds):
        U = torch.linalg.qr((A - S) @ V)[0]
        V, small = torch.linalg.qr((A - S).T @ U)
        L = U @ small.T @ V.T
        S = keep_largest(A - L, (A - L).abs(), ratio + rank_share * (1 - ratio))
    return (L + S) / D.clamp_min(1e-12)
