"""Pipelines of the size of Stable Diffusion 1.5, DiT-XL/2, PixArt or Sana, with random weights: nothing is downloaded.

    python benchmarks/models.py FOLDER [--part unet|vae|whole|narrow|dit|pixart|sana|none] [--half]

A part that is not wanted at its real size is made tiny, so that the folder is a whole pipeline all the same.
Random weights cost the same time and memory as trained ones.
"""

from __future__ import annotations

import argparse
import json
import string
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

UNET_PARAMETERS = 859_520_964
"""Of Stable Diffusion 1.5's U-Net; what is made here is held against it."""


DIT_XL_2: dict[str, Any] = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "sample_size": 32,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
}
"""The published transformer's configuration, for diffusers."""


def make(folder: Path, part: str, *, half: bool = False) -> None:
    """Writes a pipeline in a process of its own, whose memory is gone before anything is measured.

    Args:
        folder: Where to.
        part: What is made at its real size: "unet", "vae", "whole" or "none"; "narrow" is a U-Net of the real one's
            depth and levels, a tenth of its width and half its side. "dit" is DiT-XL/2 for 256x256 pixels instead,
            "pixart" PixArt-Sigma's transformer for the same, "sana" that of Sana of 0.6 billion for 512x512.
        half: In FP16.

    Raises:
        subprocess.CalledProcessError: It could not be made.
    """
    command = [sys.executable, __file__, str(folder), "--part", part, *(["--half"] if half else [])]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def _write(folder: Path, part: str, half: bool) -> None:
    import torch
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from diffusers.utils import logging
    from transformers import CLIPTextConfig, CLIPTextModel

    logging.set_verbosity_error()
    torch.manual_seed(0)
    if part in ("dit", "pixart", "sana"):
        pipeline = {"dit": _dit, "pixart": _pixart, "sana": _sana}[part]()
        pipeline.to(torch.float16 if half else torch.float32).save_pretrained(folder)
        return
    whole, real, real_vae = part == "whole", part in ("whole", "unet"), part in ("whole", "vae")
    narrow = part == "narrow"
    width = 768 if real else 16
    # The numbers of the checkpoint's own config.json files; the tiny ones keep the structure.
    unet = UNet2DConditionModel(
        sample_size=64 if real else 32 if narrow else 8,
        block_out_channels=(320, 640, 1280, 1280)
        if real
        else (32, 64, 128, 128)
        if narrow
        else (8, 16, 16, 16),
        cross_attention_dim=width,
        attention_head_dim=8 if real else 2,
        norm_num_groups=32 if real else 4,
    )
    count = sum(parameter.numel() for parameter in unet.parameters())
    assert count == UNET_PARAMETERS or not real, count
    text = CLIPTextConfig(
        vocab_size=49408 if whole else 80,
        hidden_size=width,
        intermediate_size=4 * width if whole else 16,
        num_hidden_layers=12 if whole else 1,
        num_attention_heads=12 if real else 2,
        max_position_embeddings=77,
        projection_dim=width,
        hidden_act="quick_gelu",
        bos_token_id=74,
        eos_token_id=75,
        pad_token_id=75,
    )
    pipeline = StableDiffusionPipeline(
        vae=_vae(real_vae, 512 if real else 64),
        text_encoder=CLIPTextModel(text),
        tokenizer=_tokenizer(),
        unet=unet,
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16 if half else torch.float32).save_pretrained(folder)


def _dit() -> Any:
    """DiT-XL/2, its embedders equal in every block as in the published checkpoint, and a tiny decoder."""
    import torch
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    transformer = DiTTransformer2DModel(**DIT_XL_2)
    first = transformer.transformer_blocks[0].norm1.emb.state_dict()
    with torch.no_grad():
        for block in transformer.transformer_blocks:
            block.norm1.emb.load_state_dict(first)
    return DiTPipeline(
        transformer=transformer,
        vae=_vae(False, 256),
        scheduler=DDIMScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear", clip_sample=False),
        id2label={i: f"thing {i}" for i in range(1000)},
    )


