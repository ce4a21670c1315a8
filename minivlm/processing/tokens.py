"""From text to token ids and back, in the format of Gemma's and PaliGemma's tokenizer.json.

Gemma splits text by byte-pair encoding (https://arxiv.org/abs/1508.07909). It writes spaces as "▁", and
characters outside its vocabulary as their UTF-8 bytes, so no text is unknown. PaliGemma adds 1024 words for
coordinates (`<loc0000>`), 128 for shapes (`<seg000>`) and the placeholder `<image>`, and fixes the form of a
prompt. The `tokenizers` library does the splitting; the code here decides which text may become which ids.
`BaseTokenizer` is what other systems share, such as LLaVA in llama_tokens.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from minivlm.errors import InputError
from minivlm.files import write_aside

PAD, EOS, BOS, UNK, IMAGE = "<pad>", "<eos>", "<bos>", "<unk>", "<image>"
LOC_TOKENS = [f"<loc{i:04}>" for i in range(1024)]  # a coordinate, see boxes.py
SEG_TOKENS = [f"<seg{i:03}>" for i in range(128)]  # a code of the shape inside a box, see codebook.py

# A piece is a word or a single other character, with the space before it. Newlines and extra spaces are
# pieces of their own.
_PIECE = r"▁?[\p{L}\p{M}]+|▁?[^▁\n\p{L}\p{M}]|▁|\n"


@dataclass(frozen=True)
class SpecialTokens:
    """What a vocabulary calls the tokens that control the model. The defaults are Gemma's names."""

    pad: str = PAD
    bos: str = BOS
    eos: str = EOS
    unk: str = UNK
    image: str = IMAGE  # of which a picture takes many


class BaseTokenizer:
    """Text -> ids and back, keeping what a user types apart from what only the program may insert.

    Padding, start, stop and `<image>` ("a picture goes here") control the model. Typed by a user, they are
    plain text and become several ordinary tokens. `<loc>` and `<seg>` are words of a vocabulary that prompts
    may use ("segment the thing at <loc0256>..."), so they become their own ids wherever they occur.

    This object takes over the given `tokenizers.Tokenizer`: it adds a missing `<image>`, then missing
    `words`, and turns off padding, truncation and the automatic start token.

    Raises InputError: a token of `names` is not in the vocabulary.
    """

    origin: ClassVar[str]  # whose tokenizer.json this is, for messages
    processor_class: ClassVar[str]  # the processor's class in transformers
    settings: ClassVar[dict[str, Any]] = {}  # what else its tokenizer_config.json has to say

    def __init__(self, backend: tokenizers.Tokenizer, names: SpecialTokens, words: Sequence[str]) -> None:
        controls = [names.pad, names.bos, names.eos]
        missing = [token for token in controls if backend.token_to_id(token) is None]
        if missing:
            listed = " and no ".join(missing)
            raise InputError(f"the tokenizer has no {listed}: use the tokenizer.json of {self.origin}")
        backend = _as_words(backend, set(words))
        backend.add_special_tokens([*controls, AddedToken(names.image, special=True, normalized=False)])
        # Even if the vocabulary has them: only added tokens are matched before the text is split.
        backend.add_tokens(list(words))
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = True  # "encode them as text"
        self.backend = backend
        self.names = names

        added = backend.get_added_tokens_decoder()
        ids = {token.content: index for index, token in added.items()}
        self.pad_id, self.bos_id, self.eos_id = (ids[token] for token in controls)
        self.image_id = ids[names.image]
        self.loc_ids = [ids[token] for token in LOC_TOKENS if token in ids]  # in the order of the bins
        self.seg_ids = [ids[token] for token in SEG_TOKENS if token in ids]  # in the order of the codes
        self.specials = {index: token.content for index, token in added.items() if token.special}
        self.special_ids = frozenset(self.specials)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write tokenizer.json, and the tokenizer_config.json that tells `transformers` how to load it."""
        folder = Path(folder)
        with write_aside(folder / "tokenizer.json") as temporary:
            self.backend.save(str(temporary))
        config = {
            # Not the system's own class: transformers 5 would build its own and leave out parts of the file.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "processor_class": self.processor_class,
            "bos_token": self.names.bos,
            "eos_token": self.names.eos,
            "pad_token": self.names.pad,
            "unk_token": self.names.unk,
            "padding_side": "left",
            "clean_up_tokenization_spaces": False,
            **self.settings,
        }
        with write_aside(folder / "tokenizer_config.json") as temporary:
            temporary.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    @property
    def vocab_size(self) -> int:
        """Number of tokens, including added ones: an embedding needs at least this many rows."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """The ids of a user's text. Nothing is added; `<image>`, `<bos>`, `<eos>`, `<pad>` in it are text.

        Raises InputError: a string with half a surrogate pair, which is not valid Unicode.
        """
        return encode_plain(self.backend, text, self.specials)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of ids; drops `<pad>`, `<bos>`, `<eos>`, `<image>`, keeps `<loc>` and `<seg>`.

        Inverts `encode` for any text without "▁" (U+2581): Gemma writes spaces as that character, so a
        literal one comes back as a space. Bytes that are not valid UTF-8 become "\ufffd"; ids outside the
        vocabulary are dropped.
        """
        text: str = self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def batch_decode(
        self, ids: Tensor | Sequence[Sequence[int]], skip_special_tokens: bool = False
    ) -> list[str]:
        """Text of each row of ids, [B, n] or lists, as `batch_decode` in `transformers`.

        Nothing ends at `<eos>`: that is what a processor's `decode` is for.
        """
        rows = ids.tolist() if isinstance(ids, Tensor) else ids
        return [self.decode(row, skip_special_tokens) for row in rows]


