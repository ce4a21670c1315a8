"""`minivlm.load`: a folder's name becomes a model and a processor that fit together, or a clear refusal."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import TINY, randomize
from PIL import Image

import minivlm
from minivlm import InputError, PaliGemma, Processor, weights
from minivlm.processing import ImageProcessor, Tokenizer, build_tokenizer

QUESTION = "what color is the circle"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole checkpoint: model, tokenizer and image processor."""
    tokenizer = Tokenizer(build_tokenizer([QUESTION, "red", "green"]))
    Processor(tokenizer, ImageProcessor(image_size=28, image_seq_length=4)).save_pretrained(tmp_path)
    config = replace(
        TINY,
        text=replace(TINY.text, vocab_size=tokenizer.vocab_size),
        image_token_id=tokenizer.image_id,
    )
    randomize(PaliGemma(config)).save_pretrained(tmp_path)
    return tmp_path


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_from_a_folder_to_an_answer(folder: Path):
    model, processor = minivlm.load(folder)
    inputs = processor(Image.new("RGB", (50, 40), "red"), QUESTION)
    answer = processor.decode(model.generate(**inputs, max_new_tokens=5))
    assert len(answer) == 1
    assert isinstance(answer[0], str)
    again, _ = minivlm.load(str(folder))
    assert processor.decode(again.generate(**inputs, max_new_tokens=5)) == answer


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_same_answer_on_a_gpu(folder: Path):
    """Every tensor that the model makes on its way is made where the weights are."""
    answers = []
    for device in ("cpu", "cuda"):
        model, processor = minivlm.load(folder, device=device)
        inputs = processor([Image.new("RGB", (50, 40), "red"), None], [QUESTION, "red"])
        inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
        answers.append(model.generate(**inputs, max_new_tokens=8).tolist())
        answers.append(model.generate(**inputs, max_new_tokens=8, temperature=1.0, seed=0).tolist())
    assert answers[:2] == answers[2:]


def test_dtype_and_device(folder: Path, monkeypatch: pytest.MonkeyPatch):
    assert next(minivlm.load(folder)[0].parameters()).dtype == torch.float32
    monkeypatch.setattr(weights, "CHECKED_SIZE", 0)  # the meta device has no numbers to look at
    model, _ = minivlm.load(folder, dtype=torch.bfloat16, device="meta")
    assert {(t.dtype, t.device.type) for t in model.parameters()} == {(torch.bfloat16, "meta")}
    assert {t.device.type for t in model.buffers()} == {"meta"}


def test_the_models_config_says_how_many_image_tokens(folder: Path):
    """Some published folders do not hold image_seq_length."""
    values = json.loads((folder / "preprocessor_config.json").read_text())
    del values["image_seq_length"]
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    assert minivlm.load(folder)[1].image_seq_length == 4


@pytest.mark.parametrize("model_type", ["llava", None])
def test_another_system(folder: Path, model_type: str | None):
    edit(folder / "config.json", model_type=model_type)
    with pytest.raises(
        InputError, match=rf"model of type {model_type!r}, and only paligemma, clip, siglip, vit can"
    ):
        minivlm.load(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "preprocessor_config.json", "config.json"])
def test_missing_files(folder: Path, name: str):
    (folder / name).unlink()
    with pytest.raises(InputError, match=f"has no {name}"):
        minivlm.load(folder)


def test_files_of_two_checkpoints(folder: Path):
    edit(folder / "config.json", image_token_index=7)
    with pytest.raises(InputError, match=r"the id of <image> is 7 by config.json and \d+ by tokenizer.json"):
        minivlm.load(folder)


def test_pictures_of_another_size(folder: Path):
    edit(folder / "preprocessor_config.json", size={"height": 56, "width": 56})
    with pytest.raises(
        InputError, match=r"the picture's side is 28 by config.json and 56 by preprocessor_config"
    ):
        minivlm.load(folder)


def test_importing_the_package_loads_nothing_it_does_not_need():
    slow = ["transformers", "huggingface_hub", "matplotlib", "pandas", "IPython"]
    code = (
        f"import sys, minivlm; print([name for name in {slow} if name in sys.modules], minivlm.__version__)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["[]", minivlm.__version__]


def test_what_the_package_offers():
    for name in minivlm.__all__:
        assert getattr(minivlm, name).__doc__
    assert (Path(minivlm.__file__).parent / "py.typed").is_file()
