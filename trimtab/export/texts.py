"""Text encoders with their tokenizers: the parts of a pipeline that make prompts its denoiser's conditioning.

Each function adds the program's inputs, the encoder's graph and its call. The model is let go on return.
"""

from __future__ import annotations

from typing import Any

import torch

from trimtab.errors import ExportError, first_line
from trimtab.export import encoders
from trimtab.export.examples import ROWS, mask_example, tokens_example
from trimtab.export.parts import PipelineParts
from trimtab.export.trace import Example
from trimtab.program import TensorSpec


def clip(
    parts: PipelineParts,
    suffix: str,
    hidden: str | None,
    pooled: str | None,
    *,
    masks: bool = False,
    length_of: str | None = None,
) -> None:
    """A CLIP encoder with its tokenizer: tokens -> hidden{suffix}, pooled{suffix}.

    ``masks``: the pipeline hands over an attention mask where the encoder's configuration says so.
    ``length_of``: the tokenizer that says how many tokens a prompt has, where that is another one.
    """
    model = parts.source.load("text_encoder" + suffix)
    masks = masks and bool(getattr(model.config, "use_attention_mask", False))
    tokens = "tokens" + suffix
    length = int(model.config.max_position_embeddings)
    tokenizer = "tokenizer" + suffix
    parts.tokens(tokens, tokenizer, length, mask=masks, length_of=length_of or tokenizer)
    outputs = [n for n, wanted in (("hidden", hidden), ("pooled", pooled)) if wanted]
    inputs = {"tokens": tokens_example()}
    wires = {"tokens": tokens}
    if masks:
        inputs["attention_mask"] = mask_example()
        wires["attention_mask"] = f"{tokens}_mask"
    parts.add("text_encoder" + suffix, encoders.ClipText(model, hidden, pooled), inputs, outputs)
    parts.call("text_encoder" + suffix, wires, {n: n + suffix for n in outputs})


def t5(parts: PipelineParts, suffix: str, length: int) -> None:
    """A T5 encoder with its tokenizer: tokens -> hidden{suffix}."""
    parts.tokens("tokens" + suffix, "tokenizer" + suffix, length)
    model = parts.source.load("text_encoder" + suffix)
    parts.add("text_encoder" + suffix, encoders.T5Text(model), {"tokens": tokens_example()}, ["hidden"])
    parts.call("text_encoder" + suffix, {"tokens": "tokens" + suffix}, {"hidden": "hidden" + suffix})


def masked_t5(parts: PipelineParts, length: int, *, lowercase: bool, reads_padding: bool) -> None:
    """A T5 encoder that is told which tokens are padding, as the denoiser is: tokens -> hidden, hidden_mask.

    ``lowercase``: what the pipeline makes of prompts first.
    ``reads_padding``: the denoiser reads padding too, and takes its first token for a word.
    """
    open_length = not reads_padding
    parts.tokens("tokens", "tokenizer", length, mask=True, open_length=open_length, lowercase=lowercase)
    parts.add(
        "text_encoder",
        encoders.MaskedT5Text(parts.source.load("text_encoder"), reads_padding),
        {"tokens": tokens_example(), "attention_mask": mask_example()},
        ["hidden", "mask"],
    )
    parts.call(
        "text_encoder",
        {"tokens": "tokens", "attention_mask": "tokens_mask"},
        {"hidden": "hidden", "mask": "hidden_mask"},
    )


def instructed(parts: PipelineParts, kept: int, instruction: str) -> None:
    """A language model that is given an instruction before each prompt: tokens -> hidden, hidden_mask.

    Its tokens are all of the instruction's and ``kept`` of the prompt's, less one at either end: the first of all, and
    the space that the instruction ends with, which becomes part of the prompt's first word.
    """
    length = len(parts.source.load("tokenizer").encode(instruction)) + kept - 2
    parts.tokens(
        "tokens",
        "tokenizer",
        length,
        mask=True,
        open_length=True,
        lowercase=True,
        instruction=instruction,
        negative_length=kept,
    )
    parts.inputs.append(TensorSpec("positive", "float32", ("rows*batch", 1), {"kind": "positive"}))
    left_out = length - kept
    parts.add(
        "text_encoder",
        encoders.InstructedText(parts.source.load("text_encoder"), left_out),
        {
            "tokens": tokens_example(left_out),
            "attention_mask": mask_example(left_out),
            "positive": Example(torch.ones(ROWS, 1), ("prompts", None)),
        },
        ["hidden", "mask"],
    )
    parts.call(
        "text_encoder",
        {"tokens": "tokens", "attention_mask": "tokens_mask", "positive": "positive"},
        {"hidden": "hidden", "mask": "hidden_mask"},
    )


