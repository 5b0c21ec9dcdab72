"""Image data sets and their curation: shards, folders, damage, resuming, cached latents, a server that misbehaves."""
import base64
import http.server
import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
import models
from data import Cached, Images

torch.set_num_threads(1)
ROOT = Path(data.__file__).parent
CAPTION = "A woman with short dark hair smiles in front of a plain white wall, a photograph."


def picture(seed, size=(40, 32), kind="PNG", **options):
    """The bytes of an image: smooth and random, or in one colour if `seed` is a colour's name."""
    if isinstance(seed, str):
        image = Image.new("RGB", size, seed)
    else:
        g = torch.Generator().manual_seed(seed)
        image = Image.fromarray((torch.rand(5, 5, 3, generator=g) * 255).byte().numpy()).resize(size, Image.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write_tar(path, members):
    """members: {name: bytes, str, or a type's number for a member that is no file}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            if isinstance(content, str):
                content = content.encode()
            if isinstance(content, int):
                member.type, member.linkname, content = bytes([content]), "/etc/passwd", b""
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def sample(key, seed=None, text=None, **options):
    return {f"{key}.png": picture(int(key) if seed is None else seed, **options),
            f"{key}.txt": text or f"caption {key}"}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Four tars with 5, 3, 4 and 2 samples of two images' sizes."""
    folder, n = tmp_path_factory.mktemp("shards"), 0
    for i, count in enumerate((5, 3, 4, 2)):
        rows = [sample(f"{n + j:03d}", size=((40, 32), (32, 64))[j % 2]) for j in range(count)]
        write_tar(folder / f"{i:05d}.tar", {name: content for row in rows for name, content in row.items()})
        n += count
    return folder


def take(stream, n=None):
    return [(s["key"], s["caption"], s["image"] if "image" in s else s["latents"])
            for s in itertools.islice(iter(stream), n)]


def same(a, b):
    return len(a) == len(b) and all(x[:2] == y[:2] and torch.equal(x[2], y[2]) for x, y in zip(a, b))


def keys(stream, n=None):
    return [row[0] for row in take(stream, n)]


# =========================================================================================================== the stream

def test_images_beside_another_tools_index_are_no_latents(tmp_path):
    """Latents are known by their files' names; a cache that was not finished says so, and so does a broken one."""
    (tmp_path / "a.png").write_bytes(picture(0))
    (tmp_path / "a.txt").write_text("a cat")
    (tmp_path / "index.json").write_text('{"shards": []}')
    images, captions = data.training_stream(str(tmp_path), 16, 0, 1, 2, 0)(0)
    assert images.shape == (2, 3, 16, 16) and list(captions) == ["a cat"] * 2
    (tmp_path / "0-of-1-00000.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="index.json is not one of data.latents"):
        data.training_stream(str(tmp_path), 16, 0, 1, 2, 0)
    (tmp_path / "index.json").unlink()
    with pytest.raises(ValueError, match="the latents are not finished"):
        data.training_stream(str(tmp_path), 16, 0, 1, 2, 0)


def test_latents_for_another_model_are_refused():
    data.check_cached("cache", [(4, 8, 8), (77, 16)], [(4, 8, 8), (77, 16)])
    with pytest.raises(ValueError, match=r"--images cache holds latents .*\(4, 8, 8\).* wants .*\(4, 16, 16\)"):
        data.check_cached("cache", [(4, 8, 8), (77, 16)], [(4, 16, 16), (77, 16)])


@pytest.mark.parametrize("shuffle", (True, False))
@pytest.mark.parametrize("world", (1, 2, 3))
def test_ranks_cover_everything_once_an_epoch(shards, world, shuffle):
    everything = [f"{i:03d}" for i in range(14)]
    for epochs in (1, 2):
        seen = [keys(Images(shards, 16, r, world, epochs=epochs, shuffle=shuffle, block=4)) for r in range(world)]
        assert sorted(sum(seen, [])) == sorted(everything * epochs)
    if world == 1:
        assert (seen[0] == everything * 2) == (not shuffle)
        assert shuffle == (seen[0][:14] != seen[0][14:])


def test_order_is_a_function_of_seed(shards):
    a, b, c = (keys(Images(shards, 16, seed=seed, block=4), 30) for seed in (0, 0, 1))
    assert a == b != c


@pytest.mark.parametrize("rank, world, block, workers", ((0, 1, 4, 3), (1, 2, 512, 1), (2, 3, 1, 2)))
def test_resumes_inside_a_shard_bit_for_bit(shards, rank, world, block, workers):
    make = lambda: Images(shards, 16, rank, world, seed=3, block=block, workers=workers)
    whole = take(make(), 20)
    for cut in (0, 1, 2, 4, 5, 9, 14, 15, 19):
        stream, rest = make(), make()
        assert same(take(stream, cut), whole[:cut])
        rest.restore(json.loads(json.dumps(stream.state())))
        assert same(take(rest, 20 - cut), whole[cut:]), cut


def test_batches(shards):
    stream = Images(shards, 16, seed=1, epochs=1, block=4)
    whole = take(Images(shards, 16, seed=1, epochs=1, block=4))
    got, rest = list(itertools.islice(stream.batches(4), 2)), Images(shards, 16, seed=1, epochs=1, block=4)
    rest.restore(stream.state())
    got += rest.batches(4)
    assert [len(captions) for _, captions in got] == [4, 4, 4, 2]
    images = torch.cat([images for images, _ in got])
    assert images.dtype == torch.float32 and torch.equal((images * 255).byte(), torch.stack([x for *_, x in whole]))
    assert [c for _, captions in got for c in captions] == [caption for _, caption, _ in whole]


@pytest.mark.parametrize("size", ((64, 32), (32, 96), (32, 32)))
def test_the_central_square_resized_with_antialias(tmp_path, size):
    content = picture(0, size)
    shard = write_tar(tmp_path / "0.tar", {"0.png": content, "0.txt": "x"})
    got = take(Images(shard, 16), 1)[0][2]
    x = torch.from_numpy(np.array(Image.open(io.BytesIO(content)))).permute(2, 0, 1)[None].float()
    w, h = size[0] // 2, size[1] // 2                                  # resized first, then cut: a short edge of 16
    wanted = F.interpolate(x, (h, w), mode="bicubic", antialias=True)[0].clamp(0, 255)
    wanted = wanted[:, (h - 16) // 2:(h + 16) // 2, (w - 16) // 2:(w + 16) // 2]
    assert got.dtype == torch.uint8 and got.shape == (3, 16, 16)
    assert (got.float() - wanted).abs().max() < 1.01


def test_transparent_is_white_and_turned_is_upright(tmp_path):
    clear = io.BytesIO()
    Image.new("RGBA", (32, 32), (255, 0, 0, 0)).save(clear, "PNG")
    exif = Image.Exif()
    exif[0x112] = 6                                                    # to be turned by a quarter
    turned = io.BytesIO()
    image = Image.new("RGB", (32, 32), "black")
    image.paste("white", (0, 0, 32, 16))                               # the upper half
    image.save(turned, "JPEG", exif=exif)
    shard = write_tar(tmp_path / "0.tar", {"0.png": clear.getvalue(), "0.txt": "x",
                                           "1.JPG": turned.getvalue(), "1.TXT": "y"})
    (_, _, a), (_, _, b) = take(Images(shard, 16, shuffle=False), 2)
    assert (a == 255).all() and (b[:, :, 10:] > 200).all() and (b[:, :, :6] < 50).all()


def test_grey_of_16_bits_is_not_clipped(tmp_path):
    ramp = np.linspace(0, 65535, 256 * 256).astype(np.uint16).reshape(256, 256)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    image = Image.open(tmp_path / "ramp.png")
    assert image.mode.startswith("I") and data.decoded(image).mode == "RGB"
    assert np.array_equal(np.asarray(data.decoded(image))[..., 1], np.round(ramp / 257))


def test_what_lies_between_the_samples(tmp_path):
    shard = write_tar(tmp_path / "0.tar", {
        "./a/": tarfile.DIRTYPE[0], "./a/0.JPEG": picture(0, kind="JPEG"), "./a/._0.txt": b"\0", "./a/0.txt": "zero",
        "README": "x", "./a/0.b.txt": "of no known kind", "./a/1.npy": b"x" * 9, "./a/1.json": '{"caption": "one"}',
        "./a/1.png": picture(1), "./a/2.png": picture(2), "./a/2.txt": "", "./a/2.json": '{"caption": " two "}'})
    stream = Images(shard, 16, shuffle=False, epochs=1)
    assert [row[:2] for row in take(stream)] == [("./a/0", "zero"), ("./a/1", "one"), ("./a/2", "two")]
    assert not stream.skipped


def test_folders(tmp_path):
    beside, table = tmp_path / "beside", tmp_path / "table"
    for folder in (beside / "00000", table):
        folder.mkdir(parents=True)
        for i in range(4):
            (folder / f"{i}.png").write_bytes(picture(i))
    (beside / "00000" / "0.txt").write_text("zero\n")
    (beside / "00000" / "1.json").write_text('{"caption": "one"}')
    (beside / "00000" / "2.txt").write_text("  ")
    (table / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (
        {"file_name": "0.png", "text": "zero"}, {"file_name": "1.png"}, {"file_name": "gone.png", "text": "x"},
        {"file_name": "../beside/00000/0.png", "text": "x"}, {"file_name": "3.png", "text": "three"})))
    stream = Images(beside, 16, shuffle=False, epochs=1)
    assert [row[:2] for row in take(stream)] == [("00000/0", "zero"), ("00000/1", "one")]
    assert stream.skipped == {"no caption": 2}
    stream = Images([table], 16, shuffle=False, epochs=1)
    assert [row[:2] for row in take(stream)] == [("0", "zero"), ("3", "three")]
    assert stream.skipped == {"no caption": 1, "no image": 1, "unsafe path": 1}
    make = lambda: Images([beside, table], 16, seed=1, block=3)
    whole = take(make(), 12)
    for cut in range(12):
        stream, rest = make(), make()
        take(stream, cut)
        rest.restore(stream.state())
        assert same(take(rest, 12 - cut), whole[cut:]), cut
    both = [keys(Images([beside, str(table)], 16, r, 3, epochs=2)) for r in range(3)]
    assert sorted(sum(both, [])) == sorted(["00000/0", "00000/1", "0", "3"] * 2)
    (tmp_path / "tea").mkdir()                                         # no drive's letter: a file that is there
    (tmp_path / "tea" / "5:30 pm.png").write_bytes(picture(0))
    (tmp_path / "tea" / "5:30 pm.txt").write_text("at five")
    assert [row[:2] for row in take(Images(tmp_path / "tea", 16, epochs=1))] == [("5:30 pm", "at five")]
    (table / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "zero"}\n\n["0.png"]\n')
    with pytest.raises(ValueError, match="metadata.jsonl, line 3"):
        Images(table, 16)


def test_folders_behind_links(tmp_path):
    """Are read like others; a link that leads back is not followed, and two that lead to each other end."""
    (tmp_path / "in" / "b").mkdir(parents=True), (tmp_path / "far" / "deep").mkdir(parents=True)
    for file in ("in/b/0.png", "far/1.png", "far/deep/2.png"):
        (tmp_path / file).write_bytes(picture(0))
    (tmp_path / "in" / "a").symlink_to(tmp_path / "far"), (tmp_path / "far" / "deep" / "up").symlink_to("..")
    (tmp_path / "in" / "b" / "whole").symlink_to(tmp_path / "in"), (tmp_path / "far" / "gone").symlink_to("nowhere")
    assert [key for _, key, _ in data.find_shards(tmp_path / "in")] == ["a/1", "a/deep/2", "b/0"]
    (tmp_path / "far" / "deep" / "up").unlink(), (tmp_path / "far" / "deep" / "other").symlink_to(tmp_path / "in" / "b")
    (tmp_path / "in" / "b" / "other").symlink_to(tmp_path / "far" / "deep")
    assert [key for _, key, _ in data.find_shards(tmp_path / "in")] == [
        "a/1", "a/deep/2", "a/deep/other/0", "b/0", "b/other/2"]


# =============================================================================================================== damage

BOMB = picture("red", (3000, 3000))
GIANT = BOMB[:16] + (60000).to_bytes(4, "big") * 2 + BOMB[24:29]       # a PNG that says 60000 x 60000
GIANT += zlib.crc32(GIANT[12:]).to_bytes(4, "big") + BOMB[33:]
DAMAGE = {
    "no image": {"9.txt": "x"},
    "no caption": {"9.png": picture(0)},
    "corrupt caption": {"9.png": picture(0), "9.txt": b"\xff\xfe\x00x"},
    "corrupt json": {"9.png": picture(0), "9.json": "{"},
    "corrupt image": {"9.png": b"no picture at all", "9.txt": "x"},
    "too many pixels": {"9.png": BOMB, "9.txt": "x"},
    "not a plain file": {"9.png": tarfile.SYMTYPE[0]},
}


@pytest.mark.parametrize("reason", DAMAGE)
@pytest.mark.parametrize("at", (0, 1))
def test_damage_is_counted_and_the_rest_is_read(tmp_path, reason, at, capsys):
    good = [sample("1"), sample("2")]
    good.insert(at, DAMAGE[reason])
    write_tar(tmp_path / "0.tar", {name: content for row in good for name, content in row.items()})
    stream = Images(tmp_path, 16, epochs=2, max_pixels=2**20)
    assert sorted(keys(stream)) == ["1", "1", "2", "2"]                # listed and said once, in two epochs
    assert stream.skipped == {reason: 1} and list(stream.bad.values()) == [reason]
    assert capsys.readouterr().err.count(reason) == 1


@pytest.mark.parametrize("content", (picture(0)[:-40], picture(0)[:60], picture(0, kind="JPEG")[:200], b"",
                                     picture(0, kind="TIFF"), picture(0, kind="PPM")))
def test_images_that_do_not_decode(tmp_path, content):
    shard = write_tar(tmp_path / "0.tar", {**sample("1"), "2.jpg": content, "2.txt": "x"})
    stream = Images(shard, 16, epochs=1)
    assert keys(stream) == ["1"] and stream.skipped == {"corrupt image": 1}


def test_the_pixel_limit(tmp_path, monkeypatch):
    shard = write_tar(tmp_path / "0.tar", {"1.png": GIANT, "1.txt": "x", **sample("2", size=(64, 40))})
    stream = Images(shard, 16, epochs=1)
    assert keys(stream) == ["2"] and stream.skipped == {"too many pixels": 1}
    assert keys(Images(shard, 16, epochs=1, max_pixels=64 * 40)) == ["2"]
    with pytest.raises(ValueError, match="nothing to use.*'too many pixels': 2"):
        keys(Images(shard, 16, epochs=1, max_pixels=64 * 40 - 1))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)               # Pillow's own limit gives way to ours
    assert keys(Images(shard, 16, epochs=1, max_pixels=64 * 40)) == ["2"]


@pytest.mark.parametrize("name", ("/tmp/9.png", "../9.png", "a/../../9.png", "..\\9.png", "C:/9.png", "\\9.png"))
def test_paths_that_lead_out_are_refused(tmp_path, name):
    shard = write_tar(tmp_path / "0.tar", {"a..b/1.png": picture(1), "a..b/1.txt": "fine", name: picture(2),
                                           name.replace("png", "txt"): "x"})
    stream = Images(shard, 16, epochs=1)
    assert keys(stream) == ["a..b/1"] and stream.skipped == {"unsafe path": 2}
    assert [path.name for path in tmp_path.rglob("*")] == ["0.tar"]    # nothing was unpacked


def test_a_shard_cut_anywhere(tmp_path):
    rows = [sample(f"{i}", size=(8, 8)) for i in range(3)]
    members = {name: content for row in rows for name, content in row.items()}
    whole = write_tar(tmp_path / "whole.tar", members).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as tar:
        starts = [member.offset for member in tar if member.name.endswith("png")]
        end = tar.getmembers()[-1].offset_data + 512
    for cut in sorted({*range(512, end + 513, 512), *range(700, end, 700)}):
        (tmp_path / "cut.tar").write_bytes(whole[:cut])
        bad, expected = [], sum(start < cut for start in starts[1:])   # a sample is whole once the next has begun
        got = list(data.read_tar(tmp_path / "cut.tar", lambda *x: bad.append(x)))
        if cut >= end + 512:
            assert len(got) == 3 and not bad
        else:
            assert bad == [("", "cut short")] and len(got) in (expected, expected - 1), cut
        assert all(files == {"png": rows[i][f"{i}.png"], "txt": rows[i][f"{i}.txt"].encode()}
                   for i, (_, files) in enumerate(got))
    for content, reason in ((b"", "not a tar file"), (b"x" * 3000, "not a tar file"), (whole[:100], "not a tar file")):
        (tmp_path / "cut.tar").write_bytes(content)
        assert list(data.read_tar(tmp_path / "cut.tar", lambda *x: bad.append(x))) == [] and bad[-1] == ("", reason)


def test_refused(tmp_path, shards):
    for paths, words in ((tmp_path, "no images"), (tmp_path / "gone", "gone"), ([], "no images"),
                         (str(tmp_path / "*.tar"), "pattern"), ([shards, str(tmp_path / "*.png")], r"no .*\*\.png: ")):
        with pytest.raises(ValueError, match=words):
            Images(paths, 16)
    with pytest.raises(ValueError, match="4 shards cannot be dealt to 5"):
        Images(shards, 16, world=5)
    write_tar(tmp_path / "bad.tar", DAMAGE["no image"])
    for epochs in (1, None):                                           # the endless stream does not search for ever
        with pytest.raises(ValueError, match=r"nothing to use.*bad.tar: \{'no image': 1\}"):
            keys(Images(tmp_path, 16, epochs=epochs))
    write_tar(tmp_path / "bad.tar", {}), write_tar(tmp_path / "worse.tar", {}), write_tar(tmp_path / "worst.tar", {})
    with pytest.raises(ValueError, match="rank 1 found nothing to use in its 1 of the 3 shards"):
        keys(Images(tmp_path, 16, rank=1, world=2))
    state = Images(shards, 16).state()
    for other in (Images(shards, 16, seed=1), Images(shards, 16, 1, 2), Images(shards / "00000.tar", 16),
                  Images(shards, 8)):
        with pytest.raises(ValueError, match="was saved with"):
            other.restore(state)


# ============================================================================================================== latents

@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return models.VAE(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, scaling_factor=.7,
                      shift_factor=.1)


def words(captions):
    """Two features of each caption: (B, 5, 3) bfloat16 and (B, 2)."""
    g = [torch.Generator().manual_seed(data.mix(caption)) for caption in captions]
    return (torch.stack([torch.rand(5, 3, generator=x) for x in g]).bfloat16(),
            torch.stack([torch.rand(2, generator=x) for x in g]))


@pytest.mark.parametrize("world", (1, 2))
def test_cached_latents_equal_direct_encoding(tmp_path, shards, vae, world):
    for rank in range(world):
        with pytest.raises(ValueError, match="index.json does not exist.*latents"):
            Cached(tmp_path)
        data.latents(Images(shards, 16, rank, world, epochs=1), vae, words, tmp_path, batch_size=4, per_file=6)
    direct = {key: (caption, image) for key, caption, image in take(Images(shards, 16, epochs=1))}
    for s in Cached(tmp_path, epochs=1):
        caption, image = direct.pop(s["key"])
        with torch.no_grad():
            wanted = vae.encode(image[None].float() / 255)[0]
        assert s["caption"] == caption and s["latents"].dtype == torch.float32
        assert torch.allclose(s["latents"], wanted, atol=1e-6)
        assert all(torch.equal(a, b[0]) for a, b in zip(s["context"], words([caption]), strict=True))
    assert not direct
    x, tokens, pooled = next(Cached(tmp_path).batches(5))
    assert x.shape == (5, 4, 8, 8) and tokens.shape == (5, 5, 3) and pooled.shape == (5, 2)
    assert tokens.dtype == torch.bfloat16
    make = lambda: Cached(tmp_path, rank=1, world=2, block=4)
    whole = take(make(), 20)
    for cut in (1, 5, 13):
        stream, rest = make(), make()
        take(stream, cut)
        rest.restore(stream.state())
        assert same(take(rest, 20 - cut), whole[cut:])


def test_latents_resume_after_a_kill(tmp_path, shards, vae, monkeypatch):
    write_tar(tmp_path / "more" / "bad.tar", {**DAMAGE["no caption"], **sample("20")})
    make = lambda: Images([shards, tmp_path / "more"], 16, epochs=1)
    encode = lambda name: data.latents(make(), vae, words, tmp_path / name, batch_size=2, per_file=5)
    encode("whole")
    folder = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert len(folder) == 3 + 2 and json.loads(folder["index.json"])["skipped"] == {"no caption": 1}
    real = data.write_atomic
    for kill in range(6):
        writes = itertools.count()

        def write(path, content):
            if next(writes) == kill:
                raise KeyboardInterrupt
            real(path, content)
        with monkeypatch.context() as patch:
            patch.setattr(data, "write_atomic", write)
            with pytest.raises(KeyboardInterrupt):
                encode(f"{kill}")
        encode(f"{kill}")
        encode(f"{kill}")                                              # and nothing is left to do
        assert {path.name: path.read_bytes() for path in (tmp_path / f"{kill}").iterdir()} == folder
    with pytest.raises(ValueError, match="epochs=1"):
        data.latents(Images(shards, 16), vae, words, tmp_path / "x")
    with pytest.raises(ValueError, match="was saved with"):
        data.latents(Images(shards, 16, epochs=1), vae, words, tmp_path / "whole")
    (tmp_path / "whole" / "0-of-1-00001.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match="0-of-1-00001.safetensors.*latents again"):
        take(Cached(tmp_path / "whole"), 20)


# ============================================================================================================= curation

@pytest.fixture
def server(monkeypatch):
    """A chat server on this machine: server.answer(text, image, n) -> (status, content); n counts the requests."""
    monkeypatch.setenv("no_proxy", "*")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            picture, text = body["messages"][0]["content"]
            head, _, content = picture["image_url"]["url"].partition(",")
            assert (self.path, head, body["model"]) == ("/v1/chat/completions", "data:image/jpeg;base64", "vlm")
            with lock:
                n = next(count)
            status, answer = http_server.answer(text["text"], Image.open(io.BytesIO(base64.b64decode(content))), n)
            if not isinstance(answer, bytes):
                message = answer if isinstance(answer, dict) else {"message": {"content": answer}}
                answer = json.dumps({"choices": [message]}).encode()
            self.send_response(status)
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_):
            pass

    count, lock = itertools.count(), threading.Lock()
    http_server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http_server.daemon_threads, http_server.answer = True, lambda text, image, n: (200, CAPTION)
    http_server.handle_error = lambda *_: None                         # a client that has hung up
    threading.Thread(target=http_server.serve_forever, kwargs={"poll_interval": .01}, daemon=True).start()
    http_server.url = f"http://127.0.0.1:{http_server.server_port}/v1"
    yield http_server
    http_server.shutdown()
    http_server.server_close()


def curate(source, out, *flags):
    data.main(["curate", str(source), str(out), *map(str, flags)])


def flags(server, *more):
    return ["--server", server.url, "--model", "vlm", "--no-aesthetic", "--backoff", ".01", "--workers", "3", *more]


def members(path):
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def reasons(out):
    return {row["key"]: row["reason"] for row in map(json.loads, (out / "dropped.jsonl").read_text().splitlines())}


def one(key, size=(256, 256), color="red", **meta):
    return {f"{key}.jpg": picture(color, size, "JPEG"), f"{key}.txt": f"old {key}", f"{key}.json": json.dumps(meta)}


def rows(path, *samples):
    return write_tar(path, {name: content for row in samples for name, content in row.items()})


def test_borders(tmp_path):
    """Sizes and scores exactly at the thresholds, upright and lying."""
    sizes = {"a": ((256, 455), None), "b": ((256, 456), "aspect ratio"), "c": ((455, 256), None),
             "d": ((456, 256), "aspect ratio"), "e": ((255, 256), "short edge"), "f": ((288, 512), None),
             "g": ((512, 288), None), "h": ((287, 512), "aspect ratio"), "i": ((256, 255), "short edge")}
    low = "aesthetic score"
    scores = {"j": (4.5, None), "k": (4.499999, low), "l": (float("nan"), low), "m": (5, None)}
    rows(tmp_path / "in" / "0.tar", *(one(key, size, aesthetic=9) for key, (size, _) in sizes.items()),
         *(one(key, aesthetic=score) for key, (score, _) in scores.items()),
         one("n", aesthetic=9, original_width=255, original_height=300))
    curate(tmp_path / "in", tmp_path / "out", "--no-caption")
    wanted = {key: reason for key, (_, reason) in {**sizes, **scores}.items() if reason} | {"n": "short edge"}
    assert reasons(tmp_path / "out") == wanted
    total = json.loads((tmp_path / "out" / "summary.json").read_text())["total"]
    assert total == {"kept": 6, "aspect ratio": 3, "short edge": 3, "aesthetic score": 2}
    large = {"a": ((512, 568), None), "b": ((512, 569), "aspect ratio"), "c": ((511, 512), "short edge"),
             "d": ((540, 600), None), "e": ((600, 540), None), "f": ((539, 600), "aspect ratio")}
    rows(tmp_path / "large" / "0.tar", *(one(key, size) for key, (size, _) in large.items()))
    curate(tmp_path / "large", tmp_path / "512", "--no-caption", "--no-aesthetic", "--stage", 512)
    assert reasons(tmp_path / "512") == {key: reason for key, (_, reason) in large.items() if reason}


def test_what_is_written(tmp_path, server, capsys):
    source = rows(tmp_path / "in" / "00007.tar", one("0", url="u", caption="old 0"),
                  {"1.webp": picture("blue", (300, 300), "WEBP")}, one("2", (2000, 1500), color="green"))
    asked = []

    def answer(text, image, n):
        asked.append((text, image.size))
        return 200, f"  {CAPTION}\n"
    server.answer = answer
    curate(source, tmp_path / "out", *flags(server))
    before, after = members(source), members(tmp_path / "out" / "00007.tar")
    assert list(after) == ["0.jpg", "0.txt", "0.json", "1.webp", "1.txt", "1.json", "2.jpg", "2.txt", "2.json"]
    assert all(after[name] == before[name] for name in ("0.jpg", "1.webp", "2.jpg"))
    assert json.loads(after["0.json"]) == {"url": "u", "caption": CAPTION, "original_caption": "old 0",
                                           "caption_model": "vlm"}
    assert after["1.txt"].decode() == CAPTION and "original_caption" not in json.loads(after["1.json"])
    assert {text for text, _ in asked} == {data.CAPTION_PROMPT}
    assert {size for _, size in asked} == {(256, 256), (300, 300), (1024, 768)}
    assert capsys.readouterr().out.split() == ["3", "kept"]
    assert keys(Images(tmp_path / "out", 16, epochs=1, shuffle=False)) == ["0", "1", "2"]
    curate(tmp_path / "out", tmp_path / "again", "--no-caption", "--no-aesthetic")
    assert members(tmp_path / "again" / "00007.tar") == after


def test_the_prompts_are_the_papers():
    assert data.CAPTION_PROMPT.startswith("Write a concise summary of the image in 30 words.")
    assert data.CAPTION_PROMPT.count("\n") == 1 and data.HAND_PROMPT.endswith("respond with 'No' and nothing else.")
    assert len(data.CAPTION_PROMPT.split()) == 46 and len(data.HAND_PROMPT.split()) == 152


def test_scores_by_a_function(tmp_path):
    (tmp_path / "mine.py").write_text("import math\n\n\ndef red(image):\n    return image.getpixel((9, 9))[0] / 25.5\n")
    source = rows(tmp_path / "in" / "0.tar", one("0"), one("1", color="black"),
                  one("2", color="black", mine=5), one("3", mine=None))
    with pytest.raises(SystemExit) as end:
        curate(source, tmp_path / "out", "--no-caption")
    assert end.value.code == 2
    curate(source, tmp_path / "out2", "--no-caption", "--aesthetic", f"{tmp_path}/mine.py:red", "--aesthetic-field",
           "mine")
    assert reasons(tmp_path / "out2") == {"1": "aesthetic score"}
    assert json.loads(members(tmp_path / "out2" / "0.tar")["0.json"])["mine"] == pytest.approx(9.96, abs=.05)


def test_curate_says_what_is_wrong_in_one_line(tmp_path, capsys):
    """Code 2; and a score that is there and no number is a low one, not the end of all."""
    (tmp_path / "file").write_text("")
    for name, text in (("open.py", "def red(image:"), ("ends.py", "raise SystemExit"), ("red.py", "def red(): pass"),
                       ("key.py", "def red(image):\n    return {}['red']\n")):
        (tmp_path / name).write_text(text)
    source = rows(tmp_path / "in" / "0.tar", one("0"))
    for out, flags, words in (
            ("file", (), "is a file"), ("a", ("--workers", 0), "--workers 0: 1 or more"),
            ("a", ("--min-aesthetic", "nan"), "--min-aesthetic nan"), ("a", ("--stage", 300), "--stage"),
            ("a", ("--timeout", 0), "--timeout 0: more than 0"), ("a", ("--timeout", "nan"), "--timeout nan"),
            ("a", ("--aesthetic", f"{tmp_path}/open.py:red"), "does not load: SyntaxError"),
            ("a", ("--aesthetic", f"{tmp_path}/ends.py:red"), "does not load: SystemExit"),
            ("b", ("--aesthetic", f"{tmp_path}/red.py:red", "--aesthetic-field", "mine"), "red.py:red failed: Type"),
            ("d", ("--aesthetic", f"{tmp_path}/key.py:red", "--aesthetic-field", "mine"), f"({tmp_path}/key.py:2)")):
        with pytest.raises(SystemExit) as end:
            curate(source, tmp_path / out, "--no-caption", *flags)
        err = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if line.startswith("error")]
        assert end.value.code == 2 and len(err) == 1 and words in err[0], err
    assert not (tmp_path / "a").exists()
    source = rows(tmp_path / "some" / "0.tar", one("0", mine=9), one("1", mine="nan"), one("2", mine=None))
    curate(source, tmp_path / "c", "--no-caption", "--aesthetic-field", "mine")
    assert reasons(tmp_path / "c") == {"1": "aesthetic score", "2": "aesthetic score"}


