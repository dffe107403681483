"use strict";
// The scans: a map of them, what was rejected, how they are sampled, and the settings.

const COLOURINGS = {
  region: ["body region (estimated)", (s) => s.region],
  split: ["split", (s) => s.split],
  spacing: ["slice spacing", (s) => s.spacing[0], "mm"],
  pixels: ["pixel spacing", (s) => s.spacing[2], "mm"],
  classes: ["classes of the scan", (s, row) => classesOf(row), "classes"],
};
let classCounts = null;
function classesOf(row) {
  if (!classCounts) {
    classCounts = new Uint32Array(data.scans.length);
    for (const c of data.classes) for (const scan of c.members.scan) classCounts[scan]++;
  }
  return classCounts[row];
}
// Colours that are told apart without red and green (Okabe and Ito), and a scale from dark to light.
const HUES = [
  "#0072b2",
  "#e69f00",
  "#009e73",
  "#cc79a7",
  "#56b4e9",
  "#d55e00",
  "#8c8c8c",
  "#b5a800",
];
const ramp = (share) =>
  `hsl(${250 - 200 * share} 70% ${isDark() ? 45 + 25 * share : 30 + 30 * share}%)`;
let colouring = recall("colouring", "region");
if (!COLOURINGS[colouring]) colouring = "region";
// A function from a row to its colour, and a legend.
function paint() {
  const [name, value, unit] = COLOURINGS[colouring],
    values = data.scans.map(value);
  const key = (colour, text) =>
    el("span", { class: "key" }, el("i", { style: `background:${colour}` }), text);
  if (!unit) {
    const names = [...new Set(values)].sort();
    return [
      (row) => HUES[names.indexOf(values[row]) % HUES.length],
      names.map((text, i) =>
        key(HUES[i % HUES.length], `${text} (${values.filter((v) => v === text).length})`),
      ),
    ];
  }
  const [low, high] = rangeOf(values);
  const colour = (row) =>
    name.startsWith("classes") && !values[row]
      ? "var(--bad)"
      : ramp((values[row] - low) / (high - low || 1));
  const digits = Number.isInteger(low) && Number.isInteger(high) ? 0 : 2;
  return [
    colour,
    [
      key(ramp(0), `${number(low, digits)} ${unit}`),
      key(ramp(1), `${number(high, digits)} ${unit}`),
      name.startsWith("classes") && values.includes(0) && key("var(--bad)", "in no class"),
    ].filter(Boolean),
  ];
}

