"use strict";
// One class: what it is, and its members as a contact sheet whose slices turn together.

const look = { plane: "axial", share: 0.5, size: null, sort: "score", which: "all", ...recall("look", {}) };
if (!PLANES[look.plane]) look.plane = "axial";
// Few members are shown large, unless a size was chosen.
const tileSize = (c) => look.size ?? Math.min(c.members.scan.length <= 8 ? 200 : c.members.scan.length <= 30 ? 144 : 104, half());
const half = () => (innerWidth - 72) / 2; // two pictures fit beside each other on a phone
const keepLook = () => remember("look", { plane: look.plane, size: look.size, sort: look.sort, which: look.which });
let sheetsShown = []; // contact sheets of the present view: each turns with the others

const memberSorts = () => ({ ...(data.match ? { score: "match, best first", weakest: "match, weakest first" } : {}), distance: "distance, nearest first", farthest: "distance, farthest first", doubtful: "outliers first" });
if (!memberSorts()[look.sort]) look.sort = "distance"; // members were not matched
const isOutlier = (c, index) => c.outliers.includes(c.members.scan[index]);
const isWeak = (c, index) => c.members.weak?.includes(index) ?? false;
const isLeftOut = (c, index) => c.excluded_members.includes(c.members.scan[index]);
const splitOf = (c, index) => (index < c.num_train ? "train" : "validation");
function orderMembers(c) {
  const { score, distance } = c.members, order = c.shown ?? c.members.scan.map((_, index) => index);
  const by = { score: (i) => -(score?.[i] ?? 2), weakest: (i) => score?.[i] ?? 2, distance: (i) => distance[i], farthest: (i) => -distance[i], doubtful: (i) => (isOutlier(c, i) ? 0 : isWeak(c, i) ? 1 : 2) }[look.sort] ?? ((i) => distance[i]);
  const wanted = { all: () => true, outliers: (i) => isOutlier(c, i), weak: (i) => isWeak(c, i), excluded: (i) => isLeftOut(c, i), validation: (i) => splitOf(c, i) === "validation" }[look.which] ?? (() => true);
  return [...order].filter((i) => i === 0 || wanted(i)).sort((a, b) => (b === 0) - (a === 0) || by(a) - by(b) || a - b);
}
const memberWords = (c, index) => [
  index === 0 ? "reference" : null, isOutlier(c, index) ? "outlier" : null, isWeak(c, index) ? "only just passed" : null, isLeftOut(c, index) ? "left out" : null,
].filter(Boolean);
function memberTile(c, index) {
  const size = fitted(planeMm(c, look.plane), tileSize(c)), words = memberWords(c, index);
  const label = `${scanName(c.members.scan[index])}, ${splitOf(c, index)}${words.length ? `, ${words.join(", ")}` : ""}`;
  const image = picture(() => memberSlice(c, index, look.plane, look.share), size, label, { of: c, plane: look.plane, mm: planeMm(c, look.plane)[0] });
  const kind = `${isOutlier(c, index) ? " outlier" : ""}${isWeak(c, index) ? " weak" : ""}${isLeftOut(c, index) ? " left-out" : ""}`;
  return el("li", { class: `tile${kind}`, "data-index": index },
    el("button", { type: "button", tabindex: -1, title: label, "aria-label": label, click: () => openMember(c, index) }, image),
    el("span", { class: "small" }, index === 0 ? "reference" : data.match && c.members.score[index] !== null ? `match ${number(c.members.score[index])}` : `distance ${number(c.members.distance[index])}`,
      splitOf(c, index) === "validation" && el("span", { class: "dot", title: TERMS.validation }, " ●"),
      words.includes("outlier") && el("b", { class: "bad" }, " outlier"), words.includes("left out") && el("b", { class: "bad" }, " left out")));
}
function contactSheet(c) {
  const list = el("ul", { class: "tiles", "aria-label": `Members of ${titleOf(c)}`, keydown: (event) => {
    const tiles = [...list.children], at = tiles.findIndex((tile) => tile.contains(document.activeElement));
    const columns = tiles.filter((tile) => tile.offsetTop === tiles[0].offsetTop).length;
    const go = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns, Home: -at, End: tiles.length - 1 - at }[event.key];
    if (go === undefined || at < 0 || event.ctrlKey) return;
    event.preventDefault(); event.stopPropagation();
    tiles[Math.max(0, Math.min(tiles.length - 1, at + go))].querySelector("button").focus();
  } });
  list.fill = () => {
    list.replaceChildren(...orderMembers(c).map((index) => memberTile(c, index)));
    list.querySelector("button")?.setAttribute("tabindex", "0");
  };
  list.turn = () => { for (const canvas of list.querySelectorAll("canvas")) refresh(canvas); };
  list.classOf = c;
  list.fill();
  sheetsShown.push(list);
  return list;
}
const focusedMember = () => {
  const tile = document.activeElement.closest?.(".tile"), list = tile?.closest(".tiles");
  return tile ? [list.classOf, Number(tile.dataset.index)] : null;
};

