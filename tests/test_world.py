"""The tiny world: splits, prompts, scenes, captions."""
import collections
import json
import math
import re

import pytest
import torch

import data
import rewards

torch.set_num_threads(1)


def scene(meta):
    """What a meta says, whatever the order it says it in."""
    objects = [(o["class"], o["count"], o.get("color")) for o in meta["include"]]
    if "position" not in meta["include"][-1]:
        return frozenset(objects)
    dx, dy = data.RELATIONS[meta["include"][1]["position"][0]]
    first, second = objects if dx + dy > 0 else objects[::-1]          # from left to right, or from top to bottom
    return first, second, "x" if dx else "y"


def test_splits_share_no_scene_but_single_objects():
    metas = {split: data.world_prompts(split) for split in ("train", "val", "test")}
    for task in data.TASKS:
        sets = [{scene(m) for m in rows if m["tag"] == task} for rows in metas.values()]
        if task == "single_object":
            assert sets[0] == sets[1] == sets[2] and len(sets[0]) == len(data.SHAPES)
        else:
            assert all(sets) and not sets[0] & sets[1] and not sets[0] & sets[2] and not sets[1] & sets[2]
        counts = [sum(m["tag"] == task for m in rows) for rows in metas.values()]
        for split, n in zip(metas, counts):
            row = next(line for line in data.world_prompts.__doc__.splitlines() if line.split()[:1] == [split])
            assert row.split()[1 + data.TASKS.index(task)] == str(n)
    assert metas["test"] == data.world_prompts("test")
    metas["test"][0]["include"][0]["class"] = "mine now"               # a caller's rows are its own
    assert metas["test"] != data.world_prompts("test")
    assert len({m["prompt"] for rows in metas.values() for m in rows}) == sum(map(len, metas.values())) - 16


def test_prompts_read_as_genevals():
    prompts = {m["prompt"]: m for split in ("train", "val", "test") for m in data.world_prompts(split)}
    for text in ("a circle", "a circle and a square", "three crosses", "an orange ring", "a circle left of a square",
                 "a red circle and a blue square"):
        assert f"a photo of {text}" in prompts
    assert prompts["a photo of a star above a ring"] == {
        "tag": "position", "prompt": "a photo of a star above a ring",
        "include": [{"class": "ring", "count": 1}, {"class": "star", "count": 1, "position": ["above", 0]}]}
    assert prompts["a photo of four hearts"] == {
        "tag": "counting", "prompt": "a photo of four hearts",
        "include": [{"class": "heart", "count": 4}], "exclude": [{"class": "heart", "count": 5}]}
    assert prompts["a photo of an orange ring"]["include"] == [{"class": "ring", "count": 1, "color": "orange"}]


def test_draw_prompts_takes_tasks_uniformly():
    metas = data.world_prompts("train")
    drawn = data.draw_prompts(metas, 6000, 3)
    assert drawn == data.draw_prompts(metas, 6000, 3) != data.draw_prompts(metas, 6000, 4)
    assert all(abs(n - 1000) < 150 for n in collections.Counter(m["tag"] for m in drawn).values())
    plain = [{"prompt": "x"}, {"prompt": "y"}]
    assert {m["prompt"] for m in data.draw_prompts(plain, 50, 0)} == {"x", "y"}


@pytest.mark.parametrize("size", [24, 28, 32])
def test_renders_are_what_the_meta_says(size):
    metas = [m for split in ("train", "test") for m in data.draw_prompts(data.world_prompts(split), 150, 0)]
    images = data.render(metas, 5, size)
    assert images.shape == (300, 3, size, size) and images.dtype == torch.float32
    assert 0 <= images.min() and images.max() <= 1
    scores = rewards.verify(images, metas)
    assert scores["strict"].mean() >= .99
    assert (scores["found"] == torch.tensor([sum(o["count"] for o in m["include"]) for m in metas])).all()
    assert torch.equal(images, data.render(metas, 5, size)) and not torch.equal(images, data.render(metas, 6, size))
    edge = torch.cat((images[:, :, [0, -1]].flatten(2), images[:, :, :, [0, -1]].flatten(2)), 2)
    edge = (edge - edge.median(2, keepdim=True).values).abs().max()    # only soft tips of stars reach there
    assert edge < {24: .22, 28: .16, 32: .12}[size]


def test_open_colours_vary_and_differ_between_classes():
    metas = [m for m in data.world_prompts("train") if m["tag"] == "two_object"][:1] * 64
    images = data.render(metas, 0)
    _, _, _, _, b, _, own, _ = rewards._objects(images)
    color = (images[b] * own[:, None]).sum((2, 3)) / own.sum((1, 2))[:, None]
    hue = (color[:, None] - torch.tensor(list(data.COLORS.values()))).norm(dim=2).argmin(1).view(64, 2)
    assert (hue[:, 0] != hue[:, 1]).all() and len(hue.unique()) == len(data.COLORS)


