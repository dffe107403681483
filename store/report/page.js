"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const main = document.getElementById("main");
const picker = document.getElementById("window");
const T = data.tile;

// An element with attributes, listeners (functions) and children; text is never parsed as HTML.
function el(name, attributes = {}, ...children) {
  const svg = ["svg", "circle", "rect", "text", "g", "title", "line"].includes(name);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(key, value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.filter((c) => c !== null && c !== undefined));
  return node;
}

function show(...parts) { main.replaceChildren(...parts.filter((part) => part !== null)); }

// Pictures are sheets of tiles. Their grey levels encode HU and are drawn with the chosen window.
const sheets = new Map();
function sheet(name) {
  if (!sheets.has(name)) {
    sheets.set(name, new Promise((resolve, reject) => {
      const image = new Image();
      image.onload = () => resolve(image);
      image.onerror = () => reject(new Error(`picture ${name} is broken`));
      image.src = data.live ? `sheet/${name}` : "data:image/webp;base64," + document.getElementById(name).textContent;
    }));
    if (sheets.size > 12) sheets.delete(sheets.keys().next().value);
  }
  return sheets.get(name);
}
function toHu(level) {
  const marks = data.levels;
  for (let i = 1; i < marks.length; i++) {
    if (level <= marks[i][1]) {
      const share = (level - marks[i - 1][1]) / (marks[i][1] - marks[i - 1][1]);
      return marks[i - 1][0] + share * (marks[i][0] - marks[i - 1][0]);
    }
  }
  return marks[marks.length - 1][0];
}
function levels() {
  const [low, high] = picker.value.split(",").map(Number);
  return Uint8ClampedArray.from({ length: 256 }, (_, level) => 255 * (toHu(level) - low) / (high - low));
}
// A tile as a canvas. `size`: [width, height] on the page in CSS pixels; `cell`: of the tile.
function tile(name, number, columns, size, label, { box = null, plain = false, cell = [T, T] } = {}) {
  const canvas = el("canvas", { width: size[0] * 2, height: size[1] * 2, role: "img", "aria-label": label, style: `width:${size[0]}px;height:${size[1]}px` });
  canvas.draw = async (which = number) => {
    const image = await sheet(name);
    const [wide, tall] = cell;
    const small = new OffscreenCanvas(wide, tall).getContext("2d", { willReadFrequently: true });
    small.drawImage(image, (which % columns) * wide, Math.floor(which / columns) * tall, wide, tall, 0, 0, wide, tall);
    const pixels = small.getImageData(0, 0, wide, tall);
    if (!plain) {
      const table = levels();
      for (let i = 0; i < pixels.data.length; i += 4) pixels.data[i] = pixels.data[i + 1] = pixels.data[i + 2] = table[pixels.data[i]];
      small.putImageData(pixels, 0, 0);
    }
    const pen = canvas.getContext("2d");
    pen.imageSmoothingQuality = "high";
    pen.drawImage(small.canvas, 0, 0, canvas.width, canvas.height);
    if (box) {
      pen.strokeStyle = "#ffb000";
      pen.lineWidth = 3;
      pen.strokeRect(box[0] * canvas.width, box[1] * canvas.height, (box[2] - box[0]) * canvas.width, (box[3] - box[1]) * canvas.height);
    }
    canvas.dataset.drawn = which;
  };
  seen.observe(canvas);
  return canvas;
}
const seen = new IntersectionObserver((entries) => {
  for (const entry of entries) if (entry.isIntersecting) { seen.unobserve(entry.target); entry.target.draw(); }
}, { rootMargin: "400px" });
function redraw() {
  for (const canvas of document.querySelectorAll("canvas[data-drawn]")) canvas.draw(Number(canvas.dataset.drawn));
}

const percent = (share) => `${Math.round(100 * share)} %`;
const number = (value, digits = 2) => value === null ? "-" : value.toFixed(digits);
const title = (c) => c.name || `Class ${c.label}`;
const mostly = (c) => Object.entries(c.tissue).sort((a, b) => b[1] - a[1])[0][0];
const scanLabel = (row) => `${data.scans[row].id.slice(0, 8)} (patient ${data.scans[row].patient})`;
function table(head, rows, numbers = []) {
  const cell = (kind, value, i) => el(kind, { class: numbers.includes(i) ? "number" : null }, value instanceof Node ? value : String(value));
  return el("table", {}, el("thead", {}, el("tr", {}, ...head.map((h, i) => cell("th", h, i)))),
    el("tbody", {}, ...rows.map((row) => el("tr", {}, ...row.map((value, i) => cell("td", value, i))))));
}

