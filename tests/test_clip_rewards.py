"""CLIP, ImageReward and their preprocessing against transformers, open_clip and PIL: small random networks, full-size
shapes."""
import functools
import html
import json
import math
import sys
import unicodedata
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import data
import models
import rewards
from rewards import CLIP, CLIP_SIZES, ImageReward, clip_pixels

torch.set_num_threads(1)
MEAN, STD = (torch.tensor(v)[:, None, None] for v in ((.48145466, .4578275, .40821073),
                                                       (.26862954, .26130258, .27577711)))
PROMPTS = ["a red ring", "two blue squares", "a photo of a green star left of a ring"]


def config(act="gelu", vocab=60, eos=59, length=12):
    return dict(projection_dim=24,
                text_config=dict(hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2,
                                 vocab_size=vocab, max_position_embeddings=length, eos_token_id=eos, hidden_act=act),
                vision_config=dict(hidden_size=48, intermediate_size=56, num_hidden_layers=3, num_attention_heads=3,
                                   patch_size=8, image_size=32, hidden_act=act))


def shaken(net, seed=0, std=.1):
    """No weight at its initial value: a bias of zero or a norm of one would hide a mistake."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(std * torch.randn_like(p))
    return net.eval()


def theirs(**options):
    return shaken(transformers.CLIPModel(transformers.CLIPConfig(**config(**options))))


def to_open_clip(state):
    """transformers' tensors under open_clip's names, written by hand the other way round."""
    out, state = {}, dict(state)
    for tower, prefix in (("text_model", ""), ("vision_model", "visual.")):
        n = 1 + max(int(key.split(".")[3]) for key in state if key.startswith(f"{tower}.encoder"))
        for i in range(n):
            old, new = f"{tower}.encoder.layers.{i}.", f"{prefix}transformer.resblocks.{i}."
            for kind in ("weight", "bias"):
                out[f"{new}attn.in_proj_{kind}"] = torch.cat([state.pop(f"{old}self_attn.{x}_proj.{kind}")
                                                              for x in "qkv"])
                for a, b in (("self_attn.out_proj", "attn.out_proj"), ("layer_norm1", "ln_1"), ("layer_norm2", "ln_2"),
                             ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj")):
                    out[f"{new}{b}.{kind}"] = state.pop(f"{old}{a}.{kind}")
    for kind in ("weight", "bias"):
        out[f"ln_final.{kind}"] = state.pop(f"text_model.final_layer_norm.{kind}")
        out[f"visual.ln_pre.{kind}"] = state.pop(f"vision_model.pre_layrnorm.{kind}")
        out[f"visual.ln_post.{kind}"] = state.pop(f"vision_model.post_layernorm.{kind}")
    out["visual.class_embedding"] = state.pop("vision_model.embeddings.class_embedding")
    out["visual.conv1.weight"] = state.pop("vision_model.embeddings.patch_embedding.weight")
    out["visual.positional_embedding"] = state.pop("vision_model.embeddings.position_embedding.weight")
    out["positional_embedding"] = state.pop("text_model.embeddings.position_embedding.weight")
    out["token_embedding.weight"] = state.pop("text_model.embeddings.token_embedding.weight")
    out["visual.proj"] = state.pop("visual_projection.weight").T.contiguous()
    out["text_projection"] = state.pop("text_projection.weight").T.contiguous()
    out["logit_scale"] = state.pop("logit_scale")
    assert not state
    return out


def inputs(vocab=60, eos=59, length=12):
    torch.manual_seed(1)
    ids = torch.randint(1, vocab - 1, (3, length))
    ids[0, 4:], ids[1, 9:], ids[2, -1] = eos, 0, eos                  # padded with the end, with 0, and full
    ids[1, 8] = eos
    return torch.randn(3, 3, 32, 32), ids


def features(net, pixels, ids):
    """transformers' normalised features and logits."""
    out = net(input_ids=ids, pixel_values=pixels)
    return out.image_embeds, out.text_embeds, out.logits_per_image.diagonal()


def agrees(ours, reference):
    pixels, ids = inputs()
    image, text, logits = features(reference, pixels, ids)
    torch.testing.assert_close(ours.image(pixels), image, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.text(ids), text, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours(pixels, ids) * ours.logit_scale.exp(), logits, atol=1e-4, rtol=0)


# ---------------------------------------------------------------------------------------------------------------- CLIP

@pytest.mark.parametrize("act, eos", [("gelu", 59), ("quick_gelu", 59), ("quick_gelu", 2)])
def test_clip_equals_transformers_both_ways(tmp_path, act, eos):
    net = theirs(act=act, eos=eos)
    net.save_pretrained(tmp_path / "a")
    ours = CLIP.from_pretrained(tmp_path / "a")
    agrees(ours, net)
    ours.save_pretrained(tmp_path / "b")
    agrees(ours, transformers.CLIPModel.from_pretrained(tmp_path / "b").eval())