@pytest.mark.parametrize("name", data.SHAPES)
def test_shapes_are_signed_distances(name):
    """Near the edge the field's slope is one and its zero set encloses the area that coverage adds up to."""
    g = (torch.arange(400) + .5) / 400 * 2.4 - 1.2
    x, y = torch.meshgrid(g, g, indexing="xy")
    d = data.SHAPES[name](x, y)
    dy, dx = torch.gradient(d, spacing=2.4 / 400)
    slope = torch.hypot(dx, dy)[d.abs() < .03]
    assert (slope - 1).abs().median() < .02
    area = (d < 0).float().mean() * 2.4**2
    a = data.coverage(name, torch.tensor([16.3]), torch.tensor([15.8]), torch.tensor([8.]), 32)
    assert abs(a.sum() / 64 / area - 1) < .02
    assert max(x[d < 0].abs().max(), y[d < 0].abs().max()) <= data.REACH


def test_world_batch_is_indexable_and_its_captions_are_noisy_by_task():
    images, captions, metas = data.world_batch(0, 7, 32, 24)
    again = data.world_batch(0, 7, 32, 24)
    assert torch.equal(images, again[0]) and captions == again[1] and metas == again[2]
    for key in ((1, 7), (0, 8)):
        assert data.world_batch(*key, 32, 24)[1] != captions
    pairs = [pair for step in range(40) for pair in zip(*data.world_batch(0, step, 100, 24)[1:])]
    words = {word for caption, _ in pairs for word in caption.split()}
    assert words <= set(data.WORLD_WORDS) and max(len(c.split()) for c, _ in pairs) <= 14
    assert all(c == c.lower() for c, _ in pairs)
    assert abs(sum(c == "" for c, _ in pairs) / len(pairs) - data.EMPTY) < .02
    for split in ("train", "val", "test"):
        assert {word for m in data.world_prompts(split) for word in m["prompt"].split()} <= set(data.WORLD_WORDS)

    def share(task, holds):
        some = [holds(c.split(), m) for c, m in pairs if m["tag"] == task and c]
        return sum(some) / len(some)
    assert share("single_object", lambda c, m: m["include"][0]["class"] in c) == 1
    assert share("colors", lambda c, m: {m["include"][0]["class"], m["include"][0]["color"]} <= set(c)) == 1
    related = share("position", lambda c, m: m["include"][1]["position"][0] in " ".join(c))
    assert abs(related - (1 - data.NO_RELATION - data.WRONG_RELATION)) < .06
    counted = share("counting", lambda c, m: data.NUMBERS[m["include"][0]["count"]] in c)
    assert abs(counted - (1 - data.COUNT_OFF - data.COUNT_VAGUE)) < .06
    both = share("two_object", lambda c, m: {o["class"] for o in m["include"]} <= set(c))
    assert abs(both - (1 - data.DROP_SECOND) * (1 - data.WRONG_CLASS * (1 - 1 / len(data.SHAPES)))) < .06

    said = []                                                          # each object's colour: right, wrong or None
    for caption, meta in pairs:
        if meta["tag"] == "color_attr" and all(o["class"] in caption.split() for o in meta["include"]):
            found = (re.search(rf"(\w*) ?\b{o['class']}\b(?: in (\w+))?", caption).groups() for o in meta["include"])
            found = [next((word for word in words if word in data.COLORS), None) for words in found]
            said.append([word and word == o["color"] for word, o in zip(found, meta["include"])])
    spoiled = {(False, False): data.SWAP_COLORS, (None, None): data.DROP_COLORS, (True, None): data.DROP_COLOR / 2,
               (None, True): data.DROP_COLOR / 2}
    for colors, probability in spoiled.items():
        assert abs(said.count(list(colors)) / len(said) - probability) < .06, colors
    assert abs(said.count([True, True]) / len(said) - (1 - sum(spoiled.values()))) < .06


def test_prompts_from_files(tmp_path):
    assert data.prompts("shapes", "val") == data.world_prompts("val")
    rows = [{"prompt": "a\u2028dog"}, {"prompt": "two\u00e9 cats, and a bird"}]      # a line separator is no new line
    files = {"a.txt": "a\u2028dog\n\n  two\u00e9 cats, and a bird\n",
             "a.jsonl": "\n".join(json.dumps(row, ensure_ascii=False) for row in rows),
             "a.json": json.dumps(["a\u2028dog", rows[1]]),
             "a.csv": 'id,prompt\n1,a\u2028dog\n2,"two\u00e9 cats, and a bird"\n'}
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        got = data.prompts(str(tmp_path / name), "train")
        assert [row["prompt"] for row in got] == [row["prompt"] for row in rows], name
        assert got == data.prompts(tmp_path / name, "test")


