"""Tiny vision-language models with random weights, made from configurations of real architectures, as folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedTokenizerFast

from cit_fast.models.image_reader import without_videos

SIZE = 32  # pixels of an image's side
_TOKENS = (
    "<image>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<start_of_image>",
    "<end_of_image>", "<image_soft_token>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>",
)  # fmt: skip
# The place of an image in a prompt.
_PLACE = {
    "llava": "<image>\n",
    "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "qwen3_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "idefics3": "<image>",
    "gemma3": "<start_of_image>",
}
KINDS = tuple(_PLACE)

_TEXT: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "tie_word_embeddings": True, "initializer_range": 0.3,
}  # fmt: skip
_VISION: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": SIZE,
    "patch_size": 8,
}  # fmt: skip


def seeing_tokenizer(kind: str) -> Any:
    """Bytes as tokens, the special tokens of all kinds, and a chat template that takes parts."""
    alphabet = {"<pad>": 0, "<s>": 1, "</s>": 2}
    for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()):
        alphabet[symbol] = len(alphabet)
    made = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    named = {
        "llava": {"image_token": "<image>"},
        "idefics3": {
            "image_token": "<image>", "fake_image_token": "<fake_token_around_image>",
            "global_image_token": "<global-img>", "end_of_utterance_token": "<end_of_utterance>",
        },
        "gemma3": {
            "image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>",
        },
    }.get(kind, {})  # fmt: skip
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made,
        extra_special_tokens=named,
        bos_token="<s>",  # noqa: S106
        eos_token="</s>",  # noqa: S106
        pad_token="<pad>",  # noqa: S106
    )
    tokenizer.add_special_tokens({"additional_special_tokens": [t for t in _TOKENS if t not in named.values()]})
    tokenizer.chat_template = (
        "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: "
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}" + _PLACE[kind] + "{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
        "{% endif %}</s>\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    return tokenizer


def _image_processor(kind: str) -> Any:
    if kind == "llava":
        from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

        return LlavaImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    if kind == "idefics3":
        from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

        return Idefics3ImageProcessorPil(size={"longest_edge": 2 * SIZE}, max_image_size={"longest_edge": SIZE})
    if kind == "gemma3":
        from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

        return Gemma3ImageProcessorPil(size={"height": SIZE, "width": SIZE})
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil(
        patch_size=8, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 16 * 16, "longest_edge": SIZE * SIZE}
    )


def _processor(kind: str, tokenizer: Any) -> Any:
    import transformers

    images = _image_processor(kind)
    if kind == "llava":
        return transformers.LlavaProcessor(
            images, tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1
        )
    if kind == "idefics3":
        return transformers.Idefics3Processor(images, tokenizer, image_seq_len=4)
    if kind == "gemma3":
        return transformers.Gemma3Processor(images, tokenizer, image_seq_length=4)
    name = {"qwen2_5_vl": "Qwen2_5_VLProcessor", "qwen3_vl": "Qwen3VLProcessor"}[kind]
    return without_videos(getattr(transformers, name))(images, tokenizer, None)


def _config(kind: str, tokenizer: Any) -> Any:
    def token(name: str) -> int:
        return int(tokenizer.convert_tokens_to_ids(name))

    text = {**_TEXT, "vocab_size": len(tokenizer)}
    qwen = {
        "image_token_id": token("<|image_pad|>"), "video_token_id": token("<|video_pad|>"),
        "vision_start_token_id": token("<|vision_start|>"), "vision_end_token_id": token("<|vision_end|>"),
    }  # fmt: skip
    tower = {"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 8,
             "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 32}  # fmt: skip
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
    if kind == "llava":
        return AutoConfig.for_model(
            kind, text_config={"model_type": "llama", **text}, image_token_id=token("<image>"), vision_feature_layer=-1,
            vision_config={"model_type": "clip_vision_model", **_VISION}, tie_word_embeddings=True,
        )  # fmt: skip
    if kind == "qwen2_5_vl":
        return AutoConfig.for_model(
            kind, text_config={**text, "rope_parameters": rope}, tie_word_embeddings=True,
            vision_config={**tower, "fullatt_block_indexes": [1], "window_size": 32}, **qwen,
        )  # fmt: skip
    if kind == "qwen3_vl":
        vision = {**tower, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
        return AutoConfig.for_model(
            kind, text_config={**text, "rope_parameters": {**rope, "mrope_interleaved": True}}, vision_config=vision,
            tie_word_embeddings=True, **qwen,
        )  # fmt: skip
    if kind == "idefics3":
        return AutoConfig.for_model(
            kind, text_config={"model_type": "llama", **text}, vision_config=_VISION, scale_factor=2,
            image_token_id=token("<image>"), pad_token_id=0, tie_word_embeddings=True,
        )  # fmt: skip
    return AutoConfig.for_model(
        kind, text_config={**text, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"],
                           "query_pre_attn_scalar": 8},
        vision_config={"model_type": "siglip_vision_model", **_VISION}, mm_tokens_per_image=4, tie_word_embeddings=True,
        image_token_id=token("<image_soft_token>"), boi_token_index=token("<start_of_image>"),
        eoi_token_index=token("<end_of_image>"), image_token_index=token("<image_soft_token>"),
    )  # fmt: skip


def seeing_model_folder(folder: Path, kind: str) -> Path:
    """A folder with model, tokenizer and processor of one of :data:`KINDS`."""
    tokenizer = seeing_tokenizer(kind)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(_config(kind, tokenizer), dtype=torch.float32)
    if kind == "gemma3":  # whose projection begins with zeros
        torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.3)
    model.save_pretrained(folder)
    _processor(kind, tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
