"""From text to token ids and back, in the format of Qwen's qwen.tiktoken.

The file has no merges: each line is a piece of bytes in base64 and its rank. To split a word, two neighbors
that together are a piece become one, the pair of lowest rank first, until no pair is left. The `tokenizers`
library does the same when it is given every way to cut every piece in two, in the order of the ranks. So all
systems here share one library, and `tiktoken`, which made the format, is only needed by the test that finds
the same ids with both. No text is unknown, as every byte is a piece.

After the pieces come special tokens that no file lists: their names and their order are Qwen's. `<ref>`,
`<box>` and `<quad>` are words that prompts and answers may use, see qwen_tags.py; typed by a user, `<img>`
and the tokens that begin and end the turns of a chat are plain text.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Self

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from minivlm.errors import InputError
from minivlm.files import write_aside
from minivlm.processing.tokens import BaseTokenizer, SpecialTokens

VOCABULARY = "qwen.tiktoken"
END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
EXTRAS = [f"<|extra_{number}|>" for number in range(205)]  # never used
TAGS = ["<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>"]
IMAGE_START, IMAGE_END, IMAGE_PAD = "<img>", "</img>", "<imgpad>"

ChatFormat = Literal["chatml", "raw"]  # of Qwen-VL-Chat and of Qwen-VL

# A piece never goes over the end of a word, a digit, a run of signs or of spaces.
_WORD = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
# A character for each byte, as `ByteLevel` has them: itself where it is visible, or else one from 256 on.
_VISIBLE = {*range(33, 127), *range(161, 173), *range(174, 256)}
_HIDDEN = [byte for byte in range(256) if byte not in _VISIBLE]
_CHARACTERS = [chr(b if b in _VISIBLE else 256 + _HIDDEN.index(b)) for b in range(256)]


class QwenTokenizer(BaseTokenizer):
    """Qwen's. An answer ends with `<|im_end|>` in a chat and with `<|endoftext|>` elsewhere.

    Args:
        ranks: the pieces and their ids, which count from 0; each of the 256 bytes is one of them.
        chat_format: "chatml", or "raw" for a model that has not learned to chat.

    Raises InputError: a byte or an id is missing.
    """

    origin = "Qwen-VL"
    processor_class = "QWenTokenizer"

    def __init__(self, ranks: Mapping[bytes, int], chat_format: ChatFormat = "chatml") -> None:
        if sorted(ranks.values()) != list(range(len(ranks))):
            raise InputError(f"the {len(ranks)} ranks do not count from 0: use {VOCABULARY} of {self.origin}")
        missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
        if missing:
            raise InputError(f"{len(missing)} bytes have no rank: use {VOCABULARY} of {self.origin}")
        end = TURN_END if chat_format == "chatml" else END_OF_TEXT
        names = SpecialTokens(END_OF_TEXT, TURN_START, end, END_OF_TEXT, IMAGE_PAD)
        super().__init__(build_backend(ranks), names, TAGS)
        self.ranks, self.chat_format = ranks, chat_format
        ids = {name: index for index, name in self.specials.items()}
        self.turn_start_id, self.turn_end_id = ids[TURN_START], ids[TURN_END]
        self.image_start_id, self.image_end_id = ids[IMAGE_START], ids[IMAGE_END]

    @classmethod
    def from_pretrained(cls, folder: str | Path, chat_format: ChatFormat = "chatml") -> Self:
        """Load the qwen.tiktoken of a checkpoint folder. Raises InputError: no such file, or another one."""
        return cls(read_ranks(Path(folder) / VOCABULARY), chat_format)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write qwen.tiktoken and tokenizer_config.json."""
        folder = Path(folder)
        lines = (b"%b %d\n" % (base64.b64encode(piece), rank) for piece, rank in self.ranks.items())
        with write_aside(folder / VOCABULARY) as temporary:
            temporary.write_bytes(b"".join(lines))
        with write_aside(folder / "tokenizer_config.json") as temporary:
            config = {"model_max_length": 8192, "tokenizer_class": self.processor_class}
            temporary.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def read_ranks(path: Path) -> dict[bytes, int]:
    """The pieces in a file of tiktoken's format, and their ids.

    Raises InputError: no such file, or a line that is not a piece in base64 and a number.
    """
    if not path.is_file():
        raise InputError(f"{path.parent} has no {path.name}: use a complete folder of Qwen-VL")
    ranks: dict[bytes, int] = {}
    try:
        for line in filter(None, path.read_bytes().splitlines()):
            piece, rank = line.split()
            ranks[base64.b64decode(piece, validate=True)] = int(rank)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error}): download it again") from error
    except (ValueError, binascii.Error) as error:
        raise InputError(
            f"{path} is damaged (line {len(ranks) + 1} is no piece with its rank): download it again"
        ) from error
    return ranks


def build_backend(ranks: Mapping[bytes, int]) -> tokenizers.Tokenizer:
    """The same pieces for the `tokenizers` library, and the special tokens after them."""
    names = {piece: "".join(_CHARACTERS[byte] for byte in piece) for piece in ranks}
    merges = [
        (names[piece[:cut]], names[piece[cut:]])
        for piece in sorted(ranks, key=ranks.__getitem__)
        for cut in range(1, len(piece))
        if piece[:cut] in ranks and piece[cut:] in ranks
    ]
    # A whole word that is a piece stays one, even if merging would not get there.
    vocabulary = {names[piece]: rank for piece, rank in ranks.items()}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORD), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([END_OF_TEXT, TURN_START, TURN_END, *EXTRAS])
    backend.add_tokens([AddedToken(tag, normalized=False) for tag in TAGS])
    backend.add_special_tokens([IMAGE_START, IMAGE_END, IMAGE_PAD])
    return backend
