"""Text encoders: prompts in, the states that a U-Net attends to out.

The networks and tokenizers are those of ``transformers``, imported when the first one is loaded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..files import AnyPath, CheckpointError, read_json
from ..ops import checks
from ..turns import Turns
from .clip_weights import assemble, read_states, save
from .embeddings import Embeddings
from .prompt import Tokens, tokenize
from .single_file import TextState

SUBFOLDERS = ("text_encoder", "text_encoder_2")
TOKENIZERS = ("tokenizer", "tokenizer_2")


@dataclass(frozen=True)
class TextStates:
    """What the U-Net is told of B prompts.

    Attributes:
        context: states of all tokens, [B, L, C]; L is 77 for each chunk of the longest prompt.
        pooled: one vector per prompt, [B, P], of its first chunk (SDXL), or None.
    """

    context: Tensor
    pooled: Tensor | None = None

    def __getitem__(self, prompts: slice | Sequence[int]) -> TextStates:
        pooled = None if self.pooled is None else self.pooled[prompts]
        return TextStates(self.context[prompts], pooled)


class TextEncoders:
    """The text encoders of one model: one for SD 1 and 2, two for SDXL, its second for the refiner.

    SD 1 and 2 see the last layer's states after the final norm. SDXL sees the penultimate layers'
    states of both encoders, without it, side by side; and the second one's projection, pooled at
    the end token, joins the time embedding. So does the refiner, of that one alone.

    Args:
        tokenizers: one ``CLIPTokenizer`` for each encoder.
        encoders: ``CLIPTextModel``, and ``CLIPTextModelWithProjection`` as SDXL's second one.

    Attributes:
        projected: whether the last one has a projection, as in SDXL.
    """

    def __init__(self, tokenizers: Sequence[Any], encoders: Sequence[nn.Module]) -> None:
        if len(tokenizers) != len(encoders) or len(encoders) not in (1, 2):
            got = f"{len(tokenizers)} and {len(encoders)}"
            checks.fail("tokenizers, encoders", "one or two of each", got)
        for tokenizer, encoder in zip(tokenizers, encoders, strict=True):
            known = encoder.config.vocab_size  # type: ignore[union-attr]
            if len(tokenizer) > known:  # type: ignore[operator]
                checks.fail("tokenizer", f"at most the encoder's {known} tokens", len(tokenizer))
        self.tokenizers, self.encoders = list(tokenizers), [one.eval() for one in encoders]
        self.projected = hasattr(encoders[-1], "text_projection")
        self._turns = Turns("TextEncoders")  # vectors of embeddings belong to one call
        self.embeddings = Embeddings([one.config.hidden_size for one in encoders])  # type: ignore

    @classmethod
    def from_pretrained(
        cls,
        folder: AnyPath,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        variant: str | None = None,
        tokenizer: AnyPath | None = None,
    ) -> TextEncoders:
        """The encoders in a pipeline's folder: ``text_encoder`` and, if there, ``text_encoder_2``.

        Args:
            variant: suffix of the weights' files, such as ``"fp16"``.
            tokenizer: a folder to take the tokenizers from in place of ``folder``.

        Raises:
            CheckpointError: a missing or damaged file, another kind of encoder, tensors that are
                missing, extra or misshapen (listed by name).
        """
        folder = Path(folder)
        names = [name for name in SUBFOLDERS if (folder / name).is_dir()]
        if not names:
            raise CheckpointError(f"{folder}: expected a folder {SUBFOLDERS[0]} in it")
        encoders = []
        for name in names:
            config = read_json(folder / name / "config.json")
            kind = config.get("model_type", "clip_text_model")
            if kind not in ("clip_text_model", "clip"):
                raise CheckpointError(
                    f"{folder / name / 'config.json'}: expected model_type clip_text_model"
                    f" (CLIP and OpenCLIP encoders), got {kind!r}"
                )
            if kind == "clip":  # a whole CLIP
                config = config.get("text_config") or config
            states = read_states(folder / name, dtype, device, variant)
            encoders.append(_encoder(name, config, states, folder / name))
        return cls(load_tokenizers(tokenizer or folder, names), encoders)

    @classmethod
    def from_single_file(
        cls,
        file: AnyPath,
        text: Mapping[str, TextState],
        tokenizer: AnyPath | None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> TextEncoders:
        """The encoders of a single CompVis file.

        Args:
            file: the file's path, for messages.
            text: what :func:`~.single_file.identify` found in it.
            tokenizer: folder with the tokenizer (and ``tokenizer_2`` for SDXL).

        Raises:
            CheckpointError: no encoder or no tokenizer; tensors that don't fit.
        """
        if not text:
            raise CheckpointError(f"{file}: expected a text encoder in it, found none")
        if tokenizer is None:
            raise CheckpointError(
                f"{file}: a single file holds no tokenizer; pass tokenizer= with the folder of one"
                " (a diffusers folder of the same model, or one with vocab.json and merges.txt)"
            )
        names = [name for name in SUBFOLDERS if name in text]
        tokenizers = load_tokenizers(tokenizer, names)
        encoders = []
        for name in names:
            states = text[name].load(dtype=dtype, device=device)
            encoders.append(_encoder(name, text[name].config, states, file))
        return cls(tokenizers, encoders)

    def modules(self) -> dict[str, nn.Module]:
        """The networks under their folders' names."""
        return dict(zip(self._of_them(SUBFOLDERS), self.encoders, strict=True))

    def _of_them(self, names: tuple[str, str]) -> tuple[str, ...]:
        """Names of the first, the second or both, as the encoders are there."""
        return names if len(self.encoders) == 2 else names[self.projected :][:1]

    def to(self, *args: Any, **kwargs: Any) -> TextEncoders:
        """Move or cast all encoders, as ``nn.Module.to``."""
        for encoder in self.encoders:
            encoder.to(*args, **kwargs)
        return self

    def save_pretrained(self, folder: AnyPath) -> None:
        """Write encoders and tokenizers as a pipeline's folder has them.

        Raises:
            OSError: it can't be written.
        """
        folder = Path(folder)
        for name, encoder in self.modules().items():
            save(encoder, folder / name)
        for name, tokenizer in zip(self._of_them(TOKENIZERS), self.tokenizers, strict=True):
            tokenizer.save_pretrained(folder / name)

    def check_clip_skip(self, clip_skip: Any) -> None:
        """Raise ValueError unless so many layers can be left out."""
        encoders: list[Any] = self.encoders
        most = min(one.config.num_hidden_layers for one in encoders) - 1 - self.projected
        if not isinstance(clip_skip, int) or not 0 <= clip_skip <= most:
            checks.fail("clip_skip", f"an integer in [0, {most}]", repr(clip_skip))

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], clip_skip: int = 0) -> TextStates:
        """The states of prompts.

        Weights (see :func:`~.prompt.parse`) multiply the states of their tokens; then each chunk is
        scaled so that the mean of its states is what it was (unless that is about zero, under a
        thousandth of their root mean square). Without weights, and within 75 tokens,
        the states are the encoder's own. Longer prompts are cut into chunks of 75 tokens that are
        encoded by themselves, one after the other along L; all prompts get the same number.

        Args:
            prompts: B texts; the empty one is fine. Give the prompts and the negative ones of a run
                together, so that they are equally long.
            clip_skip: how many layers to leave out at the end (0 is as trained, 1 what other tools
                often call "clip skip 2").

        Returns:
            :class:`TextStates` in the encoders' dtype.

        Raises:
            TypeError: a prompt that is no string.
            ValueError: no prompts, or more layers to skip than there are.
        """
        if not prompts:
            checks.fail("prompts", "at least one", list(prompts))
        for prompt in prompts:
            if not isinstance(prompt, str):
                raise TypeError(f"prompt: expected a string, got {type(prompt).__name__}")
        self.check_clip_skip(clip_skip)
        with self._turns:
            states = [self._states(i, prompts, clip_skip) for i in range(len(self.encoders))]
        contexts, pooled = zip(*states, strict=True)
        chunks = max(context.shape[1] for context in contexts)
        if any(context.shape[1] != chunks for context in contexts):
            checks.fail("tokenizers", "two that split prompts alike", "two that don't")
        return TextStates(torch.cat(contexts, dim=-1), pooled[-1])

    def states(self, ids: Sequence[Tensor], clip_skip: int = 0) -> TextStates:
        """The states of tokens as they are, with gradients: what training calls.

        Args:
            ids: token ids of each encoder, int64 [B, L], chunk after chunk.
            clip_skip: as for :meth:`encode`.
        """
        states = [self._chunked_states(i, one, clip_skip) for i, one in enumerate(ids)]
        contexts, pooled = zip(*states, strict=True)
        return TextStates(torch.cat(contexts, dim=-1), pooled[-1])

    def _chunked_states(
        self, number: int, ids: Tensor, clip_skip: int
    ) -> tuple[Tensor, Tensor | None]:
        """What one of the encoders says of tokens [B, L], each chunk by itself."""
        encoder: Any = self.encoders[number]
        chunks = max(1, ids.shape[1] // encoder.config.max_position_embeddings)
        rows = ids.unflatten(1, (chunks, -1)).flatten(0, 1)
        states, pooled = self._plain_states(number, rows, clip_skip)
        states = states.unflatten(0, (-1, chunks)).flatten(1, 2)
        return states, None if pooled is None else pooled.unflatten(0, (-1, chunks))[:, 0]

    def _states(
        self, number: int, prompts: Sequence[str], clip_skip: int
    ) -> tuple[Tensor, Tensor | None]:
        """What one of the encoders says of prompts."""
        encoder: Any = self.encoders[number]
        length, embeddings = encoder.config.max_position_embeddings, self.embeddings.of(number)
        tokens = tokenize(prompts, self.tokenizers[number], length, embeddings)
        with _in_place(encoder.get_input_embeddings(), tokens):
            states, pooled = self._plain_states(number, tokens.ids.flatten(0, 1), clip_skip)
        weights = tokens.weights.flatten(0, 1).to(states.device)  # [B * chunks, L]
        states = _weighted(states, weights).unflatten(0, tokens.ids.shape[:2]).flatten(1, 2)
        if pooled is not None:
            pooled = pooled.unflatten(0, tokens.ids.shape[:2])[:, 0]
        return states, pooled

    def _plain_states(
        self, number: int, ids: Tensor, clip_skip: int
    ) -> tuple[Tensor, Tensor | None]:
        """What one of the encoders says of tokens [N, L]: states [N, L, C], pooled [N, P]."""
        encoder: Any = self.encoders[number]
        most = encoder.config.num_hidden_layers - 1 - self.projected
        if not isinstance(clip_skip, int) or not 0 <= clip_skip <= most:
            checks.fail("clip_skip", f"an integer in [0, {most}]", repr(clip_skip))
        output = encoder(ids.to(next(encoder.parameters()).device), output_hidden_states=True)
        states = output.hidden_states[-1 - clip_skip - self.projected]
        if not self.projected:
            states = getattr(encoder, "text_model", encoder).final_layer_norm(states)
        return states, getattr(output, "text_embeds", None)


@contextlib.contextmanager
def _in_place(layer: nn.Module, tokens: Tokens) -> Iterator[None]:
    """While it lasts, the vectors of ``tokens`` are what a layer of token embeddings gives."""

    def put(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        output = output.clone()  # [B * chunks, L, C]
        for (i, k, j), vector in tokens.vectors.items():
            output[i * tokens.ids.shape[1] + k, j] = vector.to(output)
        return output

    handle = layer.register_forward_hook(put)
    try:
        yield
    finally:
        handle.remove()


def load_tokenizers(folder: AnyPath, encoders: Sequence[str]) -> list[Any]:
    """The tokenizers of these encoders in a pipeline's folder, or one in a folder of its own.

    Raises:
        CheckpointError: there is none, or it can't be read.
    """
    from transformers import CLIPTokenizer

    folder = Path(folder)
    found = []
    for encoder in encoders:
        name = TOKENIZERS[SUBFOLDERS.index(encoder)]
        place = folder / name if (folder / name).is_dir() else folder
        if place == folder and len(encoders) == 2 and name == TOKENIZERS[1]:
            raise CheckpointError(f"{folder}: expected a folder {name} in it (SDXL has two)")
        if not any((place / file).is_file() for file in ("vocab.json", "tokenizer.json")):
            raise CheckpointError(f"{place}: expected a tokenizer (vocab.json and merges.txt)")
        try:
            found.append(CLIPTokenizer.from_pretrained(place, local_files_only=True))
        except Exception as error:  # what the tokenizers library raises has no class of its own
            raise CheckpointError(f"{place}: not a CLIP tokenizer: {error}") from error
    return found


def _encoder(
    name: str, config: Mapping[str, Any], states: Mapping[str, Tensor], source: AnyPath
) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    kind = CLIPTextModelWithProjection if name == SUBFOLDERS[1] else CLIPTextModel
    shape = CLIPTextConfig.from_dict(dict(config))
    return assemble(lambda: kind(shape), states, Path(source))


def _weighted(states: Tensor, weights: Tensor) -> Tensor:
    """States [N, L, C] times weights [N, L], each item scaled back to its mean."""
    plain = (weights == 1).all(dim=1)
    if plain.all():
        return states
    before = states.float()
    after = before * weights[..., None]
    (mean, clear), (new_mean, still_clear) = _mean(before), _mean(after)
    scale = torch.where(clear & still_clear, mean / new_mean, 1.0)
    after *= scale[:, None, None]
    return torch.where(plain[:, None, None], states, after.to(states.dtype))


def _mean(x: Tensor) -> tuple[Tensor, Tensor]:
    """Means of the items [N, L, C], and whether they are more than rounding."""
    mean = x.mean((1, 2))
    return mean, mean.abs() > 1e-3 * x.square().mean((1, 2)).sqrt()
