"use strict";
// The first view: a strip of numbers, and every class as a card.

function summaryStrip() {
  const patients = new Set(data.scans.map((s) => s.patient)).size,
    train = data.scans.filter((s) => s.split === "train").length;
  const rejected = Object.values(data.rejected).reduce((a, b) => a + b, 0),
    mixed = data.classes.filter((c) => c.consistency < data.mixedBelow).length;
  const excluded = data.classes.filter((c) => c.excluded).length;
  const box = (value, label, detail, href = null) =>
    el(
      href ? "a" : "div",
      { class: "count", href },
      el("b", {}, value),
      el("span", {}, label),
      el("small", { class: "soft" }, detail),
    );
  return el(
    "section",
    { class: "counts", "aria-label": "Summary" },
    box(
      count(data.scans.length),
      "scans",
      `${train} train, ${data.scans.length - train} validation`,
      "#/scans",
    ),
    box(count(patients), "patients", "never in both splits"),
    box(count(data.classes.length), "classes", `${excluded} excluded`),
    box(
      count(data.crops.train + data.crops.validation),
      "crops",
      `${data.shape.join(" × ")} voxels`,
    ),
    box(
      number(median(data.classes.map((c) => c.consistency))),
      "median consistency",
      `${mixed} of ${data.classes.length} below ${data.mixedBelow}`,
    ),
    data.match &&
      box(
        number(median(data.classes.map((c) => c.median_score).filter((v) => v !== null))),
        "median match",
        `limit ${number(data.match.score)}`,
      ),
    box(count(rejected), "rejected series", rejected ? "reasons under Scans" : "none", "#/scans"),
  );
}

// Cards share the width of the page; their pictures fill them.
const CARD_WIDTH = 352,
  CARD_GAP = 14;
function pictureSizes() {
  const wide = main.clientWidth - 48,
    columns = Math.max(1, Math.floor((wide + CARD_GAP) / (CARD_WIDTH + CARD_GAP))),
    inside = (wide - (columns - 1) * CARD_GAP) / columns - 26;
  const crop = Math.min(150, Math.floor(0.27 * inside));
  return { crop, places: inside - 2 * crop - 26 };
}
function card(c) {
  const name = `cards-${Math.floor(c.label / data.classesPerSheet)}`,
    first = (c.label % data.classesPerSheet) * data.cardTiles;
  const { crop: side, places } = pictureSizes(),
    size = fitted(planeMm(c, "axial", -1), side),
    mm = planeMm(c, "axial", -1)[0];
  const crop = (which, text) =>
    picture(
      () => tileOf(name, first + which, data.cardTiles),
      size,
      `${titleOf(c)}: ${text}, axial`,
      { of: c, plane: "axial", mm },
    );
  const found = [
    c.outliers.length && plural(c.outliers.length, "outlier"),
    c.weak_members && `${c.weak_members} only just passed`,
    c.overlap >= 0.3 &&
      `${percent(c.overlap)} shared with ${titleOf(data.classes[c.overlap_class])}`,
  ].filter(Boolean);
  const box = el(
    "li",
    {
      class: `card${c.excluded ? " excluded" : ""}`,
      "data-label": c.label,
      tabindex: -1,
      "aria-selected": String(selected.has(c.label)),
      role: "option",
      "aria-label": `${titleOf(c)}, ${c.grade}, consistency ${number(c.consistency)}`,
    },
    el(
      "header",
      {},
      el("input", {
        type: "checkbox",
        class: "pick",
        "aria-label": `Select ${titleOf(c)}`,
        ".checked": selected.has(c.label),
        tabindex: -1,
        click: (event) => pick(c.label, event.shiftKey),
      }),
      el("a", { href: `#/class/${c.label}`, class: "name", tabindex: -1 }, titleOf(c)),
      stateMark(c),
      gradeMark(c),
    ),
    el(
      "a",
      { class: "pictures", href: `#/class/${c.label}`, tabindex: -1, "aria-hidden": "true" },
      figureOf(crop(0, "mean of all members"), "mean"),
      figureOf(crop(1, "reference"), "reference"),
      el("span", { class: "places" }, placePictures(c, 0, side, places)),
    ),
    el(
      "p",
      { class: "small soft", title: hint("member", "tissue", "body", "match") },
      `${c.num_train} + ${c.num_validation} members, mostly ${mostly(c)}`,
      c.body_share !== null && `, body ${percent(c.body_share)}`,
      c.median_score !== null && `, match ${number(c.median_score)}`,
    ),
    found.length
      ? el(
          "p",
          { class: "small fair", title: hint("outlier", "only just passed", "overlap") },
          found.join(", "),
        )
      : null,
    c.tags.length || c.note
      ? el(
          "p",
          { class: "small" },
          c.tags.map((tag) => el("span", { class: "tag" }, tag)),
          c.note &&
            el("span", { class: "soft" }, c.note.length > 80 ? `${c.note.slice(0, 80)}…` : c.note),
        )
      : null,
    view.scans && el("p", { class: "small" }, `${inScans(c)} of ${view.scans.size} chosen scans`),
    data.live && el("footer", {}, decisionButtons(c, true)),
  );
  return box;
}

