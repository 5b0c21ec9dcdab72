"""GenEval's and the OCR task's prompts and scores, against what their authors published."""
import collections
import hashlib
import json
import random

import pytest
import torch

import data
import rewards

SPLITS = ("train", "val", "test")


def tags(metas):
    return dict(collections.Counter(meta["tag"] for meta in metas))


def test_the_official_prompts_come_out_byte_for_byte():
    metas = data.prompts("geneval", "test")
    lines = [json.dumps(meta) for meta in metas]
    assert hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest() == (
        "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13")          # of evaluation_metadata.jsonl
    assert hashlib.sha256("".join(f"{meta['prompt']}\n" for meta in metas).encode()).hexdigest() == (
        "55b6e3650e980c13daf30569eb666e000faf19bfc2b7b4cbe999fcdb7aa9d680")          # of generation_prompts.txt
    assert tags(metas) == {"single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100,
                           "color_attr": 100}
    for row, line in {
            0: '{"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}',
            179: '{"tag": "counting", "include": [{"class": "clock", "count": 2}], "exclude": [{"class": "clock", '
                 '"count": 3}], "prompt": "a photo of two clocks"}',
            353: '{"tag": "position", "include": [{"class": "teddy bear", "count": 1}, {"class": "dog", "count": 1, '
                 '"position": ["right of", 0]}], "prompt": "a photo of a dog right of a teddy bear"}',
            552: '{"tag": "color_attr", "include": [{"class": "pizza", "count": 1, "color": "blue"}, {"class": '
                 '"baseball glove", "count": 1, "color": "yellow"}], "prompt": "a photo of a blue pizza and a yellow '
                 'baseball glove"}'}.items():
        assert lines[row] == line


def test_another_numpy_that_draws_otherwise_is_noticed(monkeypatch):
    monkeypatch.setattr(data, "OFFICIAL", "0" * 64)
    with pytest.raises(RuntimeError, match="draws other prompts than GenEval's 553"):
        data.prompts("geneval", "test")


@pytest.mark.parametrize("spec, val, test", [("geneval", 150, 553), ("geneval-unseen", 157, 246)])
def test_training_prompts(spec, val, test):
    metas = {split: data.prompts(spec, split) for split in SPLITS}
    assert metas["train"] == data.prompts(spec, "train") and len(metas["val"]) == val and len(metas["test"]) == test
    assert tags(metas["train"]) == {"position": 20588, "counting": 14706, "color_attr": 8824, "colors": 2941,
                                    "two_object": 2941}               # the released training set's
    assert set(tags(metas["train"][:300])) == set(tags(metas["val"])) == set(data.TASK_WEIGHTS)
    words = [{meta["prompt"] for meta in metas[split]} for split in SPLITS]
    assert not (words[0] & words[1] or words[0] & words[2] or words[1] & words[2])
    classes = [{need["class"] for meta in metas[split] for need in meta["include"]} for split in SPLITS]
    if spec == "geneval":
        assert classes[0] == classes[2] == set(data.OBJECTS) and len(data.OBJECTS) == 80
        assert data.geneval_prompts("train", seed=1) != metas["train"]
    else:
        assert classes[2] == set(data.UNSEEN) and classes[0] == set(data.OBJECTS) - classes[2] and len(classes[0]) == 60
        assert classes[1] <= classes[0]
    drawn = tags(data.draw_prompts(metas["train"], 6000, 0))
    assert all(abs(drawn[task] / 6000 - weight / 17) < .02 for task, weight in data.TASK_WEIGHTS.items())


def test_an_unknown_split_is_refused():
    for make in (data.geneval_prompts, data.ocr_prompts):
        with pytest.raises(ValueError, match="unknown split 'dev'"):
            make("dev")


def test_ocr_prompts():
    metas = {split: data.prompts("ocr", split) for split in SPLITS}
    assert metas["train"] == data.prompts("ocr", "train")
    assert [len(metas[split]) for split in SPLITS] == [27000, 840, 840]
    for rows in metas.values():
        assert all(row["prompt"].split('"')[1:] == [row["text"], ""] for row in rows)
        assert len({row["prompt"] for row in rows}) == len(rows)
    texts = [{row["text"].lower() for row in metas[split]} for split in SPLITS]
    assert not (texts[0] & texts[1] or texts[0] & texts[2] or texts[1] & texts[2])


# A box of 10 x 10 around (x, y), y down.
def seen(noun, x=50, y=50, score=.95, **color):
    return {"class": noun, "score": score, "box": (x - 5, y - 5, x + 5, y + 5), **color}


