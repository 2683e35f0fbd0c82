// An image file to the bytes that the model was trained on: resized as Pillow does it, cropped as timm does it. A
// browser's own resizing is another one, and costs accuracy.

const FILTERS = {
  bilinear: [1, (x) => Math.max(0, 1 - Math.abs(x))],
  bicubic: [2, (x) => {
    x = Math.abs(x);
    return x < 1 ? (1.5 * x - 2.5) * x * x + 1 : x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0;
  }],
  lanczos: [3, (x) => {
    const t = Math.PI * x;
    return x === 0 ? 1 : Math.abs(x) < 3 ? (3 * Math.sin(t) * Math.sin(t / 3)) / (t * t) : 0;
  }],
};

// Bytes [height, width, 3] of an image file, for a model's metadata.
export async function modelPixels(blob, about) {
  const [, height, width] = about.input_size;
  const scale = [Math.floor(height / about.crop_pct), Math.floor(width / about.crop_pct)];
  const image = await decode(blob);
  let size = scale;
  if (about.crop_mode === "center") {
    if (scale[0] !== scale[1]) throw new Error("this page crops to squares only");
    const short = scale[0], { height: h, width: w } = image;
    size = h <= w ? [short, Math.floor((short * w) / h)] : [Math.floor((short * h) / w), short];
  } else if (about.crop_mode !== "squash") {
    throw new Error(`this page has no crop mode ${about.crop_mode}`);
  }
  return crop(resize(image, ...size, about.interpolation), height, width);
}

async function decode(blob) {
  const bitmap = await createImageBitmap(blob, { colorSpaceConversion: "none" });
  const { width, height } = bitmap;
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  context.fillStyle = "white"; // behind what is transparent
  context.fillRect(0, 0, width, height);
  context.drawImage(bitmap, 0, 0);
  const rgba = context.getImageData(0, 0, width, height).data;
  const data = new Uint8ClampedArray(width * height * 3);
  for (let i = 0, j = 0; i < rgba.length; i += 4) for (let c = 0; c < 3; c++) data[j++] = rgba[i + c];
  return { data, width, height };
}

// Two passes with bytes between them, columns first, as Pillow does.
export function resize(image, height, width, interpolation) {
  const filter = FILTERS[interpolation];
  if (!filter) throw new Error(`this page has no interpolation ${interpolation}`);
  if (image.width !== width) image = transposed(resizeRows(transposed(image), width, filter));
  return image.height === height ? image : resizeRows(image, height, filter);
}

function resizeRows({ data, width, height: before }, height, [radius, weight]) {
  const out = new Uint8ClampedArray(width * height * 3), stride = width * 3; // which rounds and clips
  const ratio = before / height, stretch = Math.max(ratio, 1), support = radius * stretch;
  for (let y = 0; y < height; y++) {
    const center = (y + 0.5) * ratio;
    const first = Math.max(0, Math.trunc(center - support + 0.5));
    const last = Math.min(before, Math.trunc(center + support + 0.5));
    const weights = Array.from({ length: last - first }, (_, i) => weight((i + first - center + 0.5) / stretch));
    const sum = weights.reduce((a, b) => a + b);
    for (let x = 0; x < stride; x++) {
      let value = 0;
      for (let i = 0; i < weights.length; i++) value += weights[i] * data[(first + i) * stride + x];
      out[y * stride + x] = value / sum;
    }
  }
  return { data: out, width, height };
}

function transposed({ data, width, height }) {
  const out = new Uint8ClampedArray(data.length);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      for (let c = 0; c < 3; c++) out[(x * height + y) * 3 + c] = data[(y * width + x) * 3 + c];
    }
  }
  return { data: out, width: height, height: width };
}

function crop({ data, width: w, height: h }, height, width) {
  const top = halved(h - height), left = halved(w - width);
  const out = new Uint8Array(height * width * 3);
  for (let y = 0; y < height; y++) {
    const from = ((top + y) * w + left) * 3;
    out.set(data.subarray(from, from + width * 3), y * width * 3);
  }
  return out;
}

// Half, rounded to even, as Python's round.
const halved = (n) => (n % 4 === 3 ? (n + 1) / 2 : Math.floor(n / 2));
