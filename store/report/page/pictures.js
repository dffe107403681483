"use strict";
// Pictures of scans: grey levels from sheets of tiles or from volumes, drawn in the chosen window,
// with orientation marks and a scale bar.

const data = readData("data");
// The first window is chosen for each class by its tissue.
const WINDOWS = [
  ["Auto"],
  ["Wide", -1000, 500],
  ["Lung", -1350, 150],
  ["Soft tissue", -160, 240],
  ["Bone", -500, 1300],
];
const PLANES = {
  axial: ["Axial", "Seen from the feet"],
  coronal: ["Coronal", "Seen from the front"],
  sagittal: ["Sagittal", "Seen from the patient's left"],
};
// Letters at the left, top, right and bottom edge.
const EDGES = {
  axial: ["R", "A", "L", "P"],
  coronal: ["R", "H", "L", "F"],
  sagittal: ["A", "H", "P", "F"],
};
const shown = { window: recall("window", 0), marks: recall("marks", true) };
if (!WINDOWS[shown.window]) shown.window = 0;

// Grey levels stand for HU; this table turns them into what is shown.
function toHu(level) {
  const points = data.levels;
  const i = Math.max(
    1,
    points.findIndex(([, end]) => level <= end),
  );
  const [[hu, start], [nextHu, end]] = [points[i - 1], points[i]];
  return hu + ((level - start) / (end - start)) * (nextHu - hu);
}
const IDENTITY = Uint8ClampedArray.from({ length: 256 }, (_, level) => level);
function windowTable([, low, high]) {
  return Uint8ClampedArray.from(
    { length: 256 },
    (_, level) => (255 * (toHu(level) - low)) / (high - low),
  );
}
const TABLES = WINDOWS.slice(1).map(windowTable);
const [WIDE, LUNG, SOFT, BONE] = [1, 2, 3, 4]; // places in WINDOWS
function autoWindow({ tissue }) {
  const air = tissue.lung + tissue.air;
  if (air > 0.5) return LUNG;
  if (tissue.bone > 0.2) return BONE;
  return air > 0.15 ? WIDE : SOFT;
}
const levelsOf = (c) => TABLES[(shown.window || (c ? autoWindow(c) : WIDE)) - 1];

// Promises of the last values, by name; the oldest and those that failed are forgotten.
class Recent {
  constructor(most) {
    this.most = most;
    this.made = new Map();
  }
  get(name, make) {
    let found = this.made.get(name);
    this.made.delete(name);
    if (!found) {
      found = make();
      found.catch(() => this.made.delete(name));
    }
    this.made.set(name, found);
    if (this.made.size > this.most) this.made.delete(this.made.keys().next().value);
    return found;
  }
}
const sheets = new Recent(40),
  volumes = new Recent(data.live ? 60 : 0);

// A sheet of tiles: {grey, width}, one byte a pixel.
const sheet = (name) =>
  sheets.get(name, async () => {
    const image = new Image();
    if (data.live) image.src = `sheet/${name}`;
    else {
      if (!document.getElementById(name))
        await new Promise((done) => addEventListener("load", done));
      image.src = `data:image/webp;base64,${document.getElementById(name).textContent}`;
    }
    await image.decode();
    const pen = new OffscreenCanvas(image.width, image.height).getContext("2d", {
      willReadFrequently: true,
    });
    pen.drawImage(image, 0, 0);
    const { data: rgba } = pen.getImageData(0, 0, image.width, image.height);
    return {
      grey: Uint8Array.from({ length: rgba.length / 4 }, (_, i) => rgba[4 * i]),
      width: image.width,
    };
  });
// A slice is {grey, width, height}. Here: tile `which` of a sheet.
async function tileOf(name, which, columns) {
  const { grey, width } = await sheet(name),
    side = data.tile;
  const start = Math.floor(which / columns) * side * width + (which % columns) * side;
  const cut = new Uint8Array(side * side);
  for (let y = 0; y < side; y++)
    cut.set(grey.subarray(start + y * width, start + y * width + side), y * side);
  return { grey: cut, width: side, height: side };
}
// Bytes of volumes, from the server.
const bytesOf = (path) =>
  volumes.get(path, async () => {
    const reply = await fetch(path);
    if (!reply.ok) throw new Error(`${path}: ${reply.status}`);
    return new Uint8Array(await reply.arrayBuffer());
  });
// A plane through a volume of `shape` (z, y, x), at a share of its length; head and front up.
function sliceOf(volume, [depth, height, width], plane, share) {
  const at = (length) => Math.min(length - 1, Math.floor(share * length));
  if (plane === "axial")
    return {
      grey: volume.subarray(at(depth) * height * width, (at(depth) + 1) * height * width),
      width,
      height,
    };
  const across = plane === "coronal" ? width : height,
    step = plane === "coronal" ? 1 : width;
  const first = plane === "coronal" ? at(height) * width : at(width);
  const grey = new Uint8Array(depth * across);
  for (let z = 0; z < depth; z++)
    for (let i = 0, from = (depth - 1 - z) * height * width + first; i < across; i++, from += step)
      grey[z * across + i] = volume[from];
  return { grey, width: across, height: depth };
}

