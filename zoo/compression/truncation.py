"""The controls of prompt compression: a text cut at its beginning or in its middle.

The question and the instruction stay. A model that reads the last tokens of a text alone is what
every compression has to beat (Bai 2023, LongBench, section 4.1, cuts the middle, arXiv 2308.14508).
"""

from zoo.compression.prompt import Prompt
from zoo.compression.scorer import Scorer
from zoo.errors import choose


def compress(
    _scorer: Scorer | None, prompt: Prompt, budget: int, *, side: str = "left"
) -> list[int]:
    """Keep the last tokens of a prompt's demonstrations (side=left), or the first and the last.

    Args:
        budget: tokens to keep.
        side: left or middle, what is dropped.
    """
    choose("side", side, ["left", "middle"])
    inside = [number for part in prompt.demonstrations for number in part]
    fixed = [*prompt.instruction, *prompt.question]
    if not inside:
        inside, fixed = fixed, []
    room = max(budget - prompt.size(fixed), 0)
    first = room // 2 if side == "middle" else 0
    ahead = _until(prompt, inside, first)
    behind = _until(prompt, inside[::-1], room - prompt.size(ahead))
    return sorted({*fixed, *ahead, *behind})


def _until(prompt: Prompt, numbers: list[int], room: int) -> list[int]:
    """The first of these pieces that fit into so many tokens."""
    found = []
    for number in numbers:
        room -= prompt.size([number])
        if room < 0:
            break
        found.append(number)
    return found
