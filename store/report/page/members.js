"use strict";
// The members of a class as a contact sheet; the slices of all pictures of a view turn together.

const look = {
  plane: "axial",
  share: 0.5,
  size: null,
  sort: "score",
  which: "all",
  ...recall("look", {}),
};
if (!PLANES[look.plane]) look.plane = "axial";
// Few members are shown large, unless a size was chosen.
const tileSize = (c) =>
  look.size ??
  Math.min(c.members.scan.length <= 8 ? 200 : c.members.scan.length <= 30 ? 144 : 104, half());
const half = () => (innerWidth - 72) / 2; // two pictures fit beside each other on a phone
const keepLook = () =>
  remember("look", { plane: look.plane, size: look.size, sort: look.sort, which: look.which });
let sheetsShown = []; // contact sheets of the present view: each turns with the others

const memberSorts = () => ({
  ...(data.match ? { score: "match, best first", weakest: "match, weakest first" } : {}),
  distance: "distance, nearest first",
  farthest: "distance, farthest first",
  doubtful: "outliers first",
});
if (!memberSorts()[look.sort]) look.sort = "distance"; // members were not matched
const isOutlier = (c, index) => c.outliers.includes(c.members.scan[index]);
const isWeak = (c, index) => c.members.weak?.includes(index) ?? false;
const isLeftOut = (c, index) => c.excluded_members.includes(c.members.scan[index]);
const splitOf = (c, index) => (index < c.num_train ? "train" : "validation");
function orderMembers(c) {
  const { score, distance } = c.members,
    order = c.shown ?? c.members.scan.map((_, index) => index);
  const by =
    {
      score: (i) => -(score?.[i] ?? 2),
      weakest: (i) => score?.[i] ?? 2,
      distance: (i) => distance[i],
      farthest: (i) => -distance[i],
      doubtful: (i) => (isOutlier(c, i) ? 0 : isWeak(c, i) ? 1 : 2),
    }[look.sort] ?? ((i) => distance[i]);
  const wanted =
    {
      all: () => true,
      outliers: (i) => isOutlier(c, i),
      weak: (i) => isWeak(c, i),
      excluded: (i) => isLeftOut(c, i),
      validation: (i) => splitOf(c, i) === "validation",
    }[look.which] ?? (() => true);
  return [...order]
    .filter((i) => i === 0 || wanted(i))
    .sort((a, b) => (b === 0) - (a === 0) || by(a) - by(b) || a - b);
}
const memberWords = (c, index) =>
  [
    index === 0 ? "reference" : null,
    isOutlier(c, index) ? "outlier" : null,
    isWeak(c, index) ? "only just passed" : null,
    isLeftOut(c, index) ? "left out" : null,
  ].filter(Boolean);
function memberTile(c, index) {
  const size = fitted(planeMm(c, look.plane, index), tileSize(c)),
    words = memberWords(c, index);
  const label = `${scanName(c.members.scan[index])}, ${splitOf(c, index)}${words.length ? `, ${words.join(", ")}` : ""}`;
  const image = picture(() => memberSlice(c, index, look.plane, look.share), size, label, {
    of: c,
    plane: look.plane,
    mm: planeMm(c, look.plane, index)[0],
  });
  const kind = `${isOutlier(c, index) ? " outlier" : ""}${isWeak(c, index) ? " weak" : ""}${isLeftOut(c, index) ? " left-out" : ""}`;
  return el(
    "li",
    { class: `tile${kind}`, "data-index": index },
    el(
      "button",
      {
        type: "button",
        tabindex: -1,
        title: label,
        "aria-label": label,
        click: () => openMember(c, index),
      },
      image,
    ),
    el(
      "span",
      { class: "small" },
      index === 0
        ? "reference"
        : data.match && c.members.score[index] !== null
          ? `match ${number(c.members.score[index])}`
          : `distance ${number(c.members.distance[index])}`,
      splitOf(c, index) === "validation" &&
        el("span", { class: "dot", title: TERMS.validation }, " ●"),
      words.includes("outlier") && el("b", { class: "bad" }, " outlier"),
      words.includes("left out") && el("b", { class: "bad" }, " left out"),
    ),
  );
}
function contactSheet(c) {
  const list = el("ul", {
    class: "tiles",
    "aria-label": `Members of ${titleOf(c)}`,
    keydown: (event) => {
      const tiles = [...list.children],
        at = tiles.findIndex((tile) => tile.contains(document.activeElement));
      const columns = tiles.filter((tile) => tile.offsetTop === tiles[0].offsetTop).length;
      const go = {
        ArrowLeft: -1,
        ArrowRight: 1,
        ArrowUp: -columns,
        ArrowDown: columns,
        Home: -at,
        End: tiles.length - 1 - at,
      }[event.key];
      if (go === undefined || at < 0 || event.ctrlKey) return;
      event.preventDefault();
      event.stopPropagation();
      tiles[Math.max(0, Math.min(tiles.length - 1, at + go))].querySelector("button").focus();
    },
  });
  list.fill = () => {
    list.replaceChildren(...orderMembers(c).map((index) => memberTile(c, index)));
    list.querySelector("button")?.setAttribute("tabindex", "0");
  };
  list.turn = () => {
    for (const canvas of list.querySelectorAll("canvas")) refresh(canvas);
  };
  list.classOf = c;
  list.fill();
  sheetsShown.push(list);
  return list;
}
const focusedMember = () => {
  const tile = document.activeElement.closest?.(".tile"),
    list = tile?.closest(".tiles");
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
  requestAnimationFrame(() => {
    turning = false;
    for (const list of sheetsShown) list.turn();
    for (const canvas of main.querySelectorAll("canvas[data-turns]")) refresh(canvas);
  });
}
function sliceWords() {
  const c = sheetsShown[0]?.classOf ?? data.classes[0],
    axis = { axial: 0, coronal: 1, sagittal: 2 }[look.plane];
  const mm = (look.share - 0.5) * c.extent[axis],
    side = {
      axial: ["to the feet", "to the head"],
      coronal: ["to the front", "to the back"],
      sagittal: ["to the right", "to the left"],
    }[look.plane][mm < 0 ? 0 : 1];
  return Math.abs(mm) < 0.05 ? "through the centre" : `${number(Math.abs(mm), 1)} mm ${side}`;
}
const slicesOf = (c) =>
  data.live
    ? data.volume[{ axial: 0, coronal: 1, sagittal: 2 }[look.plane]]
    : data.slices[look.plane];