function scanCard(row) {
  const scan = data.scans[row],
    [depth, tall, wide] = frameMm(row),
    scale = Math.min(180 / depth, 220 / wide);
  const make = (which, plane, width, text) =>
    picture(
      () => tileOf("scans", 2 * row + which, data.scanColumns),
      [width * scale, depth * scale],
      `Scan ${scan.id}, ${text}`,
      { plain: true, plane, mm: width },
    );
  return [
    row < data.mappedScans
      ? el(
          "span",
          { class: "places" },
          make(0, "coronal", wide, "from the front"),
          make(1, "sagittal", tall, "from the patient's left"),
        )
      : null,
    facts([
      ["Scan", scan.id],
      ["Patient", scan.patient],
      ["Split", scan.split],
      ["Region", `${scan.region} (estimated)`],
      ["Voxels", `${scan.size.join(" × ")} (z, y, x)`],
      ["Spacing", `${scan.spacing.map((v) => number(v)).join(" × ")} mm`],
      ["Classes", classesOf(row)],
      data.paths && ["File", data.paths[row] ?? "-"],
    ]),
  ];
}
function scatter(side = 560) {
  const place = (at) => [14 + at[0] * (side - 28), 14 + (1 - at[1]) * (side - 28)],
    radius = data.scans.length > 2000 ? 2 : data.scans.length > 300 ? 4 : 7;
  const many = data.scans.length > 500,
    hovered = document.getElementById("hovered");
  const point = (row) => hovered.replaceChildren(...scanCard(row).filter(Boolean));
  const dots = data.scans.map((scan, row) => {
    const [cx, cy] = place(scan.at);
    return el("circle", {
      cx,
      cy,
      r: radius,
      tabindex: many ? null : 0,
      role: "img",
      "aria-label": `Scan ${scan.id}, ${scan.region}`,
      "data-row": row,
      pointerenter: () => point(row),
      focus: () => point(row),
      click: () => chooseScans([row]),
    });
  });
  const lasso = el("polygon", { class: "lasso-line", points: "" });
  let path = null;
  const at = (event) => {
    const box = svg.getBoundingClientRect();
    return [
      ((event.clientX - box.left) * side) / box.width,
      ((event.clientY - box.top) * side) / box.height,
    ];
  };
  const svg = el(
    "svg",
    {
      id: "map",
      viewBox: `0 0 ${side} ${side}`,
      role: "group",
      "aria-label": "Map of scans. Drag to choose scans.",
      pointerdown: (event) => {
        if (event.button) return;
        path = [at(event)];
        event.preventDefault();
      },
      pointermove: (event) => {
        if (!path) return;
        path.push(at(event));
        if (path.length === 4) svg.setPointerCapture(event.pointerId);
        lasso.setAttribute("points", path.map((p) => p.join(",")).join(" "));
      },
      pointerup: () => {
        const drawn = path;
        path = null;
        lasso.setAttribute("points", "");
        if (drawn && drawn.length > 3)
          chooseScans(
            data.scans.flatMap((scan, row) => (inside(place(scan.at), drawn) ? [row] : [])),
          );
      },
    },
    dots,
    lasso,
  );
  svg.paint = () => {
    const [colour, legend] = paint();
    dots.forEach((dot, row) => {
      dot.setAttribute("fill", colour(row));
      dot.classList.toggle("dim", view.scans !== null && !view.scans.has(row));
    });
    document.getElementById("legend").replaceChildren(...legend);
  };
  return svg;
}
// Whether a point lies in a polygon: a ray to the right crosses its edges an odd number of times.
function inside([x, y], polygon) {
  let odd = false;
  for (let i = 0, j = polygon.length - 1; i < polygon.length; j = i++) {
    const [xi, yi] = polygon[i],
      [xj, yj] = polygon[j];
    if (yi > y !== yj > y && x < ((xj - xi) * (y - yi)) / (yj - yi) + xi) odd = !odd;
  }
  return odd;
}
function chooseScans(rows) {
  view.scans = rows.length ? new Set(rows) : null;
  document.getElementById("map").paint();
  const found = document.getElementById("found");
  if (!view.scans) {
    found.replaceChildren("Drag around scans to choose them.");
    return;
  }
  const hit = data.classes.filter((c) => inScans(c) > 0).length;
  found.replaceChildren(
    `${plural(rows.length, "scan")} chosen, in ${plural(hit, "class", "classes")}. `,
    el("a", { href: "#/", id: "show-classes" }, "Show these classes"),
    " ",
    el("button", { type: "button", click: () => chooseScans([]) }, "Clear"),
  );
}

// Math.min cannot take the values of 130,000 scans.
const rangeOf = (values) =>
  values.reduce(([low, high], v) => [Math.min(low, v), Math.max(high, v)], [Infinity, -Infinity]);

function histogram(name, values, unit, bins = 16) {
  const [low, high] = rangeOf(values),
    width = (high - low) / bins || 1,
    counts = new Array(bins).fill(0);
  for (const value of values) counts[Math.min(bins - 1, Math.floor((value - low) / width))]++;
  const highest = Math.max(...counts),
    digits = high - low > 20 ? 0 : 2;
  return el(
    "figure",
    {},
    el("figcaption", {}, `${name}, ${unit}`),
    el(
      "svg",
      {
        class: "histogram",
        viewBox: "0 0 260 96",
        role: "img",
        "aria-label": `${name}: ${values.length} values from ${number(low)} to ${number(high)} ${unit}`,
      },
      counts.map((found, i) =>
        el(
          "rect",
          {
            x: 2 + i * 16,
            y: 78 - (68 * found) / highest,
            width: 14,
            height: (68 * found) / highest,
          },
          el(
            "title",
            {},
            `${number(low + i * width, digits)} to ${number(low + (i + 1) * width, digits)} ${unit}: ${found}`,
          ),
        ),
      ),
      el("text", { x: 2, y: 92 }, number(low, digits)),
      el("text", { x: 258, y: 92, "text-anchor": "end" }, number(high, digits)),
      el("text", { x: 130, y: 92, "text-anchor": "middle" }, `highest bar: ${highest}`),
    ),
  );
}