// The bar that turns all pictures of the view: plane, slice, order, size.
let turning = false;
function turn(share) {
  look.share = Math.max(0, Math.min(1, share));
  const slider = document.getElementById("slice");
  if (slider) slider.value = look.share;
  const where = document.getElementById("where");
  if (where) where.textContent = sliceWords();
  if (turning) return;
  turning = true;
  requestAnimationFrame(() => { turning = false; for (const list of sheetsShown) list.turn(); for (const canvas of main.querySelectorAll("canvas[data-turns]")) refresh(canvas); });
}
function sliceWords() {
  const c = sheetsShown[0]?.classOf ?? data.classes[0], axis = { axial: 0, coronal: 1, sagittal: 2 }[look.plane];
  const mm = (look.share - 0.5) * c.extent[axis], side = { axial: ["to the feet", "to the head"], coronal: ["to the front", "to the back"], sagittal: ["to the right", "to the left"] }[look.plane][mm < 0 ? 0 : 1];
  return Math.abs(mm) < 0.05 ? "through the centre" : `${number(Math.abs(mm), 1)} mm ${side}`;
}
const slicesOf = (c) => (data.live ? data.volume[{ axial: 0, coronal: 1, sagittal: 2 }[look.plane]] : data.slices[look.plane]);
const stepSlice = (direction) => {
  const total = slicesOf(data.classes[0]), at = Math.min(total - 1, Math.floor(look.share * total));
  turn(shareOf(Math.max(0, Math.min(total - 1, at + direction)), total));
};
function setPlane(plane) {
  look.plane = plane; look.share = 0.5;
  keepLook();
  route(); // the pictures have another shape
}
const nextPlane = () => setPlane({ axial: "coronal", coronal: "sagittal", sagittal: "axial" }[look.plane]);
function sheetBar(c) {
  const refill = (key) => (value) => { look[key] = value; keepLook(); for (const list of sheetsShown) list.fill(); };
  const size = el("input", { type: "range", min: 64, max: 256, step: 8, ".value": tileSize(c), "aria-label": "Size of the pictures", input: () => refill("size")(Number(size.value)) });
  return el("div", { class: "toolbar sticky" },
    choice("Plane", Object.entries(PLANES).map(([key, [name, hint]]) => [key, name, hint]), look.plane, setPlane),
    wheelTurns(el("label", { class: "row", title: "Also: keys up and down; the wheel here or over the reference; Shift and the wheel over the members" }, "Slice ", el("input", { id: "slice", type: "range", min: 0, max: 1, step: 0.001, ".value": look.share, "aria-label": "Slice of all pictures", input: (event) => turn(Number(event.target.value)) }), el("span", { id: "where", class: "soft small" }, sliceWords()))),
    select("Order", memberSorts(), look.sort, refill("sort"), { id: "member-sort" }),
    select("Show", { all: "all members", outliers: "outliers", ...(data.match ? { weak: "only just passed" } : {}), validation: "validation", ...(data.live ? { excluded: "left out" } : {}) }, look.which, refill("which"), { id: "member-show" }),
    el("label", { class: "row" }, "Size ", size));
}
// The wheel over the reference or the slice bar turns all pictures; over the members, with Shift, because they scroll.
function wheelTurns(node, needsShift = false) {
  node.addEventListener("wheel", (event) => {
    if (event.ctrlKey || needsShift !== event.shiftKey) return;
    event.preventDefault();
    stepSlice(event.deltaY + event.deltaX < 0 ? 1 : -1);
  }, { passive: false });
  return node;
}