LONG = " ".join(f"word{i}" for i in range(101))
ANSWERS = {
    "": "empty caption", " \n": "empty caption", "...": "empty caption", None: "empty caption",
    "I'm sorry, but I can't help with describing this person.": "refused caption",
    "I’m unable to identify people in this image, as they are private.": "refused caption",
    "I cannot assist with that request, since it shows a person.": "refused caption",
    "I'm afraid I can't help with that picture.": "refused caption",
    "I am an AI assistant and do not describe people.": "refused caption",
    "I'm just a text model without access to images.": "refused caption",
    "As an airplane takes off above the beach, people look up at it.": None,
    "I can see a woman in a red dress in front of a wall.": None, "Sorrynotsorry is on the shirt of a tall man.": None,
    "A woman.": "caption too short", LONG: "caption too long",
    "a man " * 20: "caption repeats itself", "red red red red red red": "caption repeats itself",
    "A picture of " + "a" * 60 + " on a wall": "caption repeats itself",
    "The man is here. He stands near the big wall, with a hat. " * 3: "caption repeats itself",
    CAPTION: None, " ".join(LONG.split()[:100]): None, "A woman in a hat": None,
    "I-beams and cranes tower over a harbour at dusk, photographed from below.": None}


@pytest.mark.parametrize("hands", (False, True))
def test_answers_that_are_no_captions(tmp_path, server, hands):
    answers = [(f"{'Yes' + chr(10) if hands else ''}{text or ''}", fault) for text, fault in ANSWERS.items()]
    if hands:
        answers += [("No", "hands: no"), ("no.", "hands: no"), ("No hands are visible.", "hands: no"),
                    (CAPTION, "hands: neither yes nor no"), ("", "hands: neither yes nor no"),
                    (f"**Yes**\n\n{CAPTION}", None), (f"Yes, {CAPTION}", None), ("Yes", "empty caption")]
    else:
        answers += [(None, "empty caption"),
                    ({"message": {"content": CAPTION}, "finish_reason": "length"}, "caption too long")]
    source = rows(tmp_path / "in" / "0.tar", *(one(str(i)) for i in range(len(answers))))
    server.answer = lambda text, image, n: (200, answers[n][0])
    curate(source, tmp_path / "out", *flags(server, "--workers", 1), *["--hands"] * hands)
    assert reasons(tmp_path / "out") == {str(i): fault for i, (_, fault) in enumerate(answers) if fault}
    for name, content in members(tmp_path / "out" / "0.tar").items():
        if name.endswith("txt"):
            text = answers[int(name[:-4])][0]
            assert content.decode() == " ".join(re.sub(r"^\W*Yes\W*", "", text).split())