const stepSlice = (direction) => {
  const total = slicesOf(data.classes[0]),
    at = Math.min(total - 1, Math.floor(look.share * total));
  turn(shareOf(Math.max(0, Math.min(total - 1, at + direction)), total));
};
function setPlane(plane) {
  look.plane = plane;
  look.share = 0.5;
  keepLook();
  route(); // the pictures have another shape
}
const nextPlane = () =>
  setPlane({ axial: "coronal", coronal: "sagittal", sagittal: "axial" }[look.plane]);
function sheetBar(c) {
  const refill = (key) => (value) => {
    look[key] = value;
    keepLook();
    for (const list of sheetsShown) list.fill();
  };
  const size = el("input", {
    type: "range",
    min: 64,
    max: 256,
    step: 8,
    ".value": tileSize(c),
    "aria-label": "Size of the pictures",
    input: () => refill("size")(Number(size.value)),
  });
  return el(
    "div",
    { class: "toolbar sticky" },
    choice(
      "Plane",
      Object.entries(PLANES).map(([key, [name, hint]]) => [key, name, hint]),
      look.plane,
      setPlane,
    ),
    wheelTurns(
      el(
        "label",
        {
          class: "row",
          title:
            "Also: keys up and down; the wheel here or over the reference; Shift and the wheel over the members",
        },
        "Slice ",
        el("input", {
          id: "slice",
          type: "range",
          min: 0,
          max: 1,
          step: 0.001,
          ".value": look.share,
          "aria-label": "Slice of all pictures",
          input: (event) => turn(Number(event.target.value)),
        }),
        el("span", { id: "where", class: "soft small" }, sliceWords()),
      ),
    ),
    select("Order", memberSorts(), look.sort, refill("sort"), { id: "member-sort" }),
    select(
      "Show",
      {
        all: "all members",
        outliers: "outliers",
        ...(data.match ? { weak: "only just passed" } : {}),
        validation: "validation",
        ...(data.live ? { excluded: "left out" } : {}),
      },
      look.which,
      refill("which"),
      { id: "member-show" },
    ),
    el("label", { class: "row" }, "Size ", size),
  );
}
// The wheel over the reference or the slice bar turns all pictures; over the members, with Shift, because they scroll.
function wheelTurns(node, needsShift = false) {
  node.addEventListener(
    "wheel",
    (event) => {
      if (event.ctrlKey || needsShift !== event.shiftKey) return;
      event.preventDefault();
      stepSlice(event.deltaY + event.deltaX < 0 ? 1 : -1);
    },
    { passive: false },
  );
  return node;
}

function turningPicture(c, index, text) {
  const image = wheelTurns(
    picture(
      () => memberSlice(c, index, look.plane, look.share),
      fitted(planeMm(c, look.plane, index), Math.min(200, half())),
      text,
      { of: c, plane: look.plane, mm: planeMm(c, look.plane, index)[0] },
    ),
  );
  image.dataset.turns = "";
  return figureOf(image, text);
}
// What a class is, in pictures; the place is at most so high and so wide.
const classPictures = (c, ...size) =>
  el(
    "div",
    { class: "row top" },
    turningPicture(c, 0, "Reference"),
    turningPicture(c, -1, "Mean of all members"),
    figureOf(
      el("span", { class: "places" }, placePictures(c, 0, ...size)),
      "Place in the reference",
    ),
  );
