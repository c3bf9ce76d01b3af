"""Triton kernels of `models/halfblock.py`, each function the twin of one there, and the one of all binary weights.

Tensors [B, C, H, W] in channels_last are matrices of M = B·H·W rows and C columns in memory. A program works on tiles
of BM rows and BC columns; sums over rows are kept for each place of the tile and only added up at the end of its
rows, in float32, then over the programs in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

ROWS = 512  # rows of one program that sums
TILE = 1024  # elements of a tile: more spill in the summing kernel


@triton.jit
def _residual(
    stream_ptr,
    rows,
    row_mask,
    cols,
    col_mask,
    stream_channels,
    height,
    width,
    POOLED: tl.constexpr,
    DOUBLED: tl.constexpr,
):
    mask = row_mask[:, None] & col_mask[None, :]
    if POOLED:
        image = rows // (height * width)
        place = rows % (height * width)
        y, x = place // width, place % width
        first = ((image * (2 * height) + 2 * y) * (2 * width) + 2 * x).to(tl.int64)[:, None]
        base = first * stream_channels + cols[None, :]
        below = base + 2 * width * stream_channels
        a = tl.load(stream_ptr + base, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(stream_ptr + base + stream_channels, mask=mask, other=0.0).to(tl.float32)
        c = tl.load(stream_ptr + below, mask=mask, other=0.0).to(tl.float32)
        d = tl.load(stream_ptr + below + stream_channels, mask=mask, other=0.0).to(tl.float32)
        return (a + b + c + d) * 0.25
    else:
        own = cols % stream_channels if DOUBLED else cols
        places = rows.to(tl.int64)[:, None] * stream_channels + own[None, :]
        return tl.load(stream_ptr + places, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _statistics_kernel(c_ptr, parts_ptr, M, C, ROWS: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr):
    part = tl.program_id(0)
    cols = tl.program_id(1) * BC + tl.arange(0, BC)
    col_mask = cols < C
    total = tl.zeros((BM, BC), tl.float32)
    square = tl.zeros((BM, BC), tl.float32)
    for start in range(0, ROWS, BM):
        rows = part * ROWS + start + tl.arange(0, BM)
        mask = (rows < M)[:, None] & col_mask[None, :]
        c = tl.load(c_ptr + rows.to(tl.int64)[:, None] * C + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        total += c
        square += c * c
    first = parts_ptr + part * C + cols
    tl.store(first, tl.sum(total, 0), mask=col_mask)
    tl.store(first + tl.num_programs(0) * C, tl.sum(square, 0), mask=col_mask)


@triton.jit
def _apply_kernel(
    c_ptr, stream_ptr, h_ptr, s_ptr, scale_ptr, shift_ptr, slope_ptr, out_ptr, threshold_ptr,
    M, C, stream_channels, height, width,
    POOLED: tl.constexpr, DOUBLED: tl.constexpr, SIGN: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BM + tl.arange(0, BM)  # on the first axis, which alone takes more than 65,535
    cols = tl.program_id(1) * BC + tl.arange(0, BC)
    col_mask, row_mask = cols < C, rows < M
    mask = row_mask[:, None] & col_mask[None, :]
    scale = tl.load(scale_ptr + cols, mask=col_mask, other=0.0)
    shift = tl.load(shift_ptr + cols, mask=col_mask, other=0.0)
    slope = tl.load(slope_ptr + cols, mask=col_mask, other=0.0)
    out = tl.load(out_ptr + cols, mask=col_mask, other=0.0)
    places = rows.to(tl.int64)[:, None] * C + cols[None, :]
    c = tl.load(c_ptr + places, mask=mask, other=0.0).to(tl.float32)
    residual = _residual(stream_ptr, rows, row_mask, cols, col_mask, stream_channels, height, width, POOLED, DOUBLED)
    u = c * scale[None, :] + shift[None, :] + residual
    h = (tl.where(u > 0, u, u * slope[None, :]) + out[None, :]).to(h_ptr.dtype.element_ty)
    tl.store(h_ptr + places, h, mask=mask)
    if SIGN:
        threshold = tl.load(threshold_ptr + cols, mask=col_mask, other=0.0)
        z = h.to(tl.float32) + threshold[None, :]
        s = tl.where(z > 0, 1.0, tl.where(z < 0, -1.0, 0.0))
        tl.store(s_ptr + places, s.to(s_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _sums_kernel(
    grad_h_ptr, grad_s_ptr, c_ptr, stream_ptr, du_ptr, parts_ptr, scale_ptr, shift_ptr, slope_ptr, out_ptr,
    threshold_ptr, mean_ptr, rstd_ptr,
    M, C, stream_channels, height, width,
    POOLED: tl.constexpr, DOUBLED: tl.constexpr, SIGN: tl.constexpr, QUADRATIC: tl.constexpr, ROWS: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0)
    cols = tl.program_id(1) * BC + tl.arange(0, BC)
    col_mask = cols < C
    scale = tl.load(scale_ptr + cols, mask=col_mask, other=0.0)
    shift = tl.load(shift_ptr + cols, mask=col_mask, other=0.0)
    slope = tl.load(slope_ptr + cols, mask=col_mask, other=0.0)
    out = tl.load(out_ptr + cols, mask=col_mask, other=0.0)
    threshold = tl.load(threshold_ptr + cols, mask=col_mask, other=0.0)
    mean = tl.load(mean_ptr + cols, mask=col_mask, other=0.0)
    rstd = tl.load(rstd_ptr + cols, mask=col_mask, other=0.0)
    d_beta = tl.zeros((BM, BC), tl.float32)
    d_gamma = tl.zeros((BM, BC), tl.float32)
    d_out = tl.zeros((BM, BC), tl.float32)
    d_threshold = tl.zeros((BM, BC), tl.float32)
    d_slope = tl.zeros((BM, BC), tl.float32)
    for start in range(0, ROWS, BM):
        rows = part * ROWS + start + tl.arange(0, BM)
        row_mask = rows < M
        mask = row_mask[:, None] & col_mask[None, :]
        places = rows.to(tl.int64)[:, None] * C + cols[None, :]
        c = tl.load(c_ptr + places, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(grad_h_ptr + places, mask=mask, other=0.0).to(tl.float32)
        residual = _residual(
            stream_ptr, rows, row_mask, cols, col_mask, stream_channels, height, width, POOLED, DOUBLED
        )
        u = c * scale[None, :] + shift[None, :] + residual
        positive = u > 0
        if SIGN:
            h = tl.where(positive, u, u * slope[None, :]) + out[None, :]
            z = tl.abs(h.to(du_ptr.dtype.element_ty).to(tl.float32) + threshold[None, :])
            through = tl.load(grad_s_ptr + places, mask=mask, other=0.0).to(tl.float32)
            if QUADRATIC:
                through = through * tl.maximum(2 - 2 * z, 0.0)
            else:
                through = tl.where(z <= 1, through, 0.0)
            g += through
            d_threshold += through
        d_out += g
        d_slope += tl.where(positive, 0.0, g * u)
        du = tl.where(positive, g, g * slope[None, :])
        d_beta += du
        d_gamma += du * ((c - mean[None, :]) * rstd[None, :])
        tl.store(du_ptr + places, du.to(du_ptr.dtype.element_ty), mask=mask)
    step = tl.num_programs(0) * C
    first = parts_ptr + part * C + cols
    tl.store(first, tl.sum(d_beta, 0), mask=col_mask)
    tl.store(first + step, tl.sum(d_gamma, 0), mask=col_mask)
    tl.store(first + 2 * step, tl.sum(d_out, 0), mask=col_mask)
    tl.store(first + 3 * step, tl.sum(d_threshold, 0), mask=col_mask)
    tl.store(first + 4 * step, tl.sum(d_slope, 0), mask=col_mask)


@triton.jit
def _input_kernel(du_ptr, c_ptr, dc_ptr, k0_ptr, k1_ptr, k2_ptr, M, C, BM: tl.constexpr, BC: tl.constexpr):
    rows = tl.program_id(0) * BM + tl.arange(0, BM)  # on the first axis, which alone takes more than 65,535
    cols = tl.program_id(1) * BC + tl.arange(0, BC)
    col_mask = cols < C
    mask = (rows < M)[:, None] & col_mask[None, :]
    places = rows.to(tl.int64)[:, None] * C + cols[None, :]
    k0 = tl.load(k0_ptr + cols, mask=col_mask, other=0.0)
    k1 = tl.load(k1_ptr + cols, mask=col_mask, other=0.0)
    k2 = tl.load(k2_ptr + cols, mask=col_mask, other=0.0)
    du = tl.load(du_ptr + places, mask=mask, other=0.0).to(tl.float32)
    c = tl.load(c_ptr + places, mask=mask, other=0.0).to(tl.float32)
    dc = du * k0[None, :] + c * k1[None, :] + k2[None, :]
    tl.store(dc_ptr + places, dc.to(dc_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _weight_kernel(table_ptr, sign_ptr, scale_ptr, longest, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    weight_ptr = tl.load(table_ptr + 3 * row).to(tl.pointer_type(tl.float32))
    length = tl.load(table_ptr + 3 * row + 1)
    first = tl.load(table_ptr + 3 * row + 2)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, longest, BLOCK):  # of all rows: a bound that was loaded is not one for the interpreter
        places = start + tl.arange(0, BLOCK)
        mask = places < length
        w = tl.load(weight_ptr + places, mask=mask, other=0.0)
        total += tl.abs(w)
        s = tl.where(w > 0, 1.0, tl.where(w < 0, -1.0, 0.0))
        tl.store(sign_ptr + first + places, s.to(sign_ptr.dtype.element_ty), mask=mask)
    tl.store(scale_ptr + row, tl.sum(total, 0) / length)


def tile(channels: int) -> tuple[int, int]:
    """Rows and columns of a tile: whole 128-byte lines of 16-bit numbers where there are that many channels."""
    columns = min(64, max(16, triton.next_power_of_2(channels)))
    return TILE // columns, columns


def _sizes(c: Tensor, stream: Tensor) -> tuple[int, int, int, int, int]:
    batch, channels, height, width = c.shape
    return batch * height * width, channels, stream.shape[1], height, width


Wrap = Callable[[Any], Any]


def statistics(c: Tensor, wrap: Wrap = wrap_triton) -> tuple[Tensor, Tensor]:
    """See `models.halfblock.statistics`."""
    rows, channels = c.numel() // c.shape[1], c.shape[1]
    bm, bc = tile(channels)
    parts = triton.cdiv(rows, ROWS)
    sums = torch.empty(2, parts, channels, dtype=torch.float32, device=c.device)
    grid = (parts, triton.cdiv(channels, bc))
    wrap(_statistics_kernel)[grid](c, sums, rows, channels, ROWS=ROWS, BM=bm, BC=bc)
    mean, square = sums.double().sum(dim=1).div(rows).unbind()
    return mean.float(), (square - mean * mean).clamp(min=0).float()


def apply(
    c: Tensor, stream: Tensor, vectors: list[Tensor], residual: str, has_sign: bool, wrap: Wrap = wrap_triton
) -> tuple[Tensor, Tensor]:
    """See `models.halfblock.apply`."""
    rows, channels, stream_channels, height, width = _sizes(c, stream)
    bm, bc = tile(channels)
    h = torch.empty_like(c)
    s = torch.empty_like(c) if has_sign else c.new_empty(0)
    grid = (triton.cdiv(rows, bm), triton.cdiv(channels, bc))
    wrap(_apply_kernel)[grid](
        c, stream, h, s if has_sign else h, *vectors,
        rows, channels, stream_channels, height, width,
        POOLED=residual == "pooled", DOUBLED=residual == "doubled", SIGN=has_sign, BM=bm, BC=bc,
    )  # fmt: skip
    return h, s


def backward_sums(
    grad_h: Tensor,
    grad_s: Tensor,
    c: Tensor,
    stream: Tensor,
    vectors: list[Tensor],
    residual: str,
    estimator: str,
    has_sign: bool,
    wrap: Wrap = wrap_triton,
) -> tuple[Tensor, Tensor]:
    """See `models.halfblock.backward_sums`."""
    rows, channels, stream_channels, height, width = _sizes(c, stream)
    bm, bc = tile(channels)
    parts = triton.cdiv(rows, ROWS)
    du = torch.empty_like(c)
    sums = torch.empty(5, parts, channels, dtype=torch.float32, device=c.device)
    wrap(_sums_kernel)[(parts, triton.cdiv(channels, bc))](
        grad_h, grad_s, c, stream, du, sums, *vectors,
        rows, channels, stream_channels, height, width,
        POOLED=residual == "pooled", DOUBLED=residual == "doubled", SIGN=has_sign,
        QUADRATIC=estimator == "reactnet", ROWS=ROWS, BM=bm, BC=bc,
    )  # fmt: skip
    return du, sums.double().sum(dim=1).float()


def backward_input(du: Tensor, c: Tensor, k0: Tensor, k1: Tensor, k2: Tensor, wrap: Wrap = wrap_triton) -> Tensor:
    """See `models.halfblock.backward_input`."""
    rows, channels = c.numel() // c.shape[1], c.shape[1]
    bm, bc = tile(channels)
    dc = torch.empty_like(c)
    grid = (triton.cdiv(rows, bm), triton.cdiv(channels, bc))
    wrap(_input_kernel)[grid](du, c, dc, k0, k1, k2, rows, channels, BM=bm, BC=bc)
    return dc


_TABLES: dict[Any, Tensor] = {}


def weight_signs(weights: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """See `models.weight_signs.signs_and_scales`; a program for each output channel of all weights, in float32."""
    rows = sum(len(weight) for weight in weights)
    key = tuple((weight.data_ptr(), weight.shape) for weight in weights)
    if key not in _TABLES:  # parameters stay where they are, so that a run makes this once
        table, start = [], 0
        for weight in weights:
            length = weight[0].numel()
            for row in range(len(weight)):
                table.append((weight.data_ptr() + 4 * row * length, length, start + row * length))
            start += weight.numel()
        _TABLES[key] = torch.tensor(table, dtype=torch.int64, device=weights[0].device)
    signs = torch.empty(sum(weight.numel() for weight in weights), dtype=dtype, device=weights[0].device)
    scales = torch.empty(rows, dtype=torch.float32, device=weights[0].device)
    longest = max(weight[0].numel() for weight in weights)
    _weight_kernel[(rows,)](_TABLES[key], signs, scales, longest, BLOCK=TILE)
    return signs, scales
