"use strict";
// The first view: a strip of numbers, and every class as a card.

const titleOf = (c) => c.name || `Class ${c.label}`;
const mostly = (c) => Object.entries(c.tissue).sort((a, b) => b[1] - a[1])[0][0];
const isDecided = (c) => c.kept || c.excluded;
const scanName = (row) => `${data.scans[row].id.slice(0, 8)}, patient ${data.scans[row].patient}`;

// Consistency in words. Below `data.mixedBelow` the members may show different anatomy.
const GRADES = { good: ["▲", "good"], fair: ["●", "fair"], mixed: ["▼", "bad"] }; // sign, colour
const TERMS = {
  class: "A position that shows the same anatomy in many patients; its number is the pseudo-label of its crops.",
  member: "A scan in which the class was found; its crops are training examples of the class.",
  reference: "The scan in which the class's position was drawn; the others are compared with it.",
  consistency: "Probability that two members are more similar than a member and a crop of another class. 1 is perfect, 0.5 is chance; below 0.8 the members may show different anatomy.",
  match: "Median match score of the members: similarity of their surroundings to the reference's. 1 is perfect.",
  "only just passed": "The match score is close to its limit, or the way there and back ended far from where it began.",
  "there and back": "Distance in mm between the reference's position and where it is found again after going to the member and back.",
  outlier: "A member that is not similar to the other members.",
  overlap: "Share of the crop that another class also covers in the same scans.",
  body: "Share of the reference's crop that is body, not air or table.",
  distance: "Distance of the scan's embedding (what the autoencoder knows of its thumbnail) to the reference's.",
  tissue: "Share of the voxels by HU: air below -950, lung -950 to -500, fat -150 to -30, soft -30 to 130, bone above 200.",
  similarity: "Mean correlation of two crops, in small windows: 1 for equal anatomy, 0 for unrelated anatomy.",
  centre: "Where the centre of the crop lies in the reference, as shares of the body's box or of the scan, from 0 to 1, or as voxels: the setting frame says which.",
  validation: "Scans of patients that training never sees; they measure how well a model generalises.",
};
const hint = (...words) => words.map((word) => `${word}: ${TERMS[word]}`).join("\n");
const meaning = (word, text = word) => term(text, TERMS[word]);

// What is shown, in which order; a reload keeps it.
const view = { sort: data.live ? "worst" : "best", text: "", tissue: "", show: "all", ...recall("view", {}), scans: null };
const byRank = (a, b) => a.rank[0] - b.rank[0] || a.rank[1] - b.rank[1] || a.label - b.label;
const ORDERS = {
  worst: ["worst first", (a, b) => byRank(b, a)],
  best: ["best first", byRank],
  consistency: ["consistency, highest first", (a, b) => b.consistency - a.consistency],
  number: ["number", (a, b) => a.label - b.label],
  name: ["name", (a, b) => titleOf(a).localeCompare(titleOf(b), undefined, { numeric: true })],
  members: ["members, most first", (a, b) => b.num_train - a.num_train],
  outliers: ["outliers, most first", (a, b) => b.outliers.length - a.outliers.length],
  overlap: ["overlap, largest first", (a, b) => b.overlap - a.overlap],
  ...(data.match ? { score: ["match score, highest first", (a, b) => b.median_score - a.median_score], weak: ["only just passed, most first", (a, b) => b.weak_members / b.num_train - a.weak_members / a.num_train] } : {}),
};
if (!ORDERS[view.sort]) view.sort = "best";
const SHOWN = {
  all: ["all", () => true], undecided: ["undecided", (c) => !isDecided(c)], kept: ["kept", (c) => c.kept], excluded: ["excluded", (c) => c.excluded],
  mixed: [`consistency below ${data.mixedBelow}`, (c) => c.consistency < data.mixedBelow], outliers: ["with outliers", (c) => c.outliers.length > 0],
};
if (!SHOWN[view.show]) view.show = "all";
const inScans = (c) => c.members.scan.filter((row) => view.scans.has(row)).length;
const matchesText = (c, text) => [titleOf(c), `class ${c.label}`, c.note, ...c.tags].some((part) => part.toLowerCase().includes(text));
// Classes as they are shown, in order.
function chosen() {
  const text = view.text.trim().toLowerCase();
  return data.classes.filter((c) => matchesText(c, text) && (!view.tissue || mostly(c) === view.tissue)
    && SHOWN[view.show][1](c) && (!view.scans || inScans(c) > 0)).sort(ORDERS[view.sort][1]);
}
const keepView = () => remember("view", { sort: view.sort, text: view.text, tissue: view.tissue, show: view.show });