def test_clip_reads_old_files(tmp_path):
    """position_ids in the file; a config that states what differs a second time and leaves out the defaults."""
    net = theirs()
    net.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    save_file(state | {"vision_model.embeddings.position_ids": torch.arange(17)[None]}, tmp_path / "model.safetensors")
    agrees(CLIP.from_pretrained(tmp_path), net)
    small = CLIP(projection_dim=24, text_config_dict=config()["text_config"],
                 vision_config=config()["vision_config"], vision_config_dict=None)
    assert {k: v.shape for k, v in small.state_dict().items()} == {k: v.shape for k, v in state.items()}
    save_file(state | {"more": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="unexpected tensor more"):
        CLIP.from_pretrained(tmp_path)
    del state["vision_model.pre_layrnorm.bias"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="pre_layrnorm.bias is missing"):
        CLIP.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="hidden_act"):
        CLIP(vision_config=dict(hidden_act="relu"))


@pytest.mark.parametrize("name", ["open_clip_pytorch_model.bin", "open_clip_model.safetensors",
                                  "HPS_v2.1_compressed.pt"])
def test_open_clip_names(tmp_path, monkeypatch, name):
    monkeypatch.setitem(CLIP_SIZES, "H/14", config())
    net = theirs()
    state = to_open_clip(net.state_dict())
    if name.endswith("safetensors"):
        save_file(state, tmp_path / name)
    else:
        torch.save({"epoch": 1, "state_dict": state} if "HPS" in name else state, tmp_path / name)
    other = {key: torch.zeros_like(value) for key, value in state.items()}                # as laion's beside HPSv2's
    torch.save(other, tmp_path / "open_clip_pytorch_model.bin") if "HPS" in name else None
    agrees(rewards.read_clip(tmp_path, "H/14", "cpu", name), net)


@pytest.fixture(scope="module")
def open_clip():
    """open_clip, with stand-ins for torchvision: it takes its image transforms from there, and its networks nothing."""
    with pytest.MonkeyPatch.context() as m:
        for name in ("", ".ops", ".ops.misc", ".transforms", ".transforms.functional"):
            m.setitem(sys.modules, "torchvision" + name, MagicMock())
        import open_clip
    return open_clip


