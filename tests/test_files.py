"""Files from elsewhere."""
import pickle
import re

import pytest
import torch
from safetensors.torch import save_file

import models
from models import MMDiT


@pytest.mark.parametrize("name", ("diffusion_pytorch_model.bin", "pytorch_model.bin", "pytorch_model.fp16.bin",
                                  "pytorch_model-00001-of-00002.bin"))
def test_a_directory_with_only_a_pickle_is_refused(name, tmp_path):
    (tmp_path / name).write_bytes(pickle.dumps({}))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=rf"{re.escape(name)} is a pickle.*safetensors file is expected"):
        models.weight_files(tmp_path)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / name))):
        MMDiT.from_pretrained(tmp_path)
    save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors")
    assert models.weight_files(tmp_path) == [tmp_path / "model.safetensors"]          # beside that, it is left alone
