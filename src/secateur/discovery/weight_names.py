"""Names of weights -> shorter ones for tables: layers as a star, numbers as ranges."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from secateur.discovery.groups import Discovery

NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
SHORTEST_STEPPED_RANGE = 4  # numbers that are written as a range with a step


def without_layer_number(text: str, layer: int) -> str:
    """The name of a weight, or a text with such names, with a star for the number of the layer.

    >>> without_layer_number("model.layers.3.mlp.experts.3.up_proj", 3)
    'model.layers.*.mlp.experts.3.up_proj'
    """
    return re.sub(rf"(?<![.\w])((?:[A-Za-z_]\w*\.)+){layer}\.", r"\g<1>*.", text)


def without_numbers(name: str) -> str:
    """The name of a weight or group without its numbers: the same for all layers and experts.

    >>> without_numbers("layers.3.experts.0.weight")
    'layers.experts.weight'
    """
    return ".".join(piece for piece in name.split(".") if not piece.isdigit())


class ShortNames:
    """Short names for weights: without the layer, and no longer than it takes to tell them apart."""

    def __init__(self, discovery: Discovery) -> None:
        self.shapes = {weight.name: weight.shape for weight in discovery.weights}
        self._all = [weight.name for weight in discovery.weights]
        self._alike = {
            weight.name: (weight.name if weight.layer is None else without_layer_number(weight.name, weight.layer))
            for weight in discovery.weights
        }
        self._members = Counter(self._alike.values())
        layers = f"{discovery.layer_lists[0]}.*." if len(discovery.layer_lists) == 1 else ""
        paths = {name: name.removesuffix(".weight").removesuffix(".*").removeprefix(layers) for name in self._members}
        self._wholes = Counter(paths.values())
        self._ends = Counter(end for path in paths.values() for end in _ends(path))
        self._short = {name: self._shortened(path) or name for name, path in paths.items()}

    def _shortened(self, path: str) -> str | None:
        """The shortest end of the path that no other has and that begins with a word."""
        for end in _ends(path):
            first = end.split(".")[0]
            if self._ends[end] == 1 and first not in ("*", "bias") and not first.isdigit():
                return end
        return path if self._wholes[path] == 1 else None

    def of(self, weights: Sequence[str]) -> tuple[str, ...]:
        """Names for some weights of one layer; for those of several layers, too, if no such layer is left out."""
        layers = Counter(self._alike[weight] for weight in weights)
        one_layer = all(count == 1 for count in layers.values())
        whole = {name for name, count in layers.items() if one_layer or count == self._members[name]}
        short = dict.fromkeys(self._short[self._alike[w]] for w in weights if self._alike[w] in whole)
        rest = [weight.removesuffix(".weight") for weight in weights if self._alike[weight] not in whole]
        return (*short, *fold_names(rest, self._all))


def _ends(path: str) -> list[str]:
    """Every end of a dotted path, the shortest first."""
    parts = path.split(".")
    return [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]


def fold_names(names: Iterable[str], among: Iterable[str] = ()) -> tuple[str, ...]:
    """Names that differ by a number only, once: a star for all the numbers there are `among` these, braces for some.

    >>> fold_names(["h.0.q", "h.2.q", "h.0.k", "h.1.k", "h.2.k"], ["h.0.k", "h.1.k", "h.2.k"])
    ('h.{0,2}.q', 'h.*.k')
    """
    everywhere: dict[str, set[str]] = defaultdict(set)
    for name in among:
        for match in NUMBER.finditer(name):
            everywhere[name[: match.start() - 1]].add(match[0])
    folded = [tuple(name.split(".")) for name in names]
    for place in range(max(map(len, folded), default=0)):
        alike: dict[tuple[str, ...], list[str]] = defaultdict(list)
        for path in folded:
            if place < len(path):
                number = path[place].isdigit()
                alike[(*path[:place], "#" if number else path[place], *path[place + 1 :])].append(path[place])
            else:
                alike[path].append("")
        folded = [
            (*path[:place], _numbers(found, everywhere[".".join(path[:place])]), *path[place + 1 :])
            if place < len(path) and path[place] == "#"
            else path
            for path, found in alike.items()
        ]
    return tuple(".".join(path) for path in folded)


def _numbers(found: Sequence[str], all_of_them: set[str]) -> str:
    if len(found) == 1:
        return found[0]
    return "*" if set(found) == all_of_them else "{" + format_ranges(sorted(map(int, found))).replace(", ", ",") + "}"


def format_ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as ranges, with steps, or as a range and what it lacks, whichever is shorter.

    >>> format_ranges([0, 1, 2, 5]), format_ranges(range(0, 24, 2)), format_ranges([n for n in range(30) if n % 6 != 2])
    ('0-2, 5', '0-22 by 2', '0-29 except 2-26 by 6')
    """
    plain = _ranges(numbers)
    if len(numbers) < SHORTEST_STEPPED_RANGE:
        return plain
    lacking = sorted(set(range(numbers[0], numbers[-1] + 1)) - set(numbers))
    but = f"{numbers[0]}-{numbers[-1]} except {_ranges(lacking)}"
    return but if lacking and len(but) < len(plain) else plain


def _ranges(numbers: Sequence[int]) -> str:
    found = []
    at = 0
    while at < len(numbers):
        end = at + 1
        step = numbers[end] - numbers[at] if end < len(numbers) else 1
        while end < len(numbers) and numbers[end] - numbers[end - 1] == step:
            end += 1
        if end - at < (2 if step == 1 else SHORTEST_STEPPED_RANGE):
            end = at + 1
            found.append(str(numbers[at]))
        else:
            found.append(f"{numbers[at]}-{numbers[end - 1]}" + (f" by {step}" if step > 1 else ""))
        at = end
    return ", ".join(found)
