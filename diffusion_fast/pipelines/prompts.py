"""What prompts say in the course of a run, and what a U-Net is conditioned on by it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch

from ..conditioning import Context, PerStep
from ..models.prompt import parse
from ..models.prompt_edits import at_steps, is_edited
from ..models.text import TextStates


@dataclass(frozen=True)
class Said:
    """What prompts say.

    Attributes:
        texts: the different ones, each of all prompts.
        order: which of them it is at each step; empty where it is the same at all.
    """

    texts: list[tuple[str, ...]]
    order: list[int]


@dataclass(frozen=True)
class Told:
    """What both halves of guidance are told.

    Attributes:
        positive: of the prompts.
        negative: of the negative ones; None where their half doesn't run.
        zeros: whether zeros stand for the states of the negative ones.
    """

    positive: Said
    negative: Said | None
    zeros: bool

    def contexts(
        self,
        encode: Callable[[list[str]], TextStates],
        make: Callable[[TextStates], Context],
        make_negative: Callable[[TextStates], Context],
    ) -> tuple[Context | PerStep, Context | PerStep]:
        """The contexts of both halves.

        Args:
            encode: called once with all texts, so that their states are equally long.
            make, make_negative: a half's context from the states of its prompts.
        """
        halves = [self.positive] if self.negative is None else [self.positive, self.negative]
        every = list(dict.fromkeys(one for half in halves for said in half.texts for one in said))
        states = encode(every)

        def context(
            half: Said, make: Callable[[TextStates], Context], zeros: bool
        ) -> Context | PerStep:
            found = []
            for texts in half.texts:
                own = states[[every.index(one) for one in texts]]
                if zeros:
                    assert own.pooled is not None  # only SDXL has zeros
                    own = TextStates(torch.zeros_like(own.context), torch.zeros_like(own.pooled))
                found.append(make(own))
            return PerStep(found, half.order) if half.order else found[0]

        positive = context(self.positive, make, False)
        if self.negative is None:
            return positive, None
        return positive, context(self.negative, make_negative, self.zeros)


def said(
    name: str, prompts: Sequence[str], steps: Callable[[], int], embeddings: Collection[str] = ()
) -> Said:
    """What prompts say at each step, checked.

    Args:
        name: the argument, for errors.
        prompts: B texts.
        steps: gives the number of steps; called where a prompt changes with them.
        embeddings: words that stand for embeddings.

    Raises:
        ValueError: a text that :func:`~diffusion_fast.models.prompt.parse` refuses.
    """
    if not any(is_edited(prompt, name) for prompt in prompts):
        return Said([tuple(prompts)], [])
    count = steps()
    by_step = list(zip(*(at_steps(prompt, count, name) for prompt in prompts), strict=True))
    texts = list(dict.fromkeys(by_step))
    for text in dict.fromkeys(one for of_step in texts for one in of_step):
        parse(text, name, embeddings)
    return Said(texts, [texts.index(one) for one in by_step])
