"""What the inline assembly in kernels does, for interpreters, which have none: of int32 words, to a list of such."""

import torch
from torch import Tensor

from plugins.moe.hopper_factor_kernel import WIDENED
from plugins.moe.numbers_kernel import E2M1_PAIR, LAST_E2M1_PAIR, OFFSET_OF, SCALED_PAIR, SCALES_OF, SPREAD


def _rounded(values: Tensor) -> Tensor:
    return values.bfloat16().view(torch.int32)


def _numbers(word: Tensor) -> Tensor:
    return word.view(torch.bfloat16).double()


def _spread(word: Tensor) -> list[Tensor]:
    halves = word.view(torch.int16).view(*word.shape, 2)
    return [half.unsqueeze(-1).expand_as(halves).contiguous().view(torch.int32)[..., 0] for half in halves.unbind(-1)]


def _offset_of(scale: Tensor) -> list[Tensor]:
    return [_rounded(-24 * _numbers(scale))]


def _scaled_pair(word: Tensor, scale: Tensor, offset: Tensor) -> list[Tensor]:
    return [_rounded(_numbers(word & 0x00780078 | 0x41804180) * _numbers(scale) + _numbers(offset))]


def _scales_of(word: Tensor) -> list[Tensor]:
    return [(word >> 8 * byte & 0xFF) * 0x00100010 + 0x70007000 for byte in range(4)]


def _e2m1_pair(word: Tensor, scale: Tensor) -> list[Tensor]:
    return [_rounded(_numbers(word & 0x81C081C0 - (1 << 32)) * _numbers(scale))]


def _last_e2m1_pair(word: Tensor, scale: Tensor) -> list[Tensor]:
    return _e2m1_pair(word << 1 & 0x80008000 - (1 << 32) | word >> 4 & 0x00C000C0 | word >> 5 & 0x01000100, scale)


def _widened(word: Tensor) -> list[Tensor]:
    pairs = word.view(torch.float8_e4m3fn).half().view(torch.int32).view(*word.shape, 2)
    return [pair.contiguous() for pair in pairs.unbind(-1)]


RESULTS = {
    SPREAD: _spread,
    OFFSET_OF: _offset_of,
    SCALED_PAIR: _scaled_pair,
    SCALES_OF: _scales_of,
    E2M1_PAIR: _e2m1_pair,
    LAST_E2M1_PAIR: _last_e2m1_pair,
    WIDENED: _widened,
}