function scans() {
  const counts = Object.entries(data.rejected).sort((a, b) => b[1] - a[1]),
    tried = Object.entries(data.notMembers);
  const settings = Object.entries(data.config).filter(
    ([, v]) => typeof v !== "object" || Array.isArray(v),
  );
  const files = data.rejectedFiles;
  show(
    el(
      "div",
      { class: "scan-view" },
      el(
        "section",
        { class: "panel" },
        el(
          "div",
          { class: "row" },
          el("h2", {}, "Map of scans"),
          el("span", { class: "spacer" }),
          select(
            "Colour",
            Object.fromEntries(Object.entries(COLOURINGS).map(([k, [text]]) => [k, text])),
            colouring,
            (value) => {
              colouring = value;
              remember("colouring", value);
              document.getElementById("map").paint();
            },
            { id: "colouring" },
          ),
        ),
        el(
          "p",
          { class: "soft small" },
          "Each dot is a scan; scans that look alike are close together (first two principal components of the embeddings). Drag around scans to choose them, and to see their classes.",
        ),
        el("p", { id: "legend", class: "row small" }),
        el("div", { id: "here" }),
        el("p", { id: "found", "aria-live": "polite" }),
      ),
      el(
        "section",
        { class: "stack" },
        el(
          "div",
          { class: "panel", id: "hovered", "aria-live": "polite" },
          el("p", { class: "soft" }, "Move the pointer over a scan, or press Tab, to see it."),
        ),
        el(
          "div",
          { class: "panel" },
          el("h3", {}, "Rejected series"),
          counts.length
            ? table(
                ["series", "reason"],
                counts.map(([reason, n]) => [n, reason]),
                [0],
              )
            : el("p", {}, "None."),
          files && files.length
            ? el(
                "details",
                {},
                el("summary", {}, "Files"),
                table(
                  ["reason", "detail", "first file"],
                  files.map(([file, reason, detail]) => [reason, detail, file]),
                ),
              )
            : el(
                "p",
                { class: "soft small" },
                "Which files they are: semgen inspect STORE --paths.",
              ),
        ),
        tried.length
          ? el(
              "div",
              { class: "panel" },
              el("h3", {}, "Scans tried as members and not used"),
              table(
                ["attempts", "reason"],
                tried.map(([reason, n]) => [n, reason]),
                [0],
              ),
            )
          : null,
      ),
      el(
        "section",
        { class: "panel wide" },
        el("h3", {}, "Sampling of the scans"),
        el(
          "div",
          { class: "row top" },
          histogram(
            "Slice spacing",
            data.scans.map((s) => s.spacing[0]),
            "mm",
          ),
          histogram(
            "Pixel spacing",
            data.scans.map((s) => s.spacing[2]),
            "mm",
          ),
          histogram(
            "Slices",
            data.scans.map((s) => s.size[0]),
            "slices",
          ),
          histogram(
            "Height of the scan",
            data.scans.map((s) => s.size[0] * s.spacing[0]),
            "mm",
          ),
        ),
      ),
      el(
        "section",
        { class: "panel wide" },
        el(
          "details",
          {},
          el("summary", {}, "Settings of the store"),
          table(
            ["setting", "value"],
            settings.map(([k, v]) => [k, JSON.stringify(v)]),
          ),
        ),
        el("p", { class: "soft small" }, `Fingerprint ${data.fingerprint}`),
      ),
    ),
  );
  document.getElementById("here").replaceWith(scatter());
  chooseScans(view.scans ? [...view.scans] : []);
  keys.view = { Escape: ["Choose no scan", () => chooseScans([])] };
}
addEventListener("themechange", () => document.getElementById("map")?.paint());
