"""The divergence of the loss, a weighted sum of named divergences: "forward-kl:0.7,js(0.1):0.3".

    spec    term {"," term}                 a weighted sum
    term    name ["(" number {"," number} ")"] [":" weight]           weight 1 if none is given
    name    one of DIVERGENCES, or the import path of a function: my_module.my_function

A specification is parsed once to a frozen `DivergenceSum`; `str` of it parses to an equal one. Losses on entries call
`soft_losses`, a few operations on [n, K+1] numbers; those on full distributions `full_soft_losses`, on [n, V].
"""

from __future__ import annotations

import difflib
import functools
import importlib
import math
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipeline.losses import divergences as d
from pipeline.losses.entries import TargetEntries
from pipeline.losses.tails import TAIL_POLICIES, UNBIASED, StudentValues, TailPolicy, distributions

OVER_CLASSES: tuple[TailPolicy, ...] = tuple(tail for tail in TAIL_POLICIES if tail not in UNBIASED)
FORWARD_KL = "forward-kl"


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """A divergence and the facts about it that its formula does not show.

    Attributes:
        function: log p, log q [n, C], *parameters → [n]; with `of_entries`, on log p and logits of the K exact entries.
        parameters: default of each, by name.
        between: open interval for the parameters; closed at 0 if `with_zero`.
        tails: tail policies it can be used with.
        power: the factor T^power keeps the gradient independent of T. It is 2 if D is quadratic near agreement, where
            p − q shrinks as 1/T and dz as well; 1 for total variation, whose gradient is a sign.
    """

    function: Callable[..., Tensor]
    parameters: dict[str, float] = field(default_factory=dict)
    between: tuple[float, float] = (0.0, 1.0)
    with_zero: bool = False
    tails: tuple[TailPolicy, ...] = OVER_CLASSES
    of_entries: bool = False
    power: int = 2


DIVERGENCES: dict[str, Divergence] = {
    # A lambda looks the function up when it is called, so that a test can replace it.
    FORWARD_KL: Divergence(function=lambda p, q: d.forward_kl(p, q), tails=TAIL_POLICIES),
    "reverse-kl": Divergence(function=d.reverse_kl, tails=("bucket", "renormalise")),
    "js": Divergence(function=d.js, parameters={"beta": 0.5}),
    "skew-forward-kl": Divergence(function=d.skew_forward_kl, parameters={"skew": 0.1}),
    "skew-reverse-kl": Divergence(function=d.skew_reverse_kl, parameters={"skew": 0.1}),
    "tvd": Divergence(function=d.tvd, power=1),
    "alpha-beta": Divergence(
        function=d.alpha_beta,
        parameters={"alpha": 0.5, "beta": 0.5},
        between=(0.0, math.inf),
        with_zero=True,
        tails=("bucket", "renormalise"),
    ),
    "logit-mse": Divergence(function=d.logit_mse, of_entries=True),
    "pairwise": Divergence(function=d.pairwise, of_entries=True),
}

_TERM = re.compile(r"(?P<name>[\w.-]+)(?:\((?P<parameters>[^()]*)\))?(?::(?P<weight>[^:()]+))?")


@dataclass(frozen=True)
class Term:
    """One divergence of a sum. `name`: of DIVERGENCES, or an import path."""

    name: str
    parameters: tuple[float, ...] = ()
    weight: float = 1.0

    def __str__(self) -> str:
        parameters = f"({','.join(map(_number, self.parameters))})" if self.parameters else ""
        return self.name + parameters + ("" if self.weight == 1.0 else f":{_number(self.weight)}")

    @property
    def divergence(self) -> Divergence:
        return DIVERGENCES.get(self.name) or Divergence(function=_user_function(self.name))


