"""BiLLM and ARB-RC as published, against programs that follow their definition mask by mask."""

from __future__ import annotations

import numpy as np
import pytest

import corequant as cq

BLOCK = 20


def residual(X, mask, order):
    """Return the sum of planes of the entries in a mask, row by row."""
    found = np.zeros_like(X)
    for i in range(len(X)):
        here = np.flatnonzero(mask[i])
        rest = X[i, here].copy()
        for _ in range(order if len(here) else 0):
            mean = rest.mean()
            scale = np.abs(rest - mean).mean()
            plane = mean + scale * np.where(rest - mean < 0, -1, 1)
            found[i, here] += plane
            rest = rest - plane
    return found


def row_column(X, mask, order, steps):
    """Return ARB-RC of the entries in a mask, with loops over rows and columns."""
    rows, n = X.shape
    r, c = np.zeros((order, rows)), np.zeros((order, n))
    B = np.ones((order, rows, n))
    left = np.where(mask, X, 0.0)
    for k in range(order):
        for i in range(rows):
            r[k, i] = np.abs(left[i, mask[i]]).mean() if mask[i].any() else 0
        for j in range(n):
            here = mask[:, j] & (r[k] > 0)
            c[k, j] = (np.abs(left[here, j]) / r[k, here]).mean() if here.any() else 0
        B[k] = np.where(left < 0, -1, 1)
        left = np.where(mask, left - np.outer(r[k], c[k]) * B[k], 0)
    for _ in range(steps):
        for k in range(order):
            others = X - sum(np.outer(r[m], c[m]) * B[m] for m in range(order) if m != k)
            for i in range(rows):
                t = (c[k] * B[k, i])[mask[i]]
                r[k, i] = t @ others[i, mask[i]] / (t @ t) if t @ t > 0 else 0
            for j in range(n):
                t = (r[k] * B[k, :, j])[mask[:, j]]
                c[k, j] = t @ others[mask[:, j], j] / (t @ t) if t @ t > 0 else 0
        choices = [np.array(s) for s in np.ndindex(*(2,) * order)]
        sums = [sum((2 * s[k] - 1) * np.outer(r[k], c[k]) for k in range(order)) for s in choices]
        best = np.abs(X - np.stack(sums)).argmin(0)
        B = np.stack([2.0 * np.array(choices)[best][..., k] - 1 for k in range(order)])
    total = sum(np.outer(r[k], c[k]) * B[k] for k in range(order))
    return np.where(mask, total, 0)


def parts(S, everywhere):
    """Return masks of the block's parts: small and large others, small and large salient ones."""
    rows, n = S.shape
    order = np.argsort(-S.sum(0), kind="stable")
    errors = []
    for k in range(1, min(50, n)):
        mask = np.zeros((rows, n), bool)
        mask[:, order[:k]] = True
        trial = residual(S, mask, 2) + residual(S, ~mask, 2)
        errors.append(np.square(S - trial).sum())
    salient = np.zeros((rows, n), bool)
    salient[:, order[: 1 + int(np.argmin(errors))]] = True

    def split(inside, planes, values):
        found, least = None, np.inf
        for level in np.quantile(values, np.linspace(0.1, 0.9, 81)):
            small, large = inside & (S < level), inside & (S >= level)
            trial = residual(S, small, planes) + residual(S, large, planes)
            error = np.square(np.where(inside, S - trial, 0)).sum()
            if error < least * (1 - 1e-12):
                found, least = (small, large), error
        return found

    others = split(~salient, 1, np.where(salient, 0, S))
    if not everywhere:
        return [(*others, salient)]
    return [(*others, *split(salient, 2, S[salient & (S != 0)]))]


def published(W, H, everywhere):
    """Return BiLLM's or ARB-LLM's weight by the inverse of H."""
    W = W.copy()
    H = H + 0.01 * np.diagonal(H).mean() * np.eye(len(H))
    U = np.linalg.cholesky(np.linalg.inv(H)).T
    for start in range(0, W.shape[1], BLOCK):
        stop = min(start + BLOCK, W.shape[1])
        block = W[:, start:stop].copy()
        Q = np.zeros_like(block)
        (masks,) = parts(block**2 / np.diagonal(U)[start:stop] ** 2, everywhere)
        for mask, order in zip(masks, (1, 1, 2, 2), strict=False):
            if everywhere:
                Q += row_column(block, mask, order, 15)
            else:
                Q += residual(block, mask, order)
        W[:, start:stop] = Q
        error = (block - Q) / np.diagonal(U)[start:stop]
        W[:, stop:] -= error @ U[start:stop, stop:]
    return W


@pytest.mark.parametrize("everywhere", [False, True])
def test_published_methods_follow_their_definition(everywhere):
    generator = np.random.default_rng(0)
    W = generator.standard_t(4, size=(9, 50)) * np.exp(0.5 * generator.normal(size=50))
    X = generator.normal(size=(300, 50)) * np.exp(0.3 * generator.normal(size=50))
    X[:, 1:] += 0.5 * X[:, :-1]
    H = X.T @ X / 300
    if everywhere:
        found = cq.arb(W, H, published=True, group=BLOCK)
    else:
        found = cq.billm(W, H, published=True, block=BLOCK)
    wanted = published(W, H, everywhere)
    # Scales are stored in float16.
    assert np.abs(found.dequantize() - wanted).max() < 2e-3 * np.abs(wanted).max()
