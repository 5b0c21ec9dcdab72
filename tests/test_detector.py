"""Mask2Former against transformers, mmdet's post-processing against loops, GenEval's rewards from image to number."""
import functools
import hashlib
import json
import math

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers.core_model_loading import revert_weight_conversion

import data
import models
import rewards
from rewards import Mask2Former, clip_pixels, detector_pixels, from_mmdet, geneval_engine, instances

torch.set_num_threads(1)
TINY = dict(feature_size=64, mask_feature_size=32, hidden_dim=64, encoder_feedforward_dim=48, dim_feedforward=40,
            encoder_layers=2, decoder_layers=5, num_attention_heads=4, num_queries=7)
SWIN = dict(embed_dim=12, depths=[1, 2, 3, 1], num_heads=[1, 2, 3, 4], window_size=3)
STAGES = [f"stage{i}" for i in (1, 2, 3, 4)]


def shaken(net, seed=0, std=.1):
    """No weight at its initial value: a bias of zero or a norm of one would hide a mistake."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(std * torch.randn_like(p))
    return net.eval()


def theirs(labels=80, swin=SWIN, **options):
    backbone = transformers.SwinConfig(**swin, out_features=STAGES)
    return transformers.Mask2FormerForUniversalSegmentation(transformers.Mask2FormerConfig(
        backbone_config=backbone, num_labels=labels, **options))


@pytest.fixture(scope="module")
def reference():
    """A small network whose queries are quite sure of a few classes."""
    torch.manual_seed(1)
    net = shaken(theirs(**TINY), 1)
    with torch.no_grad():
        net.class_predictor.weight.mul_(8)
        for noun in ("cup", "cat"):
            net.class_predictor.bias[data.OBJECTS.index(noun)] += 8
    return net


@pytest.fixture(scope="module")
def home(reference, tmp_path_factory):
    """Small random weights of the detector and of the classifier of colours, in the public files' layout."""
    home = tmp_path_factory.mktemp("weights")
    reference.save_pretrained(home / "mask2former")
    words = " ".join([*rewards.PHRASES, *data.PAINTS, "cat cup"]).split()
    vocab = models.train_tokenizer(words, home / "clip-l14", 24)
    text = dict(hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2, vocab_size=vocab,
                max_position_embeddings=24, eos_token_id=vocab - 1)
    vision = dict(hidden_size=48, intermediate_size=56, num_hidden_layers=2, num_attention_heads=3, patch_size=8,
                  image_size=32)
    torch.manual_seed(3)
    shaken(transformers.CLIPModel(transformers.CLIPConfig(projection_dim=24, text_config=text, vision_config=vision)),
           4, .3).save_pretrained(home / "clip-l14")
    return home


@pytest.fixture
def small(monkeypatch):
    """The detector's own 800 x 1333 pixels would take seconds."""
    monkeypatch.setattr(rewards, "detector_pixels", functools.partial(detector_pixels, long=130, short=80))
    geneval_engine.cache_clear()


