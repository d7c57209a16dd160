"""Small diffusers pipelines with random weights, one for each family that trimtab exports."""

from __future__ import annotations

import json
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderTiny,
    ChromaPipeline,
    ChromaTransformer2DModel,
    ControlNetModel,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    DreamLiteMobilePipeline,
    DreamLitePipeline,
    DreamLiteUNetModel,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxControlPipeline,
    FluxFillPipeline,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInstructPix2PixPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    T5Config,
    T5EncoderModel,
)

SD_BETAS: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def clip_tokenizer(folder: Path, pad: str = "<|endoftext|>", length: int = 16) -> CLIPTokenizer:
    """A CLIP tokenizer that spells words letter by letter."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = string.ascii_lowercase + string.digits + "!"
    tokens = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), pad_token=pad, model_max_length=length
    )


def t5_tokenizer(length: int = 24) -> PreTrainedTokenizerFast:
    """A tokenizer shaped like T5's: one token a letter, </s> at the end, <pad> behind."""
    vocab = {"<pad>": 0, "</s>": 1, "<unk>": 2}
    for letter in string.ascii_letters + string.digits + " ,.":
        vocab[letter] = len(vocab)
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=length,
    )


Module = TypeVar("Module", bound=torch.nn.Module)


def drawn(seed: int, make: Callable[[], Module]) -> Module:
    """A module with random weights of its own seed: in every family the same, which is traced once."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = make().eval()
    spread(module, torch.Generator().manual_seed(seed))
    return module


def clip_text(projection: bool = False, width: int = 16, seed: int = 1) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=80,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=width,
        hidden_act="quick_gelu",
        bos_token_id=74,
        eos_token_id=75,
        pad_token_id=75,
    )
    return drawn(seed, lambda: (CLIPTextModelWithProjection if projection else CLIPTextModel)(config))


def t5(width: int = 32, layers: int = 2) -> T5EncoderModel:
    config = T5Config(
        vocab_size=80,
        d_model=width,
        d_kv=8,
        d_ff=2 * width,
        num_layers=layers,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return drawn(3, lambda: T5EncoderModel(config))


def vae(latent_channels: int = 4, **config: Any) -> AutoencoderKL:
    return drawn(
        4,
        lambda: AutoencoderKL(
            block_out_channels=(8, 8, 16, 16),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1,
            norm_num_groups=4,
            latent_channels=latent_channels,
            sample_size=64,
            **config,
        ),
    )


def tiny_vae(seed: int, **config: Any) -> AutoencoderTiny:
    blocks: dict[str, Any] = {"num_encoder_blocks": (1,) * 4, "num_decoder_blocks": (1,) * 4}
    for side in ("encoder", "decoder"):
        blocks[f"{side}_block_out_channels"] = (8,) * 4
    return drawn(seed, lambda: AutoencoderTiny(latent_channels=4, **blocks, **config))


def shifted_vae() -> AutoencoderKL:
    """As SD3's and Flux's: with a shift, and without the convolutions about the latents."""
    return vae(
        16, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False
    )


def unet(**config: Any) -> UNet2DConditionModel:
    defaults: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (8, 16, 16),
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "cross_attention_dim": 16,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**(defaults | config)).eval()


TWO_LEVELS: dict[str, Any] = {
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
"""For families that show something else than a U-Net's depth: a third less to trace."""