@pytest.mark.parametrize("act", ["gelu", "quick_gelu"])
def test_open_clips_own_network_and_file(open_clip, tmp_path, monkeypatch, act):
    small = config(act)
    text, vision = small["text_config"], small["vision_config"]
    torch.manual_seed(0)
    net = shaken(open_clip.CLIP(
        small["projection_dim"], quick_gelu=act == "quick_gelu",
        text_cfg=dict(context_length=12, vocab_size=60, width=32, heads=2, layers=2, mlp_ratio=40 / 32),
        vision_cfg=dict(image_size=32, patch_size=8, width=48, head_width=16, layers=3, mlp_ratio=56 / 48)))
    assert (text["intermediate_size"], vision["intermediate_size"]) == (40, 56)
    monkeypatch.setitem(CLIP_SIZES, "H/14", small)
    torch.save(net.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    ours, (pixels, ids) = rewards.read_clip(tmp_path, "H/14", "cpu", "open_clip_pytorch_model.bin"), inputs()
    with torch.no_grad():
        torch.testing.assert_close(ours.image(pixels), net.encode_image(pixels, normalize=True), atol=1e-5, rtol=0)
        torch.testing.assert_close(ours.text(ids), net.encode_text(ids, normalize=True), atol=1e-5, rtol=0)
        logits = net.get_logits(pixels, ids)[0].diagonal()
        torch.testing.assert_close(ours(pixels, ids) * ours.logit_scale.exp(), logits, atol=1e-4, rtol=0)
        assert logits.std() > .1


def test_open_clips_tokens(open_clip, tmp_path):
    """CLIP's own vocabulary, which open_clip ships, through our tokenizer; the padding is another and never seen."""
    theirs = open_clip.SimpleTokenizer()
    (tmp_path / "vocab.json").write_text(json.dumps(
        {token.replace("<start_of_text>", "<|startoftext|>").replace("<end_of_text>", "<|endoftext|>"): i
         for token, i in theirs.encoder.items()}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in theirs.bpe_ranks))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    tokenize = models.CLIPTokenizer(tmp_path)
    prompts = [*PROMPTS, "", "A  photo\tof \u201ctwo\u201d CATS &amp; 3 dogs, caf\u00e9 \u732b \U0001f408!",
               "it's " * 60, "a sign that says \"N\u00b0 42\"", *TRICKY,
               *(meta["prompt"] for meta in data.prompts("geneval", "test")[::10])]
    ours, want = tokenize([rewards.open_clip_text(prompt) for prompt in prompts]), theirs(prompts)
    end = want.argmax(1)
    assert torch.equal(ours.argmax(1), end)
    for a, b, n in zip(ours, want, end):
        assert torch.equal(a[:n + 1], b[:n + 1])
    assert tokenize(["a photo of a cat"])[0, 1:6].tolist() == [320, 1125, 539, 320, 2368]


TRICKY = [
    "&ldquo;HELLO&rdquo;, the sign&#8217;s text", "&rsquo;s", "&amp;amp;amp; x", "&lt;b&gt; <i> &amp; &ldquo;q&rdquo;",
    "a < b &rsquo;s", "\uff21\uff22\uff23\uff01 full\u3000width \uff5e", "\uff02q\uff02 \uff06amp; &#65282;",
    "\u2018a\u2019 \u201ab\u201b \u201ec\u201f it\u02bcs", "cafe\u0301", "x\u00a0y\u2028z",
    "&nbsp;x&nbsp;y", "&copy 2020 AT&T", "\ufeffa \x07bell\x7f, \ufffb\u206aend\x0b"]


def test_open_clips_cleaning(open_clip):
    from open_clip.tokenizer import basic_clean
    for prompt in TRICKY:
        ours = " ".join(unicodedata.normalize("NFC", rewards.open_clip_text(prompt)).split())      # our tokenizer's NFC
        assert ours == " ".join(basic_clean(prompt).split())


def test_read_weights_is_strict(tmp_path):
    state = to_open_clip(theirs().state_dict())
    file = tmp_path / "x.pt"

    def refused(content, match):
        torch.save(content, file)
        with torch.device("meta"):
            net = CLIP(**config())
        with pytest.raises(ValueError, match=match) as e:
            rewards.read_weights(net, file, convert=rewards.from_open_clip)
        assert "\n" not in str(e.value) and str(file) in str(e.value)
    refused(state | {"visual.extra.weight": torch.zeros(2)}, "visual.extra.weight")
    refused(state | {"extra": torch.zeros(2)}, "extra .* no place")
    refused(state | {"visual.proj": torch.zeros(3, 3)}, "visual.proj .* no place")
    refused({key: v for key, v in state.items() if key != "ln_final.bias"}, "final_layer_norm.bias is missing, 1")
    refused({"state_dict": Image.new("L", (1, 1))}, "more than tensors")                   # a pickle of any object
    refused({"epoch": 3, "model": state}, "no plain table of tensors: 'epoch'")
    refused({"model": state}, "no plain table of tensors: 'model'")
    refused({"state_dict": {3: torch.zeros(2)}}, "no plain table of tensors: 3")
    refused([torch.zeros(2)], "more than tensors")
    file.write_bytes(b"no file of tensors")
    with pytest.raises(ValueError, match="damaged"):
        rewards.read_weights(CLIP(**config()), file)


def test_pickles_before_pytorch_1_6(tmp_path):
    """Such files are no zip archives and cannot be mapped into memory."""
    head = rewards.Affine(24)
    torch.save(head.state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    again = rewards.read_weights(rewards.Affine(24), tmp_path / "old.pth")
    torch.testing.assert_close(again(torch.ones(2, 24)), head(torch.ones(2, 24)))


def test_full_sizes():
    """The public files' tensors, by name and shape, without their memory."""
    libraries = {"B/32": {}, "L/14": dict(
        projection_dim=768, text_config=dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12),
        vision_config=dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
                           patch_size=14))}
    for name, act, size in (("H/14", "gelu", 224), ("H/14-378", "quick_gelu", 378)):
        libraries[name] = dict(projection_dim=1024, text_config=dict(
            hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, hidden_act=act),
            vision_config=dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16,
                               patch_size=14, hidden_act=act, image_size=size))
    count = {"B/32": 151277313, "L/14": 427616513, "H/14": 986109441, "H/14-378": 986109441 + (27**2 - 16**2) * 1280}
    for name, options in libraries.items():
        with torch.device("meta"):
            ours = CLIP(**CLIP_SIZES[name])
            reference = transformers.CLIPModel(transformers.CLIPConfig(**options))
        assert sum(p.numel() for p in ours.parameters()) == count[name]
        assert ({k: v.shape for k, v in ours.state_dict().items()} ==
                {k: v.shape for k, v in reference.state_dict().items()})
        for tower in ("text_config", "vision_config"):
            mine = ours.config[tower]
            assert all(mine[k] == getattr(getattr(reference.config, tower), k) for k in mine
                       if k not in ("architectures", "projection_dim", "bos_token_id", "eos_token_id"))
        if name == "H/14":
            assert len(to_open_clip(ours.state_dict())) == 686        # as HPS_v2.1_compressed.pt