def test_retries(tmp_path, server, capsys):
    source = rows(tmp_path / "in" / "0.tar", *(one(str(i)) for i in range(4)))
    noise = [(429, b"busy"), (500, b""), (503, b"x"), (200, b"<html>"), (200, b"{}"), (200, b'{"choices": []}'),
             (200, b'{"choices": [{"message": 7}]}'), (200, b'[1]'), (408, b"")]
    server.answer = lambda text, image, n: noise[n] if n < len(noise) else (200, CAPTION)
    curate(source, tmp_path / "out", *flags(server, "--retries", len(noise)))
    assert len(members(tmp_path / "out" / "0.tar")) == 12

    first = threading.Semaphore(1)

    def slow(text, image, n):
        time.sleep(20 if first.acquire(blocking=False) else 0)
        return 200, CAPTION
    server.answer, start = slow, time.time()
    curate(source, tmp_path / "slow", *flags(server, "--timeout", ".3"))
    assert len(members(tmp_path / "slow" / "0.tar")) == 12 and time.time() - start < 15


@pytest.mark.parametrize("answer, words", (((500, b""), "failed 3 times, the last by HTTP 500"),
                                           ((200, b"<html>"), "failed 3 times, the last by JSONDecodeError"),
                                           ((404, b"no such model"), "no such model")))
