"""Rotary frequencies for texts longer than the training window.

    width             d, the rotary width of a head
    base              b of theta_i = b^(-2i/d)
    original_length   L, the window the frequencies were trained in
    length            l, the tokens of the text so far
    factor            s = L'/L, the reach asked for over the reach trained, unless said otherwise
    r_i               L theta_i / 2 pi, how often pair i turned in the trained window

Each function gives `(inv_freq, attention_factor)` for `rope.rotate`; the factor multiplies the
cosine and sine of queries and keys, so the scores by its square. All take the five arguments
above, so that one can stand for another. Those that heed `length` say so: with them an output
depends on how much has been read, and keys must be cached before they are turned.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from zoo.errors import choose
from zoo.positions.rope import inverse_frequencies

Scaled = tuple[tuple[float, ...], float]


MAX_MSCALE = 10  # published: 1, DeepSeek's 0.707


def linear(
    *,
    width: int,
    base: float = 10000.0,
    factor: float,
    original_length: int | None = None,
    length: int | None = None,
) -> Scaled:
    """Position interpolation (Chen 2023, section 2.3): theta_i / s, the same as positions m / s.

    Golden: with s = 4, theta_0 = 0.25.
    """
    return tuple(f / _at_least_one(factor) for f in inverse_frequencies(width, base)), 1.0


def ntk_aware(
    *,
    width: int,
    base: float = 10000.0,
    factor: float,
    original_length: int | None = None,
    length: int | None = None,
) -> Scaled:
    """NTK-aware interpolation (bloc97 2023; Peng 2023, YaRN, section 3.1): b' = b s^(d/(d-2)).

    The fastest pair stays, the slowest becomes exactly theta / s. The pairs between leave the
    angles they were trained at before s L: ask for twice the factor that is wanted.
    Golden, d=128: b' = 20221.26, 40889.94, 82684.62 for s = 2, 4, 8.
    """
    if width == 2:
        raise ValueError("NTK-aware scaling needs a fastest and a slowest pair: width=2 has one")
    s, theta = _at_least_one(factor), inverse_frequencies(width, base)
    return tuple(f * s ** (-2 * i / (width - 2)) for i, f in enumerate(theta)), 1.0


def current_factor(length: int | None, original_length: int | None, factor: float = 1.0) -> float:
    """1 up to L; above, l/L (YaRN, section 3.3), or f l/L - (f - 1) with a steeper `factor` f."""
    if length is None:
        raise ValueError("a dynamic scaling needs the length of the text so far")
    window = _window(original_length)
    return 1 + _at_least_one(factor) * max(length - window, 0) / window


def dynamic_ntk(
    *,
    width: int,
    base: float = 10000.0,
    factor: float = 1.0,
    original_length: int | None = None,
    length: int | None = None,
) -> Scaled:
    """NTK-aware interpolation to the length at hand (emozilla 2023; YaRN, section 3.3).

    Heeds `length`: plain up to L, b' = b (f l/L - (f-1))^(d/(d-2)) above. `factor` is f, 1 in the
    paper; larger ones, usual in programs, stretch further than the text is long, for the reason
    given at `ntk_aware`. Golden, d=128: f=2, l=2L gives b' = 30527.74.
    """
    s = current_factor(length, original_length, factor)
    return ntk_aware(width=width, base=base, factor=s)


def ntk_by_parts(
    *,
    width: int,
    base: float = 10000.0,
    factor: float,
    original_length: int | None = None,
    length: int | None = None,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    ramp: str = "paper",
    mix: str = "arith",
    truncate: bool = True,
) -> Scaled:
    """Interpolate slow pairs, keep fast ones (bloc97 2023; YaRN, section 3.2).

    Pairs that turned more than `beta_fast` times in the trained window stay, those that turned
    less than `beta_slow` times become theta / s, and gamma goes from 0 to 1 between, linear in

        ramp=paper   r_i
        ramp=code    i, from where r is beta_fast to where it is beta_slow, these two rounded
                     outwards to whole pairs with `truncate`: the authors' program

    theta' = (1 - gamma) theta / s + gamma theta, or with mix=harmonic theta / ((1 - gamma) s +
    gamma), which mixes wavelengths (Zhu 2024, PoSE, its program's "revised" YaRN).
    Golden, d=128, L=4096: the code's ramp runs from pair 20 to pair 46.
    """
    if not 0 < beta_slow < beta_fast:
        raise ValueError(f"beta_slow={beta_slow} must lie between 0 and beta_fast={beta_fast}")
    choose("mix", mix, ["arith", "harmonic"])
    s, window = _at_least_one(factor), _window(original_length)
    theta = inverse_frequencies(width, base)
    if choose("ramp", ramp, ["paper", "code"]) == "paper":
        turns = [window * f / (2 * math.pi) for f in theta]
        gamma = [_clamp((r - beta_slow) / (beta_fast - beta_slow)) for r in turns]
    else:
        first, last = (_pair_that_turned(n, width, base, window) for n in (beta_fast, beta_slow))
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
    length: int | None = None,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    ramp: str = "code",
    mix: str = "arith",
    truncate: bool = True,
    mscale: float = 1.0,
    mscale_all_dim: float = 0.0,
) -> Scaled:
    """YaRN (Peng 2023, section 3.4): NTK-by-parts and sharper attention.

    The temperature t of softmax(q k / (t sqrt d)) has sqrt(1/t) = 0.1 ln s + 1, and q and k each
    carry one sqrt(1/t). DeepSeek-V2 divides by the same with `mscale_all_dim` in place of
    `mscale`, and scales the scores of all channels, turned or not, by the square of
    `temperature(factor, mscale_all_dim)` besides; that is left to the attention (zoo.model.extend).
    Golden, d=128, L=4096, s=16: theta_21 = 0.046941, theta_33 = 0.0046, factor 1.277259.
    """
    for name, value in (("mscale", mscale), ("mscale_all_dim", mscale_all_dim)):
        if not 0 <= value <= MAX_MSCALE:
            raise ValueError(f"{name}={value} must be between 0 and {MAX_MSCALE}")
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
    )
    return inv_freq, temperature(factor, mscale) / temperature(factor, mscale_all_dim)


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
) -> Scaled:
    """YaRN with the factor of the length at hand (Peng 2023, section 3.3): s = max(1, l/L).

    Heeds `length`; `factor` is `current_factor`'s, 1 in the paper. Golden: YaRN's at l = 16 L.
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
    )


