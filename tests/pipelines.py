"""Very small random pipelines of SD3.5, FLUX and Stable Diffusion 1, made and saved by diffusers and transformers."""
import json

import diffusers
import tokenizers
import torch
import transformers

import data
import models

FAMILIES = ("sd3", "flux", "sd14")


def redraw(net, seed, std=0.7):
    """Draw every weight anew, so that no branch is zero: matrices by std / sqrt(fan-in), the rest around 0 or 1."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if p.ndim > 1:
                p.normal_(std=std / p[0].numel() ** 0.5 if "shared" not in name and "embedding" not in name else 1)
            else:
                p.copy_(0.2 * torch.randn_like(p) + ("norm" in name and name.endswith("weight")))
    return net.eval()


def t5_tokenizer(directory, words):
    """A unigram tokenizer of a few words in T5's format: <pad> 0, </s> 1, <unk> 2."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0), ("\u2581", -2.0)]
    pieces += [("\u2581" + word, -3.0) for word in words] + [(letter, -6.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    core = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=2, byte_fallback=False))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="always")
    core.decoder = tokenizers.decoders.Metaspace(prepend_scheme="always")
    core.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>",
                                                unk_token="<unk>", model_max_length=512)
    fast.save_pretrained(directory)
    return fast, len(pieces)


def clip(directory, seed, width, projection, act="quick_gelu", pad="<|endoftext|>", projected=True):
    """A CLIP text encoder of two layers and its tokenizer, of 16 tokens."""
    vocab = models.train_tokenizer(data.WORLD_WORDS, directory, 16)
    file = directory / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pad_token": pad}))
    config = transformers.CLIPTextConfig(
        vocab_size=vocab, hidden_size=width, intermediate_size=2 * width, projection_dim=projection,
        num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=16, hidden_act=act, eos_token_id=2)
    cls = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    return redraw(cls(config), seed), transformers.CLIPTokenizer.from_pretrained(directory)


def t5(directory, seed, width):
    tokenizer, vocab = t5_tokenizer(directory, data.WORLD_WORDS)
    return redraw(transformers.T5EncoderModel(transformers.T5Config(
        vocab_size=vocab, d_model=width, d_kv=12, d_ff=48, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu",
        relative_attention_num_buckets=8, relative_attention_max_distance=20)), seed), tokenizer


def vae(channels, quant, **scale):
    return redraw(diffusers.AutoencoderKL(
        block_out_channels=(8, 16, 16), down_block_types=("DownEncoderBlock2D",) * 3, layers_per_block=1,
        up_block_types=("UpDecoderBlock2D",) * 3, latent_channels=channels, norm_num_groups=4, use_quant_conv=quant,
        use_post_quant_conv=quant, sample_size=32, **scale), 9)


def save(family, directory):
    """Make the pipeline, save it into the directory as public ones are, return it."""
    Euler = diffusers.FlowMatchEulerDiscreteScheduler
    if family == "sd3":
        one, words = clip(directory / "tokenizer", 1, 16, 12)
        two, words_two = clip(directory / "tokenizer_2", 2, 24, 12, act="gelu", pad="!")
        three, words_three = t5(directory / "tokenizer_3", 3, 48)
        net = redraw(diffusers.SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=48, caption_projection_dim=32, pooled_projection_dim=24,
            pos_embed_max_size=12, dual_attention_layers=(0,), qk_norm="rms_norm"), 4)
        pipe = diffusers.StableDiffusion3Pipeline(
            transformer=net, scheduler=Euler(shift=3.0), vae=vae(4, False, scaling_factor=1.5305, shift_factor=0.0609),
            text_encoder=one, tokenizer=words, text_encoder_2=two, tokenizer_2=words_two, text_encoder_3=three,
            tokenizer_3=words_three)
    elif family == "flux":
        one, words = clip(directory / "tokenizer", 1, 24, 16, projected=False)
        two, words_two = t5(directory / "tokenizer_2", 2, 48)
        net = redraw(diffusers.FluxTransformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=48, pooled_projection_dim=24, guidance_embeds=True, axes_dims_rope=(4, 6, 6)), 3)
        pipe = diffusers.FluxPipeline(
            transformer=net, vae=vae(4, False, scaling_factor=0.3611, shift_factor=0.1159), text_encoder=one,
            scheduler=Euler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256,
                            max_image_seq_len=4096, shift=3.0),
            tokenizer=words, text_encoder_2=two, tokenizer_2=words_two)
    else:
        one, words = clip(directory / "tokenizer", 1, 24, 16, projected=False)
        net = redraw(diffusers.UNet2DConditionModel(
            sample_size=8, block_out_channels=(8, 16), cross_attention_dim=24, attention_head_dim=2,
            layers_per_block=1, norm_num_groups=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")), 2)
        pipe = diffusers.StableDiffusionPipeline(
            unet=net, vae=vae(4, True), text_encoder=one, tokenizer=words, safety_checker=None, feature_extractor=None,
            requires_safety_checker=False, scheduler=diffusers.DDIMScheduler(
                beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1,
                set_alpha_to_one=False))
    pipe.save_pretrained(directory)
    for tokenizer in directory.glob("tokenizer*"):                    # as in the public ones: vocab.json, merges.txt
        if (tokenizer / "vocab.json").is_file():
            (tokenizer / "tokenizer.json").unlink(missing_ok=True)
    return pipe