// The class's place in its reference scan, front and side view.
function placePictures(c, height) {
  const [depth, tall, wide] = c.frame;
  const name = `cards-${Math.floor(c.label / data.classesPerSheet)}`;
  const first = (c.label % data.classesPerSheet) * data.cardTiles;
  const [low, high] = c.box;
  return [
    tile(name, first + 2, data.cardTiles, [Math.round(height * wide / depth), height], `${title(c)}: place in the body, from the front`, { plain: true, box: [low[2], 1 - high[0], high[2], 1 - low[0]] }),
    tile(name, first + 3, data.cardTiles, [Math.round(height * tall / depth), height], `${title(c)}: place in the body, from the patient's left`, { plain: true, box: [low[1], 1 - high[0], high[1], 1 - low[0]] }),
  ];
}

function overview() {
  const counts = Object.entries(data.rejected);
  const settings = Object.entries(data.config).filter(([, v]) => typeof v !== "object" || Array.isArray(v));
  const patients = (split) => new Set(data.scans.filter((s) => s.split === split).map((s) => s.patient)).size;
  show(
    el("h2", {}, "Store"),
    el("div", { class: "panels" },
      el("section", {}, table(["", "train", "validation"], [
        ["scans", ...["train", "validation"].map((split) => data.scans.filter((s) => s.split === split).length)],
        ["patients", patients("train"), patients("validation")],
        ["crops", data.crops.train, data.crops.validation],
      ], [1, 2]),
      el("p", {}, `${data.classes.length} classes, ${data.classes.filter((c) => c.excluded).length} excluded. Crops of ${data.shape.join(" x ")} voxels (z, y, x)${data.spacing ? `, ${data.spacing.join(" x ")} mm` : ""}.`),
      el("p", { class: "soft small" }, `Fingerprint ${data.fingerprint.slice(0, 16)}`)),
      el("section", {}, el("h3", {}, "Rejected series"), counts.length ? table(["reason", "series"], counts, [1]) : el("p", {}, "None.")),
      Object.keys(data.notMembers).length ? el("section", {}, el("h3", {}, "Scans tried as members and rejected"), table(["reason", "attempts"], Object.entries(data.notMembers), [1])) : null,
      el("section", {}, el("h3", {}, "Slice spacing, mm"), histogram(data.scans.map((s) => s.spacing[0]))),
      el("section", {}, el("h3", {}, "Pixel spacing, mm"), histogram(data.scans.map((s) => s.spacing[2]))),
      el("section", {}, el("h3", {}, "Slices"), histogram(data.scans.map((s) => s.size[0])))),
    el("h2", {}, "Map of scans"),
    el("p", { class: "soft" }, "Each dot is a scan; scans with similar embeddings are close together (first two principal components). Blue: training, orange: validation."),
    el("div", { class: "panels" }, map(), el("figure", { id: "hovered", "aria-live": "polite" }, el("figcaption", {}, "Move the pointer over a scan, or press Tab, to see it."))),
    el("details", {}, el("summary", {}, "Settings"), table(["setting", "value"], settings.map(([k, v]) => [k, JSON.stringify(v)]))),
  );
}
function histogram(values, bins = 12) {
  const low = Math.min(...values), high = Math.max(...values), width = (high - low) / bins || 1;
  const counts = new Array(bins).fill(0);
  for (const value of values) counts[Math.min(bins - 1, Math.floor((value - low) / width))]++;
  const highest = Math.max(...counts);
  return el("svg", { class: "histogram", viewBox: "0 0 200 80", width: 200, height: 80, role: "img", "aria-label": `${values.length} values from ${number(low)} to ${number(high)}` },
    ...counts.map((count, i) => el("rect", { x: 4 + i * 16, y: 62 - 56 * count / highest, width: 14, height: 56 * count / highest }, el("title", {}, `${number(low + i * width)} to ${number(low + (i + 1) * width)}: ${count}`))),
    el("text", { x: 4, y: 76 }, number(low)), el("text", { x: 196, y: 76, "text-anchor": "end" }, number(high)));
}
function map() {
  const side = 500, point = (row) => {
    const scan = data.scans[row], wide = scan.size[2] * scan.spacing[2], deep = scan.size[0] * scan.spacing[0];
    document.getElementById("hovered").replaceChildren(
      row < data.mappedScans ? tile("scans", row, data.scanColumns, [Math.round(Math.min(320, 220 * wide / deep)), 220], `Scan ${scan.id} from the front`, { plain: true }) : "",
      el("figcaption", {}, `${scanLabel(row)}, ${scan.split}, ${scan.size.join(" x ")} voxels of ${scan.spacing.map((v) => number(v)).join(" x ")} mm (z, y, x)`));
  };
  return el("svg", { id: "map", viewBox: `0 0 ${side} ${side}`, role: "group", "aria-label": "Map of scans" },
    ...data.scans.map((scan, row) => el("circle", { class: scan.split, cx: 15 + scan.at[0] * (side - 30), cy: 15 + (1 - scan.at[1]) * (side - 30), r: data.scans.length > 500 ? 3 : 6, tabindex: data.scans.length > 500 ? null : 0, role: "img", "aria-label": `Scan ${scan.id}`, pointerenter: () => point(row), focus: () => point(row) })));
}