# --------------------------------------------------------------------------------------------------------------- pixels

def pictures(h, w, n=2):
    """Random bytes (n, h, w, 3), and as images in [0, 1]."""
    array = np.random.default_rng(h * w).integers(0, 256, (n, h, w, 3), dtype=np.uint8)
    return array, torch.from_numpy(array).permute(0, 3, 1, 2).float() / 255


@pytest.mark.parametrize("h, w", [(64, 64), (224, 224), (40, 97), (97, 41), (5, 7), (1, 1), (333, 200), (30, 31)])
def test_pil_pixels_equal_the_processor(h, w):
    array, images = pictures(h, w)
    for size in (56, 224) if h * w < 9999 else (56,):
        processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
        want = processor(list(array), return_tensors="pt", input_data_format="channels_last")["pixel_values"]
        torch.testing.assert_close(clip_pixels(images, size), want.float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("h, w", [(64, 64), (40, 97), (97, 41), (50, 71), (5, 7)])
def test_torchvisions_crop(h, w):
    """torchvision's center_crop starts at int(round((n - size) / 2.0)): at times a pixel after the processor's."""
    array, images = pictures(h, w)
    small = (32, int(32 * w / h)) if h <= w else (int(32 * h / w), 32)
    top, left = (int(round((n - 32) / 2.0)) for n in small)
    want = np.stack([np.array(Image.fromarray(a).resize(small[::-1], Image.Resampling.BICUBIC).crop(
        (left, top, left + 32, top + 32))) for a in array])
    got = clip_pixels(images, 32, "torchvision")
    torch.testing.assert_close(got, (torch.from_numpy(want).permute(0, 3, 1, 2) / 255 - MEAN) / STD, atol=1e-5, rtol=0)
    assert torch.equal(got, clip_pixels(images, 32)) == ((top, left) == ((small[0] - 32) // 2, (small[1] - 32) // 2))


def pil_float(images, h, w, how):
    """PIL's own filter on floats, channel by channel: nothing is rounded or clamped."""
    return torch.stack([torch.stack([torch.from_numpy(np.array(Image.fromarray(c.numpy(), "F").resize((w, h), how)))
                                     for c in image]) for image in images])


@pytest.mark.parametrize("h, w", [(64, 64), (40, 97), (97, 41), (5, 7)])
def test_the_other_pixels(h, w):
    images, size = pictures(h, w)[1], 32
    small = (size, int(size * w / h)) if h <= w else (int(size * h / w), size)
    for how, filter, start in (("bicubic", Image.Resampling.BICUBIC, math.floor),
                               ("bilinear", Image.Resampling.BILINEAR, round)):           # torchvision's crop
        top, left = (start((n - size) / 2) for n in small)
        want = pil_float(images, *small, filter)[:, :, top:top + size, left:left + size].clamp(0, 1)
        torch.testing.assert_close(clip_pixels(images, size, how), (want - MEAN) / STD, atol=1e-5, rtol=0)
    small = tuple(round(n * size / max(h, w)) for n in (h, w))
    top, left = (size - small[0]) // 2, (size - small[1]) // 2
    want = torch.zeros(2, 3, size, size)
    want[:, :, top:top + small[0], left:left + small[1]] = pil_float(images, *small, Image.Resampling.BICUBIC)
    torch.testing.assert_close(clip_pixels(images, size, "pad"), (want - MEAN) / STD, atol=1e-5, rtol=0)


@pytest.mark.parametrize("h, w", [(64, 64), (40, 97), (97, 41), (5, 7)])
def test_squash_is_what_open_clip_does_for_dfn(open_clip, monkeypatch, h, w):
    """Its own transform, by its registry's row of DFN5B; of torchvision's four steps, PIL's and NumPy's words."""
    own = open_clip.transform
    monkeypatch.setattr(own, "Compose", lambda steps: lambda x: functools.reduce(lambda x, step: step(x), steps, x))
    monkeypatch.setattr(own, "Resize", lambda size, interpolation: lambda x: x.resize(size[::-1], {
        own.InterpolationMode.BICUBIC: Image.Resampling.BICUBIC}[interpolation]))
    monkeypatch.setattr(own, "MaybeToTensor", lambda: lambda x: torch.from_numpy(np.array(x)).permute(2, 0, 1) / 255)
    monkeypatch.setattr(own, "Normalize", lambda mean, std: lambda x: (
        x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None])
    row = open_clip.get_pretrained_cfg("ViT-H-14-378", "dfn5b") | {"size": 32}
    preprocess = own.image_transform_v2(own.PreprocessCfg(**own.merge_preprocess_dict(own.PreprocessCfg(), row)), False)
    array, images = pictures(h, w)
    want = torch.stack([preprocess(Image.fromarray(picture)) for picture in array])
    torch.testing.assert_close(clip_pixels(images, 32, "squash"), want, atol=1e-5, rtol=0)


def test_bytes_or_floats():
    """A third of a byte's step is lost where the reference has a PNG in between, and kept where it has none."""
    images = pictures(40, 40)[1].clamp(.02, .98).mul(255).round() / 255
    for how, lost in (("pil", True), ("squash", True), ("pad", True), ("bicubic", False), ("bilinear", False)):
        near = clip_pixels(images + .3 / 255, 32, how)
        assert torch.allclose(near, clip_pixels(images, 32, how), atol=1e-5) == lost
    with pytest.raises(ValueError, match="'pil'"):
        clip_pixels(images, 32, "nearest")


def test_what_the_fast_pixels_cost():
    """Smooth pictures: at most two of 255 steps a pixel, half a step on average; a cosine moves by less than .001."""
    torch.manual_seed(0)
    images = torch.nn.functional.interpolate(torch.rand(4, 3, 9, 9), (160, 160), mode="bicubic").clamp(0, 1)
    slow, fast = (clip_pixels(images, 32, how) for how in ("pil", "bicubic"))
    step = ((slow - fast) * STD).abs() * 255
    assert .1 < step.mean() < .5 and step.max() < 2
    net = shaken(CLIP(**config()))
    text = net.text(inputs()[1][:1])
    assert ((net.image(slow) - net.image(fast)) @ text.T).abs().max() < 1e-3


# -------------------------------------------------------------------------------------------------------------- rewards

@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Small random weights of every reward but ImageReward, in the public files' layout."""
    home, patch = tmp_path_factory.mktemp("weights"), pytest.MonkeyPatch()
    for name in ("pickscore", "clip-l14", "hpsv2", "clip-dfn"):
        vocab = models.train_tokenizer(data.WORLD_WORDS, home / name, 12)
        options = dict(act="gelu" if name in ("pickscore", "hpsv2") else "quick_gelu", vocab=vocab, eos=vocab - 1)
        net = theirs(**options)
        if name in ("pickscore", "clip-l14"):
            net.save_pretrained(home / name)
        else:
            size, file = {"hpsv2": ("H/14", "HPS_v2.1_compressed.pt"),
                          "clip-dfn": ("H/14-378", "open_clip_pytorch_model.bin")}[name]
            patch.setitem(CLIP_SIZES, size, config(**options))
            state = {key: v.half() for key, v in to_open_clip(net.state_dict()).items()}
            torch.save({"state_dict": state} if name == "hpsv2" else state, home / name / file)
    (home / "aesthetic").mkdir()
    torch.save(shaken(rewards.Affine(24)).state_dict(), home / "aesthetic" / rewards.HEAD)
    yield home
    patch.undo()


def cosines(home, name, pixels):
    """The reference's cosine of each image with its prompt."""
    if (home / name / "config.json").is_file():
        net = transformers.CLIPModel.from_pretrained(home / name)
    else:
        net = rewards.read_clip(home / name, {"hpsv2": "H/14", "clip-dfn": "H/14-378"}[name], "cpu",
                                *rewards.OPEN_CLIP_FILES[name])
    tokens = models.CLIPTokenizer(home / name)(PROMPTS)
    if isinstance(net, CLIP):
        return net(pixels, tokens), net.logit_scale.exp()
    image, text, _ = features(net.eval(), pixels, tokens)
    return (image * text).sum(1).detach(), net.logit_scale.exp().detach()


@pytest.mark.parametrize("name, source, how, formula", [
    ("pickscore", "pickscore", "pil", lambda c, s: s * c / 26),
    ("pickscore-raw", "pickscore", "pil", lambda c, s: s * c),
    ("hpsv2", "hpsv2", "pad", lambda c, s: c), ("clip-l14", "clip-l14", "pil", lambda c, s: c),
    ("clip-dfn", "clip-dfn", "squash", lambda c, s: c), ("clipscore-raw", "clip-l14", "pil", lambda c, s: s * c),
    ("clipscore", "clip-l14", "bilinear", lambda c, s: s * c / 30)])
def test_scores(home, name, source, how, formula):
    images = pictures(40, 52, 3)[1]
    score = rewards.load(name, home)
    got = score(images, PROMPTS, [{}] * 3)
    torch.testing.assert_close(got, formula(*cosines(home, source, clip_pixels(images, 32, how))), atol=1e-4, rtol=0)
    assert got.dtype == torch.float32 and not got.requires_grad and len(set(got.tolist())) == 3
    torch.testing.assert_close(score(images.flip(0), PROMPTS[::-1], [{}] * 3), got.flip(0), atol=1e-6, rtol=0)


def test_drawbench_is_reported_on_the_papers_scales():
    names = set(rewards.BENCHMARKS["drawbench"][2].split(","))
    assert names >= {"pickscore-raw", "clipscore-raw"} and names.isdisjoint({"pickscore", "clipscore"})
    assert names <= set(rewards.REWARDS)


def test_aesthetic(home):
    images = pictures(40, 40, 3)[1]
    net = transformers.CLIPModel.from_pretrained(home / "clip-l14").eval()
    e = features(net, clip_pixels(images, 32), torch.zeros(3, 12, dtype=torch.long))[0]
    for i in (0, 2, 4, 6, 7):
        state = torch.load(home / "aesthetic" / rewards.HEAD, weights_only=True)
        e = e @ state[f"layers.{i}.weight"].T + state[f"layers.{i}.bias"]
    got = rewards.load("aesthetic", home)(images, PROMPTS, [{}] * 3)
    torch.testing.assert_close(got, e[:, 0].detach(), atol=1e-4, rtol=1e-4)


def test_sums_batches_and_failures(home):
    images = pictures(32, 32, 3)[1]
    one, other = (rewards.load(name, home)(images, PROMPTS, [{}] * 3) for name in ("hpsv2", "clip-dfn"))
    both = rewards.load("hpsv2:0.7,clip-dfn:1.4", home)(images, PROMPTS, [{}] * 3)                # DanceGRPO's
    torch.testing.assert_close(both, .7 * one + 1.4 * other)
    for value in (math.nan, math.inf):
        broken = images.clone()
        broken[1, 2, 3, 4] = value
        got = rewards.load("hpsv2", home)(broken, PROMPTS, [{}] * 3)
        assert got.isnan().tolist() == [False, True, False]
        torch.testing.assert_close(got[[0, 2]], one[[0, 2]])
    sizes = []
    score = rewards.in_batches(lambda x, prompts: sizes.append((len(x), len(prompts))) or x.mean((1, 2, 3)), n=2)
    torch.testing.assert_close(score(images, PROMPTS, []), images.mean((1, 2, 3)))
    assert sizes == [(2, 2), (1, 1)]


def test_a_groups_prompt_is_read_once(home, monkeypatch):
    """The cosines are those of one image at a time, whichever text is whose."""
    read, own = [], CLIP.text
    monkeypatch.setattr(CLIP, "text", lambda net, ids: read.append(len(ids)) or own(net, ids))
    images, prompts = pictures(40, 40, 6)[1], ["b", "a", "b", "a ring", "b", "a"]
    score = rewards.load("clip-l14", home)
    together = score(images, prompts)
    assert read == [3]
    alone = torch.cat([score(images[i:i + 1], prompts[i:i + 1]) for i in range(6)])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-5)


def test_a_shared_network_is_read_once(home):
    rewards.read_clip.cache_clear()
    rewards.load("clip-l14,clipscore,aesthetic", home), rewards.load("clip-l14", home)
    assert rewards.read_clip.cache_info().misses == 1


def test_missing_weights_name_the_command(tmp_path):
    for name, download in (("pickscore", "hf download yuvalkirstain/PickScore_v1"), ("hpsv2", "xswu/HPSv2"),
                           ("clip-dfn", "apple/DFN5B-CLIP-ViT-H-14-378"), ("clipscore", "clip-vit-large-patch14"),
                           ("aesthetic", "curl -fL"), ("imagereward", "THUDM/ImageReward")):
        with pytest.raises(ValueError, match=download) as e:
            rewards.load(name, tmp_path)
        assert "\n" not in str(e.value) and str(tmp_path) in str(e.value) and "{}" not in str(e.value)


def test_open_clip_text():
    assert rewards.open_clip_text(" it\u2019s \u201cred\u201d &amp;amp; blue ") == "it's \"red\" & blue"
    plain = "a photo of a ring, (very:1.2) caf\u00e9"
    assert rewards.open_clip_text(plain) == html.unescape(plain) == plain


# ---------------------------------------------------------------------------------------------------------- ImageReward

SMALL = dict(vocab=70, dim=32, layers=2, heads=4, places=40, dim_image=48, layers_image=2, heads_image=3, patch=8,
             size=32)


def test_imagereward_equals_transformers():
    """BLIP's two networks there, loaded with this one's tensors."""
    ours = shaken(ImageReward(**SMALL))
    vision = BlipVisionModel(transformers.BlipVisionConfig(
        hidden_size=48, intermediate_size=192, num_hidden_layers=2, num_attention_heads=3, image_size=32, patch_size=8,
        layer_norm_eps=1e-6, hidden_act="gelu")).eval()
    names = (("cls_token", "embeddings.class_embedding"), ("pos_embed", "embeddings.position_embedding"),
             ("patch_embed.proj", "embeddings.patch_embedding"), ("blocks", "encoder.layers"),
             ("attn.qkv", "self_attn.qkv"), ("attn.proj", "self_attn.projection"), (".norm", ".layer_norm"))
    state = {}
    for key, tensor in ours.blip.visual_encoder.state_dict().items():
        for a, b in names:
            key = key.replace(a, b)
        state[f"post_layernorm{key[4:]}" if key.startswith("norm.") else key] = tensor
    vision.load_state_dict(state)
    text = BlipTextModel(transformers.BlipTextConfig(
        vocab_size=70, hidden_size=32, encoder_hidden_size=48, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=40, layer_norm_eps=1e-12, hidden_act="gelu", is_decoder=True),
        add_pooling_layer=False).eval()
    text.load_state_dict(ours.blip.text_encoder.state_dict())
    torch.manual_seed(0)
    pixels, ids, mask = torch.randn(3, 3, 32, 32), torch.randint(0, 70, (3, 35)), torch.ones(3, 35, dtype=torch.bool)
    mask[0, 5:] = mask[1, 20:] = False
    image = vision(pixels).last_hidden_state
    want = text(input_ids=ids, attention_mask=mask.long(), encoder_hidden_states=image,
                encoder_attention_mask=torch.ones(3, 17, dtype=torch.long), is_decoder=False).last_hidden_state
    torch.testing.assert_close(ours.hidden(pixels, ids, mask), want, atol=1e-4, rtol=0)
    e = want[:, 0]
    for i in (0, 2, 4, 6, 7):
        e = ours.mlp.layers[i](e)
    got = ours(pixels, ids, mask)
    torch.testing.assert_close(got, (e[:, 0] - 0.16717362830052426) / 1.0333394966054072, atol=1e-4, rtol=1e-4)


def test_imagereward_full_size():
    with torch.device("meta"):
        net = ImageReward()
    assert sum(p.numel() for p in net.parameters()) == 446665953
    state = {key: tuple(v.shape) for key, v in net.state_dict().items()}
    assert len(state) == 625 - 1                                      # the file's, less its position_ids
    for key, shape in {"blip.visual_encoder.cls_token": (1, 1, 1024), "blip.visual_encoder.pos_embed": (1, 197, 1024),
                       "blip.visual_encoder.patch_embed.proj.weight": (1024, 3, 16, 16),
                       "blip.visual_encoder.blocks.23.attn.qkv.bias": (3072,), "blip.visual_encoder.norm.bias": (1024,),
                       "blip.text_encoder.embeddings.word_embeddings.weight": (30524, 768),
                       "blip.text_encoder.encoder.layer.11.crossattention.self.key.weight": (768, 1024),
                       "blip.text_encoder.encoder.layer.0.attention.output.LayerNorm.weight": (768,),
                       "blip.text_encoder.encoder.layer.0.output.dense.weight": (768, 3072),
                       "blip.vision_proj.weight": (256, 1024), "blip.text_proj.weight": (256, 768),
                       "mlp.layers.7.weight": (1, 16)}.items():
        assert state[key] == shape


VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "ring", "star", "##s", "##ring", ",", "'", "cafe",
         "of", "!", "two", "##3", "st", "##a", "##r", "\u4e2d"]


WORDED = SMALL | dict(vocab=len(VOCAB) + 2)                           # BLIP adds two


def test_wordpiece_equals_transformers(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(VOCAB) + "\n", encoding="utf-8")
    reference = transformers.BertTokenizer.from_pretrained(tmp_path)
    texts = ["A red RING", "rings,stars!", "caf\u00e9 of\t\u4e2d zebra", "", "a" * 200, "two " * 60, "[SEP] a"]
    want = reference(texts, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    ids, mask = rewards.WordPiece(tmp_path / "vocab.txt")(texts)
    assert torch.equal(ids, want["input_ids"]) and torch.equal(mask, want["attention_mask"].bool())
    (tmp_path / "vocab.txt").write_text("a\nred\n")
    with pytest.raises(ValueError, match="special token"):
        rewards.WordPiece(tmp_path / "vocab.txt")


def test_imagereward_by_name(tmp_path, monkeypatch):
    """The file is read whole, position_ids aside; each image meets its own prompt only."""
    folder = tmp_path / "imagereward"
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(VOCAB) + "\n", encoding="utf-8")
    net = shaken(ImageReward(**WORDED))
    torch.save(net.state_dict() | {"blip.text_encoder.embeddings.position_ids": torch.arange(40)[None]},
               folder / "ImageReward.pt")
    monkeypatch.setattr(rewards, "ImageReward", lambda: ImageReward(**WORDED))
    images, prompts = pictures(40, 52, 3)[1], ["a red ring", "two stars", "a"]
    got = rewards.load("imagereward", tmp_path)(images, prompts, [{}] * 3)
    ids, mask = rewards.WordPiece(folder / "vocab.txt")(prompts)
    assert ids.shape == (3, 35)
    other = tmp_path / "other" / "imagereward"
    other.mkdir(parents=True)
    (other / "ImageReward.pt").symlink_to(folder / "ImageReward.pt")
    for words in (VOCAB[:-1], [*VOCAB, "more"]):
        (other / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
        with pytest.raises(ValueError, match=rf"other/imagereward/vocab.txt holds {len(words)} words, the network 24,"):
            rewards.load("imagereward", other.parent)
    with torch.no_grad():
        want = [net(clip_pixels(images[i:i + 1], 32), ids[i:i + 1], mask[i:i + 1]).item() for i in range(3)]
    torch.testing.assert_close(got, torch.tensor(want), atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------------------------------------------------- bfloat16

EPS = torch.finfo(torch.bfloat16).eps                                 # 2^-7; one rounding is off by half of it at most


def moved(name, home, images, prompts, metas):
    """How far bfloat16 moves each image's reward, (B,), and the reward's networks."""
    exact, rounded = (rewards.load(name, home, dtype=dtype) for dtype in ("float32", "bfloat16"))
    one, other = (score(images, prompts, metas) for score in (exact, rounded))
    assert other.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    return (one - other).abs(), exact.rewards[name].nets


@pytest.mark.parametrize("name, share", [("pickscore", 1 / 26), ("pickscore-raw", 1), ("hpsv2", 0), ("clip-l14", 0),
                                         ("clip-dfn", 0), ("clipscore", 1 / 30)])
def test_a_cosine_in_bfloat16(home, name, share):
    """Moves by at most EPS, which is what one rounding of its two unit vectors can do. Seen: .0016 to .0041.

    share: of exp(logit_scale), which multiplies the cosine; 0: nothing does.
    """
    difference, (net,) = moved(name, home, pictures(40, 52, 3)[1], PROMPTS, [{}] * 3)
    scale = net.logit_scale.exp() * share if share else 1
    assert 0 < (difference / scale).max() < EPS


def test_tiny_clip_in_bfloat16():
    """96 renders and their prompts: the same bound; seen: .0021 at most, .0005 on average, where the std is .055."""
    metas = data.draw_prompts(data.world_prompts("train"), 96, 1)
    difference, _ = moved("tiny-clip", None, data.render(metas, 2, 28), [meta["prompt"] for meta in metas], metas)
    assert 0 < difference.max() < EPS and difference.mean() < EPS / 8


def test_an_affine_head_on_bfloat16(home, tmp_path, monkeypatch):
    """The head runs in float32: what it sees is off by EPS of its norm at most, times the head's slope.

    Seen: .0020 of .0223 for the aesthetic score, .0113 of .1275 for ImageReward.
    """
    difference, (net, head) = moved("aesthetic", home, pictures(40, 40, 3)[1], PROMPTS, [{}] * 3)

    def slope(head, dim):
        return torch.autograd.functional.jacobian(lambda x: head(x[None])[0], torch.zeros(dim)).norm()
    assert 0 < difference.max() < EPS * slope(head, 24)                # e has norm 1

    folder = tmp_path / "imagereward"
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(VOCAB) + "\n", encoding="utf-8")
    net = shaken(ImageReward(**WORDED))
    torch.save(net.state_dict(), folder / "ImageReward.pt")
    monkeypatch.setattr(rewards, "ImageReward", lambda: ImageReward(**WORDED))
    norms, hidden = [], ImageReward.hidden
    monkeypatch.setattr(ImageReward, "hidden", lambda *args: norms.append(x := hidden(*args)) or x)
    difference, _ = moved("imagereward", tmp_path, pictures(40, 52, 3)[1], ["a red ring", "two stars", "a"], [{}] * 3)
    norm = torch.cat(norms)[:, 0].norm(dim=1).max()
    assert 0 < difference.max() < EPS * slope(net.mlp, 32) * norm / ImageReward.STD


def test_what_is_not_rounded(home):
    """Rewards with thresholds keep every bit, beside one that is rounded; alone they refuse."""
    metas = data.draw_prompts(data.world_prompts("train"), 4, 1)
    images, prompts = data.render(metas, 2, 28), [meta["prompt"] for meta in metas]
    one, other = (rewards.load("shapes,tiny-clip", dtype=dtype) for dtype in ("float32", "bfloat16"))
    one(images, prompts, metas), other(images, prompts, metas)
    assert torch.equal(one.values["shapes"], other.values["shapes"])
    assert not torch.equal(one.values["tiny-clip"], other.values["tiny-clip"])
    with pytest.raises(ValueError, match="'shapes' is computed in float32"):
        rewards.load("shapes", dtype="bfloat16")
