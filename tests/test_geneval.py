"""GenEval's and the OCR task's prompts and scores, against what their authors published."""
import collections
import hashlib
import json

import pytest

import data

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


def test_ocr_prompts():
    metas = {split: data.prompts("ocr", split) for split in SPLITS}
    assert metas["train"] == data.prompts("ocr", "train")
    assert [len(metas[split]) for split in SPLITS] == [27000, 840, 840]
    for rows in metas.values():
        assert all(row["prompt"].split('"')[1:] == [row["text"], ""] for row in rows)
        assert len({row["prompt"] for row in rows}) == len(rows)
    texts = [{row["text"].lower() for row in metas[split]} for split in SPLITS]
    assert not (texts[0] & texts[1] or texts[0] & texts[2] or texts[1] & texts[2])