ONE_LEVEL: dict[str, Any] = {
    "block_out_channels": (8,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
}
"""For those that show nothing of it."""


def _stable_diffusion(folder: Path, scheduler: Any, cls: Any = StableDiffusionPipeline, **config: Any) -> Any:
    return cls(
        vae=vae(),
        text_encoder=clip_text(),
        tokenizer=clip_tokenizer(folder / "scratch"),
        unet=unet(**config),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sd15(folder: Path) -> Any:
    return _stable_diffusion(folder, DDIMScheduler(**SD_BETAS))


def taesd(folder: Path) -> Any:
    """`sd15` with an autoencoder that has no posterior."""
    pipeline = sd15(folder)
    pipeline.register_modules(vae=tiny_vae(5))
    return pipeline


def sd_below(folder: Path) -> Any:
    """Stable Diffusion with the levels of SDXL: no attention at the top."""
    return _stable_diffusion(
        folder,
        DDIMScheduler(**SD_BETAS),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )


def sd21_v(folder: Path) -> Any:
    betas = {k: v for k, v in SD_BETAS.items() if k not in ("clip_sample", "set_alpha_to_one")}
    return _stable_diffusion(
        folder,
        DPMSolverMultistepScheduler(**betas, prediction_type="v_prediction"),
        use_linear_projection=True,
        attention_head_dim=[2, 4],
        upcast_attention=True,
        **TWO_LEVELS,
    )


def inpaint9(folder: Path) -> Any:
    return _stable_diffusion(
        folder, DDIMScheduler(**SD_BETAS), cls=StableDiffusionInpaintPipeline, in_channels=9, **ONE_LEVEL
    )


def pix2pix(folder: Path) -> Any:
    return _stable_diffusion(
        folder,
        EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=0
        ),
        cls=StableDiffusionInstructPix2PixPipeline,
        in_channels=8,
        **ONE_LEVEL,
    )


def _sdxl_parts(folder: Path, **config: Any) -> dict[str, Any]:
    """The components of SDXL with another, shallow U-Net."""
    parts = sdxl(folder).components
    shallow = {"transformer_layers_per_block": 1, "attention_head_dim": 2, **ONE_LEVEL}
    parts["unet"] = unet(**{**parts["unet"].config, **shallow, **config})
    return {name: part for name, part in parts.items() if name not in ("image_encoder", "feature_extractor")}


def pix2pix_xl(folder: Path) -> Any:
    parts = _sdxl_parts(folder, in_channels=8)
    return StableDiffusionXLInstructPix2PixPipeline(**parts, add_watermarker=False, is_cosxl_edit=True)


def sdxl_refiner(folder: Path) -> Any:
    told = {"projection_class_embeddings_input_dim": 8 * 5 + 16, "cross_attention_dim": 16}
    return StableDiffusionXLImg2ImgPipeline(
        **(_sdxl_parts(folder, **told) | {"text_encoder": None, "tokenizer": None}),
        add_watermarker=False,
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
    )


def controlnet_model(**config: Any) -> ControlNetModel:
    """What it adds to the skips counts, as after training: its last convolutions are zeros before."""
    model = ControlNetModel(
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        conditioning_embedding_out_channels=(4, 4, 8, 8),
        controlnet_conditioning_channel_order="bgr",
        **config,
    )
    ends = [
        *model.controlnet_down_blocks,
        model.controlnet_mid_block,
        model.controlnet_cond_embedding.conv_out,
    ]
    for convolution in ends:
        torch.nn.init.normal_(convolution.weight)
    return model.eval()


def controlnet(folder: Path) -> Any:
    levels = {name: TWO_LEVELS[name] for name in ("block_out_channels", "down_block_types")}
    parts = _stable_diffusion(folder, DDIMScheduler(**SD_BETAS), **TWO_LEVELS).components
    return StableDiffusionControlNetPipeline(
        **{name: part for name, part in parts.items() if name != "image_encoder"},
        controlnet=controlnet_model(cross_attention_dim=16, **levels),
        requires_safety_checker=False,
    )


def controlnet_xl(folder: Path) -> Any:
    parts = sdxl(folder).components
    config = parts["unet"].config
    names = ("block_out_channels", "down_block_types", "transformer_layers_per_block", "cross_attention_dim")
    names += ("addition_embed_type", "addition_time_embed_dim", "projection_class_embeddings_input_dim")
    names += ("use_linear_projection",)
    return StableDiffusionXLControlNetPipeline(
        **{name: part for name, part in parts.items() if name not in ("image_encoder", "feature_extractor")},
        controlnet=controlnet_model(**{name: config[name] for name in names}),
        add_watermarker=False,
    )


def lcm(folder: Path) -> Any:
    return _stable_diffusion(
        folder,
        LCMScheduler(**SD_BETAS),
        cls=LatentConsistencyModelPipeline,
        time_cond_proj_dim=16,
        **ONE_LEVEL,
    )


def sdxl(folder: Path) -> Any:
    return StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=clip_text(),
        text_encoder_2=clip_text(projection=True, seed=2),
        tokenizer=clip_tokenizer(folder / "scratch"),
        tokenizer_2=clip_tokenizer(folder / "scratch2", pad="!"),
        unet=unet(
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2),
            cross_attention_dim=32,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=8 * 6 + 16,
            use_linear_projection=True,
            attention_head_dim=(2, 4),
        ),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
        ),
        add_watermarker=False,
    )


