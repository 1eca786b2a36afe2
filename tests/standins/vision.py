"""CLIP and BLIP-2 of a few thousand random weights, in the layout on disk of the real ones."""

from __future__ import annotations

from pathlib import Path

import torch

from fedkeel.rng import isolated

SIDE = 16
WORDS = ("red", "green", "blue", "dark", "bright", "small", "large", "striped", "shoe", "bag", "on", "with", "grass")


def clip(folder: Path, dim: int, *, vision_only: bool = False) -> Path:
    """A CLIPModel with image features of width `dim`, or the vision half of it with its projection, in `folder`."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPVisionModelWithProjection

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**small, "vocab_size": 40, "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1},
        vision_config={**small, "image_size": SIDE, "patch_size": 8, "projection_dim": dim},
        projection_dim=dim,
    )
    with isolated(torch.Generator().manual_seed(1)):
        model = CLIPVisionModelWithProjection(config.vision_config) if vision_only else CLIPModel(config)
    model.save_pretrained(folder)
    side = {"height": SIDE, "width": SIDE}
    CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=side).save_pretrained(folder)
    return folder


def blip2(folder: Path) -> Path:
    """A Blip2ForConditionalGeneration with an OPT decoder and its processor in `folder`."""
    from transformers import (
        Blip2Config,
        Blip2ForConditionalGeneration,
        Blip2Processor,
        BlipImageProcessorPil,
        GPT2Tokenizer,
    )

    words = ["<pad>", "</s>", "<unk>", "<image>", *(f"Ġ{word}" for word in WORDS)]  # Ġ: a space in byte-level BPE
    tokenizer = GPT2Tokenizer(
        vocab={word: i for i, word in enumerate(words)},
        merges=[],
        bos_token="</s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Blip2Config(
        vision_config={**small, "image_size": SIDE, "patch_size": 8},
        qformer_config={**small, "vocab_size": 40, "encoder_hidden_size": 16},
        text_config={
            "model_type": "opt",
            "vocab_size": len(tokenizer),
            "hidden_size": 16,
            "ffn_dim": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 16,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 1,
        },
        num_query_tokens=4,
        image_token_index=3,
    )
    with isolated(torch.Generator().manual_seed(2)):
        model = Blip2ForConditionalGeneration(config)
        for parameter in model.parameters():  # its own first weights are so small that all images get one caption
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    images = BlipImageProcessorPil(size={"height": SIDE, "width": SIDE})
    Blip2Processor(images, tokenizer, num_query_tokens=4).save_pretrained(folder)
    return folder