const view = { sort: "consistency", text: "", tissue: "", excluded: "all" };
const ORDERS = {
  consistency: (a, b) => b.consistency - a.consistency,
  number: (a, b) => a.label - b.label,
  name: (a, b) => title(a).localeCompare(title(b), undefined, { numeric: true }),
  members: (a, b) => b.members - a.members,
  overlap: (a, b) => b.overlap - a.overlap,
  score: (a, b) => b.median_score - a.median_score,
  weak: (a, b) => b.weak_members / b.all.length - a.weak_members / a.all.length,
};
function chosen() {
  return data.classes.filter((c) =>
    title(c).toLowerCase().includes(view.text.toLowerCase())
    && (!view.tissue || mostly(c) === view.tissue)
    && (view.excluded === "all" || c.excluded === (view.excluded === "excluded"))).sort(ORDERS[view.sort]);
}
function card(c) {
  const name = `cards-${Math.floor(c.label / data.classesPerSheet)}`;
  const first = (c.label % data.classesPerSheet) * data.cardTiles;
  const anatomy = [data.match ? `match score ${number(c.median_score)}` : null, c.body_share === null ? null : `body ${percent(c.body_share)}`].filter(Boolean);
  return el("li", {}, el("a", { class: `card${c.excluded ? " excluded" : ""}`, href: `#/class/${c.label}`, "aria-label": `${title(c)}, consistency ${number(c.consistency)}` },
    el("h3", {}, el("span", {}, title(c)), c.excluded ? el("span", { class: "soft small" }, "excluded") : null, el("span", { class: "soft" }, number(c.consistency))),
    el("div", { class: "row" },
      tile(name, first, data.cardTiles, [72, 72], "Mean crop"),
      tile(name, first + 1, data.cardTiles, [72, 72], "Reference crop"),
      ...placePictures(c, Math.min(72, Math.floor(120 * c.frame[0] / (c.frame[1] + c.frame[2]))))),
    el("div", { class: "bar", title: "Consistency, from chance to perfect" }, el("i", { style: `width:${Math.max(0, 200 * (c.consistency - 0.5))}%` })),
    el("p", { class: "soft small", style: "margin:.35rem 0 0" }, `${c.members} + ${c.validation_members} members, mostly ${mostly(c)}${c.outliers.length ? `, ${c.outliers.length} outlier${c.outliers.length > 1 ? "s" : ""}` : ""}`),
    anatomy.length ? el("p", { class: "soft small", style: "margin:0" }, anatomy.join(", ") + (c.weak_members ? ", " : ""), c.weak_members ? el("span", { class: "weak" }, `${c.weak_members} only just passed`) : null) : null));
}
function classes() {
  const list = el("ul", { class: "cards" });
  const count = el("span", { class: "soft", role: "status" });
  const fill = () => {
    const found = chosen();
    list.replaceChildren(...found.map(card));
    count.textContent = `${found.length} of ${data.classes.length} classes`;
  };
  const select = (key, label, options) => el("label", {}, `${label} `, (() => {
    const node = el("select", { id: key, change: () => { view[key] = node.value; fill(); } }, ...Object.entries(options).map(([value, text]) => el("option", { value }, text)));
    node.value = view[key];
    return node;
  })());
  const search = el("input", { id: "text", type: "search", input: () => { view.text = search.value; fill(); } });
  search.value = view.text;
  show(
    el("h2", {}, "Classes"),
    el("p", { class: "soft" }, "Consistency: the probability that two members are more similar than a member and a crop of another class; 1 is perfect, 0.5 is chance. A card shows the mean of all members, the reference crop, and its place in the reference scan (maximum intensity projections from the front and from the patient's left)."),
    data.classes[0].body_share === null ? null : el("p", { class: "soft" }, `Body: share of the reference crop. ${data.match ? `Match score: median of the members, the reference not counted; 1 is perfect. ${weakLegend()}` : ""}`),
    el("div", { class: "filters" },
      select("sort", "Sort by", { consistency: "consistency", number: "number", name: "name", members: "members", overlap: "overlap", ...(data.match ? { score: "match score", weak: "only just passed" } : {}) }),
      el("label", {}, "Name ", search),
      select("tissue", "Mostly", { "": "any tissue", ...Object.fromEntries(Object.keys(data.classes[0].tissue).map((t) => [t, t])) }),
      select("excluded", "Show", { all: "all", kept: "kept", excluded: "excluded" }), count),
    list);
  fill();
}