def sd3(folder: Path) -> Any:
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=16,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=32,
            caption_projection_dim=32,
            pooled_projection_dim=32,
            out_channels=16,
            pos_embed_max_size=32,
            qk_norm="rms_norm",
        ).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=shifted_vae(),
        text_encoder=clip_text(projection=True),
        tokenizer=clip_tokenizer(folder / "scratch"),
        text_encoder_2=clip_text(projection=True, seed=2),
        tokenizer_2=clip_tokenizer(folder / "scratch2", pad="!"),
        text_encoder_3=t5(),
        tokenizer_3=t5_tokenizer(),
    )


def _flux(cls: Any, folder: Path, channels: int = 64, single_layers: int = 0) -> Any:
    return cls(
        transformer=FluxTransformer2DModel(
            patch_size=1,
            in_channels=channels,
            out_channels=64,
            num_layers=1,
            num_single_layers=single_layers,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=16,
            guidance_embeds=True,
            axes_dims_rope=(4, 4, 8),
        ).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=shifted_vae(),
        text_encoder=clip_text(),
        tokenizer=clip_tokenizer(folder / "scratch"),
        text_encoder_2=t5(),
        tokenizer_2=t5_tokenizer(),
    )


def flux(folder: Path) -> Any:
    return _flux(FluxPipeline, folder, single_layers=2)


def flux_control(folder: Path) -> Any:
    return _flux(FluxControlPipeline, folder, channels=2 * 64)


def flux_fill(folder: Path) -> Any:
    return _flux(FluxFillPipeline, folder, channels=2 * 64 + 4 * 64)


def flux_kontext(folder: Path) -> Any:
    return _flux(FluxKontextPipeline, folder)


def chroma(folder: Path) -> Any:
    transformer = ChromaTransformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=16,
        approximator_hidden_dim=96,
        approximator_layers=1,
    ).eval()
    # Published ones say so, and diffusers' inpainting pipeline asks for it.
    transformer.register_to_config(guidance_embeds=False)
    return ChromaPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=shifted_vae(),
        text_encoder=t5(layers=1),
        tokenizer=t5_tokenizer(),
    )


def _pixart(cls: Any, **config: Any) -> Any:
    return cls(
        transformer=PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=12,  # the width must be a multiple of 3: the size conditions share it
            in_channels=4,
            out_channels=8,
            num_layers=2,
            cross_attention_dim=24,
            patch_size=2,
            caption_channels=32,
            **config,
        ).eval(),
        scheduler=DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear"),
        vae=vae(),
        text_encoder=t5(),
        tokenizer=t5_tokenizer(),
    )


def pixart_sigma(folder: Path) -> Any:
    return _pixart(PixArtSigmaPipeline, sample_size=32, use_additional_conditions=False)


def pixart_alpha(folder: Path) -> Any:
    return _pixart(PixArtAlphaPipeline, sample_size=128)