@dataclass(frozen=True)
class DivergenceSum:
    """Σ weight·T^(power−2)·D, to be multiplied by T²."""

    terms: tuple[Term, ...]

    def __str__(self) -> str:
        return ",".join(map(str, self.terms))

    @property
    def is_forward_kl(self) -> bool:
        return self.terms == (Term(FORWARD_KL),)

    @property
    def tails(self) -> tuple[TailPolicy, ...]:
        """Tail policies that every term can use."""
        return tuple(tail for tail in TAIL_POLICIES if all(tail in term.divergence.tails for term in self.terms))

    def check_tail(self, tail: TailPolicy) -> None:
        """Raises: ValueError if a term cannot use this tail policy, with the reason."""
        if tail not in TAIL_POLICIES:
            raise ValueError(f"`tail` {tail}: expected one of {', '.join(TAIL_POLICIES)}.")
        for term in self.terms:
            if tail in term.divergence.tails:
                continue
            if tail == "label":
                why = "it takes the logarithm of teacher probabilities, which are then 0 outside entries and label"
            elif term.divergence.of_entries:
                why = "it compares exact entries only"
            else:
                why = "a sampled tail is unbiased only for losses that are linear in the teacher's probabilities"
            options = " or ".join(f"`tail={each}`" for each in self.tails)
            raise ValueError(
                f"`tail` {tail} with `divergence={self}`: {term.name} cannot use it, because {why}. Use {options}, or "
                "`divergence=forward-kl`."
            )

    @staticmethod
    @functools.lru_cache(maxsize=256)
    def parse(text: str | DivergenceSum) -> DivergenceSum:
        """Parses a specification. Raises: ValueError, one line: what was found, what was expected, what to do."""
        if isinstance(text, DivergenceSum):
            return text
        return DivergenceSum(tuple(_parse_term(term.strip(), text) for term in re.split(r",(?![^(]*\))", text)))


