"""What is done to a caption before a tokenizer sees it, where the published program does more than its file.

- CLIP (https://github.com/openai/CLIP, `simple_tokenizer.py`) repairs text with ftfy, resolves HTML twice,
  collapses spaces and lowercases. So curly quotes, ligatures, full-width letters, `&amp;` and text that was
  decoded wrongly become what they stand for. `CLIPTokenizer` in transformers leaves them as they are.
- SigLIP 1: `SiglipTokenizer` in transformers lowercases, removes ASCII punctuation and collapses spaces, as
  big_vision does with the prompts of its zero-shot evaluation (except that big_vision makes "_" a space).
"""

from __future__ import annotations

import html
import re
import string
import warnings

import tokenizers
from tokenizers import Regex, normalizers

_UNTOUCHED = re.compile(r"[ -%'-~\t\n\r\f]*")  # printable ASCII without "&"


def clean_for_clip(text: str) -> str:
    """A caption as CLIP's own program cleans it: one line, in lower case.

    Printable ASCII without "&" needs no repair. Other text needs the package ftfy. Where it is not installed,
    a warning says so, and only HTML, spaces and capitals are taken care of.
    """
    if not _UNTOUCHED.fullmatch(text):
        text = html.unescape(html.unescape(_repair(text)))
    return re.sub(r"\s+", " ", text).strip().lower()


def _repair(text: str) -> str:
    try:
        from ftfy import fix_text
    except ImportError:
        warnings.warn(
            "the package ftfy is not installed: captions with '&' or characters outside ASCII, such as curly "
            "quotes, may be read otherwise than CLIP's own program reads them. Install it: pip install ftfy",
            stacklevel=3,
        )
        return text
    return fix_text(text)


def remove_punctuation(backend: tokenizers.Tokenizer) -> None:
    """Clean as SigLIP 1 before the file's normalizer runs. Does nothing more to text that is clean."""
    steps = [
        normalizers.Lowercase(),
        normalizers.Replace(Regex(f"[{re.escape(string.punctuation)}]"), ""),
        normalizers.Replace(Regex(r"\s+"), " "),
        normalizers.Strip(),
    ]
    own = [] if backend.normalizer is None else [backend.normalizer]
    backend.normalizer = normalizers.Sequence([*steps, *own])
