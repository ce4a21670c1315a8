"use strict";
/* From text to token ids and back. As minivlm/processing/tokens.py: byte-pair encoding with the vocabulary of the
   shipped tokenizer.json. Spaces become "▁", characters outside of the vocabulary their UTF-8 bytes.

   <loc0000> and <seg000> are words that a prompt may use. <image>, <bos>, <eos> and <pad> control the model: typed by a
   user they are plain text, and only the code below may put them into a row. */

// A piece is a word or a single other character, with the space before it. Newlines and extra spaces are pieces too.
const PIECE = /▁?[\p{L}\p{M}]+|▁?[^▁\n\p{L}\p{M}]|▁|\n/gu;
const COORDINATE_OR_CODE = /(<loc\d{4}>|<seg\d{3}>)/;

class Tokenizer {
  /* The contents of tokenizer.json. */
  constructor({ model, added_tokens }) {
    this.ids = new Map(Object.entries(model.vocab));
    this.words = new Map(added_tokens.filter((token) => !token.special).map((token) => [token.content, token.id]));
    this.names = []; // by id
    for (const [name, id] of this.ids) this.names[id] = name;
    for (const token of added_tokens) this.names[token.id] = token.content;
    this.special_ids = new Set(added_tokens.filter((token) => token.special).map((token) => token.id));
    this.ranks = new Map(model.merges.map((pair, rank) => [pair.join(" "), rank])); // no symbol holds a space
    const id_of = (name) => added_tokens.find((token) => token.content === name)?.id;
    this.pad_id = id_of("<pad>");
    this.bos_id = id_of("<bos>");
    this.eos_id = id_of("<eos>");
    this.image_id = id_of("<image>");
  }

  /* The ids of a user's text; nothing is added. */
  encode(text) {
    const ids = [];
    for (const part of text.replaceAll(" ", "▁").split(COORDINATE_OR_CODE)) {
      const known = this.words.get(part);
      if (known !== undefined) ids.push(known);
      else for (const piece of part.match(PIECE) ?? []) ids.push(...this.merge(piece));
    }
    return ids;
  }

  /* The ids of a piece: begin with characters, then join the pair that was learned first, again and again. */
  merge(piece) {
    let symbols = [...piece].flatMap((character) => (this.ids.has(character) ? [character] : bytes_of(character)));
    for (;;) {
      let best = Infinity, at = -1;
      for (let i = 0; i + 1 < symbols.length; i++) {
        const rank = this.ranks.get(`${symbols[i]} ${symbols[i + 1]}`) ?? Infinity;
        if (rank < best) [best, at] = [rank, i];
      }
      if (at < 0) return symbols.map((symbol) => this.ids.get(symbol));
      symbols.splice(at, 2, symbols[at] + symbols[at + 1]);
    }
  }

  /* Text of ids, without <pad>, <bos>, <eos> and <image>. */
  decode(ids) {
    let text = "", bytes = [];
    const flush = () => {
      text += text_of_bytes(Uint8Array.from(bytes));
      bytes = [];
    };
    for (const id of ids) {
      const name = this.names[id];
      if (name === undefined || this.special_ids.has(id)) continue;
      const byte = /^<0x([0-9A-F]{2})>$/.exec(name);
      if (byte) bytes.push(parseInt(byte[1], 16));
      else {
        flush();
        text += name.replaceAll("▁", " ");
      }
    }
    flush();
    return text;
  }

  /* <image> N times, <bos>, the prompt and a newline: what the model reads before it answers. */
  encode_prefix(prompt, image_seq_length, breaks = {}) {
    const text = breaks.no_newline ? prompt : `${prompt}\n`;
    return [...Array(image_seq_length).fill(this.image_id), this.bos_id, ...this.encode(text)];
  }
}

function bytes_of(character) {
  return [...new TextEncoder().encode(character)].map((byte) => `<0x${byte.toString(16).toUpperCase().padStart(2, "0")}>`);
}

/* Bytes that are not valid UTF-8 become one sign of replacement each. */
function text_of_bytes(bytes) {
  try {
    return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes);
  } catch {
    return "\ufffd".repeat(bytes.length);
  }
}