// Selected classes, by number.
const selected = new Set();
let anchor = null;

function summaryStrip() {
  const patients = new Set(data.scans.map((s) => s.patient)).size, train = data.scans.filter((s) => s.split === "train").length;
  const rejected = Object.values(data.rejected).reduce((a, b) => a + b, 0), mixed = data.classes.filter((c) => c.consistency < data.mixedBelow).length;
  const excluded = data.classes.filter((c) => c.excluded).length;
  const box = (value, label, detail, href = null) => el(href ? "a" : "div", { class: "count", href }, el("b", {}, value), el("span", {}, label), el("small", { class: "soft" }, detail));
  return el("section", { class: "counts", "aria-label": "Summary" },
    box(count(data.scans.length), "scans", `${train} train, ${data.scans.length - train} validation`, "#/scans"),
    box(count(patients), "patients", "never in both splits"),
    box(count(data.classes.length), "classes", `${excluded} excluded`),
    box(count(data.crops.train + data.crops.validation), "crops", `${data.shape.join(" × ")} voxels`),
    box(number(median(data.classes.map((c) => c.consistency))), "median consistency", `${mixed} of ${data.classes.length} below ${data.mixedBelow}`),
    data.match && box(number(median(data.classes.map((c) => c.median_score).filter((v) => v !== null))), "median match", `limit ${number(data.match.score)}`),
    box(count(rejected), "rejected series", rejected ? "reasons under Scans" : "none", "#/scans"));
}

function gradeMark(c) {
  const [sign, colour] = GRADES[c.grade];
  return el("span", { class: `grade ${colour}`, title: TERMS.consistency }, `${sign} ${c.grade} ${number(c.consistency)}`);
}
function stateMark(c) {
  if (c.excluded) return el("span", { class: "state bad" }, "excluded");
  return c.kept ? el("span", { class: "state good" }, "kept") : null;
}
function card(c) {
  const name = `cards-${Math.floor(c.label / data.classesPerSheet)}`, first = (c.label % data.classesPerSheet) * data.cardTiles;
  const size = fitted(planeMm(c, "axial"), 104), mm = planeMm(c, "axial")[0];
  const crop = (which, text) => picture(() => tileOf(name, first + which, data.cardTiles), size, `${titleOf(c)}: ${text}, axial`, { of: c, plane: "axial", mm });
  const found = [c.outliers.length && plural(c.outliers.length, "outlier"), c.weak_members && `${c.weak_members} only just passed`, c.overlap >= 0.3 && `${percent(c.overlap)} shared with ${titleOf(data.classes[c.overlap_class])}`].filter(Boolean);
  const box = el("li", { class: `card${c.excluded ? " excluded" : ""}`, "data-label": c.label, tabindex: -1, "aria-selected": String(selected.has(c.label)), role: "option", "aria-label": `${titleOf(c)}, ${c.grade}, consistency ${number(c.consistency)}` },
    el("header", {}, el("input", { type: "checkbox", class: "pick", "aria-label": `Select ${titleOf(c)}`, ".checked": selected.has(c.label), tabindex: -1, click: (event) => pick(c.label, event.shiftKey) }),
      el("a", { href: `#/class/${c.label}`, class: "name", tabindex: -1 }, titleOf(c)), stateMark(c), gradeMark(c)),
    el("a", { class: "pictures", href: `#/class/${c.label}`, tabindex: -1, "aria-hidden": "true" },
      figureOf(crop(0, "mean of all members"), "mean"), figureOf(crop(1, "reference"), "reference"),
      el("span", { class: "places" }, placePictures(c, 0, 104, 184))),
    el("p", { class: "small soft", title: hint("member", "tissue", "body", "match") }, `${c.num_train} + ${c.num_validation} members, mostly ${mostly(c)}`, c.body_share !== null && `, body ${percent(c.body_share)}`, c.median_score !== null && `, match ${number(c.median_score)}`),
    found.length ? el("p", { class: "small fair", title: hint("outlier", "only just passed", "overlap") }, found.join(", ")) : null,
    c.tags.length || c.note ? el("p", { class: "small" }, c.tags.map((tag) => el("span", { class: "tag" }, tag)), c.note && el("span", { class: "soft" }, c.note.length > 80 ? `${c.note.slice(0, 80)}…` : c.note)) : null,
    view.scans && el("p", { class: "small" }, `${inScans(c)} of ${view.scans.size} chosen scans`),
    data.live && el("footer", {}, decisionButtons(c, true)));
  return box;
}
const figureOf = (image, caption) => el("figure", {}, image, el("figcaption", {}, caption));