def gemma_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer shaped like Gemma's: <bos> at the start, padding at the left; one token a letter, words of the
    instruction as a whole.
    """
    vocab = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3}
    for letter in string.ascii_letters + string.digits + " ,.:-":
        vocab[letter] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        padding_side="left",
    )


def gemma(width: int = 32) -> Gemma2Model:
    config = Gemma2Config(
        vocab_size=80,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        sliding_window=64,
    )
    return drawn(6, lambda: Gemma2Model(config))


def _sana(cls: Any, scheduler: Any, **config: Any) -> Any:
    blocks: dict[str, Any] = {"latent_channels": 8, "attention_head_dim": 8}
    for side in ("encoder", "decoder"):
        blocks[f"{side}_block_types"] = ("ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock")
        blocks[f"{side}_block_out_channels"] = (8, 8, 16, 16)
        blocks[f"{side}_layers_per_block"] = (1,) * 4
        blocks[f"{side}_qkv_multiscales"] = ((), (), (), (5,))
    return cls(
        tokenizer=gemma_tokenizer(),
        text_encoder=gemma(),
        vae=drawn(7, lambda: AutoencoderDC(scaling_factor=0.41407, **blocks)),
        transformer=SanaTransformer2DModel(
            in_channels=8,
            out_channels=8,
            num_attention_heads=4,
            attention_head_dim=4,
            num_layers=2,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=32,
            sample_size=8,
            **config,
        ).eval(),
        scheduler=scheduler,
    )


def sana(folder: Path) -> Any:
    flow: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    return _sana(SanaPipeline, DPMSolverMultistepScheduler(**flow))


def sana_sprint(folder: Path) -> Any:
    return _sana(SanaSprintPipeline, SCMScheduler(), guidance_embeds=True, qk_norm="rms_norm_across_heads")


CHAT = """{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if not enable_thinking %}<think>

</think>

{% endif %}{% endif %}"""
"""Qwen3's chat template, as far as one message of a user goes."""


def qwen_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer shaped like Qwen3's: bytes, nothing at either end, padding at the right, a chat template."""
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
    vocab = {token: number for number, token in enumerate(special)}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab[letter] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=list(special),
        padding_side="right",
        chat_template=CHAT,
    )


def qwen(layers: int, width: int = 32) -> Qwen3Model:
    config = Qwen3Config(
        vocab_size=272,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    return drawn(8, lambda: Qwen3Model(config))


def z_image(folder: Path) -> Any:
    return ZImagePipeline(
        transformer=ZImageTransformer2DModel(
            in_channels=16,
            dim=32,
            n_layers=3,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=32,
            axes_dims=[4, 6, 6],
            axes_lens=[600, 64, 64],
        ).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=shifted_vae(),
        text_encoder=qwen(3),
        tokenizer=qwen_tokenizer(),
    )


def flux2(folder: Path) -> Any:
    autoencoder = drawn(
        9,
        lambda: AutoencoderKLFlux2(
            block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4, latent_channels=4
        ),
    )
    autoencoder.bn.running_mean.copy_(torch.linspace(-0.5, 0.5, 16))
    autoencoder.bn.running_var.copy_(torch.linspace(0.5, 2.0, 16))
    return Flux2KleinPipeline(
        transformer=Flux2Transformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=3 * 8,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=False,
        ).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=autoencoder,
        text_encoder=qwen(28, width=8),
        tokenizer=qwen_tokenizer(),
    )


def worded_qwen_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """`qwen_tokenizer` with a token for every word of some texts, as it has for those of a whole language."""
    letters = qwen_tokenizer()
    words = letters.backend_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=letters.all_special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    words.train_from_iterator(texts, trainer)
    return letters


def qwen_vl(width: int = 32) -> Qwen3VLForConditionalGeneration:
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": 500,
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [2, 1, 1]},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": width,
            "deepstack_visual_indexes": [0],
        },
    )
    return drawn(10, lambda: Qwen3VLForConditionalGeneration(config))