const weakLegend = () => `Only just passed: a member with a score below ${number(data.match.weakScore)} or a there-and-back distance above ${data.match.weakCycle} mm (limits: ${number(data.match.score)} and ${data.match.cycle} mm).`;
const weakMark = () => el("span", { class: "weak" }, "match only just passed");
// What the numbers beside the members mean.
function membersLegend() {
  return el("p", { class: "soft" },
    "Distance: of the scan's embedding to the reference's. ",
    data.match ? `Score: similarity to the reference's surroundings; 1 is perfect. There and back: distance from the reference's place after matching to the member and back. ${weakLegend()}` : null);
}

function detail(label) {
  const c = data.classes[label];
  if (!c) { show(el("p", {}, `There is no class ${label}.`)); return; }
  const name = `class-${label}`, columns = data.memberSlices + 4;
  const [Z, Y, X] = c.extent, scale = 190 / Math.max(Y, X);
  const axial = [Math.round(X * scale), Math.round(Y * scale)], coronal = [axial[0], Math.round(Z * scale)], sagittal = [axial[1], Math.round(Z * scale)];
  const half = (size) => size.map((v) => Math.round(v * 0.62));
  const stacks = [];
  const stack = (first, count, size, text) => {
    const canvas = tile(name, first + Math.floor(count / 2), columns, size, text);
    stacks.push({ canvas, first, count });
    return canvas;
  };
  const slider = el("input", { type: "range", min: 0, max: 100, value: 50, "aria-label": "Slice, from the feet to the head", input: () => slice() });
  const slice = () => {
    for (const s of stacks) s.canvas.draw(s.first + Math.min(s.count - 1, Math.floor(slider.value / 100 * s.count)));
  };
  move = (step) => { slider.value = Number(slider.value) + step * 100 / data.referenceSlices; slice(); };
  const wheel = (event) => { event.preventDefault(); move(event.deltaY < 0 ? 1 : -1); };
  const three = (first, count, text, size = (v) => v) => [
    stack(first, count, size(axial), `${text}, axial`),
    tile(name, first + count, columns, size(coronal), `${text}, coronal`),
    tile(name, first + count + 1, columns, size(sagittal), `${text}, sagittal`)];
  const of = data.referenceSlices + 2, ofMean = data.memberSlices + 2, each = data.memberSlices + 4;
  const start = of + ofMean, afterMembers = start + each * c.shown.length;
  const order = chosen().map((other) => other.label), at = order.indexOf(label);
  const near = (step) => order[(at + step + order.length) % order.length] ?? label;
  const facts = [
    ["consistency", number(c.consistency)], ["similarity of two members", number(c.similarity)],
    ["similarity to crops of other classes", number(c.null_similarity)],
    ["members", `${c.members} train, ${c.validation_members} validation, ${c.patients} patients`],
    ["distance to the reference", `median ${number(c.median_distance)}, interquartile range ${number(c.distance_spread)}`],
    ["tissue", Object.entries(c.tissue).filter(([, v]) => v >= 0.01).map(([k, v]) => `${k} ${percent(v)}`).join(", ")],
    ["largest overlap", c.overlap_class < 0 ? "none" : `${percent(c.overlap)} with ${title(data.classes[c.overlap_class])}`],
    ...(data.match ? [["match score", `median ${number(c.median_score)}; ${c.weak_members} of ${c.all.length - 1} matches only just passed`]] : []),
    ...(c.body_share === null ? [] : [["body in the reference crop", percent(c.body_share)]]),
    ["centre (z, y, x)", c.centre.join(", ")], ["size, mm (z, y, x)", c.extent.join(" x ")],
  ];
  const stage = el("div", { class: "row", id: "reference" }, ...three(0, data.referenceSlices, "Reference"),
    el("figure", {}, el("div", { class: "row" }, ...placePictures(c, 150)), el("figcaption", {}, "Place in the reference scan")));
  stage.addEventListener("wheel", wheel, { passive: false });
  show(
    el("p", { class: "steps" }, el("a", { href: `#/class/${near(-1)}`, id: "previous" }, "Previous"), el("a", { href: `#/class/${near(1)}`, id: "next" }, "Next"), el("span", { class: "soft small" }, "Keys: left and right for classes, up and down or the wheel for slices, 1 to 4 for windows, Escape for all classes")),
    el("h2", {}, title(c), c.name ? el("span", { class: "soft" }, ` (class ${c.label})`) : null, c.excluded ? el("span", { class: "soft" }, " excluded") : null),
    data.live ? editor(c) : c.note ? el("p", {}, c.note) : null,
    el("div", { class: "panels" }, table(["", ""], facts)),
    el("h3", {}, `Reference ${scanLabel(c.reference)}`), el("label", { class: "steps" }, "Slice ", slider), stage,
    el("h3", {}, "Mean of all members"), el("div", { class: "row" }, ...three(of, data.memberSlices, "Mean", half)),
    el("h3", {}, `Members: ${c.shown.length} of ${c.all.length}`), membersLegend(),
    ...c.shown.map(([index, why], i) => {
      const member = c.all[index], first = start + i * each, outlier = c.outliers.includes(member.scan);
      return el("div", { class: `member row${outlier ? " outlier" : ""}` },
        el("div", { class: "who small" }, el("div", {}, scanLabel(member.scan)), el("div", {}, `${member.split}, distance ${number(member.distance)}`),
          i === 0 ? el("div", {}, "reference") : c.shown.length < c.all.length ? el("div", {}, why) : null,
          data.match ? el("div", { class: member.weak ? "weak" : null }, `score ${number(member.score)}, there and back ${number(member.cycle, 1)} mm`) : null, member.weak ? el("div", {}, weakMark()) : null, outlier ? el("div", {}, "outlier: not similar to the others") : null,
          data.live ? el("button", { type: "button", click: () => enlarge(c, member) }, "All slices") : null),
        ...three(first, data.memberSlices, `Member ${index}`, half),
        ...(member.split === "train" ? [tile(name, first + data.memberSlices + 2, columns, half(axial), `Member ${index}, second scale`), tile(name, first + data.memberSlices + 3, columns, half(axial), `Member ${index}, third scale`)] : []));
    }),
    c.nonMembers.length ? el("h3", {}, "The same place in non-members (from their thumbnails)") : null,
    el("div", { class: "row" }, ...c.nonMembers.map((scan, i) => el("figure", {}, tile(name, afterMembers + i, columns, half(axial), `Scan ${data.scans[scan].id}, non-member`), el("figcaption", {}, scanLabel(scan))))),
    el("details", {}, el("summary", {}, `All ${c.all.length} members`), memberTable(c)));
}