// The card that has the keyboard.
let current = null;
const cardOf = (label) => main.querySelector(`.card[data-label="${label}"]`);
function focusCard(label) {
  const card = cardOf(label);
  if (!card) return;
  main.querySelector(".card[tabindex='0']")?.setAttribute("tabindex", "-1");
  card.setAttribute("tabindex", "0");
  current = label;
  card.focus({ preventScroll: true });
  card.scrollIntoView({ block: "nearest" });
}
function pick(label, range = false) {
  const order = chosen().map((c) => c.label);
  if (range && anchor !== null && order.includes(anchor)) {
    const [from, to] = [order.indexOf(anchor), order.indexOf(label)].sort((a, b) => a - b);
    for (const one of order.slice(from, to + 1)) selected.add(one);
  } else {
    if (selected.has(label)) selected.delete(label); else selected.add(label);
    anchor = label;
  }
  showSelection();
}
function select_(labels) { selected.clear(); for (const label of labels) selected.add(label); showSelection(); }
function showSelection() {
  for (const card of main.querySelectorAll(".card")) {
    const on = selected.has(Number(card.dataset.label));
    card.setAttribute("aria-selected", String(on));
    card.querySelector(".pick").checked = on;
  }
  const bar = document.getElementById("selection");
  if (!bar) return;
  bar.hidden = !selected.size;
  if (!selected.size) return;
  const labels = [...selected];
  bar.replaceChildren(el("b", {}, `${selected.size} selected`), ...(data.live ? batchButtons(labels) : []),
    el("button", { type: "button", disabled: labels.length !== 2, title: "Two classes side by side (key c)", click: compareSelected }, "Compare"),
    el("button", { type: "button", click: () => select_([]) }, "Clear"));
}
function compareSelected() {
  if (selected.size === 2) location.hash = `#/compare/${[...selected].join("/")}`;
  else toast("Select two classes to compare them.");
}

// Move the keyboard on the grid of cards; with `extend`, select what is passed.
function step(across, down, extend) {
  const cards = [...main.querySelectorAll(".card")], at = cards.findIndex((card) => Number(card.dataset.label) === current);
  if (!cards.length) return;
  const columns = cards.filter((card) => card.offsetTop === cards[0].offsetTop).length;
  const next = at < 0 ? 0 : Math.max(0, Math.min(cards.length - 1, at + across + down * columns)), label = Number(cards[next].dataset.label);
  if (extend) { if (current !== null && !selected.has(current)) pick(current); for (let i = Math.min(at, next); i <= Math.max(at, next); i++) selected.add(Number(cards[i].dataset.label)); showSelection(); }
  focusCard(label);
}