function classFacts(c) {
  const shares = Object.entries(c.tissue).filter(([, v]) => v >= 0.01).map(([k, v]) => `${k} ${percent(v)}`).join(", ");
  return facts([
    [meaning("consistency", "Consistency"), gradeMark(c)],
    [meaning("member", "Members"), `${c.num_train} train, ${c.num_validation} validation; ${plural(c.patients, "patient")}`],
    data.match && [meaning("match", "Match score"), `median ${number(c.median_score)}; ${c.weak_members} of ${c.members.scan.length - 1} only just passed`],
    [meaning("outlier", "Outliers"), c.outliers.length ? `${c.outliers.length} of ${c.members.scan.length}` : "none"],
    [meaning("overlap", "Overlap"), c.overlap_class < 0 || c.overlap < 0.01 ? "none" : el("span", {}, `${percent(c.overlap)} with `, el("a", { href: `#/compare/${c.label}/${c.overlap_class}` }, titleOf(data.classes[c.overlap_class])))],
    [meaning("tissue", "Tissue"), shares],
    c.body_share !== null && [meaning("body", "Body"), percent(c.body_share)],
    [meaning("distance", "Distance"), `median ${number(c.median_distance)}, interquartile range ${number(c.distance_spread)}`],
    [meaning("similarity", "Similarity"), `${number(c.similarity)} of two members, ${number(c.null_similarity)} to other classes`],
    ["Crop", `${c.extent.map((v) => number(v, 0)).join(" × ")} mm (z, y, x)`],
    [meaning("reference", "Reference"), scanName(c.reference)],
    [meaning("centre", "Centre"), `${c.centre.map((v) => number(v)).join(", ")} (z, y, x; ${data.config.frame ?? "frame"} units)`],
  ]);
}
function turningPicture(c, index, text) {
  const image = wheelTurns(picture(() => memberSlice(c, index, look.plane, look.share), fitted(planeMm(c, look.plane), Math.min(200, half())), text, { of: c, plane: look.plane, mm: planeMm(c, look.plane)[0] }));
  image.dataset.turns = "";
  return figureOf(image, text);
}
function showClass(label) {
  const c = data.classes[label];
  if (!c) { show(el("p", {}, `There is no class ${label}. `, el("a", { href: "#/" }, "All classes"))); keys.view = {}; return; }
  current = label;
  const order = chosen().map((other) => other.label), at = order.indexOf(label);
  const near = (by) => (order.length ? order[(at + by + order.length) % order.length] : label);
  const go = (to) => { location.hash = `#/class/${to}`; };
  const count_ = c.shown && c.shown.length < c.members.scan.length ? `${c.shown.length} of ${c.members.scan.length} members (semgen browse shows all)` : plural(c.members.scan.length, "member");
  show(el("div", { class: "class-view" },
    el("aside", { class: "stack" },
      el("div", {},
        el("p", { class: "row" }, el("a", { id: "previous", href: `#/class/${near(-1)}` }, "← Previous"), el("a", { id: "next", href: `#/class/${near(1)}` }, "Next →"), el("a", { href: "#/" }, "All classes"), at >= 0 && el("span", { class: "soft small" }, `${at + 1} of ${order.length}`), data.live && el("b", { id: "decided", class: "small" }, `${decided()} of ${data.classes.length} decided`)),
        el("h2", {}, titleOf(c), c.name && el("span", { class: "soft" }, ` (class ${label})`)), el("p", { class: "row" }, gradeMark(c), stateMark(c))),
      data.live ? editor(c) : noteOf(c),
      el("section", { class: "panel" }, el("div", { class: "row top" }, turningPicture(c, 0, "Reference"), turningPicture(c, -1, "Mean of all members"), el("figure", {}, el("span", { class: "places" }, placePictures(c, 0, 150)), el("figcaption", {}, "Place in the reference")))),
      el("section", { class: "panel" }, classFacts(c)),
      !data.live && el("p", {}, el("a", { href: `#/compare/${c.label}/${c.overlap_class >= 0 ? c.overlap_class : near(1)}` }, "Compare with another class"))),
    el("section", { class: "members" }, el("h3", {}, count_), (sheetsShown = [], null), sheetBar(c), wheelTurns(contactSheet(c), true), memberTable(c))));
  document.getElementById("where").textContent = sliceWords();
  if (data.live) prefetch(nextUndecided(label) ?? near(1));
  keys.view = {
    ArrowLeft: ["Previous class", () => go(near(-1))], ArrowRight: ["Next class", () => go(near(1))],
    ArrowUp: ["Turn all slices", () => stepSlice(1)], ArrowDown: ["", () => stepSlice(-1)], PageUp: ["", () => stepSlice(1)], PageDown: ["", () => stepSlice(-1)],
    p: ["Next plane", nextPlane], f: ["Go to the members (then arrows; Enter enlarges)", () => main.querySelector(".tile button")?.focus()],
    Escape: ["All classes", () => { if (focusedMember()) main.focus(); else location.hash = "#/"; }],
    ...(data.live ? curatingKeys(() => [label], () => { const next = nextUndecided(label); if (next !== null) go(next); }) : {}),
  };
}
// The volumes that the curator will look at next.
let fetching = 0;
function prefetch(label) {
  clearTimeout(fetching);
  fetching = setTimeout(() => { for (const part of ["mean", 0]) bytesOf(`volumes/${label}-${part}`).catch(() => {}); }, 300);
}
const noteOf = (c) => (c.note || c.tags.length ? el("section", { class: "panel" }, c.tags.map((tag) => el("span", { class: "tag" }, tag)), el("p", {}, c.note)) : null);
function memberTable(c) {
  const body = el("details", { toggle: () => {
    if (!body.open || body.children.length > 1) return;
    const head = ["scan", "patient", "split", "distance", ...(data.match ? ["match", "there and back, mm"] : []), "", ...(data.paths ? ["file"] : [])];
    body.append(table(head, c.members.scan.map((row, i) => [data.scans[row].id, data.scans[row].patient, splitOf(c, i), number(c.members.distance[i], 3),
      ...(data.match ? [number(c.members.score[i]), number(c.members.cycle[i], 1)] : []), memberWords(c, i).join(", "), ...(data.paths ? [data.paths[row] ?? ""] : [])]), data.match ? [3, 4, 5] : [3]));
  } }, el("summary", {}, `Table of all ${c.members.scan.length} members`));
  return body;
}

