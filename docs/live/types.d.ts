// What the scripts hand to each other, and the constants that build.py writes. Only the type checker reads this file.

type RGB = [number, number, number];
type Thing = { shape: string; color: string; x: number; y: number; radius: number; rgb: RGB };
type Scene = { background: number; things: Thing[] };
type Pair = { scene: Scene; caption: string };
type Picture = { width: number; height: number; data: Uint8ClampedArray }; // RGB, a byte each, row by row
type Box = { x0: number; y0: number; x1: number; y1: number; name: string; codes: number[] | null };
type Word = { token_id: number; logits: Float32Array };
type Broken = { [name: string]: any; head_off?: { layer: number; head: number } }; // see model.js
type Part = { show(): void; streams?: boolean }; // of a page

type StoredWeights = { shapes: [string, number[]][]; base64: string };
// Settings are those of the Hub's config.json, tokenizer.json and preprocessor_config.json.
declare const CHECKPOINT: { config: any; tokenizer: any; preprocessor: any; model: StoredWeights; codebook: StoredWeights };
declare const TWO_TOWERS: { config: any; tokenizer: any; preprocessor: any; model: StoredWeights };
declare const BOOK: string | null; // where the book is, if the page is part of one
declare const DRAWN_WORLD: {
  shapes: string[];
  colors: Record<string, RGB>;
  sizes: Record<string, [number, number]>;
  samples: (Scene & { prompts: string[] })[];
};

interface Uint8ArrayConstructor {
  fromBase64?(text: string): Uint8Array<ArrayBuffer>; // new in browsers
}