function wall() {
  const list = el("ul", { class: "cards", role: "listbox", "aria-multiselectable": "true", "aria-label": "Classes",
    focusin: (event) => { const card = event.target.closest(".card"); if (card) current = Number(card.dataset.label); },
    click: (event) => { const card = event.target.closest(".card"); if (card && !event.target.closest("a, button, input")) focusCard(Number(card.dataset.label)); } });
  const status = el("span", { class: "soft", role: "status" }), search = el("input", { id: "text", type: "search", placeholder: "name, note, tag, number", "aria-label": "Search names, notes, tags and numbers", ".value": view.text, input: () => { view.text = search.value; fill(); } });
  const fill = () => {
    keepView();
    const found = chosen();
    list.replaceChildren(...found.map(card));
    list.querySelector(".card")?.setAttribute("tabindex", "0");
    status.textContent = `${found.length} of ${plural(data.classes.length, "class", "classes")}`;
    showSelection();
  };
  const change = (key) => (value) => { view[key] = value; fill(); };
  const names = (table) => Object.fromEntries(Object.entries(table).map(([key, [text]]) => [key, text]));
  const below = el("input", { id: "below", type: "number", min: 0.5, max: 1, step: 0.01, ".value": data.mixedBelow, "aria-label": "Consistency" });
  show(
    summaryStrip(),
    data.live && progressPanel(),
    el("div", { class: "toolbar" },
      select("Order", names(ORDERS), view.sort, change("sort"), { id: "sort" }),
      select("Show", names(SHOWN), view.show, change("show"), { id: "show" }),
      select("Mostly", { "": "any tissue", ...Object.fromEntries(Object.keys(data.classes[0].tissue).map((t) => [t, t])) }, view.tissue, change("tissue"), { id: "tissue" }),
      search,
      view.scans && el("button", { type: "button", id: "any-scan", click: () => { view.scans = null; route(); } }, `${plural(view.scans.size, "chosen scan")} ✕`),
      status,
      el("span", { class: "spacer row" }, el("label", {}, "Consistency below ", below), el("button", { type: "button", id: "select-below", click: () => select_(chosen().filter((c) => c.consistency < Number(below.value)).map((c) => c.label)) }, "Select"))),
    el("div", { id: "selection", class: "panel row", hidden: true }),
    list);
  fill();
  lassoCards(list);
  keys.view = {
    ArrowLeft: ["", () => step(-1, 0)], ArrowRight: ["", () => step(1, 0)], ArrowUp: ["Go to another card (arrows; with Shift: select)", () => step(0, -1)], ArrowDown: ["", () => step(0, 1)],
    "Shift+ArrowLeft": ["", () => step(-1, 0, true)], "Shift+ArrowRight": ["", () => step(1, 0, true)], "Shift+ArrowUp": ["", () => step(0, -1, true)], "Shift+ArrowDown": ["", () => step(0, 1, true)],
    Enter: ["Open the class", () => { if (current !== null) location.hash = `#/class/${current}`; }],
    " ": ["Select the class", () => { if (current !== null) pick(current); }],
    "Ctrl+a": ["Select all shown classes", () => select_(chosen().map((c) => c.label))],
    c: ["Compare the two selected classes", compareSelected],
    "/": ["Search", () => search.focus()],
    Escape: ["Clear the selection", () => select_([])],
    ...(data.live ? curatingKeys(() => (selected.size ? [...selected] : current === null ? [] : [current]), onwards) : {}),
  };
  if (current !== null) focusCard(current);
}
// After a decision: the next undecided class in the present order.
function onwards(labels) {
  const next = nextUndecided(labels[labels.length - 1]);
  if (next !== null) focusCard(next);
}

// Drag over the space between cards to select several.
function lassoCards(list) {
  let start = null, box = null;
  list.addEventListener("pointerdown", (event) => {
    if (event.button || event.target !== list) return;
    start = [event.pageX, event.pageY];
    box = el("div", { class: "lasso" });
    document.body.append(box);
    list.setPointerCapture(event.pointerId);
    event.preventDefault();
  });
  list.addEventListener("pointermove", (event) => {
    if (!box) return;
    const [left, right] = [start[0], event.pageX].sort((a, b) => a - b), [top, bottom] = [start[1], event.pageY].sort((a, b) => a - b);
    Object.assign(box.style, { left: `${left}px`, top: `${top}px`, width: `${right - left}px`, height: `${bottom - top}px` });
    box.area = { left, right, top, bottom };
  });
  list.addEventListener("pointerup", (event) => {
    if (!box) return;
    const { left, right, top, bottom } = box.area ?? { left: 0, right: -1, top: 0, bottom: -1 };
    box.remove();
    box = null;
    const hit = [...list.children].filter((card) => {
      const r = card.getBoundingClientRect();
      return r.left + scrollX < right && r.right + scrollX > left && r.top + scrollY < bottom && r.bottom + scrollY > top;
    }).map((card) => Number(card.dataset.label));
    select_(event.shiftKey ? [...selected, ...hit] : hit);
  });
}
// Show a class as it is now, on whatever view.
addEventListener("classeschange", ({ detail: labels }) => {
  for (const label of labels) {
    const old = cardOf(label);
    if (!old) continue;
    const had = old.contains(document.activeElement), fresh = card(data.classes[label]);
    fresh.tabIndex = old.tabIndex;
    old.replaceWith(fresh);
    if (had) fresh.focus({ preventScroll: true });
  }
});