def test_a_server_that_stays_broken_ends_the_run(tmp_path, server, capsys, answer, words):
    for i in range(3):
        rows(tmp_path / "in" / f"{i}.tar", *(one(f"{i}{j}") for j in range(3)))
    broken = threading.Event()

    def later(text, image, n):
        if n >= 4:
            broken.set()
        return answer if broken.is_set() else (200, f"{CAPTION} The image is {image.getpixel((0, 0))[0]}.")
    server.answer = later
    with pytest.raises(SystemExit) as end:
        curate(tmp_path / "in", tmp_path / "out", *flags(server, "--retries", 2))
    err = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and words in err[-1] and "1.tar/1" in err[-1] and "Traceback" not in err
    assert (tmp_path / "out" / "0.tar").is_file() and not (tmp_path / "out" / "1.tar").exists()
    server.answer = lambda text, image, n: (200, f"{CAPTION} The image is {image.getpixel((0, 0))[0]}.")
    done = (tmp_path / "out" / "0.tar").stat().st_mtime_ns
    curate(tmp_path / "in", tmp_path / "out", *flags(server))
    curate(tmp_path / "in", tmp_path / "whole", *flags(server))
    assert (tmp_path / "out" / "0.tar").stat().st_mtime_ns == done
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_unreachable(tmp_path, capsys):
    source = rows(tmp_path / "in" / "0.tar", one("0"))
    with pytest.raises(SystemExit):
        curate(source, tmp_path / "out", "--server", "http://127.0.0.1:9/v1", "--model", "vlm", "--no-aesthetic",
               "--retries", 1, "--backoff", ".01")
    assert "http://127.0.0.1:9/v1 failed 2 times" in capsys.readouterr().err


