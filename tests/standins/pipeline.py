"""A Stable Diffusion pipeline of 300,000 random weights, of the same classes and on-disk layout as real ones.

It draws coloured noise, not objects: what it is for is running the true loading, generation, LoRA and 4-bit code.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

import torch

from fedkeel.rng import isolated

TEXT = """
    photo real world images high resolution low quality of a an the with in on centered satellite image
    cat dog stripes dots red blue airplane automobile bird deer frog horse ship truck sandal bag boot shirt dress coat
"""
WORDS = tuple(TEXT.split())
START, END = "<|startoftext|>", "<|endoftext|>"


def pipeline(
    folder: Path,
    *,
    words: Iterable[str] = WORDS,
    widths: Sequence[int] = (16, 32),
    cross: int = 32,
    tokens: int = 32,
    sample: int = 8,
    prediction: str = "epsilon",
    seed: int = 0,
) -> Path:
    """Saves a StableDiffusionPipeline to `folder` and returns it.

    words: each is one token, all others are spelt in bytes; widths: channels of the U-Net's levels (sdnq quantises
    layers from 32 channels and 16,384 weights up); cross: width of the text embeddings; tokens: the tokenizer's limit;
    sample: side of the latents, images are 4 times as large.
    """
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = clip_tokenizer(words, tokens)
    with isolated(torch.Generator().manual_seed(seed)):
        text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=cross,
                intermediate_size=2 * cross,
                num_hidden_layers=1,
                num_attention_heads=4,
                max_position_embeddings=tokens,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        unet = UNet2DConditionModel(
            sample_size=sample,
            block_out_channels=tuple(widths),
            layers_per_block=1,
            down_block_types=("DownBlock2D",) * (len(widths) - 1) + ("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",) + ("UpBlock2D",) * (len(widths) - 1),
            cross_attention_dim=cross,
            attention_head_dim=4,
            norm_num_groups=8,
        )
        vae = AutoencoderKL(
            block_out_channels=(8, 8, 16),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            layers_per_block=1,
            norm_num_groups=4,
            sample_size=4 * sample,
        )
        torch.nn.init.normal_(vae.decoder.conv_out.weight, std=0.3)  # else all images are nearly grey
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
            prediction_type=prediction,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder, safe_serialization=True)
    return folder


def clip_tokenizer(words: Iterable[str], tokens: int):  # type: ignore[no-untyped-def]
    """A CLIPTokenizer whose byte pairs merge each word to one token."""
    from transformers import CLIPTokenizer

    # the 256 bytes as the printable characters that byte-level BPE writes them as (Radford et al. 2019)
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(i) for i in plain] + [chr(256 + i) for i in range(256 - len(plain))]
    vocabulary = dict.fromkeys([*letters, *(letter + "</w>" for letter in letters)])
    merges: dict[tuple[str, str], int] = {}
    for word in words:  # merges added later rank lower, so that they leave the words before alone
        left, *rest = merged([*word[:-1], word[-1] + "</w>"], merges)
        for part in rest:
            merges[left, part] = len(merges)
            left += part
            vocabulary[left] = None
    ids = {piece: i for i, piece in enumerate([*vocabulary, START, END])}
    return CLIPTokenizer(vocab=ids, merges=list(merges), model_max_length=tokens)


def merged(parts: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """Byte-pair encoding of one word: the pair of the lowest rank is joined first."""
    while pairs := [(ranks[pair], i) for i, pair in enumerate(pairwise(parts)) if pair in ranks]:
        at = min(pairs)[1]
        parts = [*parts[:at], parts[at] + parts[at + 1], *parts[at + 2 :]]
    return parts