function memberTable(c) {
  const head = ["scan", "patient", "split", "distance", ...(data.match ? ["score", "there and back, mm"] : []), ""];
  return table(head, c.all.map((m) => {
    const marks = el("span", {}, c.outliers.includes(m.scan) ? "outlier " : null, m.weak ? weakMark() : null);
    return [data.scans[m.scan].id, data.scans[m.scan].patient, m.split, number(m.distance, 3), ...(data.match ? [number(m.score), number(m.cycle, 1)] : []), marks];
  }), data.match ? [3, 4, 5] : [3]);
}

// Editing and full crops; only with a server (semgen browse).
function editor(c) {
  const status = el("span", { class: "soft", role: "status" });
  const save = async (change) => {
    status.textContent = "Saving";
    try {
      const reply = await fetch(`class/${c.label}`, { method: "PUT", headers: { "Content-Type": "application/json" }, body: JSON.stringify(change) });
      if (!reply.ok) throw new Error(`${reply.status} ${reply.statusText}`);
      Object.assign(c, await reply.json());
      status.textContent = "Saved";
      document.querySelector("h2").firstChild.textContent = title(c);
    } catch (error) {
      status.textContent = `Not saved: ${error.message}. Is semgen browse still running?`;
    }
  };
  const name = el("input", { id: "name", maxlength: 200, change: () => save({ name: name.value }) });
  const note = el("textarea", { id: "note", rows: 2, cols: 40, maxlength: 2000, change: () => save({ note: note.value }) });
  const excluded = el("input", { id: "exclude", type: "checkbox", change: () => save({ excluded: excluded.checked }) });
  name.value = c.name;
  note.value = c.note;
  excluded.checked = c.excluded;
  return el("div", { class: "filters" }, el("label", {}, "Name ", name), el("label", {}, "Note ", note), el("label", {}, excluded, " Exclude from training"), status);
}
function enlarge(c, member) {
  const [depth, tall, wide] = data.shape, [, high, broad] = c.extent;
  const canvas = tile(`crop-${member.split}-${member.rows}`, Math.floor(depth / 2), data.cropColumns, [512, Math.round(512 * high / broad)], "All slices of a member", { cell: [wide, tall] });
  const where = el("span", { class: "soft" });
  const slider = el("input", { type: "range", min: 0, max: depth - 1, value: Math.floor(depth / 2), "aria-label": "Slice, from the feet to the head", input: () => turn() });
  const turn = () => { canvas.draw(Number(slider.value)); where.textContent = `${Number(slider.value) + 1} of ${depth}`; };
  const box = el("dialog", { "aria-label": "All slices of a member", close: () => box.remove() },
    el("p", { class: "steps" }, scanLabel(member.scan), slider, where, el("button", { type: "button", click: () => box.close() }, "Close")), canvas);
  box.addEventListener("wheel", (event) => { event.preventDefault(); slider.value = Number(slider.value) + (event.deltaY < 0 ? 1 : -1); turn(); }, { passive: false });
  document.body.append(box);
  box.showModal();
  slider.focus();
  turn();
}