def temperature(factor: float, mscale: float = 1.0) -> float:
    """sqrt(1/t) = 0.1 mscale ln s + 1 (YaRN, section 3.4). Golden: 1.138629 for s = 4."""
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
) -> tuple["tuple[float, ...] | KeepFirst", float]:
    """LongRoPE (Ding 2024): theta_i / lambda_i with the lambda a search has found.

    Heeds `length`, if given: `short_factors` (all 1 unless given) up to L, `long_factors` above;
    without it the long ones. `factor` s sets the magnitude alone, that of the authors' program
    and of Phi-3, at every length since the weights were tuned with it: su, sqrt(1 + ln s / ln L),
    or yarn, or none of them. Above L the first `n_hat` positions turn as they did. Golden: su
    1.190238 for s = 32, L = 4096.
    """
    if long_factors is None:
        raise ValueError(
            "its factors are searched for a model: python eval.py run=<run> task=longrope "
            f"task.longrope.times={factor:g}"
        )
    s, window = _at_least_one(factor), _window(original_length)
    short = length is not None and length <= window
    rescale = (short_factors or [1.0] * (width // 2)) if short else long_factors
    theta = inverse_frequencies(width, base)
    if len(rescale) != len(theta) or not min(rescale) > 0:
        raise ValueError(
            f"LongRoPE needs a positive rescale factor for each of the {len(theta)} pairs: "
            f"got {len(rescale)}, the least {min(rescale, default=None)}"
        )
    su = math.sqrt(1 + math.log(s) / math.log(window)) if s > 1 else 1.0
    factors = {"su": su, "yarn": temperature(s), "none": 1.0}
    attention_factor = factors[choose("magnitude", magnitude, [*factors])]
    inv_freq = tuple(f / lam for f, lam in zip(theta, rescale, strict=True))
    kept = KeepFirst(inv_freq, theta, n_hat) if n_hat and not short else inv_freq
    return kept, attention_factor


@dataclass(frozen=True)
class KeepFirst:
    """Frequencies by position: `plain` at the first `n_hat`, `inv_freq` from there on."""

    inv_freq: tuple[float, ...]
    plain: tuple[float, ...]
    n_hat: int

    def __call__(self, positions: Tensor) -> Float[Tensor, "*t half"]:
        return keep_first(self.inv_freq, self.plain, self.n_hat, positions)


def keep_first(
    inv_freq: Sequence[float], plain: Sequence[float], n_hat: int, positions: Tensor
) -> Float[Tensor, "*t half"]:
    """A row of frequencies per token: the first `n_hat` positions turn as `plain` (Ding 2024)."""
    scaled, unscaled = (torch.tensor(f, dtype=torch.float64) for f in (inv_freq, plain))
    return torch.where(positions.cpu()[..., None] < n_hat, unscaled, scaled)


def llama3(
    *,
    width: int,
    base: float = 500000.0,
    factor: float = 8.0,
    original_length: int | None = 8192,
    length: int | None = None,
    low_freq_factor: float = 1.0,
    high_freq_factor: float = 4.0,
) -> Scaled:
    """Llama 3.1 (Grattafiori 2024 and its program): NTK-by-parts' own ramp, from r = 1 to r = 4.

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
    )


def _pair_that_turned(times: float, width: int, base: float, window: int) -> float:
    """The (fractional) index of the pair with r = times."""
    return width * math.log(window / (2 * math.pi * times)) / (2 * math.log(base))


def _clamp(x: float) -> float:
    return min(max(x, 0.0), 1.0)


def _at_least_one(factor: float) -> float:
    if not 1 <= factor < math.inf:
        raise ValueError(f"factor={factor}: a scaling factor is at least 1")
    return factor


def _window(original_length: int | None) -> int:
    if original_length is None or original_length <= 0:
        raise ValueError(
            f"original_length={original_length}: give the length trained at, at least 1"
        )
    return original_length