def _pixart() -> Any:
    """PixArt-Sigma for 256x256 pixels and 300 tokens, with a T5 of one thin layer and a tiny decoder."""
    from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel
    from transformers import T5Config, T5EncoderModel

    transformer = PixArtTransformer2DModel(
        num_attention_heads=16,
        attention_head_dim=72,
        in_channels=4,
        out_channels=8,
        num_layers=28,
        sample_size=32,
        cross_attention_dim=1152,
        caption_channels=4096,
        use_additional_conditions=False,
    )
    text = T5Config(
        vocab_size=100,
        d_model=4096,
        d_kv=16,
        d_ff=64,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return PixArtSigmaPipeline(
        transformer=transformer,
        vae=_vae(False, 256),
        scheduler=DPMSolverMultistepScheduler(),
        text_encoder=T5EncoderModel(text),
        tokenizer=_t5_tokenizer(),
    )


def _sana() -> Any:
    """Sana of 0.6 billion for 512x512 pixels, with a Gemma of one thin layer and a tiny decoder."""
    from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel
    from transformers import Gemma2Config, Gemma2Model

    transformer = SanaTransformer2DModel(
        num_layers=28,
        num_attention_heads=36,
        attention_head_dim=32,
        num_cross_attention_heads=16,
        cross_attention_head_dim=72,
        cross_attention_dim=1152,
        caption_channels=2304,
        sample_size=16,
    )
    text = Gemma2Config(
        vocab_size=100,
        hidden_size=2304,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    )
    levels: dict[str, Any] = {}
    for side in ("encoder", "decoder"):
        levels[f"{side}_block_types"] = ("ResBlock",) * 5 + ("EfficientViTBlock",)
        levels[f"{side}_block_out_channels"] = (8, 8, 16, 16, 32, 32)
        levels[f"{side}_layers_per_block"] = (1,) * 6
        levels[f"{side}_qkv_multiscales"] = ((),) * 5 + ((5,),)
    return SanaPipeline(
        transformer=transformer,
        vae=AutoencoderDC(attention_head_dim=8, **levels),
        scheduler=DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        text_encoder=Gemma2Model(text),
        tokenizer=_gemma_tokenizer(),
    )


def _vae(real: bool, size: int) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512) if real else (8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2 if real else 1,
        norm_num_groups=32 if real else 4,
        latent_channels=4,
        sample_size=size,
    )


def _tokenizer() -> Any:
    """A CLIP tokenizer that spells letter by letter: the length of what it gives is what costs time."""
    from transformers import CLIPTokenizer

    letters = string.ascii_lowercase + string.digits + "!"
    tokens = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as files:
        vocabulary, merges = Path(files, "vocab.json"), Path(files, "merges.txt")
        vocabulary.write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
        merges.write_text("#version: 0.2\n")
        return CLIPTokenizer(str(vocabulary), str(merges), pad_token="<|endoftext|>", model_max_length=77)


def _t5_tokenizer() -> Any:
    """One shaped like T5's: a token a letter, </s> at the end, <pad> behind."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokens = ["<pad>", "</s>", "<unk>", *string.ascii_lowercase, *string.digits]
    words = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="</s>", unk_token="<unk>", pad_token="<pad>", model_max_length=300
    )


def _gemma_tokenizer() -> Any:
    """One shaped like Gemma's: a token a letter, <bos> at the start, <pad> behind."""
    from tokenizers import Tokenizer, models, processors
    from transformers import PreTrainedTokenizerFast

    tokens = ["<pad>", "<bos>", "<unk>", *string.ascii_letters, *string.digits, *" .,:-"]
    words = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [], unk_token="<unk>"))
    words.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<bos>", unk_token="<unk>", pad_token="<pad>"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--part",
        choices=("unet", "vae", "whole", "narrow", "dit", "pixart", "sana", "none"),
        default="none",
    )
    parser.add_argument("--half", action="store_true", help="in FP16")
    arguments = parser.parse_args()
    _write(arguments.folder, arguments.part, arguments.half)