def mixed(folder):
    """Three shards with damage in each, and one that is cut short."""
    for i in range(3):
        rows(folder / f"{i}.tar", one(f"{i}0"), one(f"{i}1", (100, 100)), {f"/tmp/{i}.jpg": b"x"}, one(f"{i}2"),
             {f"{i}3.txt": "x"}, {f"{i}4.png": b"noise"}, one(f"{i}5"))
    content = (folder / "1.tar").read_bytes()
    (folder / "1.tar").write_bytes(content[:content.rindex(b"15.json") + 100])
    (folder / "2.tar").write_bytes(b"noise" * 300)
    return folder


def test_stopped_at_every_moment_it_goes_on_to_the_same_output(tmp_path, monkeypatch):
    mixed(tmp_path / "in")
    run = lambda out: curate(tmp_path / "in", tmp_path / out, "--no-caption", "--no-aesthetic")
    run("whole")
    whole = contents(tmp_path / "whole")
    assert set(whole) == {"0.tar", "1.tar", "2.tar", "dropped.jsonl", "summary.json", ".lock"}
    summary = json.loads(whole["summary.json"])
    assert summary["shards"]["0.tar"] == {"unsafe path": 1, "kept": 3, "short edge": 1, "no image": 1,
                                          "corrupt image": 1}
    assert summary["shards"]["1.tar"]["cut short"] == 1 and summary["shards"]["2.tar"] == {"not a tar file": 1}
    lines = [json.loads(line) for line in whole["dropped.jsonl"].splitlines()]
    assert len(lines) + summary["total"]["kept"] == sum(summary["total"].values())
    assert {"shard": "0.tar", "key": "01", "reason": "short edge"} in lines
    assert {"shard": "1.tar", "key": "", "reason": "cut short"} in lines
    real = os.replace, os.fsync
    for kill in range(20):
        moments, after = itertools.count(), kill % 2

        def moment(function):
            def call(*args):
                now = next(moments) == kill
                if now and not after:
                    raise KeyboardInterrupt
                function(*args)
                if now:
                    raise KeyboardInterrupt
            return call
        with monkeypatch.context() as patch:
            for name, function in zip(("replace", "fsync"), real):
                patch.setattr(os, name, moment(function))
            with pytest.raises(KeyboardInterrupt):
                run(f"{kill}")
                raise KeyboardInterrupt                                # there was no such moment left
        run(f"{kill}")
        got = contents(tmp_path / f"{kill}")
        assert {name: got[name] for name in whole} == whole and set(got) - set(whole) <= {"summary.json.new"}, kill
    assert next(moments) < 20                                          # all moments were tried