function wall() {
  const list = el("ul", {
    class: "cards",
    role: "listbox",
    "aria-multiselectable": "true",
    "aria-label": "Classes",
    focusin: (event) => {
      const card = event.target.closest(".card");
      if (card) current = Number(card.dataset.label);
    },
    click: (event) => {
      const card = event.target.closest(".card");
      if (card && !event.target.closest("a, button, input")) focusCard(Number(card.dataset.label));
    },
  });
  const status = el("span", { class: "soft", role: "status" }),
    search = el("input", {
      id: "text",
      type: "search",
      placeholder: "name, note, tag, number",
      "aria-label": "Search names, notes, tags and numbers",
      ".value": view.text,
      input: () => {
        view.text = search.value;
        fill();
      },
    });
  const fill = () => {
    keepView();
    const found = chosen();
    list.replaceChildren(...found.map(card));
    list.querySelector(".card")?.setAttribute("tabindex", "0");
    status.textContent = `${found.length} of ${plural(data.classes.length, "class", "classes")}`;
    showSelection();
  };
  const change = (key) => (value) => {
    view[key] = value;
    fill();
  };
  const names = (table) =>
    Object.fromEntries(Object.entries(table).map(([key, [text]]) => [key, text]));
  const below = el("input", {
    id: "below",
    type: "number",
    min: 0.5,
    max: 1,
    step: 0.01,
    ".value": data.mixedBelow,
    "aria-label": "Consistency",
  });
  show(
    summaryStrip(),
    data.live && progressPanel(),
    el(
      "div",
      { class: "toolbar" },
      select("Order", names(ORDERS), view.sort, change("sort"), { id: "sort" }),
      select("Show", names(SHOWN), view.show, change("show"), { id: "show" }),
      select(
        "Mostly",
        {
          "": "any tissue",
          ...Object.fromEntries(Object.keys(data.classes[0].tissue).map((t) => [t, t])),
        },
        view.tissue,
        change("tissue"),
        { id: "tissue" },
      ),
      search,
      view.scans &&
        el(
          "button",
          {
            type: "button",
            id: "any-scan",
            click: () => {
              view.scans = null;
              route();
            },
          },
          `${plural(view.scans.size, "chosen scan")} ✕`,
        ),
      status,
      el(
        "span",
        { class: "spacer row" },
        el("label", {}, "Consistency below ", below),
        el(
          "button",
          {
            type: "button",
            id: "select-below",
            click: () =>
              selectOnly(
                chosen()
                  .filter((c) => c.consistency < Number(below.value))
                  .map((c) => c.label),
              ),
          },
          "Select",
        ),
      ),
    ),
    el("div", { id: "selection", class: "panel row", hidden: true }),
    list,
  );
  fill();
  lassoCards(list);
  keys.view = {
    ArrowLeft: ["", () => step(-1, 0)],
    ArrowRight: ["", () => step(1, 0)],
    ArrowUp: ["Go to another card (arrows; with Shift: select)", () => step(0, -1)],
    ArrowDown: ["", () => step(0, 1)],
    "Shift+ArrowLeft": ["", () => step(-1, 0, true)],
    "Shift+ArrowRight": ["", () => step(1, 0, true)],
    "Shift+ArrowUp": ["", () => step(0, -1, true)],
    "Shift+ArrowDown": ["", () => step(0, 1, true)],
    Enter: [
      "Open the class",
      () => {
        if (current !== null) location.hash = `#/class/${current}`;
      },
    ],
    " ": [
      "Select the class",
      () => {
        if (current !== null) pick(current);
      },
    ],
    "Ctrl+a": ["Select all shown classes", () => selectOnly(chosen().map((c) => c.label))],
    c: ["Compare the two selected classes", compareSelected],
    "/": ["Search", () => search.focus()],
    Escape: ["Clear the selection", () => selectOnly([])],
    ...(data.live
      ? curatingKeys(
          () => (selected.size ? [...selected] : current === null ? [] : [current]),
          onwards,
        )
      : {}),
  };
  if (current !== null) focusCard(current);
}
// After a decision: the next undecided class in the present order.
function onwards(labels) {
  const next = nextUndecided(labels[labels.length - 1]);
  if (next !== null) focusCard(next);
}

// Show a class as it is now, on whatever view.
addEventListener("classeschange", ({ detail: labels }) => {
  for (const label of labels) {
    const old = cardOf(label);
    if (!old) continue;
    const had = old.contains(document.activeElement),
      fresh = card(data.classes[label]);
    fresh.tabIndex = old.tabIndex;
    old.replaceWith(fresh);
    if (had) fresh.focus({ preventScroll: true });
  }
});
