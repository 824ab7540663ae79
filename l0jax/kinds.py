"""What kind of units a group has, told by the products in which they take part.

In attention two products have no parameter: queries by keys, which sums over a
dimension of heads, and weights by values, which sums over tokens. What both keep apart
are heads.
Names of modules are not looked at, so that kinds are the same for every library.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from l0jax.axes import Type, Variable, variables
from l0jax.values import Contraction

KINDS = {
    "inputs": "features of an input",
    "experts": "what a product with a parameter keeps apart",
    "heads": "what a product of activations keeps apart, and queries that share a key",
    "query-key": "what queries by keys is summed over",
    "value": "what weights by values makes",
    "stream": "what several products read and, through others, make again",
    "feed-forward": "what dense layers make and one reads",
    "channels": "what a convolution makes or reads",
}
"""Each kind, and what it is."""


def kinds(
    contractions: Sequence[Contraction],
    name_of: Mapping[Variable, str],
    inputs: Iterable[str],
    ranks: Mapping[str, int],
) -> dict[str, str]:
    """The kind of each group.

    Args:
        contractions: the products of the program.
        name_of: the group of each variable that is one.
        inputs: groups that lie in inputs.
        ranks: how many axes each parameter has. (A convolution may be written as a
            product of patches.)
    """

    def groups(axes: Iterable[Type]) -> Iterator[str]:
        for axis in axes:
            yield from (name_of[v] for v in variables(axis) if v in name_of)

    found: dict[str, str] = dict.fromkeys(inputs, "inputs")

    def said(kind: str, axes: Iterable[Type]) -> None:
        for name in groups(axes):
            found.setdefault(name, kind)

    dense = [each for each in contractions if each.primitive == "dot_general"]
    for each in dense:
        if not each.of_activations:
            said("experts", each.apart)
    of_activations = [each for each in dense if each.of_activations]
    scores = [each for each in of_activations if any(groups(each.summed))]
    for each in of_activations:
        said("heads", each.apart)
    for each in scores:
        said("query-key", each.summed)
    for each in scores:
        said("heads", each.free)
    for each in of_activations:
        said("value", each.free)
    others = [each for each in contractions if not each.of_activations]
    read_by: dict[str, set[str]] = {}
    makes: dict[str, set[str]] = {}
    for each in others:
        for name in groups(each.summed):
            read_by.setdefault(name, set()).add(each.kernel or each.where)
            makes.setdefault(name, set()).update(groups(each.free), groups(each.apart))
    windows = {
        name
        for each in others
        if each.primitive != "dot_general" or ranks.get(each.kernel or "", 0) > 3
        for name in groups((*each.summed, *each.free, *each.apart))
    }
    for name in dict.fromkeys(name_of.values()):
        if name in found:
            continue
        if len(read_by.get(name, ())) > 1 and name in _after(name, makes):
            found[name] = "stream"
        else:
            found[name] = "channels" if name in windows else "feed-forward"
    return {name: found[name] for name in dict.fromkeys(name_of.values())}


def _after(name: str, makes: Mapping[str, set[str]]) -> set[str]:
    """The groups that are made of a group, through others or not."""
    seen: set[str] = set()
    ahead = [*makes.get(name, ())]
    while ahead:
        each = ahead.pop()
        if each not in seen:
            seen.add(each)
            ahead += makes.get(each, ())
    return seen