def test_shards_of_another_source_and_another_process_are_refused(tmp_path, capsys):
    """img2dataset calls the first shard of every data set 00000.tar."""
    for source, color in (("a", "red"), ("b", "blue")):
        rows(tmp_path / source / "00000.tar", one("0", color=color))
    curate(tmp_path / "a", tmp_path / "out", "--no-caption", "--no-aesthetic")
    before = contents(tmp_path / "out")
    with pytest.raises(SystemExit):
        curate(tmp_path / "b", tmp_path / "out", "--no-caption", "--no-aesthetic")
    assert f"00000.tar was made from {tmp_path / 'a' / '00000.tar'}, not from" in capsys.readouterr().err
    hold = "import fcntl; f = open('.lock', 'ab'); fcntl.lockf(f, fcntl.LOCK_EX); print('held', flush=True); input()"
    other = subprocess.Popen([sys.executable, "-c", hold], cwd=tmp_path / "out", stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"held\n"
    with pytest.raises(SystemExit):
        curate(tmp_path / "a", tmp_path / "out", "--no-caption", "--no-aesthetic")
    assert "out is another process's, which still runs" in capsys.readouterr().err
    assert contents(tmp_path / "out") == before
    other.kill()
    other.wait()


def test_half_of_a_surrogate_pair_is_a_corrupt_caption(tmp_path, server):
    """Emoji that were cut in two, as JSON can spell them: in a shard, in a table of images, in a server's answer."""
    half = {"0.png": picture(0, (256, 256)), "0.json": '{"caption": "cat \\ud83d"}'}
    write_tar(tmp_path / "in" / "0.tar", half | one("1"))
    stream = Images(tmp_path / "in", 16, epochs=1)
    assert keys(stream) == ["1"] and list(stream.bad.values()) == ["corrupt caption"]
    curate(tmp_path / "in", tmp_path / "kept", "--no-caption", "--no-aesthetic")
    assert reasons(tmp_path / "kept") == {"0": "corrupt caption"}
    server.answer = lambda text, image, n: (200, CAPTION + " \ud83d")
    with pytest.raises(SystemExit):
        curate(tmp_path / "in", tmp_path / "asked", *flags(server))
    assert set(reasons(tmp_path / "asked").values()) == {"corrupt caption"}
    (tmp_path / "table").mkdir()
    for name in "ab":
        (tmp_path / "table" / f"{name}.png").write_bytes(picture(0))
    (tmp_path / "table" / "metadata.jsonl").write_text(
        '{"file_name": "a.png", "text": "cat \\ud83d"}\n{"file_name": "b.png", "text": "dog"}\n')
    assert keys(Images(tmp_path / "table", 16, epochs=1)) == ["b"]


def test_an_image_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(picture(0))

    def broken(path):
        raise OSError(5, "Input/output error")
    monkeypatch.setattr(Path, "read_bytes", broken)
    with pytest.raises(ValueError, match="cannot read .*a.png: Input/output error"):
        take(Images(tmp_path, 16, epochs=1))


def test_killed_for_real(tmp_path, server):
    for i in range(3):
        rows(tmp_path / "in" / f"{i}.tar", *(one(f"{i}{j}") for j in range(4)))
    stuck = threading.Event()

    def answer(text, image, n):
        if n >= 6:
            stuck.set()
            time.sleep(3)
        return 200, CAPTION
    server.answer = answer
    line = [sys.executable, ROOT / "data.py", "curate", tmp_path / "in", tmp_path / "out", *flags(server)]
    process = subprocess.Popen(list(map(str, line)), stderr=subprocess.DEVNULL, env={**os.environ, "no_proxy": "*"})
    assert stuck.wait(30)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert set(contents(tmp_path / "out")) >= {"0.tar", "1.tar.new"} and not (tmp_path / "out" / "1.tar").exists()
    server.answer = lambda text, image, n: (200, CAPTION)
    curate(tmp_path / "in", tmp_path / "out", *flags(server))
    curate(tmp_path / "in", tmp_path / "whole", *flags(server))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_bad_options_end_with_two_and_one_line(tmp_path, capsys):
    source = rows(tmp_path / "in" / "0.tar", one("0"))
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(picture(0))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("mine")
    (tmp_path / "f.py").write_text("score = 3\n")
    keep = ("--no-caption", "--no-aesthetic")
    curate(source, tmp_path / "done", *keep)
    for line, word in (((source, "out"), "--server"), ((source, "out", "--no-caption"), "--no-aesthetic"),
                       ((source, "out", "--server", "localhost:8000", "--model", "m"), "http://HOST"),
                       ((tmp_path / "gone", "out", *keep), "gone"),
                       ((tmp_path / "images", "out", *keep), ".tar shards"),
                       ((source, tmp_path / "in", *keep), "the source itself"),
                       ((source, "out", *keep, "--hands"), "--hands"),
                       ((source, tmp_path / "full", *keep), "summary.json"),
                       ((source, tmp_path / "done", *keep, "--stage", 512), "stage=256"),
                       ((source, "small", *keep, "--stage", 512), "nothing is left"),
                       ((source, "out", "--no-caption", "--aesthetic", "x.py:f"), "no such file"),
                       ((source, "out", "--no-caption", "--aesthetic", f"{tmp_path}/f.py:score"), "no such function")):
        line = [tmp_path / part if part in ("out", "small") else part for part in line]
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            curate(*line)
        err = [text for text in capsys.readouterr().err.replace("\r", "\n").split("\n") if text.startswith("error")]
        assert end.value.code == 2 and len(err) == 1 and word in err[0], (word, err)
    for name in ("dropped.jsonl", "0.tar"):
        (tmp_path / "done" / name).rename(tmp_path / name)
        with pytest.raises(SystemExit):
            curate(source, tmp_path / "done", *keep)
        assert f"{name} is gone" in capsys.readouterr().err
        (tmp_path / name).rename(tmp_path / "done" / name)
    curate(source, tmp_path / "done", *keep)


# ============================================================================================================== prompts

def test_a_weight_is_its_tasks(tmp_path):
    """Only a task's first row would count: rows of one tag that differ are refused."""
    file = tmp_path / "a.jsonl"
    for rows, words in (([("x", 2), ("y", 1), ("x", 3)], "row 3: weight 3, and 2 in the first row with tag 'x'"),
                        ([("x", 2), ("x", None)], "row 2: weight 1, and 2 in"),
                        ([(None, None), (None, 2)], "row 2: weight 2, and 1 in the first row with no tag"),
                        ([("x", 2), ("x", 2), ("y", None), ("y", 1)], None)):
        rows = [{"prompt": "a dog"} | {name: value for name, value in (("tag", tag), ("weight", weight)) if value}
                for tag, weight in rows]
        file.write_text("\n".join(map(json.dumps, rows)))
        if words:
            with pytest.raises(ValueError, match=f"a.jsonl: {words}"):
                data.prompts(file, "train")
        else:
            assert data.prompts(file, "train") == rows and len(data.tasks_of(rows)) == 3


def test_a_column_of_translations_is_not_unigenbenchs(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,prompt_zh\na cat,\u4e00\u53ea\u732b\n", encoding="utf-8")
    assert [row["prompt"] for row in data.prompts(tmp_path / "a.csv", "train")] == ["a cat"]


@pytest.mark.parametrize("name, text, words", (
    ("a.json", "[" * 100000, "(recursion|overflow)"),                    # the second word is Python 3.14's
    ("a.jsonl", '"a dog"\n' + "[" * 100000, "line 2: .*(recursion|overflow)"),
    ("a.json", f"[{'1' * 5000}]", "5000 digits"), ("a.jsonl", "1" * 5000, "line 1: .*5000 digits"),
    ("a.csv", f"prompt,weight\na dog,{'1' * 5000}\n", "5000 digits")))
def test_json_that_python_cannot_hold(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name} is not a valid .*{words}"):
        data.prompts(tmp_path / name, "train")