def chat(
    parts: PipelineParts,
    length: int,
    layers: tuple[int, ...],
    *,
    thinking: bool,
    masks: bool,
) -> None:
    """A language model that is asked in its chat template: tokens -> hidden, hidden_mask.

    ``layers``: whose hidden states are taken.
    ``thinking``: what the pipeline asks the template for.
    ``masks``: whether the denoiser is told which tokens are words, and reads no others.

    Raises:
        ExportError: It has fewer layers, or no template that can be written around a prompt.
    """
    around = _around(parts.source.load("tokenizer"), thinking)
    model = parts.source.load("text_encoder")
    if model.config.num_hidden_layers < max(layers):
        raise ExportError(
            f"the text encoder has {model.config.num_hidden_layers} layers, and the pipeline reads behind the "
            f"{max(layers)}th: give another"
        )
    _asked(parts, length, encoders.ChatText(model, layers, masks), around)


def templated(
    parts: PipelineParts, kept: int, around: tuple[str, str], left_out: int, instruction: str
) -> None:
    """The language model of one that sees, asked in a template of the pipeline's: tokens -> hidden, hidden_mask.

    What sees is let go, unread.

    Args:
        parts: Grows.
        kept: Tokens of a text, at the most, behind those that are left out.
        around: What stands before a prompt and behind it.
        left_out: Tokens in front of every text that are not kept: as many as the template begins with.
        instruction: Stands before prompts that are not negative.

    Raises:
        ExportError: The tokenizer leaves nothing of an empty text.
    """
    found = len(parts.source.load("tokenizer")("".join(around)).input_ids)
    if found <= left_out:
        raise ExportError(
            f"the tokenizer makes {found} tokens of the pipeline's template, of which the first {left_out} are left "
            "out: copy the tokenizer again"
        )
    model = parts.source.load("text_encoder").model.language_model
    model.rotary_emb = encoders.TextPlaces(model.rotary_emb)
    _asked(parts, left_out + kept, encoders.ChatText(model, (-1,), True, left_out), around, instruction)


def _asked(
    parts: PipelineParts, length: int, text: encoders.ChatText, around: tuple[str, str], instruction: str = ""
) -> None:
    """Adds a language model that is asked for prompts within a text."""
    before, after = around
    said = {"instruction": instruction} if instruction else {}
    parts.tokens(
        "tokens", "tokenizer", length, mask=True, open_length=text.masks, prefix=before, suffix=after, **said
    )
    parts.add(
        "text_encoder",
        text,
        {"tokens": tokens_example(text.left_out), "attention_mask": mask_example(text.left_out)},
        ["hidden", "mask"] if text.masks else ["hidden"],
    )
    parts.call(
        "text_encoder",
        {"tokens": "tokens", "attention_mask": "tokens_mask"},
        {"hidden": "hidden", **({"mask": "hidden_mask"} if text.masks else {})},
    )


def _around(tokenizer: Any, thinking: bool) -> tuple[str, str]:
    """What a tokenizer's chat template writes before a prompt and behind it.

    Raises:
        ExportError: It has none, or one that changes prompts.
    """

    def asked(prompt: str) -> str:
        messages = [{"role": "user", "content": prompt}]
        try:
            return str(
                tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
                )
            )
        except Exception as error:  # jinja's and transformers' share no base
            raise ExportError(
                f"the tokenizer's chat template cannot be used ({first_line(error)}): copy the tokenizer again"
            ) from error

    mark = "\ue000"  # for private use: in no template
    before, _, after = asked(mark).partition(mark)
    prompt = " a Prompt\n"
    if asked(prompt) != before + prompt + after:
        raise ExportError(
            "the tokenizer's chat template changes the prompt, and one that writes around it is supported: give another"
        )
    return before, after