def soft_losses(
    targets: TargetEntries,
    student: StudentValues,
    tail: TailPolicy,
    temperature: float,
    vocab_size: int,
    divergence: DivergenceSum,
    reported: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """[n] KL(teacher‖student), which compares runs, and [n] the divergence that is trained; often the same tensor.

    Args:
        targets, student, tail, temperature, vocab_size: as for `divergences.soft_loss`.
        reported: the KL, if it has another tail policy than the loss.
    """
    return _kl_and_divergence(
        divergence,
        temperature,
        reported=reported,
        kl=lambda: d.soft_loss(targets, student, tail, temperature, vocab_size),
        classes=lambda: _comparable(*distributions(targets, student, tail, temperature, vocab_size)),
        numbers=lambda: (targets.logprobs * (targets.temperature / temperature), student.entries),
    )


def full_soft_losses(
    log_p: Tensor, log_q: Tensor, z: Tensor, temperature: float, divergence: DivergenceSum
) -> tuple[Tensor, Tensor]:
    """`soft_losses` on full distributions: every token is a class and an entry.

    Args:
        log_p, log_q: [n, V] log-probabilities at temperature T.
        z: [n, V] the student's logits divided by T; log q is their log-softmax.
    """
    return _kl_and_divergence(
        divergence,
        temperature,
        kl=lambda: (log_p.exp() * (log_p - log_q)).sum(dim=1),  # log p of a softmax is never -inf, so no check
        classes=lambda: (log_p, log_q),
        numbers=lambda: (log_p, z),
    )


Pair = tuple[Tensor, Tensor]


def _kl_and_divergence(
    divergence: DivergenceSum,
    temperature: float,
    *,
    kl: Callable[[], Tensor],
    classes: Callable[[], Pair],
    numbers: Callable[[], Pair],
    reported: Tensor | None = None,
) -> Pair:
    """Both results of `soft_losses`; computes only what is needed.

    Args:
        kl: the KL under the tail policy of the loss.
        classes: log p, log q [n, C]. numbers: log p and the student's logits at the entries [n, K].
    """
    if divergence.is_forward_kl:
        found = kl()
        return found if reported is None else reported, found
    part = any(term.name == FORWARD_KL for term in divergence.terms)
    forward = reported
    if part or reported is None:
        with torch.set_grad_enabled(torch.is_grad_enabled() and part):
            forward = kl()
    assert forward is not None
    both = None
    total = torch.zeros_like(forward)
    for term in divergence.terms:
        kind = term.divergence
        if term.name == FORWARD_KL:
            value = forward
        elif kind.of_entries:
            value = kind.function(*numbers(), *term.parameters)
        else:
            both = both or classes()
            value = kind.function(*both, *term.parameters)
        total = total + term.weight * temperature ** (kind.power - 2) * value
    return forward if reported is None else reported, total


def _comparable(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """At a position without classes (renormalise, no entries) the teacher is set equal to the student: D is 0."""
    some = (log_p > -torch.inf).any(dim=1, keepdim=True)
    return torch.where(some, log_p, log_q.detach()), log_q


def _parse_term(text: str, whole: str) -> Term:
    found = _TERM.fullmatch(text)
    if found is None:
        raise ValueError(
            f"`divergence` {whole}: found {text!r}, expected NAME, NAME(NUMBER), NAME:WEIGHT, or several separated by "
            "commas, as in forward-kl:0.7,js(0.1):0.3."
        )
    name = found["name"]
    weight = 1.0 if found["weight"] is None else _parse_number(found["weight"])
    if weight is None or not 0.0 < weight < math.inf:
        dotted = f"{name}.{found['weight']}"
        own = name not in DIVERGENCES and all(part.isidentifier() for part in dotted.split("."))
        raise ValueError(
            f"`divergence` {whole}: found weight {found['weight']} for {name}, expected a number above 0."
            + (f" A function of your own is written {dotted}." if own else "")
        )
    kind = DIVERGENCES.get(name)
    if kind is None:
        if "." not in name or not all(part.isidentifier() for part in name.split(".")):
            near = difflib.get_close_matches(name, DIVERGENCES, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise ValueError(
                f"`divergence` {whole}: unknown divergence {name}{hint}, expected {', '.join(DIVERGENCES)}, or a "
                "function of your own as my_module.my_function."
            )
        if found["parameters"] is not None:
            raise ValueError(f"`divergence` {whole}: a function of your own takes no parameters. Use {name}.")
        _user_function(name)
        return Term(name, (), weight)
    if found["parameters"] is None:
        return Term(name, tuple(kind.parameters.values()), weight)
    given = [part.strip() for part in found["parameters"].split(",")]
    if len(given) != len(kind.parameters):
        names = ",".join(kind.parameters)
        raise ValueError(f"`divergence` {whole}: found {text}, expected {f'{name}({names})' if names else name}.")
    low, high = kind.between
    numbers = []
    for parameter, each in zip(kind.parameters, given, strict=True):
        number = _parse_number(each)
        if number is None or not (low < number < high or (kind.with_zero and number == 0.0)):
            expected = "a number" + (f" between {low:g} and {high:g}" if high < math.inf else ", 0 or more")
            ends = " At the ends use forward-kl or reverse-kl." if high < math.inf else ""
            raise ValueError(f"`divergence` {whole}: found {parameter}={each} for {name}, expected {expected}.{ends}")
        numbers.append(number)
    return Term(name, tuple(numbers), weight)


def _parse_number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(value)


@functools.lru_cache(maxsize=64)
def _user_function(path: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Imports a user's function, also from the current directory, as `python -m` does.

    It is called with finite numbers only: `FLOOR` for log 0, `ABSENT` on both sides for a class that does not exist.
    """
    module_name, _, name = path.rpartition(".")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # a module that the user's module imports is missing
        raise ValueError(
            f"`divergence` {path}: no module {error.name} in the current directory or on Python's path. Check the "
            "name, or run in the directory of the module."
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        found = "nothing with that name" if function is None else f"a {type(function).__name__}"
        raise ValueError(
            f"`divergence` {path}: found {found} in {module_name}, expected a function of log p and log q."
        )

    def checked(log_p: Tensor, log_q: Tensor) -> Tensor:
        there = log_q > d.ABSENT / 1e6  # ABSENT may have been divided by T
        sides = d.floored(log_p, log_q)
        value = function(*(torch.where(there, side, d.ABSENT) for side in sides))
        if not isinstance(value, Tensor) or value.shape != log_p.shape[:1]:
            what = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"`divergence` {path}: returned {what} for log p, log q of shape {list(log_p.shape)}, expected "
                f"[{len(log_p)}]: one number per position, such as (…).sum(dim=1)."
            )
        return value

    log_p, log_q = torch.tensor([[[0.5, 0.3, 0.2], [0.9, 0.1, 0.0]], [[0.3, 0.3, 0.4], [0.2, 0.7, 0.1]]]).log()
    checked(log_p, log_q)  # fail now and not during a run
    return checked
