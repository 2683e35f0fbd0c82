// A model of `timm-faim export --with-preprocessing` in the browser: bytes in, logits or probabilities out.

import { modelPixels } from "./pixels.js";

const RATE = "0.05"; // of known images that may be called unknown

export class Classifier {
  // Opens a model; `ort` is onnxruntime-web.
  static async open(ort, address) {
    const answer = await fetch(address);
    if (!answer.ok) throw new Error(`there is no ${address}; export a model to it`);
    const bytes = new Uint8Array(await answer.arrayBuffer());
    const text = metadata(bytes, "timm_faim");
    if (!text) throw new Error(`${address} has no metadata of timm_faim`);
    const about = JSON.parse(text);
    if (about.preprocessing !== "inside") throw new Error("export the model with --with-preprocessing");
    if (about.input_size[0] !== 3) throw new Error("this page is for colour images");
    return new Classifier(ort, await ort.InferenceSession.create(bytes), about);
  }

  constructor(ort, session, about) {
    this.ort = ort;
    this.session = session;
    this.about = about;
    const numbers = Array.from({ length: about.num_classes }, (_, k) => `class ${k}`);
    this.names = about.label_names ?? numbers;
  }

  // The likeliest classes of an image file, best first, and whether it is one of them (null: nobody knows).
  async classify(blob, top = 5) {
    const [, height, width] = this.about.input_size;
    const pixels = await modelPixels(blob, this.about);
    const images = new this.ort.Tensor("uint8", pixels, [1, height, width, 3]);
    const kind = this.about.outputs[0];
    const out = Array.from((await this.session.run({ images }))[kind].data);
    const logits = kind === "logits" ? out : out.map((p) => Math.log(Math.max(p, 1e-38)));
    const highest = Math.max(...logits);
    const exps = logits.map((l) => Math.exp(l - highest));
    const sum = exps.reduce((a, b) => a + b);
    const classes = exps.map((e, k) => ({ name: this.names[k], probability: e / sum }));
    classes.sort((a, b) => b.probability - a.probability);
    return { classes: classes.slice(0, top), known: kind === "logits" ? this.isKnown(logits) : null, logits };
  }

  // The score of timm_faim.calibration.known_score against the threshold that the model came with.
  isKnown(logits) {
    const reject = this.about.classifier?.calibration?.reject;
    if (!reject || !(RATE in reject)) return null;
    if (reject[RATE] === null) return true; // too few images for this rate: nothing is rejected
    const warm = logits.map((l) => l / 2);
    const highest = Math.max(...warm);
    const logsumexp = highest + Math.log(warm.reduce((sum, l) => sum + Math.exp(l - highest), 0));
    return highest - 0.75 * logsumexp >= reject[RATE];
  }
}

// The value of a key in an ONNX file's metadata_props, which onnxruntime-web does not give. ModelProto is a row of
// fields, each a tag and a value; metadata_props is field 14, with a key (1) and a value (2) in each.
function metadata(bytes, wanted) {
  for (const entry of fields(bytes)) {
    if (entry.number !== 14) continue;
    const pair = Object.fromEntries(Array.from(fields(entry.bytes), (f) => [f.number, new TextDecoder().decode(f.bytes)]));
    if (pair[1] === wanted) return pair[2];
  }
  return null;
}

function* fields(bytes) {
  let at = 0;
  const varint = () => {
    let value = 0, scale = 1, byte;
    do {
      byte = bytes[at++];
      value += (byte & 127) * scale; // no shifts: lengths may pass 2^31
      scale *= 128;
    } while (byte & 128);
    return value;
  };
  while (at < bytes.length) {
    const tag = varint(), kind = tag % 8;
    const length = kind === 2 ? varint() : kind === 1 ? 8 : kind === 5 ? 4 : 0;
    if (kind === 0) varint();
    yield { number: Math.floor(tag / 8), bytes: bytes.subarray(at, at + length) };
    at += length;
  }
}