// A canvas that draws itself when it becomes visible. `load` gives a slice, `size` is in CSS pixels.
// of: the class; box: [left, top, right, bottom] as shares; cross: [x, y]; mm: width; plain: no window.
function picture(
  load,
  size,
  label,
  { of = null, plane = null, box = null, cross = null, mm = null, plain = false } = {},
) {
  const scale = Math.min(2, Math.max(1, devicePixelRatio));
  const canvas = el("canvas", {
    role: "img",
    "aria-label": label,
  });
  Object.assign(canvas, {
    load,
    scale,
    stale: true,
    visible: false,
    extras: { of, plane, box, cross, mm, plain },
  });
  reshape(canvas, size);
  visibility.observe(canvas);
  return canvas;
}
function reshape(canvas, [wide, tall]) {
  canvas.width = Math.round(wide * canvas.scale);
  canvas.height = Math.round(tall * canvas.scale);
  canvas.style = `width:${Math.round(wide)}px;height:auto;aspect-ratio:${wide}/${tall}`;
}
function refresh(canvas) {
  canvas.stale = true;
  if (canvas.visible) draw(canvas);
}
const visibility = new IntersectionObserver(
  (entries) => {
    for (const { target, isIntersecting } of entries) {
      target.visible = isIntersecting;
      if (isIntersecting && target.stale) draw(target);
    }
  },
  { rootMargin: "300px" },
);
const scratch = new OffscreenCanvas(1, 1).getContext("2d");
async function draw(canvas) {
  const turn = (canvas.turn = (canvas.turn ?? 0) + 1);
  canvas.stale = false;
  let slice;
  try {
    slice = await canvas.load();
  } catch (error) {
    canvas.title = `This picture could not be read: ${error.message}`;
    return;
  }
  if (turn !== canvas.turn) return; // a later one was asked for
  const { grey, width, height } = slice,
    { of, plane, box, cross, mm, plain } = canvas.extras;
  const shades = plain ? IDENTITY : levelsOf(of),
    image = new ImageData(width, height),
    pixels = new Uint32Array(image.data.buffer);
  for (let i = 0; i < pixels.length; i++) pixels[i] = 0xff000000 | (shades[grey[i]] * 0x010101);
  scratch.canvas.width = width;
  scratch.canvas.height = height;
  scratch.putImageData(image, 0, 0);
  const pen = canvas.getContext("2d");
  pen.imageSmoothingQuality = "high";
  pen.drawImage(scratch.canvas, 0, 0, canvas.width, canvas.height);
  if (box) outline(pen, canvas, box);
  if (cross) crosshair(pen, canvas, cross);
  if (shown.marks) mark(pen, canvas, plane, mm);
  canvas.dataset.drawn = turn;
}
function outline(pen, { width, height, scale }, [left, top, right, bottom]) {
  pen.strokeStyle = "#ffb000";
  pen.lineWidth = 1.5 * scale;
  pen.strokeRect(left * width, top * height, (right - left) * width, (bottom - top) * height);
}
function crosshair(pen, { width, height, scale }, [x, y]) {
  pen.strokeStyle = "#ffb000b0";
  pen.lineWidth = scale;
  pen.beginPath();
  pen.moveTo(x * width, 0);
  pen.lineTo(x * width, height);
  pen.moveTo(0, y * height);
  pen.lineTo(width, y * height);
  pen.stroke();
}
// Letters at the edges (two on small pictures, four on large ones), and a bar of a round length.
function mark(pen, { width, height, scale }, plane, mm) {
  const wide = width / scale,
    size = Math.max(8, Math.min(14, wide / 9)) * scale,
    gap = 2 * scale;
  pen.font = `600 ${size}px system-ui, sans-serif`;
  pen.fillStyle = "#fff";
  pen.strokeStyle = "#000c";
  pen.lineWidth = 2.5 * scale;
  pen.lineJoin = "round";
  const write = (text, x, y, align, base) => {
    pen.textAlign = align;
    pen.textBaseline = base;
    pen.strokeText(text, x, y);
    pen.fillText(text, x, y);
  };
  if (plane) {
    const [left, top, right, bottom] = EDGES[plane];
    write(left, gap, height / 2, "left", "middle");
    write(top, width / 2, gap, "center", "top");
    if (wide >= 90) write(right, width - gap, height / 2, "right", "middle");
    if (wide >= 150) write(bottom, width / 2 + size, height - gap, "center", "bottom");
  }
  if (mm) {
    const length = [200, 100, 50, 20, 10, 5].find((bar) => bar <= 0.42 * mm) ?? 2,
      bar = (length / mm) * width;
    pen.fillStyle = "#000c";
    pen.fillRect(
      gap * 1.5 - scale,
      height - gap * 3 - scale,
      bar + 2 * scale,
      2 * scale + 2 * scale,
    );
    pen.fillStyle = "#fff";
    pen.fillRect(gap * 1.5, height - gap * 3, bar, 2 * scale);
    write(`${length} mm`, gap * 1.5, height - gap * 4, "left", "bottom");
  }
}