let move = null;
function route() {
  const [, page, label] = location.hash.split("/");
  move = null;
  for (const link of document.querySelectorAll("nav a")) {
    const current = link.dataset.view === (page ? "classes" : "overview");
    if (current) link.setAttribute("aria-current", "page"); else link.removeAttribute("aria-current");
  }
  if (page === "class") detail(Number(label)); else if (page === "classes") classes(); else overview();
  scrollTo(0, 0);
  main.focus({ preventScroll: true });
}
addEventListener("hashchange", route);
addEventListener("beforeprint", () => {
  for (const canvas of document.querySelectorAll("canvas:not([data-drawn])")) canvas.draw();
});
picker.addEventListener("change", redraw);
addEventListener("keydown", (event) => {
  if (event.target.matches("input, select, textarea") || event.ctrlKey || event.metaKey || event.altKey) return;
  const go = (id) => document.getElementById(id)?.click();
  if (event.key >= "1" && event.key <= "4") { picker.selectedIndex = Number(event.key) - 1; redraw(); }
  else if (event.key === "ArrowLeft") go("previous");
  else if (event.key === "ArrowRight") go("next");
  else if (event.key === "Escape") location.hash = "#/classes";
  else if ((event.key === "ArrowUp" || event.key === "ArrowDown") && move) { event.preventDefault(); move(event.key === "ArrowUp" ? 1 : -1); }
});
route();