def dreamlite_unet(**config: Any) -> DreamLiteUNetModel:
    """Of two levels: the upper with attention to the text alone, the lower with attention to itself too, of heads that
    share a key and a value.
    """
    defaults: dict[str, Any] = {
        "block_out_channels": (8, 16),
        "down_block_types": ("DreamLiteCrossAttnNoSelfAttnDownBlock2D", "DreamLiteCrossAttnDownBlock2D"),
        "mid_block_type": None,  # of the same parts again
        "up_block_types": ("DreamLiteUpBlock2D", "DreamLiteUpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": (2, 4),
        "cross_attention_dim": 16,
        "encoder_hid_dim": 32,
        "encoder_hid_dim_type": "text_proj_rms",
        "addition_embed_type": "time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 2 * 8,
        "ff_mult": 2,
    }
    return drawn(11, lambda: DreamLiteUNetModel(**defaults | config))


def _dreamlite(cls: Any) -> Any:
    without_models = cls(
        **dict.fromkeys(("text_encoder", "tokenizer", "processor", "vae", "unet", "scheduler"))
    )
    tokenizer = worded_qwen_tokenizer([without_models.prompt_template_encode_generate])
    return cls(
        text_encoder=qwen_vl(),
        tokenizer=tokenizer,
        processor=tokenizer,  # its own, which needs torchvision, reads pictures to edit
        vae=tiny_vae(31, scaling_factor=0.3, shift_factor=0.1),
        unet=dreamlite_unet(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )


def dreamlite(folder: Path) -> Any:
    return _dreamlite(DreamLitePipeline)


def dreamlite_mobile(folder: Path) -> Any:
    return _dreamlite(DreamLiteMobilePipeline)


def dit(folder: Path) -> Any:
    return DiTPipeline(
        transformer=DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            sample_size=8,
            patch_size=2,
            num_embeds_ada_norm=1000,
        ).eval(),
        vae=vae(),
        scheduler=DDIMScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear", clip_sample=False),
        id2label={i: f"thing {i}, item {i}" for i in range(1000)},
    )


def _unet2d() -> UNet2DModel:
    return UNet2DModel(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=4,
    ).eval()


def ddpm(folder: Path) -> Any:
    return DDPMPipeline(unet=_unet2d(), scheduler=DDPMScheduler())


def ddim(folder: Path) -> Any:
    return DDIMPipeline(unet=_unet2d(), scheduler=DDIMScheduler())


FAMILIES: dict[str, Callable[[Path], Any]] = {
    make.__name__: make
    for make in (
        sd15,
        taesd,
        sd_below,
        sd21_v,
        inpaint9,
        pix2pix,
        pix2pix_xl,
        sdxl_refiner,
        controlnet,
        controlnet_xl,
        lcm,
        sdxl,
        sd3,
        flux,
        flux_control,
        flux_fill,
        flux_kontext,
        chroma,
        pixart_sigma,
        pixart_alpha,
        sana,
        sana_sprint,
        z_image,
        flux2,
        dreamlite,
        dreamlite_mobile,
        dit,
        ddpm,
        ddim,
    )
}


def spread(module: torch.nn.Module, generator: torch.Generator) -> None:
    """Gives zero-initialised outputs (as DiT's have) and flat norms something to say."""
    with torch.no_grad():
        for parameter in module.parameters():
            if float(parameter.std() if parameter.numel() > 1 else 0.0) == 0.0:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def save(family: str, folder: Path, seed: int = 0) -> Path:
    """Writes the pipeline of a family to ``folder / family`` and returns that path."""
    torch.manual_seed(seed)
    pipeline = FAMILIES[family](folder)
    generator = torch.Generator().manual_seed(seed)
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            spread(component, generator)
    pipeline.save_pretrained(folder / family)
    if family == "dit":  # diffusers reads the names from there, and does not write them
        index = folder / family / "model_index.json"
        index.write_text(json.dumps(json.loads(index.read_text()) | {"id2label": class_names(pipeline)}))
    return folder / family


def class_names(pipeline: Any) -> dict[str, str]:
    """Class number -> its names, as a published DiT's model_index.json has them."""
    names: dict[str, list[str]] = {}
    for name, number in pipeline.labels.items():
        names.setdefault(str(number), []).append(name)
    return {number: ", ".join(parts) for number, parts in names.items()}