class Tokenizer(BaseTokenizer):
    """PaliGemma's: `<pad>`, `<bos>`, `<eos>` and `<image>` control the model, and every vocabulary has words
    for coordinates and shapes. Missing `<image>`, `<loc>` and `<seg>` tokens are added in the order of
    PaliGemma's processor in `transformers` (image first).

    Raises InputError: no `<pad>`, `<bos>` or `<eos>` in the vocabulary.
    """

    origin = "Gemma or PaliGemma"
    processor_class = "PaliGemmaProcessor"

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        super().__init__(backend, SpecialTokens(), [*LOC_TOKENS, *SEG_TOKENS])

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Load the tokenizer.json of a checkpoint folder.

        Raises InputError: no such file, not a tokenizer, or tokens are missing (see the class).
        """
        return cls(backend_of(folder, "PaliGemma"))

    def encode_prefix(self, prefix: str, image_seq_len: int) -> list[int]:
        """The first segment (token type 0): image tokens, `<bos>`, the prompt and a newline.

        The same as `add_image_tokens_to_prompt`, but built from ids, so that an `<image>` or `<bos>` typed in
        the prompt cannot add another one. image_seq_len 0 gives a row without a picture.
        """
        return [self.image_id] * image_seq_len + [self.bos_id] + self.encode(prefix + "\n")

    def encode_suffix(self, suffix: str) -> list[int]:
        """The second segment (token type 1): the answer and `<eos>`, the targets of training."""
        return [*self.encode(suffix), self.eos_id]


def backend_of(folder: str | Path, system: str) -> tokenizers.Tokenizer:
    """What is in a folder's tokenizer.json. Raises InputError: no such file, or not a tokenizer."""
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise InputError(f"{folder} has no tokenizer.json: use a {system} checkpoint folder")
    return read_backend(path)


def settings_in(path: Path) -> dict[str, Any]:
    """The JSON object in a file beside tokenizer.json; empty without the file.

    Raises InputError: it is not JSON, or not an object.
    """
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error}): download it again") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} contains no settings: download it again")
    return values


def read_backend(path: Path) -> tokenizers.Tokenizer:
    """The tokenizer in a file. Raises InputError: it is none."""
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # plain Exception; where the library's Rust code panics, not even that
        raise InputError(f"{path} is not a tokenizer ({error}): download it again") from error