// Slices of class members. Number -1 is the mean of all members. In a file, a class's sheet holds a
// few slices of some members; `semgen browse` sends the volumes of all of them.
const shareOf = (index, total) => (index + 0.5) / total;
function memberSlice(c, index, plane, share) {
  if (data.live) {
    if (index < 0)
      return bytesOf(`volumes/${c.label}-mean`).then((volume) =>
        sliceOf(volume, data.volume, plane, share),
      );
    const chunk = Math.floor(index / data.chunk),
      size = data.volume[0] * data.volume[1] * data.volume[2],
      first = (index - chunk * data.chunk) * size;
    return bytesOf(`volumes/${c.label}-${chunk}`).then((bytes) =>
      sliceOf(bytes.subarray(first, first + size), data.volume, plane, share),
    );
  }
  const names = Object.keys(data.slices),
    per = Object.values(data.slices).reduce((a, b) => a + b),
    total = data.slices[plane];
  const before = names
    .slice(0, names.indexOf(plane))
    .reduce((sum, name) => sum + data.slices[name], 0);
  const at = before + Math.min(total - 1, Math.floor(share * total)),
    row = index < 0 ? 0 : 1 + c.shown.indexOf(index);
  return tileOf(`class-${c.label}`, row * per + at, per);
}
// Extent (z, y, x) in mm of a member's crop; of the reference's where members do not differ, or index is -1.
function extentOf(c, index, scale = 0) {
  const [z, y, x] = c.members.extent?.[index] ?? c.extent,
    zoom = scale ? c.members.zoom[index][scale - 1] : 1;
  return [z, y * zoom, x * zoom];
}
// Width and height of a plane of it.
function planeMm(c, plane, index, scale = 0) {
  const [z, y, x] = extentOf(c, index, scale);
  return { axial: [x, y], coronal: [x, z], sagittal: [y, z] }[plane];
}
function fitted([wide, tall], most) {
  const scale = most / Math.max(wide, tall);
  return [wide * scale, tall * scale];
}

// The box of a member's crop in the frame of its scan, as shares (z, y, x): [low, high].
function boxOf(c, index) {
  const { frame } = data.scans[c.members.scan[index]],
    low = [],
    high = [];
  for (let axis = 0; axis < 3; axis++) {
    const length = frame[3 + axis] - frame[axis],
      centre = c.members.place[index][axis],
      half = extentOf(c, index)[axis] / 2;
    low.push((centre - half - frame[axis]) / length);
    high.push((centre + half - frame[axis]) / length);
  }
  return [low, high];
}
const frameMm = (row) =>
  [0, 1, 2].map((axis) => data.scans[row].frame[3 + axis] - data.scans[row].frame[axis]);
// Projections of a scan with the box of a member, from the front and from the patient's left, at most so high
// and together so wide.
function placePictures(c, index, most, widest = 2.6 * most) {
  const row = c.members.scan[index],
    [depth, tall, wide] = frameMm(row),
    [low, high] = boxOf(c, index);
  const scale = Math.min(most / depth, widest / (wide + tall)),
    height = depth * scale;
  const onCard =
    index === 0
      ? [
          `cards-${Math.floor(c.label / data.classesPerSheet)}`,
          (c.label % data.classesPerSheet) * data.cardTiles + 2,
          data.cardTiles,
        ]
      : null;
  if (!onCard && row >= data.mappedScans) return [];
  const [name, first, columns] = onCard ?? ["scans", 2 * row, data.scanColumns];
  const make = (which, plane, width, axis, text) =>
    picture(
      () => tileOf(name, first + which, columns),
      [width * scale, height],
      `${titleOf(c)}: place in the body, ${text}`,
      { plain: true, plane, mm: width, box: [low[axis], 1 - high[0], high[axis], 1 - low[0]] },
    );
  return [
    make(0, "coronal", wide, 2, "from the front"),
    make(1, "sagittal", tall, 1, "from the patient's left"),
  ];
}

// The window and the marks are chosen in the header; every picture follows.
function redrawAll() {
  for (const canvas of document.querySelectorAll("canvas")) if (canvas.load) refresh(canvas);
}
function setWindow(index) {
  shown.window = index;
  remember("window", index);
  windowChoice.choose(index);
  redrawAll();
}
const windowChoice = choice(
  "Window",
  WINDOWS.map(([name, low, high], i) => [
    i,
    name,
    i ? `${low} to ${high} HU (key ${i})` : "By the tissue of each class (key 0)",
  ]),
  shown.window,
  setWindow,
);
windowChoice.id = "window";
WINDOWS.forEach(([name], i) => {
  keys.shared[i] = [`Window: ${name}`, () => setWindow(i)];
});
keys.shared.m = [
  "Show or hide orientation marks and scale bars",
  () => {
    shown.marks = !shown.marks;
    remember("marks", shown.marks);
    redrawAll();
  },
];
