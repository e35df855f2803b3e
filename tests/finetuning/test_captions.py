"""Captions as tokens: chunks as the pipelines cut them, whatever is drawn of a caption."""

from __future__ import annotations

import functools
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_runs import run, write_images
from transformers import CLIPTokenizer

from diffusion_fast.finetuning.captions import Captions, chunks_of, token_ids
from diffusion_fast.models.prompt import tokenize
from diffusion_fast.pipelines.tiny_tokenizer import write_tokenizer

Tiny = Callable[[str], Path]
LONG = ", ".join(f"a red cat number {i}" for i in range(30))


def test_a_long_caption_is_read_as_a_prompt(tiny_folder: Tiny, tmp_path: Path) -> None:
    """By both text encoders of SDXL; one that is dropped is as long as those beside it."""
    folder = write_images(tmp_path / "images", ((64, 64), (64, 64)))
    for number in range(2):
        (folder / f"{number}.txt").write_text(LONG)
    out = tmp_path / "out"
    for options in ({}, {"shuffle_captions": True, "keep_tokens": 30}, {"train_text": True}):
        made = run(tiny_folder("sdxl"), folder, out, caption_dropout=0.5, **options)
        who = "2 captions that are longer than one: "
        assert any(f"chunks of 75 tokens; {who}" in line for line in made.data.notes(made.method))
        text = made.parts.text
        truth = text.encode([LONG, ""])
        count = truth.context.shape[1] // 77
        assert count == len(tokenize([LONG], text.tokenizers[0]).ids[0]) > 2
        batches, seen = made.trainer().dataloader.starting_at(0), set()
        for _, (_, context) in zip(range(12), batches, strict=False):
            if "tokens" in context:
                states = text.states(context["tokens"].unbind(1))
                context = {"context": states.context, "text_embeds": states.pooled}
            for states, pooled in zip(context["context"], context["text_embeds"], strict=True):
                states = states[: truth.context.shape[1]]  # in any order there may be one more
                far = [(states - one).abs().max().item() for one in truth.context]
                which = far.index(min(far))
                assert min(far) < 1e-5
                assert (pooled - truth.pooled[which]).abs().max() < 1e-5
                seen.add(which)
        assert seen == {0, 1}


def test_captions_of_one_length_share_a_batch(tiny_folder: Tiny, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", ((64, 64),) * 5)
    (folder / "3.txt").write_text(LONG)
    made = run(tiny_folder("sd15"), folder, tmp_path / "out", steps=4, batch_size=4)
    lengths = sorted(
        (len(x_0), context["context"].shape[1])
        for _, (x_0, context) in zip(range(2), made.trainer().dataloader, strict=False)
    )
    assert lengths == [(1, 77 * made.data.examples[3].chunks), (4, 77)]
    assert len(made.train()) == 4


@functools.cache
def tokenizer() -> Any:
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder))
        return CLIPTokenizer.from_pretrained(folder)


WORDS = st.lists(
    st.sampled_from(["cat", "a", "red house", "zzzzzzzzzzz" * 9, "!", ""]), max_size=60
)


@settings(max_examples=60, deadline=None)
@given(WORDS, st.integers(0, 2**32))
def test_no_order_of_parts_needs_more_chunks(parts: list[str], seed: int) -> None:
    text = ",".join(parts)
    most = chunks_of([tokenizer()], text, shuffled=True)
    random.seed(seed)
    drawn = Captions(shuffle=True).draw(text)
    ids = token_ids([tokenizer()], drawn, chunks=most)  # an IndexError where they don't fit
    assert ids.shape == (1, 77 * most)
    whole = tokenizer()(drawn, add_special_tokens=False, verbose=False).input_ids
    special = set(tokenizer().all_special_ids)
    assert [one for one in ids[0].tolist() if one not in special] == whole


def test_short_captions_have_the_tokenizers_own_ids() -> None:
    for text in ("", "a cat", "a (red:1.3) [cat], BREAK", LONG[:60]):
        wanted = tokenizer()(text, padding="max_length", max_length=77, return_tensors="pt")
        assert torch.equal(token_ids([tokenizer()], text), wanted.input_ids)
        plain = text.replace("(", "\\(").replace(")", "\\)").replace("[", "\\[").replace("]", "\\]")
        if "BREAK" not in text:
            assert torch.equal(tokenize([plain], tokenizer()).ids[0, 0], wanted.input_ids[0])