ONE = {"tag": "single_object", "include": [{"class": "dog", "count": 1}]}
TWO = {"tag": "two_object", "include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1}]}
THREE = {"tag": "counting", "include": [{"class": "dog", "count": 3}], "exclude": [{"class": "dog", "count": 4}]}
RED = {"tag": "colors", "include": [{"class": "cup", "count": 1, "color": "red"}]}
REDS = {"tag": "colors", "include": [{"class": "cup", "count": 2, "color": "red"}]}
BOTH = {"tag": "color_attr", "include": [{"class": "cup", "count": 1, "color": "red"},
                                         {"class": "car", "count": 1, "color": "blue"}]}
LEFT = {"tag": "position", "include": [{"class": "cat", "count": 1},              # a dog left of a cat
                                       {"class": "dog", "count": 1, "position": ["left of", 0]}]}
DOG, CAT = seen("dog", 20), seen("cat", 80)
RED_CUP, BLUE_CUP, BLUE_CAR, RED_CAR = (seen(n, color=c) for n, c in (("cup", "red"), ("cup", "blue"), ("car", "blue"),
                                                                      ("car", "red")))


@pytest.mark.parametrize("meta, detections, correct, strict, score", [
    (ONE, [DOG], 1, 1, 1), (ONE, [], 0, 0, 0), (ONE, [DOG] * 2, 1, 0, 0), (ONE, [DOG] * 16, 1, 0, -14),
    (ONE, [DOG] * 40, 1, 0, -14),                                      # at most 16 of a class count
    (TWO, [DOG, CAT], 1, 1, 1), (TWO, [DOG], 0, 0, .5), (TWO, [], 0, 0, 0), (TWO, [DOG, CAT, CAT], 1, 0, .5),
    (THREE, [DOG] * 3, 1, 1, 1), (THREE, [DOG] * 2, 0, 0, 2 / 3), (THREE, [DOG] * 7, 0, 0, -1 / 3),
    (THREE, [DOG] * 4, 0, 0, 2 / 3),                                   # "exclude": the benchmark counts exactly, too
    (RED, [RED_CUP], 1, 1, 1), (RED, [BLUE_CUP], 0, 0, .5), (RED, [], 0, 0, 0), (RED, [RED_CUP] * 2, 1, 0, 0),
    (REDS, [RED_CUP] * 2, 1, 1, 1), (REDS, [RED_CUP, BLUE_CUP], 0, 0, .75), (REDS, [RED_CUP], 0, 0, .25),
    (BOTH, [RED_CUP, BLUE_CAR], 1, 1, 1), (BOTH, [RED_CUP, RED_CAR], 0, 0, .75), (BOTH, [BLUE_CUP, RED_CAR], 0, 0, .5),
    (BOTH, [RED_CUP], 0, 0, .5),
    (LEFT, [DOG, CAT], 1, 1, 1), (LEFT, [seen("dog", 80), seen("cat", 20)], 0, 0, .75),
    (LEFT, [CAT], 0, 0, 1 / 3), (LEFT, [DOG], 0, 0, 1 / 3), (LEFT, [], 0, 0, 0)])
def test_scores_of_detections(meta, detections, correct, strict, score):
    got = rewards.score_detections(detections, meta)
    assert got == {"correct": correct, "strict": strict, "score": pytest.approx(score)}


def test_what_the_released_code_does_can_be_turned_off():
    wrong = [seen("dog", 80), seen("cat", 20)]
    assert rewards.score_detections(wrong, LEFT, position_quirk=False)["score"] == pytest.approx(2 / 3)
    assert rewards.score_detections([DOG, CAT], LEFT, position_quirk=False)["score"] == 1
    assert rewards.score_detections([DOG], LEFT, position_quirk=False)["score"] == pytest.approx(1 / 3)
    assert rewards.score_detections([DOG] * 16, ONE, clip_negative=True)["score"] == 0
    assert rewards.score_detections([DOG] * 16 + [CAT], TWO)["score"] == -6.5
    assert rewards.score_detections([DOG] * 16 + [CAT], TWO, clip_negative=True)["score"] == .5


def test_thresholds_and_the_best_detections():
    def correct(meta, *scores):
        return rewards.score_detections([seen("dog", score=s) for s in scores], meta)["correct"]
    assert correct(ONE, .301) == 1 and correct(ONE, .3) == 0
    assert correct(THREE, .91, .92, .93, .9, .5) == 1 and correct(THREE, .91, .92, .9) == 0
    cups = [seen("cup", score=.5, color="blue"), seen("cup", score=.8, color="red")]
    assert rewards.score_detections(cups, RED)["correct"] == 1         # the best is red, whatever the order
    cups[0]["score"] = .9
    assert rewards.score_detections(cups, RED)["correct"] == 0
    pair = [DOG, CAT, seen("cat", 0, score=.4)]                        # the second cat is on the other side
    got = rewards.score_detections(pair, LEFT)
    assert got == {"correct": 1, "strict": 0, "score": pytest.approx(1 / 3)}               # the terms: 0, then 1 and 0


@pytest.mark.parametrize("x, y, names", [
    (-30, 0, {"left of"}), (30, 0, {"right of"}), (0, -30, {"above"}), (0, 30, {"below"}), (30, 12, {"right of"}),
    (-30, -30, {"left of", "above"}), (5, 0, {"right of"}), (4.1, 0, {"right of"}), (3, 0, set()), (5, 5, set()),
    (2, 0, set()), (-2, 2, set()), (0, 0, set())])
def test_relations(x, y, names):
    assert rewards.relations(seen("a", 50 + x, 50 + y)["box"], seen("b")["box"]) == names


def perfect(meta):
    """Detections that show what a meta asks for; related objects lie 100 apart."""
    found = []
    for need in meta["include"]:
        dx, dy = data.RELATIONS[need["position"][0]] if "position" in need else (0, 0)
        color = {"color": need["color"]} if "color" in need else {}
        found += [seen(need["class"], 200 + 100 * dx, 200 + 100 * dy, **color) for _ in range(need["count"])]
    return random.Random(0).sample(found, len(found))


@pytest.mark.parametrize("spec", ["geneval", "shapes"])
def test_a_perfect_image_of_every_prompt_is_right_and_an_empty_one_is_not(spec):
    for meta in data.prompts(spec, "test"):
        assert rewards.score_detections(perfect(meta), meta) == {"correct": 1, "strict": 1, "score": 1}
        assert rewards.score_detections([], meta) == {"correct": 0, "strict": 0, "score": 0}


def test_what_cannot_be_scored_is_refused():
    for include in (None, [], [{"class": "dog"}], [{"class": "dog", "count": 0}], [{"class": "dog", "count": "1"}],
                    [{"class": "dog", "count": 1, "color": "mauve"}], ["dog"],
                    [{"class": "dog", "count": 1, "position": ["left of", 0]}],
                    [TWO["include"][0], {"class": "cat", "count": 1, "position": ["near", 0]}]):
        with pytest.raises(ValueError, match="cannot check"):
            rewards.score_detections([DOG], {"tag": "x", "include": include})
    with pytest.raises(ValueError, match="has no colour"):
        rewards.score_detections([seen("cup")], RED)


def test_only_numbered_images_of_a_folder_are_scored(tmp_path, monkeypatch):
    """As in GenEval's own script: no grids, no masks. The engine stands aside: it finds nothing."""
    def find(images, metas):
        return [[] for _ in images]
    find.engine = "none"
    monkeypatch.setattr(rewards, "geneval_engine", lambda weights, device: find)
    rewards.write_geneval(tmp_path, 0, {"tag": "x", "prompt": "a dog", **RED}, torch.zeros(2, 3, 4, 4))
    samples = tmp_path / "00000" / "samples"
    for name in ("0000_mask.png", "grid.png", "0002.jpg"):
        (samples / name).write_bytes((samples / "0000.png").read_bytes())
    rows = rewards.score_geneval(tmp_path)
    assert [row["filename"] for row in rows] == [str(samples / name) for name in ("0000.png", "0001.png")]


def test_the_summary_is_the_mean_over_tags():
    rows = [{"tag": tag, "prompt": f"{tag} {i // 4}", "correct": i < right}
            for tag, n, right in (("counting", 8, 2), ("colors", 4, 3), ("position", 4, 0)) for i in range(n)]
    got = rewards.geneval_summary(rows)
    assert list(got) == ["counting", "colors", "position", "overall", "correct_images", "correct_prompts"]
    assert list(got.values()) == pytest.approx([.25, .75, 0, 1 / 3, 5 / 16, 2 / 4])
    with pytest.raises(ValueError, match="at least one image"):
        rewards.geneval_summary([])


@pytest.mark.parametrize("text, target, score", [
    ("Hello World", "Hello World", 1), ("hello  WORLD", "HelloWorld", 1), ("", "Hello", 0),
    ("HelloWorldandmuchmorebesides", "Hello World", 1),                # surplus text is forgiven if the target is whole
    ("HelloWorl", "Hello World", .9), ("HelloXWorld", "Hello World", .9), ("Hallo World", "Hello World", .9),
    ("olleH", "Hello", .2), ("xyz", "Hello", 0), ("Hellandmuchmorebesides", "Hello", 0),   # and not, if it is not
    ("Hell\no", "Hello", .8)])                                        # only spaces are taken out
def test_ocr_score(text, target, score):
    assert rewards.ocr_score(text, target) == pytest.approx(score)


def test_the_ocr_score_needs_a_target():
    with pytest.raises(ValueError, match="between double quotes"):
        rewards.ocr_score("Hello", " ")


@pytest.mark.parametrize("a, b, distance", [
    ("", "", 0), ("", "abc", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("intention", "execution", 5),
    ("saturday", "sunday", 3), ("rosettacode", "raisethysword", 8)])
def test_levenshtein(a, b, distance):
    assert rewards.levenshtein(a, b) == rewards.levenshtein(b, a) == distance