@pytest.mark.parametrize("name, text, why", (
    ("a.csv", "prompt\na dog\na cat, sleeping\n", "row 2 has more cells than the header"),
    ("a.jsonl", '{"prompt": "a dog", "weight": "2"}', "row 1: a tag is a text, a weight a whole number"),
    ("a.csv", 'prompt,weight\na dog,two', "row 1: a tag is a text, a weight a whole number"),
    ("b.jsonl", '{"prompt": "a dog"}\n{"prompt"', "line 2, column 10"),
    ("a.jsonl", '{"prompt": "a dog", "weight": 0}', "row 1: a tag is a text, a weight a whole number"),
    ("a.jsonl", '{"prompt": "a dog", "tag": ["x"]}', "row 1: a tag is a text, a weight a whole number"),
    ("a.json", r'["a dog", "a \ud83d"]', "row 2: half of a surrogate pair")))
def test_rows_that_would_fail_late_are_refused(name, text, why, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name}.*{why}"):
        data.prompts(tmp_path / name, "train")


def test_prompts_from_a_folder(tmp_path):
    """A file a split, by Flow-GRPO's names; validation prompts without a file of their own are held out of training."""
    rows = [json.dumps({"prompt": f"{i}", "tag": "x"}) for i in range(50)]
    (tmp_path / "train_metadata.jsonl").write_text("\n".join(rows))
    (tmp_path / "test.txt").write_text("a dog\n")
    (tmp_path / "notes.md").write_text("none of these")

    def words(split):
        return [row["prompt"] for row in data.prompts(str(tmp_path), split)]
    assert words("val") == ["0", "20", "40"] and words("test") == ["a dog"]
    assert words("train") == [f"{i}" for i in range(50) if i % 20] and data.prompts(tmp_path, "train")[0]["tag"] == "x"
    (tmp_path / "val.json").write_text('["a cat"]')
    assert words("val") == ["a cat"] and len(words("train")) == 50
    (tmp_path / "val.json").unlink()
    (tmp_path / "train_metadata.jsonl").write_text("\n".join(rows * 3))                   # Flow-GRPO's repeat prompts
    assert words("val") == ["0", "20", "40"] * 3 and not set(words("train")) & {"0", "20", "40"}
    (tmp_path / "val.json").write_text('["a cat"]')
    (tmp_path / "train.csv").write_text("prompt\nx\n")
    with pytest.raises(ValueError, match="one file of train prompts.* train.csv and train_metadata.jsonl$"):
        words("train")
    for name in ("train_metadata.jsonl", "val.json", "test.txt"):
        (tmp_path / name).unlink()
    with pytest.raises(ValueError, match="one prompt, of which none can be held out for validation: add val.txt"):
        words("val")
    with pytest.raises(ValueError, match="one file of test prompts, test.txt, say: there is none"):
        words("test")


def test_hpdv2(tmp_path):
    """Its files as its authors describe them: a list of pairs, lists of prompts. The missing one names its command."""
    pair = {"human_preference": [1, 0], "prompt": "a cat", "file_path": ["1.jpg", "2.jpg"], "user_hash": "x"}
    (tmp_path / "train.json").write_text(json.dumps([pair, {**pair, "prompt": "a dog"}, pair]))
    (tmp_path / "anime.json").write_text(json.dumps(["a cat", "a dog"]))
    for name in ("train", "anime"):
        assert [row["prompt"] for row in data.prompts(tmp_path / f"{name}.json", "train")] == ["a cat", "a dog"]
    with pytest.raises(ValueError, match="curl -fL --create-dirs -o weights/hpdv2/train.txt https://"):
        data.prompts("weights/hpdv2/train.txt", "train")
    with pytest.raises(ValueError, match="No such file or directory$"):
        data.prompts(tmp_path / "mine.txt", "train")


@pytest.mark.parametrize("name, content, says", [
    ("none.txt", None, "cannot read"), ("bytes.txt", b"caf\xe9", "not UTF-8: byte 3 is 0xe9"),
    ("empty.txt", b"\n \n", "no prompts"), ("empty.json", b"", "no prompts"), ("empty.csv", b"prompt\n", "no prompts"),
    ("a.jsonl", b'{"prompt": "x"}\n{"text": 1}', "row 2"), ("a.json", b'{"prompt": "x"}', "a list"),
    ("broken.json", b"[", "not a valid .json"), ("a.csv", b"text\nx\n", "row 1"),
    ("blank.json", b'["x", " "]', "row 2"), ("number.json", b"[1]", "row 1"), ("a.parquet", b"x", "unknown prompts")])
def test_bad_files_are_refused_in_one_line(tmp_path, name, content, says):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=says) as e:
        data.prompts(str(path), "train")
    assert "\n" not in str(e.value)


def test_bad_specs_and_splits_are_refused():
    for spec, says in (("shape", "unknown prompts"), ("geneval-seen", "unknown prompts")):
        with pytest.raises(ValueError, match=says):
            data.prompts(spec, "train")
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        data.prompts("shapes", "dev")


def test_contact_sheet():
    sheet = data.contact_sheet(columns=2, size=24, scale=2)
    assert sheet.mode == "RGB" and sheet.width > 100 and math.isclose(sheet.height / 6, 90, abs_tol=10)