def encode_plain(backend: tokenizers.Tokenizer, text: str, specials: Mapping[int, str]) -> list[int]:
    """The ids of a user's text, with nothing added and no special tokens among them.

    Args:
        backend: has `encode_special_tokens` on, so that typed special tokens are text.
        specials: id and name of each special token.

    Raises InputError: a string with half a surrogate pair, which is not valid Unicode.
    """

    def encode(part: str) -> list[int]:
        # add_special_tokens=False: the file's post-processor may put <bos> first, but special tokens are
        # added elsewhere.
        ids: list[int] = backend.encode(part, add_special_tokens=False).ids
        return ids

    check_unicode(text)
    ids = encode(text)
    if specials.keys().isdisjoint(ids):
        return ids
    # Merges may build "<bos>" from its letters, and a pickled copy of the backend loses
    # `encode_special_tokens`: split the text inside such words.
    inside = "|".join(
        f"(?<={re.escape(s[0])})(?={re.escape(s[1:])})" for s in specials.values() if len(s) > 1
    )
    return [index for part in re.split(inside, text) for index in encode(part)]


def check_unicode(text: str) -> None:
    """Raises InputError: half a surrogate pair."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"character {error.start} of the text is not Unicode: remove it") from error


def _as_words(backend: tokenizers.Tokenizer, tokens: set[str]) -> tokenizers.Tokenizer:
    """A tokenizer in which these tokens are words, even if its file marks them as special.

    In the library, a special token stays special, so the file's JSON is edited instead.
    """
    added = backend.get_added_tokens_decoder().values()
    if not any(token.special and token.content in tokens for token in added):
        return backend
    state = json.loads(backend.to_str())
    for token in state["added_tokens"]:
        token["special"] &= token["content"] not in tokens
    return tokenizers.Tokenizer.from_str(json.dumps(state))


def add_image_tokens_to_prompt(
    prefix_prompt: str, bos_token: str, image_seq_len: int, image_token: str
) -> str:
    """The text of a prompt as PaliGemma saw it in training: `<image>` * N, `<bos>`, the prompt, a newline.

    The image comes before `<bos>`, and the newline is a token of its own that says "now answer". This text is
    for display. The package builds ids instead, so that what a user types cannot be mistaken for a
    placeholder (`Tokenizer.encode_prefix`).
    """
    return f"{image_token * image_seq_len}{bos_token}{prefix_prompt}\n"


def build_tokenizer(texts: Iterable[str]) -> tokenizers.Tokenizer:
    """A small tokenizer in Gemma's format, in which every word of the texts is one token.

    Ids: 0 `<pad>`, 1 `<eos>`, 2 `<bos>`, 3 `<unk>`, then 256 bytes `<0x00>`..., the characters and words of
    the texts, `<loc0000>`..., `<seg000>`..., and `<image>` last. A word after a space and the same word at
    the start of a line are two tokens ("▁red", "red"); each exists only if the texts contain it. Other words
    are split into pieces, down to bytes if necessary. The order of the texts does not matter.

    Gemma has no pre-tokenizer. This one keeps merges inside words during training; afterwards it has no
    effect, since no merge crosses its splits.
    """
    markers = re.compile("<loc[0-9]{4}>|<seg[0-9]{3}>|" + "|".join((PAD, EOS, BOS, UNK, IMAGE)))
    learner = tokenizers.Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", "▁")
    learner.pre_tokenizer = pre_tokenizers.Split(Regex(_PIECE), behavior="isolated")
    trainer = trainers.BpeTrainer(
        vocab_size=100_000,  # never reached: merging stops when every word is one token
        initial_alphabet=["\n", "▁"],
        show_progress=False,
    )
    learner.train_from_iterator((markers.sub("\n", text) for text in texts), trainer)
    learned = json.loads(learner.to_str())["model"]

    words = [PAD, EOS, BOS, UNK, *(f"<0x{byte:02X}>" for byte in range(256)), *learned["vocab"]]
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab={word: index for index, word in enumerate(words)},
            merges=[tuple(merge) for merge in learned["merges"]],
            unk_token=UNK,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = learner.pre_tokenizer
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.add_special_tokens([PAD, EOS, BOS, UNK])
    backend.add_tokens([*LOC_TOKENS, *SEG_TOKENS])
    backend.add_special_tokens([AddedToken(IMAGE, special=True, normalized=False)])
    return backend
