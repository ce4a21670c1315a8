"""`minivlm.load`: from a folder's name to a model and its matching processor, or to a clear error."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import TINY, randomize
from PIL import Image
from safetensors.torch import load_file, save_file

import minivlm
from minivlm import InputError, PaliGemma, Processor
from minivlm.checkpoints import weights
from minivlm.models.load import kind_of, load_answering, load_matching
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
    """Every tensor that the model creates is on the device of the weights."""
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
    monkeypatch.setattr(weights, "CHECKED_SIZE", 0)  # the meta device has no values to check
    model, _ = minivlm.load(folder, dtype=torch.bfloat16, device="meta")
    assert {(t.dtype, t.device.type) for t in model.parameters()} == {(torch.bfloat16, "meta")}
    assert {t.device.type for t in model.buffers()} == {"meta"}


def test_the_models_config_says_how_many_image_tokens(folder: Path):
    """Some published folders lack image_seq_length."""
    values = json.loads((folder / "preprocessor_config.json").read_text())
    del values["image_seq_length"]
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    assert minivlm.load(folder)[1].image_seq_length == 4


@pytest.mark.parametrize("model_type", ["llava_next", None])
def test_another_system(folder: Path, model_type: str | None):
    edit(folder / "config.json", model_type=model_type)
    with pytest.raises(InputError, match=rf"model of type {model_type!r}, and only paligemma, .*vit.* can"):
        minivlm.load(folder)


def test_another_system_for_answers(folder: Path):
    edit(folder / "config.json", model_type="llava_next")
    with pytest.raises(
        InputError, match=r"model of type 'llava_next', and only paligemma, .*can write answers: choose"
    ):
        load_answering(folder)


def test_the_kind_of_a_folder(folder: Path):
    """By config.json alone: the weights may not be there yet."""
    assert kind_of(folder) == kind_of() == "answers"
    (folder / "model.safetensors").unlink()
    for name, kind in (("clip", "matches"), ("siglip", "matches"), ("vit", "classifies")):
        edit(folder / "config.json", model_type=name)
        assert kind_of(folder) == kind
    edit(folder / "config.json", model_type="llava_next")
    with pytest.raises(InputError, match=r"type 'llava_next', and only paligemma, .*vit.* can be loaded"):
        kind_of(folder)


def test_a_model_that_answers_where_one_that_matches_is_wanted(folder: Path):
    message = (
        "type 'paligemma', and only clip, open_clip, siglip can match pictures with texts: choose another"
    )
    with pytest.raises(InputError, match=message):
        load_matching(folder)


def test_another_decoder(folder: Path):
    text = json.loads((folder / "config.json").read_text())["text_config"]
    edit(folder / "config.json", text_config=text | {"model_type": "gemma3_text"})
    with pytest.raises(InputError, match=r"text_config has model_type = 'gemma3_text'; only 'gemma' is"):
        minivlm.load(folder)


def test_a_revision_of_a_folder(folder: Path):
    with pytest.raises(
        InputError, match=r"is a local folder, but revision 'v1' belongs to a repo of the Hub"
    ):
        minivlm.load(folder, revision="v1")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e5m2])
def test_a_dtype_that_nothing_computes_in(folder: Path, dtype: torch.dtype):
    """Refused before the large files are read: here there are none."""
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=rf"{dtype}.*: (models compute in|use) torch.float32"):
        minivlm.load(folder, dtype=dtype)


def test_a_file_in_a_dtype_that_nothing_computes_in(folder: Path):
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"cpu cannot compute in torch\.float8_e4m3fn"):
        minivlm.load(folder, dtype=None)


def test_a_device_that_is_not_here(folder: Path):
    for dtype in (torch.float32, None):
        with pytest.raises(InputError, match="device 'nowhere' cannot be used here"):
            minivlm.load(folder, dtype=dtype, device="nowhere")


def test_a_prompt_longer_than_the_context(folder: Path):
    model, processor = minivlm.load(folder)
    inputs = processor(Image.new("RGB", (50, 40), "red"), "red " * 70)
    tokens = inputs["input_ids"].shape[1]
    message = f"{tokens} tokens including its picture; .* context of 64: shorten the prompt by {tokens - 63}"
    with pytest.raises(InputError, match=message):
        model.generate(**inputs, max_new_tokens=5)


@pytest.mark.parametrize("name", ["tokenizer.json", "preprocessor_config.json", "config.json"])
def test_missing_files(folder: Path, name: str):
    (folder / name).unlink()
    with pytest.raises(InputError, match=f"has no {name}"):
        minivlm.load(folder)


def test_files_of_two_checkpoints(folder: Path):
    edit(folder / "config.json", image_token_index=7)
    with pytest.raises(InputError, match=r"the id of <image> is 7 in config.json and \d+ in tokenizer.json"):
        minivlm.load(folder)


def test_a_word_without_an_embedding(folder: Path):
    """The number of words may be right, and an id still be past the table."""
    words = json.loads((folder / "tokenizer.json").read_text())
    largest = max(words["model"]["vocab"], key=words["model"]["vocab"].get)
    words["model"]["vocab"][largest] = 5000
    (folder / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(InputError, match=r"tokenizer.json has the id 5000 but the model knows only \d+"):
        minivlm.load(folder)


def test_a_tokenizer_that_makes_its_library_panic(folder: Path):
    edit(folder / "tokenizer.json", normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"})
    with pytest.raises(InputError, match=r"tokenizer.json is not a tokenizer \(.*\): download it again"):
        minivlm.load(folder)


def test_pictures_of_another_size(folder: Path):
    edit(folder / "preprocessor_config.json", size={"height": 56, "width": 56})
    with pytest.raises(
        InputError, match=r"the picture's side is 28 in config.json and 56 in preprocessor_config"
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


def test_loading_imports_no_compiler():
    """It takes seconds, and is needed only for random numbers on the meta device: here, the file has them."""
    program = (
        "import sys, minivlm; from minivlm.models.load import SHIPPED;"
        "minivlm.PaliGemma.from_pretrained(SHIPPED); print('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