// One member, large: three planes of its crop, and its place in the scan.
function openMember(c, index) {
  const scan = c.members.scan[index], at = { axial: 0.5, coronal: 0.5, sagittal: 0.5 };
  let scale = 0;
  const [depth, height, width] = data.shape, total = (plane) => (data.live ? { axial: depth, coronal: height, sagittal: width }[plane] : data.slices[plane]);
  const load = (plane) => (data.live ? bytesOf(`crop/${splitOf(c, index)}-${c.members.rows[index][scale]}`).then((volume) => sliceOf(volume, data.shape, plane, at[plane])) : memberSlice(c, index, plane, at[plane]));
  const most = Math.min(380, innerWidth - 60);
  const views = Object.keys(PLANES).map((plane) => {
    const image = picture(() => load(plane), fitted(planeMm(c, plane), most), `${PLANES[plane][0]} plane of the crop`, { of: c, plane, mm: planeMm(c, plane)[0], cross: [0, 0] });
    const slider = el("input", { type: "range", min: 0, max: total(plane) - 1, ".value": Math.floor(total(plane) / 2), "aria-label": `Slice, ${plane}`, input: () => move(plane, Number(slider.value)) });
    const words = el("span", { class: "small soft" });
    image.addEventListener("wheel", (event) => { event.preventDefault(); move(plane, Number(slider.value) + (event.deltaY < 0 ? 1 : -1)); }, { passive: false });
    return { plane, image, slider, words };
  });
  const update = () => {
    for (const { plane, image, slider, words } of views) {
      const [x, y] = { axial: [at.sagittal, at.coronal], coronal: [at.sagittal, 1 - at.axial], sagittal: [at.coronal, 1 - at.axial] }[plane];
      image.extras.cross = [x, y];
      words.textContent = `${Number(slider.value) + 1} of ${total(plane)}`;
      refresh(image);
    }
  };
  const move = (plane, slice) => {
    const found = views.find((v) => v.plane === plane), kept = Math.max(0, Math.min(total(plane) - 1, slice));
    found.slider.value = kept;
    at[plane] = shareOf(kept, total(plane));
    update();
  };
  let active = "axial";
  const words = memberWords(c, index);
  const box = openDialog(`${titleOf(c)}: ${scanName(scan)}`, [
    el("p", { class: "row small" }, el("span", {}, `${splitOf(c, index)}, distance ${number(c.members.distance[index])}`), data.match && c.members.score[index] !== null && el("span", { class: isWeak(c, index) ? "fair" : null }, `match ${number(c.members.score[index])}, there and back ${number(c.members.cycle[index], 1)} mm`),
      words.map((word) => el("b", { class: word === "reference" ? "good" : "bad" }, word)), data.paths && el("span", { class: "soft" }, data.paths[scan])),
    el("div", { class: "row top planes" }, views.map(({ image, slider, words: at_, plane }) => el("figure", { click: () => { active = plane; } }, image, el("figcaption", { class: "row" }, PLANES[plane][0], slider, at_))),
      el("figure", {}, el("span", { class: "places" }, placePictures(c, index, Math.min(170, most))), el("figcaption", {}, `Place in the scan, ${data.scans[scan].size.join(" × ")} voxels of ${data.scans[scan].spacing.map((v) => number(v)).join(" × ")} mm`))),
    el("p", { class: "row" },
      data.live && c.members.rows[index].length > 1 && choice("Scale", [[0, "Scale 0", "The base crop"], [1, "Scale 1", "A wider or shifted crop of the same place"], [2, "Scale 2", "Another one"]].slice(0, c.members.rows[index].length), 0, (value) => { scale = value; update(); }),
      data.live && index > 0 && leaveOutButton(c, index), data.live && window.openViewer && el("button", { type: "button", id: "in-3d", click: () => openViewer(c.label, { split: splitOf(c, index), row: c.members.rows[index][0], scan }) }, "In the scan, in 3-D")),
  ], {}, { class: "member" });
  const near = (by) => { const order = orderMembers(c), next = order[order.indexOf(index) + by]; if (next !== undefined) { box.close(); openMember(c, next); } };
  const stepActive = (by) => move(active, Number(views.find((v) => v.plane === active).slider.value) + by);
  Object.assign(box.keys, {
    ArrowLeft: ["Previous member", () => near(-1)], ArrowRight: ["Next member", () => near(1)], ArrowUp: ["Next slice", () => stepActive(1)], ArrowDown: ["Previous slice", () => stepActive(-1)],
    p: ["Turn another plane", () => { active = { axial: "coronal", coronal: "sagittal", sagittal: "axial" }[active]; }],
    ...(data.live && index > 0 ? { o: ["Leave this member out of training, or take it back", () => leaveOut(c, index)] } : {}),
  });
  box.addEventListener("close", () => main.querySelector(`.tile[data-index="${index}"] button`)?.focus());
  update();
}