def torchvision_pixels(picture, size):
    """A PIL image as torchvision's Resize, CenterCrop and Normalize make it of one, (3, size, size)."""
    w, h = picture.size
    w, h = (size, int(size * h / w)) if w <= h else (int(size * w / h), size)
    left, top = int(round((w - size) / 2.0)), int(round((h - size) / 2.0))
    picture = picture.resize((w, h), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
    mean, std = np.array([.48145466, .4578275, .40821073]), np.array([.26862954, .26130258, .27577711])
    return torch.from_numpy((np.array(picture) / 255 - mean) / std).permute(2, 0, 1).float()


def pictures(h, w, n):
    """Smooth random images in [0, 1], of bytes."""
    g = torch.Generator().manual_seed(h * w)
    coarse = torch.rand(n, 3, 5, 5, generator=g)
    return torch.nn.functional.interpolate(coarse, (h, w), mode="bilinear").mul(255).round() / 255


# --------------------------------------------------------------------------------------------------------- Mask2Former

@pytest.mark.parametrize("size", [(64, 64), (37, 50), (61, 45), (9, 70)])
def test_equals_transformers(home, reference, size):
    net = rewards.read_detector(home / "mask2former")
    torch.manual_seed(1)
    pixels = torch.randn(2, 3, *size)
    with torch.no_grad():
        want = reference(pixel_values=pixels)
        logits, masks = net(pixels)
    assert masks.shape == (2, 7, *(-(-n // 4) for n in size)) and logits.shape == (2, 7, 81)
    assert masks.std() > .5 and logits.std() > .5               # not all alike
    torch.testing.assert_close(logits, want.class_queries_logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(masks, want.masks_queries_logits, atol=1e-4, rtol=0)


def test_full_size():
    """The public file's tensors, by name and shape, without their memory."""
    with torch.device("meta"):
        ours, reference = Mask2Former(), theirs(swin=dict(depths=[2, 2, 18, 2]))
    count = {net: sum(p.numel() for p in net.parameters()) for net in (ours, reference)}
    assert count[reference] == 68741083 and count[ours] == 68741083 - 2 * 768
    want = {key: v.shape for key, v in revert_weight_conversion(reference, reference.state_dict()).items()}
    used = {key: shape for key, shape in want.items() if not key.endswith(rewards.UNUSED)}
    assert len(want) - len(used) == 3                                 # the loss's weights, Swin's norm behind its end
    assert {key: v.shape for key, v in ours.state_dict().items()} == used
    table = "model.pixel_level_module.encoder.encoder.layers.2.blocks.17.attention.self.relative_position_bias_table"
    assert want[table] == (169, 12)


def test_deformable_attention_by_its_definition():
    torch.manual_seed(0)
    B, N, heads, d, K, sizes = 2, 4, 2, 3, 3, ((3, 4), (5, 2))
    maps = [torch.randn(B, heads, d, h, w) for h, w in sizes]
    places = torch.rand(B, N, heads, len(sizes), K, 2) * 1.6 - .3     # some of them outside
    weights = torch.rand(B, N, heads, len(sizes), K).flatten(3).softmax(3).view(B, N, heads, len(sizes), K)
    want = torch.zeros(B, N, heads, d, dtype=torch.float64)
    for b, n, head, l, k in np.ndindex(B, N, heads, len(sizes), K):
        h, w = sizes[l]
        x, y = places[b, n, head, l, k].double() * torch.tensor([w, h]) - .5               # in pixels' centres
        for i in range(h):
            for j in range(w):
                share = max(1 - abs(x - j), 0) * max(1 - abs(y - i), 0)
                want[b, n, head] += weights[b, n, head, l, k] * share * maps[l][b, head, :, i, j]
    got = rewards.deformable_attention(maps, places, weights)
    torch.testing.assert_close(got, want.flatten(2).float(), atol=1e-5, rtol=0)


def test_files_that_do_not_fit(home, tmp_path):
    state, config = (read(home / "mask2former" / name) for read, name in (
        (load_file, "model.safetensors"), (models.read_json, "config.json")))

    def refused(match, state=state, **changes):
        save_file(state, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
        rewards.read_detector.cache_clear()
        with pytest.raises(ValueError, match=match) as e:
            rewards.read_detector(tmp_path)
        assert "\n" not in str(e.value)
    refused("more .* has no place", {**state, "more": torch.zeros(1)})
    refused("class_predictor.bias is missing, 1", {key: v for key, v in state.items() if key != "class_predictor.bias"})
    refused("pre_norm=False, the configuration asks for True", pre_norm=True)
    refused("hidden_dim=64, .* 32", hidden_dim=32)
    refused("model_type='swin', .* 'resnet'", backbone_config={"model_type": "resnet"})
    refused("3 classes, not of COCO's 80", id2label={i: str(i) for i in range(3)})
    (tmp_path / "config.json").unlink()
    rewards.read_detector.cache_clear()
    with pytest.raises(ValueError, match="config.json is missing, .* hf download facebook/mask2former-swin-small-coco"):
        rewards.read_detector(tmp_path)
    old = {f"{key.removesuffix('table')}index".replace("_bias", ""): torch.zeros(9, 9, dtype=torch.long)
           for key in state if key.endswith("relative_position_bias_table")}
    assert len(old) == 7 and all(key.endswith(".relative_position_index") for key in old)
    save_file({**state, **old}, tmp_path / "model.safetensors")       # the public file holds these too
    (tmp_path / "config.json").write_text(json.dumps(config))
    rewards.read_detector(tmp_path)
    (tmp_path / rewards.MMDET_FILES[0]).touch()
    refused("model.safetensors and mask2former_swin-s.* leave one there")


# -------------------------------------------------------------------------------------------------- mmdet's own files

def to_mmdet(state, depths=SWIN["depths"], layers=(TINY["encoder_layers"], TINY["decoder_layers"])):
    """transformers' tensors under mmdet's names, written by hand the other way round."""
    out, state = {}, dict(state)

    def give(new, old, kinds=("weight", "bias"), change=lambda tensor: tensor):
        for kind in kinds:
            end, names = f".{kind}" if kind else "", [old] if isinstance(old, str) else old
            out[new + end] = change(torch.cat([state.pop(name + end) for name in names]))

    def unfolded(tensor):                     # torch's Unfold lists each channel's four pixels, row by row
        column, row, channel = -3, -2, -1
        return tensor.unflatten(-1, (2, 2, -1)).movedim((channel, row, column), (-3, -2, -1)).flatten(-3)

    pixels, queries = "model.pixel_level_module.", "model.transformer_module."
    give("backbone.patch_embed.projection", pixels + "encoder.embeddings.patch_embeddings.projection")
    give("backbone.patch_embed.norm", pixels + "encoder.embeddings.norm")
    for i, depth in enumerate(depths):
        give(f"backbone.norm{i}", f"{pixels}encoder.hidden_states_norms.stage{i + 1}")
        stage, theirs = f"backbone.stages.{i}.", f"{pixels}encoder.encoder.layers.{i}."
        for j in range(depth):
            new, old = f"{stage}blocks.{j}.", f"{theirs}blocks.{j}."
            give(new + "norm1", old + "layernorm_before"), give(new + "norm2", old + "layernorm_after")
            give(new + "attn.w_msa.qkv", [f"{old}attention.self.{name}" for name in ("query", "key", "value")])
            give(new + "attn.w_msa.proj", old + "attention.output.dense")
            give(new + "attn.w_msa.relative_position_bias_table",
                 old + "attention.self.relative_position_bias_table", [""])
            give(new + "ffn.layers.0.0", old + "intermediate.dense"), give(new + "ffn.layers.1", old + "output.dense")
            out[new + "attn.w_msa.relative_position_index"] = torch.zeros(9, 9, dtype=torch.long)
        if i < 3:
            give(stage + "downsample.norm", theirs + "downsample.norm", change=unfolded)
            give(stage + "downsample.reduction", theirs + "downsample.reduction", ["weight"], unfolded)
    head, pixels = "panoptic_head.pixel_decoder.", pixels + "decoder."
    give(head + "level_encoding.weight", pixels + "level_embed", [""])
    for i in range(3):
        give(f"{head}input_convs.{i}.conv", f"{pixels}input_projections.{i}.0")
        give(f"{head}input_convs.{i}.gn", f"{pixels}input_projections.{i}.1")
    for new, old in (("lateral_convs.0", "adapter_1"), ("output_convs.0", "layer_1")):
        give(f"{head}{new}.conv", f"{pixels}{old}.0", ["weight"]), give(f"{head}{new}.gn", f"{pixels}{old}.1")
    give(head + "mask_feature", pixels + "mask_projection")
    for i in range(layers[0]):
        new, old = f"{head}encoder.layers.{i}.", f"{pixels}encoder.layers.{i}."
        for part in ("sampling_offsets", "attention_weights", "value_proj", "output_proj"):
            give(f"{new}attentions.0.{part}", f"{old}self_attn.{part}")
        give(new + "norms.0", old + "self_attn_layer_norm"), give(new + "norms.1", old + "final_layer_norm")
        give(new + "ffns.0.layers.0.0", old + "fc1"), give(new + "ffns.0.layers.1", old + "fc2")
    head = "panoptic_head."
    for new, old in (("query_embed", "queries_embedder"), ("query_feat", "queries_features"), ("level_embed",) * 2):
        give(head + new, queries + old, ["weight"])
    give(head + "cls_embed", "class_predictor")
    give(head + "transformer_decoder.post_norm", queries + "decoder.layernorm")
    for i in range(3):
        give(f"{head}mask_embed.{2 * i}", f"{queries}decoder.mask_predictor.mask_embedder.{i}.0")
    for i in range(layers[1] - 1):
        new, old = f"{head}transformer_decoder.layers.{i}.", f"{queries}decoder.layers.{i}."
        give(new + "attentions.0.attn.in_proj_weight", old + "cross_attn.in_proj_weight", [""])
        give(new + "attentions.0.attn.in_proj_bias", old + "cross_attn.in_proj_bias", [""])
        for kind in ("weight", "bias"):
            give(f"{new}attentions.1.attn.in_proj_{kind}", [f"{old}self_attn.{x}_proj.{kind}" for x in "qkv"], [""])
        give(new + "attentions.0.attn.out_proj", old + "cross_attn.out_proj")
        give(new + "attentions.1.attn.out_proj", old + "self_attn.out_proj")
        for j, norm in enumerate(("cross_attn", "self_attn", "final")):
            give(f"{new}norms.{j}", f"{old}{norm}_layer_norm")
        give(new + "ffns.0.layers.0.0", old + "fc1"), give(new + "ffns.0.layers.1", old + "fc2")
    assert not state
    return out


def test_mmdet_names_are_a_bijection(home, tmp_path, monkeypatch):
    config = models.read_json(home / "mask2former" / "config.json")
    state = rewards.read_detector(home / "mask2former").state_dict()
    file = to_mmdet(state)
    back = [pair for key, v in file.items() if not key.endswith("index") for pair in from_mmdet(key, v)]
    assert len(back) == len(dict(back)) == len(state) and all(torch.equal(v, state[key]) for key, v in back)
    torch.save({"meta": {"CLASSES": ("person",), "epoch": 50}, "state_dict": file}, tmp_path / rewards.MMDET_FILES[1])
    monkeypatch.setattr(rewards, "Mask2Former", lambda: Mask2Former(**config))
    net = rewards.read_detector(tmp_path)
    assert all(torch.equal(v, state[key]) for key, v in net.state_dict().items())
    del file["panoptic_head.query_feat.weight"]
    torch.save(file, tmp_path / rewards.MMDET_FILES[1])
    rewards.read_detector.cache_clear()
    with pytest.raises(ValueError, match="queries_features.weight is missing, 1"):
        rewards.read_detector(tmp_path)


def test_mmdet_names_are_mmdets_own():
    """Names and shapes of the public detector; the sum is of those that mmdet 2.27.0 and 2.28.2 give theirs."""
    with torch.device("meta"):
        file = to_mmdet(Mask2Former().state_dict(), (2, 2, 18, 2), (6, 10))
    lines = sorted(f"{key} {tuple(v.shape)}" for key, v in file.items() if not key.endswith("index"))
    assert len(lines) == 625 and hashlib.sha256("".join(line + "\n" for line in lines).encode()).hexdigest() == (
        "99a7e09736dd8ded93ec65b2dea90095a25481b7521f6aecca8aa59be3b0bc5a")


def test_mmdet_merges_patches_in_another_order():
    """Its way: Unfold, norm, linear. Ours with the converted tensors comes to the same, odd sizes padded."""
    torch.manual_seed(0)
    x, norm, weight = torch.randn(2, 5, 6, 3), shaken(torch.nn.LayerNorm(12)), torch.randn(6, 12)
    state = {"norm.weight": norm.weight, "norm.bias": norm.bias, "reduction.weight": weight}
    ours = rewards.PatchMerging(3)
    ours.load_state_dict({key: from_mmdet(f"backbone.stages.0.downsample.{key}", v)[0][1] for key, v in state.items()})
    columns = torch.nn.Unfold(2, stride=2)(torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 1)).permute(0, 3, 1, 2))
    want = norm(columns.mT) @ weight.T                                                     # (2, 9, 6)
    torch.testing.assert_close(ours(x).flatten(1, 2), want, atol=1e-5, rtol=0)


# --------------------------------------------------------------------------------- from images to pixels and to objects

def bilinear(x, h, w):
    """Each pixel of (h, w) from its four neighbours in x (H, W), float64; edges repeat."""
    x, out = x.double(), torch.zeros(h, w, dtype=torch.float64)
    H, W = x.shape
    for i, j in np.ndindex(h, w):
        y, z = min(max((i + .5) * H / h - .5, 0), H - 1), min(max((j + .5) * W / w - .5, 0), W - 1)
        y0, z0 = int(y), int(z)
        y1, z1 = min(y0 + 1, H - 1), min(z0 + 1, W - 1)
        top, bottom = (x[r, z0] * (1 - z + z0) + x[r, z1] * (z - z0) for r in (y0, y1))
        out[i, j] = top * (1 - y + y0) + bottom * (y - y0)
    return out


@pytest.mark.parametrize("size, inner, padded", [
    ((512, 512), (800, 800), (800, 800)), ((512, 1024), (667, 1333), (672, 1344)), ((1, 1), (800, 800), (800, 800)),
    ((1024, 1024), (800, 800), (800, 800)), ((300, 7), (1333, 31), (1344, 32)), ((1, 4000), (1, 1333), (32, 1344))])
def test_sizes_of_pixels(size, inner, padded):
    with torch.device("meta"):
        pixels, got = detector_pixels(torch.zeros(1, 3, *size).to("meta"))
    assert got == inner and pixels.shape == (1, 3, *padded)


@pytest.mark.parametrize("size", [(7, 5), (31, 27)])                  # made larger, made smaller; no sum ends in .5
def test_pixels_by_their_definition(size):
    g = torch.Generator().manual_seed(0)
    image = torch.rand(1, 3, *size, generator=g)
    pixels, (h, w) = detector_pixels(image, 13, 11, 8)
    assert max(h, w) == 13 and pixels.shape[2:] == (16, 16)
    for channel, mean, std in ((0, 123.675, 58.395), (1, 116.28, 57.12), (2, 103.53, 57.375)):   # red is the first
        want = torch.full((16, 16), 128., dtype=torch.float64)
        want[:h, :w] = bilinear((image[0, channel] * 255).round(), h, w).round()
        torch.testing.assert_close(pixels[0, channel], ((want - mean) / std).float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("least, most", [(-1, 10), (-1, 100), (.1, 10)])
def test_instances_by_their_definition(least, most):
    g = torch.Generator().manual_seed(0)
    logits, masks = 2 * torch.randn(6, 5, generator=g), 3 * torch.randn(6, 5, 7, generator=g)
    masks[2] = -4                                                     # nothing to see
    padded, inner, size = (12, 16), (10, 15), (7, 9)
    pairs = []
    for query in range(6):
        p = np.exp(logits[query].double().numpy())
        pairs += [(p[k] / p.sum(), query, k) for k in range(4)]      # the fifth is "no object"
    want = []
    for chance, query, k in sorted(pairs, reverse=True)[:most]:
        x = bilinear(bilinear(masks[query], *padded)[:inner[0], :inner[1]], *size).numpy()
        inside = [(i, j) for i, j in np.ndindex(*size) if x[i, j] > 0]
        box = [0, 0, 0, 0]
        if inside:
            ys, xs = zip(*inside)
            box = [min(xs), min(ys), max(xs) + 1, max(ys) + 1]
        score = chance * sum(1 / (1 + math.exp(-x[at])) for at in inside) / (len(inside) + 1e-6)
        if score > least:
            want.append((score, k, box, x > 0))
    got = instances(logits, masks, padded, inner, size, least, most)
    scores, labels, boxes, inside = zip(*want)
    torch.testing.assert_close(got[0], torch.tensor(scores).float(), atol=1e-5, rtol=0)
    assert got[1].tolist() == list(labels) and got[2].tolist() == list(boxes)
    assert np.array_equal(got[3].numpy(), np.stack(inside))
    nothing = instances(logits, masks, padded, inner, size, .999, most)
    assert [len(x) for x in nothing] == [0] * 4 and nothing[3].shape == (0, *size)
    assert [0, 0, 0, 0] in boxes and len(want) == min(most, 24) if least < 0 else 1 < len(want) < 10


# ------------------------------------------------------------------------------------------------------ from end to end

def meta(tag="two_object", **include):
    return {"tag": tag, "include": [{"class": noun, **need} for noun, need in include.items()], "prompt": "a photo"}


METAS = [meta(cup={"count": 3}), meta(cup={"count": 2, "color": "red"}, cat={"count": 1, "color": "blue"}),
         meta(cat={"count": 2}, cup={"count": 4, "position": ["left of", 0]}), meta("counting", cat={"count": 4})]


def seen(images, home, metas=METAS, **options):
    return geneval_engine(home, "cpu", **options)(images, metas)


@pytest.mark.parametrize("size", [(40, 40), (37, 51), (1, 1)])
def test_rewards(home, small, size):
    images = pictures(*size, 4)
    found = seen(images, home)
    assert sum(len(rows) for rows in found) > 4 and all(
        rows == sorted(rows, key=lambda d: -d["score"]) and all(.3 < d["score"] <= 1 for d in rows) for rows in found)
    assert {"cat", "cup"} <= {d["class"] for rows in found for d in rows} <= set(data.OBJECTS)
    for name, key in (("geneval", "score"), ("geneval-strict", "strict"), ("geneval-correct", "correct")):
        score = rewards.load(name, home)
        got = score(images, [""] * 4, METAS)
        assert got.shape == (4,) and got.dtype == torch.float32 and not got.requires_grad
        assert got.tolist() == pytest.approx([rewards.score_detections(d, m)[key] for d, m in zip(found, METAS)])
        broken = images.clone()
        broken[1, 0, 0, 0], broken[3, 2, 0, 0] = math.nan, math.inf
        again = score(broken, [""] * 4, METAS)
        assert again.isnan().tolist() == [False, True, False, True] and torch.equal(again[::2], got[::2])
    assert len(set(rewards.load("geneval", home)(images, [""] * 4, METAS).tolist())) > 1
    quirks = rewards.geneval(home, clip_negative=True)(images, [""] * 4, METAS)
    assert quirks.tolist() == pytest.approx([rewards.score_detections(d, m, clip_negative=True)["score"]
                                             for d, m in zip(found, METAS)])
    strict = rewards.geneval(home, threshold=.5)(images, [""] * 4, METAS)
    assert strict.tolist() == pytest.approx([rewards.score_detections(d, m, threshold=.5)["score"]
                                             for d, m in zip(found, METAS)])
    for flag in ("threshold", "counting_threshold"):                   # what scores less was never kept
        with pytest.raises(ValueError, match=f"{flag}=0.2: .* 0.3 or more"):
            rewards.geneval(home, **{flag: .2})


def test_batches_and_bytes_do_not_matter(home, small):
    """A PNG in between changes nothing; nor does the company in which an image is scored."""
    images, metas = pictures(40, 52, 4), [meta(cup={"count": 3, "color": "red"})] * 4
    want = seen(images, home, metas)
    assert sum("color" in d for rows in want for d in rows) > 8       # at a batch of 1, CLIP sees eight crops at once
    for got in (seen(images, home, metas, batch=1), seen(images, home, metas, batch=3),
                seen(images + .3 / 255, home, metas)):
        for a, b in zip(sum(got, []), sum(want, []), strict=True):
            assert a == {**b, "score": pytest.approx(a["score"], abs=1e-4)}
    assert seen(images.flip(1), home, metas) != want                         # red and blue exchanged


def test_colours_equal_the_official_way(home, small, monkeypatch):
    """PIL's composite, crop and resize, and transformers' CLIP; every colour that a meta asks for, and no other."""
    images, crops = pictures(40, 52, 3), []
    metas = [meta(cup={"count": 2, "color": "red"}, cat={"count": 1})] * 3
    monkeypatch.setattr(rewards, "clip_pixels", lambda *args: crops.append(clip_pixels(*args)) or crops[-1])
    found = seen(images, home, metas)
    clip = transformers.CLIPModel.from_pretrained(home / "clip-l14").eval()
    net, tokenize = rewards.read_detector(home / "mask2former"), models.CLIPTokenizer(home / "clip-l14")
    colours = []
    for image, rows in zip(images, found):
        pixels, inner = rewards.detector_pixels(image[None])
        with torch.no_grad():
            score, label, box, mask = instances(*(x[0] for x in net(pixels)), pixels.shape[2:], inner, (40, 52), .3)
        picture = Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy())
        blank = Image.new("RGB", picture.size, "#999")
        cups = [i for i in score.argsort(descending=True).tolist() if data.OBJECTS[label[i]] == "cup"]
        rows = [row for row in rows if row["class"] == "cup"]
        assert len(cups) == len(rows) > 2 and not any("color" in row for row in rows[2:])
        for i, row in list(zip(cups, rows))[:2]:
            crop = Image.composite(picture, blank, Image.fromarray(mask[i].numpy())).crop(box[i].tolist())
            want = torchvision_pixels(crop, 32)[None]
            torch.testing.assert_close(crops.pop(0), want, atol=1e-5, rtol=0)
            likeness = []
            for paint in data.PAINTS:
                ids = tokenize([f"a photo of a {paint} cup", f"a photo of a {paint}-colored cup",
                                f"a photo of a {paint} object"])
                with torch.no_grad():
                    out = clip(input_ids=ids, pixel_values=want)
                text = out.text_embeds.mean(0)
                likeness.append((out.image_embeds[0] @ text / text.norm()).item())
            colours.append(data.PAINTS[int(np.argmax(likeness))])
            assert row["color"] == colours[-1]
    assert len(set(colours)) > 1 and not crops
    assert not any("color" in row for rows in found for row in rows if row["class"] != "cup")


@pytest.mark.parametrize("bad, match", [
    ({"prompt": "a dog"}, "'include'"), ("a\ndog", "'include'"), ({"include": None}, "cannot check"),
    ({"include": []}, "cannot check"), ({"include": 5}, "cannot check"), ({"include": ["dog"]}, "cannot check"),
    (meta(dog={"count": 0}), "cannot check"), (meta(unicorn={"count": 1}), "not 'unicorn'"),
    (meta(dog={"count": 1, "color": "mauve"}), "not 'mauve'"), (meta(dog={"count": 1, "color": None}), "not None"),
    ({**METAS[0], "exclude": [{"class": "unicorn", "count": 1}]}, "not 'unicorn'"),
    ({**METAS[0], "exclude": [{"class": "dog"}]}, "cannot check")])
def test_metas_that_cannot_be_checked(home, small, bad, match):
    with pytest.raises(ValueError, match=match) as e:
        rewards.load("geneval", home)(pictures(8, 8, 2), [""] * 2, [METAS[0], bad])
    assert "\n" not in str(e.value)


def test_an_image_without_objects(home, small, monkeypatch):
    monkeypatch.setattr(rewards, "SURE", .999)
    assert seen(pictures(40, 52, 4), home) == [[]] * 4
    assert rewards.load("geneval", home)(pictures(40, 52, 4), [""] * 4, METAS).tolist() == [0] * 4


def test_every_official_prompt_can_be_checked():
    for row in data.prompts("geneval", "test") + data.prompts("geneval", "val"):
        rewards.check_meta(row)


def test_images_of_other_shapes(home, small):
    for images, metas in ((torch.zeros(2, 1, 8, 8), METAS[:2]), (torch.zeros(2, 4, 8, 8), METAS[:2]),
                          (torch.zeros(3, 8, 8), METAS[:3]), (torch.zeros(2, 3, 8, 8), METAS[:3])):
        with pytest.raises(ValueError, match="convert grey or RGBA"):
            seen(images, home, metas)


def test_missing_weights_name_the_file_and_the_command(home, tmp_path):
    with pytest.raises(ValueError, match="curl .*hf download facebook/mask2former-swin-small-coco-instance") as e:
        rewards.load("geneval", tmp_path)
    assert "\n" not in str(e.value) and str(tmp_path / "mask2former" / rewards.MMDET_FILES[0]) in str(e.value)
    (tmp_path / "mask2former").symlink_to(home / "mask2former")
    with pytest.raises(ValueError, match="hf download openai/clip-vit-large-patch14") as e:
        rewards.load("geneval-strict", tmp_path)
    assert str(tmp_path / "clip-l14" / "config.json") in str(e.value)


# -------------------------------------------------------------------------------------------------------- the benchmark

def test_the_official_folder(home, small, tmp_path, capsys):
    images = pictures(40, 52, 4)
    metas = data.prompts("geneval", "test")
    for index in (0, 179, 300):
        rewards.write_geneval(tmp_path, index, metas[index], images[:2])
        rewards.write_geneval(tmp_path, index, metas[index], images[2:] + .3 / 255, first=2)
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*"))
    assert files == sorted(f"{index}/{name}" for index in ("00000", "00179", "00300") for name in (
        "metadata.jsonl", *(f"samples/000{i}.png" for i in range(4))))
    assert json.loads((tmp_path / "00179" / "metadata.jsonl").read_text()) == metas[179]
    picture = np.array(Image.open(tmp_path / "00000" / "samples" / "0002.png"))
    assert np.array_equal(picture, (images[2].permute(1, 2, 0) * 255).round().byte().numpy())

    rows = rewards.score_geneval(tmp_path, home, batch=3)
    assert rows == [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [row["filename"] for row in rows] == [str(tmp_path / name) for name in files if name.endswith("png")]
    find = geneval_engine(home)
    for i, row in enumerate(rows):
        meta = metas[(0, 179, 300)[i // 4]]
        [found] = find(images[i % 4][None], [meta])
        got = rewards.score_detections(found, meta)
        assert (row["tag"], row["prompt"], json.loads(row["metadata"])) == (meta["tag"], meta["prompt"], meta)
        assert row["correct"] is (got["correct"] == 1) and row["strict"] is (got["strict"] == 1)
        assert row["score"] == pytest.approx(got["score"])
        assert sum(map(len, json.loads(row["details"]).values())) == len(found)
        assert row["engine"] == find.engine and "transformers' weights" in find.engine
    assert rewards.geneval_summary(rows)["correct_images"] == sum(row["correct"] for row in rows) / 12
    (tmp_path / "results.jsonl").unlink()
    rewards.main(["geneval", str(tmp_path), "--weights", str(home), "--device", "cpu"])
    assert capsys.readouterr().out == rewards.geneval_table(rows) + "\n" and (tmp_path / "results.jsonl").is_file()
    Image.new("RGBA", (9, 5), (9, 9, 9, 0)).save(tmp_path / "00000" / "samples" / "0004.png")
    assert len(rewards.score_geneval(tmp_path, home)) == 13           # of another size and kind: made RGB


def test_the_table():
    rows = [{"tag": tag, "prompt": f"{tag} {i // 4}", "correct": i < right}
            for tag, n, right in (("counting", 8, 2), ("colors", 4, 3)) for i in range(n)]
    assert rewards.geneval_table(rows).splitlines() == [
        "task              right  images    share", "counting              2       8   25.00%",
        "colors                3       4   75.00%", "overall                           0.5000",
        "correct images                    0.4167", "correct prompts                   0.6667"]


def test_folders_that_cannot_be_scored(home, small, tmp_path):
    with pytest.raises(ValueError, match="not finite"):
        rewards.write_geneval(tmp_path, 0, METAS[0], torch.full((1, 3, 4, 4), math.nan))
    with pytest.raises(ValueError, match="no images in GenEval's layout"):
        rewards.score_geneval(tmp_path, home)
    rewards.write_geneval(tmp_path, 0, METAS[0], pictures(4, 4, 1))
    (tmp_path / "00000" / "samples" / "0001.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="cannot read the image .*0001.png"):
        rewards.score_geneval(tmp_path, home)
    without = json.dumps({key: value for key, value in METAS[0].items() if key != "prompt"})
    for text, why in (("{", ""), (without, ": it has no 'prompt'"), ("5", ""), ("[]", "")):
        (tmp_path / "00000" / "metadata.jsonl").write_text(text)
        with pytest.raises(ValueError, match="cannot read .*metadata.jsonl" + why):
            rewards.score_geneval(tmp_path, home)


def test_the_benchmark_from_a_model(home, small, random_model, tmp_path, capsys):
    """Sampled and scored by one command: the folder reads the same to score_geneval, and so to the official scripts."""
    out = tmp_path / "out"
    rewards.main(["bench", "--model", str(random_model), "--benchmark", "geneval", "--draw", "3", "--out", str(out),
                  "--eval-steps", "1", "--micro-batch", "5", "--reward-weights", str(home)])
    said = capsys.readouterr().out
    rows = [json.loads(line) for line in (out / "images" / "results.jsonl").read_text().splitlines()]
    assert len(rows) == 12 and rewards.geneval_table(rows) in said     # four images a prompt
    again = rewards.score_geneval(out / "images", home)
    assert [(row["filename"], row["correct"], row["metadata"], row["engine"]) for row in rows] == [
        (row["filename"], row["correct"], row["metadata"], row["engine"]) for row in again]
    assert [{*json.loads(row["details"])} for row in rows] == [{*json.loads(row["details"])} for row in again]
    result, find = json.loads((out / "result.json").read_text()), geneval_engine(home)
    assert result["geneval"] == rewards.geneval_summary(rows)
    assert result["protocol"]["rewards"]["geneval-correct"] == {"engine": find.engine,
                                                                "sha256": rewards.digest(*find.nets)}
