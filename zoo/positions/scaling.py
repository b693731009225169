"""Rotary frequencies for texts longer than the training window.

    width             d, the rotary width of a head
    base              b of theta_i = b^(-2i/d)
    factor            s = L'/L, the longest text over the trained one, unless said otherwise
    original_length   L, the window that the frequencies were trained in
    length            l, tokens of the text so far
    r_i               L theta_i / 2 pi, rotations of pair i within the trained window

Each function returns `(inv_freq, attention_factor)` for `rope.apply_rope`; the factor multiplies
the cosine and sine of queries and keys, so the scores by its square. All take the first three
arguments, and of the others those that they depend on. Under one that takes `length` an output
depends on how much has been read, and keys must be cached unrotated.

All take `theta` too, the frequencies that are scaled, where these are not base^(-2i/d): those of
another scaling that the model was tuned under, with its window as L. `on_top` puts one on another.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from jaxtyping import Float
from torch import Tensor

from zoo.config.domains import Range
from zoo.errors import choose, refuse
from zoo.positions.rope import inverse_frequencies

Scaled = tuple[tuple[float, ...], float]

MAX_MSCALE = 10  # published: 1 and DeepSeek's 0.707


def linear(
    *,
    width: int,
    base: float = 10000.0,
    factor: float,
    theta: Sequence[float] | None = None,
) -> Scaled:
    """Interpolate positions (PI, Chen 2023, section 2.3, arXiv 2306.15595): theta_i / s.

    Golden: with s = 4, theta_0 = 0.25.
    """
    return tuple(f / _at_least_one(factor) for f in _theta(theta, width, base)), 1.0


def ntk_aware(
    *,
    width: int,
    base: float = 10000.0,
    factor: float,
    theta: Sequence[float] | None = None,
) -> Scaled:
    """Raise the base to b' = b s^(d/(d-2)) (NTK-aware, bloc97 2023; YaRN, section 3.1).

    The fastest pair keeps its frequency, the slowest gets exactly theta / s. The pairs between
    leave their trained angles before s L, so use twice the factor that is wanted.
    Golden, d=128: b' = 20221.26, 40889.94, 82684.62 for s = 2, 4, 8.
    """
    if width == 2:
        raise ValueError("width=2: must be at least 4, as the slowest pair is not the fastest.")
    s, theta = _at_least_one(factor), _theta(theta, width, base)
    return tuple(f * s ** (-2 * i / (width - 2)) for i, f in enumerate(theta)), 1.0


def dropped(
    *,
    width: int,
    base: float = 10000.0,
) -> Scaled:
    """Turn no pair (DroPE, Gelberg 2025, arXiv 2512.12167): attention without positions.

    The model is tuned for a short while without the rotation that it was trained with.
    """
    return (0.0,) * len(inverse_frequencies(width, base)), 1.0


def current_factor(length: int | None, original_length: int | None, factor: float = 1.0) -> float:
    """Return 1 up to L; above, l/L (YaRN, section 3.3), or f l/L - (f - 1) with a `factor` f."""
    if length is None:
        raise ValueError("length=None: must be the number of tokens read.")
    window = _window(original_length)
    return 1 + _at_least_one(factor) * max(length - window, 0) / window


def dynamic_ntk(
    *,
    width: int,
    base: float = 10000.0,
    factor: float = 1.0,
    original_length: int | None = None,
    length: int | None = None,
    theta: Sequence[float] | None = None,
) -> Scaled:
    """Raise the base with the length of the text (dynamic NTK, emozilla 2023; YaRN, section 3.3).

    Unchanged up to L, b' = b (f l/L - (f-1))^(d/(d-2)) above. `factor` is f, 1 in the paper; larger
    ones, usual in programs, stretch further than the text is long, for the reason given at
    `ntk_aware`. Golden, d=128: f=2, l=2L gives b' = 30527.74.
    """
    s = current_factor(length, original_length, factor)
    return ntk_aware(width=width, base=base, factor=s, theta=theta)


def ntk_by_parts(
    *,
    width: int,
    base: float = 10000.0,
    factor: float,
    original_length: int | None = None,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    ramp: str = "paper",
    mix: str = "arith",
    truncate: bool = True,
    theta: Sequence[float] | None = None,
) -> Scaled:
    """Interpolate slow pairs, keep fast ones (NTK-by-parts, bloc97 2023; YaRN, section 3.2).

    Pairs with r > `beta_fast` keep theta, those with r < `beta_slow` get theta / s, and between
    gamma falls from 1 to 0, linear in

        ramp=paper   r_i
        ramp=code    i, from where r is beta_fast to where it is beta_slow, the two rounded outwards
                     to whole pairs with `truncate`: the authors' program

    theta' = (1 - gamma) theta / s + gamma theta, or with mix=harmonic theta / ((1 - gamma) s +
    gamma), which mixes wavelengths (Zhu 2024, PoSE, its program's "revised" YaRN).
    Golden, d=128, L=4096: the code's ramp runs from pair 20 to pair 46.
    """
    if not 0 < beta_slow < beta_fast:
        refuse("beta_slow", beta_slow, f"must be above 0 and below beta_fast={beta_fast}")
    if ramp == "paper" and not truncate:
        refuse("truncate", truncate, "rounds the ends of ramp=code alone", "Leave it out.")
    choose("mix", mix, ["arith", "harmonic"])
    s, window = _at_least_one(factor), _window(original_length)
    rotary, theta = theta is None, _theta(theta, width, base)
    if choose("ramp", ramp, ["paper", "code"]) == "paper":
        rotations = [window * f / (2 * math.pi) for f in theta]
        gamma = [_clamp((r - beta_slow) / (beta_fast - beta_slow)) for r in rotations]
    else:
        turns = beta_fast, beta_slow
        if rotary:
            first, last = (_pair_with_rotations(r, width, base, window) for r in turns)
        else:
            first, last = (_between_pairs(r * 2 * math.pi / window, theta) for r in turns)
        if truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = (min(max(end, 0), width - 1) for end in (first, last))
        steps = max(last - first, 0.001)
        gamma = [1 - _clamp((i - first) / steps) for i in range(width // 2)]
    if mix == "arith":
        return tuple(f * ((1 - g) / s + g) for f, g in zip(theta, gamma, strict=True)), 1.0
    return tuple(f / ((1 - g) * s + g) for f, g in zip(theta, gamma, strict=True)), 1.0


def yarn(
    *,
    width: int,
    base: float = 10000.0,
    factor: float,
    original_length: int | None = None,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    ramp: str = "code",
    mix: str = "arith",
    truncate: bool = True,
    mscale: float = 1.0,
    mscale_all_dim: float = 0.0,
    attention_factor: Annotated[float, Range(above=0, most=10)] | None = None,
    theta: Sequence[float] | None = None,
) -> Scaled:
    """NTK-by-parts with sharper attention (YaRN, Peng 2023, section 3.4, arXiv 2309.00071).

    The temperature t of softmax(q k / (t sqrt d)) has sqrt(1/t) = 0.1 ln s + 1, and q and k each
    carry one sqrt(1/t). DeepSeek-V2 (arXiv 2405.04434) divides by the same with `mscale_all_dim`
    in place of `mscale`, and also scales the scores of all channels, rotated or not, by the square
    of `temperature(factor, mscale_all_dim)`; zoo.model.extend does that. An `attention_factor`, as
    checkpoints may give, takes the place of all of these.
    Golden, d=128, L=4096, s=16: theta_21 = 0.046941, theta_33 = 0.0046, factor 1.277259.
    """
    for name, value in (("mscale", mscale), ("mscale_all_dim", mscale_all_dim)):
        if not 0 <= value <= MAX_MSCALE:
            refuse(name, value, f"must be between 0 and {MAX_MSCALE}")
    inv_freq, _ = ntk_by_parts(
        width=width,
        base=base,
        factor=factor,
        original_length=original_length,
        beta_fast=beta_fast,
        beta_slow=beta_slow,
        ramp=ramp,
        mix=mix,
        truncate=truncate,
        theta=theta,
    )
    derived = temperature(factor, mscale) / temperature(factor, mscale_all_dim)
    return inv_freq, derived if attention_factor is None else attention_factor


def dynamic_yarn(
    *,
    width: int,
    base: float = 10000.0,
    factor: float = 1.0,
    original_length: int | None = None,
    length: int | None = None,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    ramp: str = "code",
    mix: str = "arith",
    truncate: bool = True,
    theta: Sequence[float] | None = None,
) -> Scaled:
    """YaRN whose factor follows the length of the text (Peng 2023, section 3.3): s = max(1, l/L).

    `factor` is `current_factor`'s, 1 in the paper. Golden: YaRN's at l = 16 L.
    """
    return yarn(
        width=width,
        base=base,
        factor=current_factor(length, original_length, factor),
        original_length=original_length,
        beta_fast=beta_fast,
        beta_slow=beta_slow,
        ramp=ramp,
        mix=mix,
        truncate=truncate,
        theta=theta,
    )


def temperature(factor: float, mscale: float = 1.0) -> float:
    """Return sqrt(1/t) = 0.1 mscale ln s + 1 (YaRN, section 3.4). Golden: 1.138629 for s = 4."""
    return 0.1 * mscale * math.log(_at_least_one(factor)) + 1


def longrope(
    *,
    width: int,
    base: float = 10000.0,
    factor: float,
    original_length: int | None = None,
    length: int | None = None,
    long_factors: Sequence[float] | None,
    short_factors: Sequence[float] | None = None,
    n_hat: int = 0,
    magnitude: str = "su",
    theta: Sequence[float] | None = None,
) -> tuple["tuple[float, ...] | KeepFirst", float]:
    """Divide each frequency by a factor found by a search (LongRoPE, Ding 2024, arXiv 2402.13753).

    Args:
        factor: s, which sets `magnitude` alone.
        long_factors: lambda_i of theta_i / lambda_i for texts longer than L, or without `length`.
        short_factors: those of texts up to L; None: all 1.
        n_hat: the first positions keep theta_i; in texts longer than L.
        magnitude: the attention factor at every length, as the weights were tuned with it: su,
            sqrt(1 + ln s / ln L), of the authors' program and Phi-3; yarn; or none. Golden: su
            1.190238 for s = 32, L = 4096.
    """
    if long_factors is None:
        advice = f"Use python eval.py run=<run> task=longrope task.longrope.factor={factor:g}"
        advice += "" if theta is None else " task.longrope.composition=on_top"
        advice += "" if magnitude == "su" else f" task.longrope.magnitude={magnitude}"
        refuse("long_factors", None, "must be searched for the model", advice)
    s, window = _at_least_one(factor), _window(original_length)
    short = length is not None and length <= window
    rescale = (short_factors or [1.0] * (width // 2)) if short else long_factors
    theta = _theta(theta, width, base)
    if len(rescale) != len(theta) or not min(rescale) > 0:
        name = "short_factors" if short else "long_factors"
        refuse(name, list(rescale), f"must be {len(theta)} positive numbers, one for each pair")
    if s > 1 and window < 2:
        refuse("original_length", window, "must be at least 2")
    su = math.sqrt(1 + math.log(s) / math.log(window)) if s > 1 else 1.0
    factors = {"su": su, "yarn": temperature(s), "none": 1.0}
    attention_factor = factors[choose("magnitude", magnitude, [*factors])]
    inv_freq = tuple(f / lam for f, lam in zip(theta, rescale, strict=True))
    by_position = KeepFirst(inv_freq, theta, n_hat) if n_hat and not short else inv_freq
    return by_position, attention_factor


@dataclass(frozen=True)
class KeepFirst:
    """Frequencies by position: `plain` at the first `n_hat`, `inv_freq` from there on."""

    inv_freq: "tuple[float, ...] | KeepFirst"
    unscaled: "tuple[float, ...] | KeepFirst"
    n_hat: int

    def __call__(self, positions: Tensor) -> Float[Tensor, "*t half"]:
        scaled, unscaled = (
            f(positions) if isinstance(f, KeepFirst) else torch.tensor(f, dtype=torch.float64)
            for f in (self.inv_freq, self.unscaled)
        )
        return torch.where(positions.cpu()[..., None] < self.n_hat, unscaled, scaled)


def on_top(
    scaling: Callable[..., tuple["tuple[float, ...] | KeepFirst", float]],
    below: tuple[Any, float],
) -> tuple["tuple[float, ...] | KeepFirst", float]:
    """Scale the frequencies of another scaling, at every position; the two factors multiply.

    Args:
        scaling: one of this module's with all its arguments but `theta` bound.
        below: what the other has returned, a tuple of frequencies or a `KeepFirst` and a factor.
    """
    theta, attention_factor = below
    if isinstance(theta, KeepFirst):
        later, factor = on_top(scaling, (theta.inv_freq, attention_factor))
        first, _ = on_top(scaling, (theta.unscaled, attention_factor))
        return KeepFirst(later, first, theta.n_hat), factor
    found, factor = scaling(theta=theta)
    return found, attention_factor * factor


def llama3(
    *,
    width: int,
    base: float = 500000.0,
    factor: float = 8.0,
    original_length: int | None = 8192,
    low_freq_factor: float = 1.0,
    high_freq_factor: float = 4.0,
    theta: Sequence[float] | None = None,
) -> Scaled:
    """NTK-by-parts with a ramp from r = 1 to r = 4 (Llama 3.1, Grattafiori 2024, arXiv 2407.21783).

    Golden, d=128: pairs up to 28 stay, theta_32 = 0.00141421 becomes 0.00052485, pairs from 35 on
    are divided by s = 8.
    """
    return ntk_by_parts(
        width=width,
        base=base,
        factor=factor,
        original_length=original_length,
        beta_fast=high_freq_factor,
        beta_slow=low_freq_factor,
        theta=theta,
    )


def _pair_with_rotations(r: float, width: int, base: float, window: int) -> float:
    """Return the index i, with a fraction, of the pair with r_i = r."""
    return width * math.log(window / (2 * math.pi * r)) / (2 * math.log(base))


def _between_pairs(frequency: float, theta: Sequence[float]) -> float:
    """Return the index i, with a fraction, at which log theta_i, linear between pairs, is that."""
    if len(theta) < 2:
        raise ValueError("width=2: must be at least 4, as a ramp is between pairs.")
    logs, found = [math.log(f) for f in theta], math.log(frequency)
    after = next((i for i in range(1, len(logs) - 1) if logs[i] <= found), len(logs) - 1)
    step = logs[after - 1] - logs[after]
    return after - 1 + (logs[after - 1] - found) / step


def _theta(theta: Sequence[float] | None, width: int, base: float) -> tuple[float, ...]:
    return inverse_frequencies(width, base) if theta is None else tuple(theta)


def _clamp(x: float) -> float:
    return min(max(x, 0.0), 1.0)


def _at_least_one(factor: float) -> float:
    if not 1 <= factor < math.inf:
        refuse("factor", factor, "must be at least 1")
    return factor


def _window(original_length: int | None) -> int:
    if original_length is None or original_length <= 0:
        refuse("original_length", original_length, "must be the trained length, at least 1")
    return original_length
