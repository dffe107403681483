"use strict";
// Deciding: progress, suggestions, buttons, keys, and the form of a class.

// What to do with the classes next.
const decided = () => data.classes.filter(isDecided).length;
function nextUndecided(after = null) {
  const order = chosen().map((c) => c.label),
    from = after === null ? -1 : order.indexOf(after);
  const ahead = [...order.slice(from + 1), ...order.slice(0, from + 1)].find(
    (label) => !isDecided(data.classes[label]) && label !== after,
  );
  return ahead ?? null;
}
function goNext() {
  const next = nextUndecided(current);
  if (next === null) toast("Every class that is shown is decided.");
  else if (location.hash.startsWith("#/class/")) location.hash = `#/class/${next}`;
  else focusCard(next);
}
function suggestions() {
  const open = data.classes.filter((c) => !isDecided(c)),
    found = [];
  const comparable = data.classes.length > 1 ? open : []; // consistency compares a class with others
  const mixed = comparable.filter((c) => c.consistency < data.mixedBelow).map((c) => c.label);
  if (mixed.length)
    found.push([
      `${plural(mixed.length, "undecided class", "undecided classes")} below a consistency of ${data.mixedBelow}: the members may show different anatomy.`,
      [
        ["Select", () => selectOnly(mixed)],
        ["Exclude", () => decide(mixed, { excluded: true }, "Excluded")],
      ],
    ]);
  const pairs = new Map();
  for (const c of open) {
    const other = data.classes[c.overlap_class];
    if (!other || c.overlap < 0.5 || other.excluded) continue;
    const [better, worse] = [c, other].sort(byRank);
    if (!isDecided(worse)) pairs.set(`${better.label} ${worse.label}`, [better, worse, c.overlap]);
  }
  for (const [better, worse, overlap] of pairs.values())
    found.push([
      `${titleOf(better)} and ${titleOf(worse)} show the same place (${percent(overlap)} shared): keep one.`,
      [
        [
          "Compare",
          () => {
            location.hash = `#/compare/${better.label}/${worse.label}`;
          },
        ],
        [`Exclude ${titleOf(worse)}`, () => exclude([worse.label])],
      ],
    ]);
  const doubtful = open.filter(
    (c) =>
      c.consistency >= data.mixedBelow &&
      c.outliers.some((scan) => scan !== c.reference && !c.excluded_members.includes(scan)),
  );
  if (doubtful.length)
    found.push([
      `${plural(doubtful.length, "good class has", "good classes have")} outliers: leave these members out of training.`,
      [
        ["Select", () => selectOnly(doubtful.map((c) => c.label))],
        ["Leave all of them out", () => leaveOutliers(doubtful)],
      ],
    ]);
  return found;
}
function leaveOutliers(list) {
  const changes = list.map((c) => ({
    label: c.label,
    before: pickFields(c, ["excluded_members"]),
    after: {
      excluded_members: [
        ...new Set([...c.excluded_members, ...c.outliers.filter((scan) => scan !== c.reference)]),
      ].sort((a, b) => a - b),
    },
  }));
  apply(changes);
  toast(`Outliers left out: ${plural(changes.length, "class", "classes")}`, {
    action: ["Undo", undo],
  });
}
function progressPanel() {
  const box = el("section", { class: "panel", id: "progress", "aria-label": "Progress" });
  queueMicrotask(showProgress);
  return box;
}
function showProgress() {
  const box = document.getElementById("progress"),
    words = `${decided()} of ${data.classes.length} decided`;
  document.getElementById("decided")?.replaceChildren(words);
  if (!box) return;
  const open = box.querySelector("details")?.open ?? recall("suggestions", true),
    found = suggestions();
  const list = el(
    "details",
    { ".open": open, toggle: () => remember("suggestions", list.open) },
    el("summary", {}, plural(found.length, "suggestion")),
    el(
      "ul",
      {},
      found.slice(0, 8).map(([text, actions]) =>
        el(
          "li",
          {},
          text,
          " ",
          actions.map(([name, act]) => el("button", { type: "button", click: act }, name)),
        ),
      ),
    ),
    found.length > 8 && el("p", { class: "soft small" }, `and ${found.length - 8} more`),
  );
  box.replaceChildren(
    el(
      "div",
      { class: "row" },
      el("b", { id: "decided" }, words),
      el("progress", {
        max: data.classes.length,
        value: decided(),
        "aria-label": "Decided classes",
      }),
      el(
        "button",
        { type: "button", class: "primary", click: goNext, title: "Key g" },
        "Next undecided",
      ),
      el("button", { type: "button", title: "Key u", disabled: !past.length, click: undo }, "Undo"),
      el(
        "button",
        { type: "button", title: "Key r", disabled: !future.length, click: redo },
        "Redo",
      ),
      el(
        "span",
        { class: "spacer row" },
        el("span", { class: "soft small" }, "Decisions:"),
        el("a", { href: "decisions.csv", download: "decisions.csv" }, "CSV"),
        el("a", { href: "decisions.json", download: "decisions.json" }, "JSON"),
        el("button", { type: "button", click: importDecisions }, "Import"),
        el(
          "span",
          { class: "soft small" },
          el("kbd", {}, "x"),
          " exclude, ",
          el("kbd", {}, "k"),
          " keep, ",
          el("kbd", {}, "?"),
          " all keys",
        ),
      ),
    ),
    ...(found.length ? [list] : []),
  );
}
function importDecisions() {
  const input = el("input", {
    type: "file",
    accept: ".csv,.json",
    id: "import",
    change: async () => {
      const [file] = input.files;
      input.remove();
      if (!file) return;
      const reply = await fetch(`decisions.${file.name.endsWith(".json") ? "json" : "csv"}`, {
        method: "PUT",
        headers: { "Content-Type": "application/octet-stream" },
        body: file,
      }).catch(() => null);
      if (!reply?.ok)
        return toast(
          `Not imported: ${reply ? await reply.text() : "semgen browse does not answer"}`,
          { error: true },
        );
      past.length = future.length = 0;
      const changed = adopt(await reply.json());
      toast(`Imported: ${plural(changed.length, "class", "classes")} changed`);
    },
  });
  input.hidden = true;
  document.body.append(input);
  input.click();
}

function decisionButtons(c, small = false) {
  const button = (name, title, pressed, act) =>
    el(
      "button",
      {
        type: "button",
        class: name.toLowerCase(),
        "aria-pressed": String(pressed),
        title,
        tabindex: small ? -1 : 0,
        click: () => (pressed ? reopen : act)([c.label]),
      },
      name,
    );
  return [
    button("Keep", "Keep the class (key k)", c.kept, keep),
    button("Exclude", "Exclude the class from training (key x)", c.excluded, exclude),
  ];
}
const batchButtons = (labels) => [
  el("button", { type: "button", click: () => keep(labels) }, "Keep"),
  el("button", { type: "button", click: () => exclude(labels) }, "Exclude"),
  el("button", { type: "button", click: () => reopen(labels) }, "Undecided"),
  el("button", { type: "button", click: () => askText("Name", labels) }, "Name"),
  el("button", { type: "button", click: () => askText("Tag", labels) }, "Tag"),
];
// Ask for a name or a tag; several classes of one name are numbered.
function askText(kind, labels) {
  if (!labels.length) return;
  const one = data.classes[labels[0]],
    old = kind === "Name" ? (labels.length === 1 ? one.name : "") : "";
  const input = el("input", {
    id: "asked",
    maxlength: 200,
    ".value": old,
    list: "known",
    size: 32,
  });
  const known = [
    ...new Set(data.classes.flatMap((c) => (kind === "Name" ? [c.name] : c.tags)).filter(Boolean)),
  ].sort();
  const box = openDialog(
    `${kind} of ${labels.length === 1 ? titleOf(one) : plural(labels.length, "class", "classes")}`,
    el(
      "form",
      { method: "dialog", submit: () => save() },
      el(
        "p",
        {},
        el("label", {}, `${kind} `, input),
        el(
          "datalist",
          { id: "known" },
          known.map((value) => el("option", { value })),
        ),
        " ",
        el("button", { class: "primary" }, "Save"),
      ),
      el(
        "p",
        { class: "soft small" },
        kind === "Tag"
          ? "Separate tags by commas; a tag with a minus before it is removed."
          : labels.length > 1
            ? "Several classes get the name with a number."
            : "",
      ),
    ),
  );
  const save = () => {
    const value = input.value.trim();
    if (kind === "Name") {
      const changes = labels.map((label, i) => ({
        label,
        before: pickFields(data.classes[label], ["name"]),
        after: { name: labels.length > 1 && value ? `${value} ${i + 1}` : value },
      }));
      apply(changes);
    } else if (value) {
      const parts = value
          .split(",")
          .map((part) => part.trim())
          .filter(Boolean),
        gone = parts.filter((p) => p.startsWith("-")).map((p) => p.slice(1).trim());
      const changes = labels.map((label) => ({
        label,
        before: pickFields(data.classes[label], ["tags"]),
        after: {
          tags: [
            ...new Set([...data.classes[label].tags, ...parts.filter((p) => !p.startsWith("-"))]),
          ]
            .filter((tag) => !gone.includes(tag))
            .sort(),
        },
      }));
      apply(changes);
    }
  };
  box.addEventListener("close", () => {
    if (cardOf(labels[0])) focusCard(labels[0]);
    else main.focus({ preventScroll: true });
  });
  input.addEventListener("keydown", (event) => {
    if (event.key === "Enter") {
      event.preventDefault();
      event.stopPropagation();
      save();
      box.close();
    }
    if (event.key === "Escape") {
      event.stopPropagation();
    }
  });
  input.focus();
  input.select();
}
const historyKeys = () => ({
  u: ["Undo", undo],
  r: ["Redo", redo],
  "Ctrl+z": ["", undo],
  "Ctrl+Z": ["", redo],
  "Ctrl+y": ["", redo],
});
// `labels()`: the classes that a key acts on; `then(labels)` goes on after a decision.
function curatingKeys(labels, then) {
  const act = (what) => () => {
    const found = labels();
    if (!found.length)
      return toast("Choose a class first: arrow keys, or a click beside its name.");
    const member = focusedMember();
    if (member && what === exclude) return leaveOut(...member);
    what(found);
    selected.clear();
    showSelection();
    then(found);
  };
  return {
    x: ["Exclude, and go to the next undecided class", act(exclude)],
    k: ["Keep, and go to the next undecided class", act(keep)],
    z: [
      "Undecided again",
      () => {
        const found = labels();
        if (found.length) reopen(found);
      },
    ],
    n: ["Name", () => askText("Name", labels())],
    t: ["Tag", () => askText("Tag", labels())],
    o: [
      "Leave the member that has the keyboard out of training, or take it back",
      () => {
        const member = focusedMember();
        if (member) leaveOut(...member);
        else toast("Go to a member first: key f, then arrows.");
      },
    ],
    g: ["Next undecided class", goNext],
    ...historyKeys(),
  };
}

const leaveOutButton = (c, index) => {
  const button = el(
    "button",
    {
      type: "button",
      id: "leave-out",
      "aria-pressed": String(isLeftOut(c, index)),
      title: "Key o",
      click: () => {
        leaveOut(c, index);
        button.setAttribute("aria-pressed", String(isLeftOut(c, index)));
      },
    },
    "Leave out of training",
  );
  return button;
};

function editor(c) {
  const shown = pickFields(c, ["name", "tags", "note"]);
  const change = (field, read) => () => {
    const value = read();
    decide([c.label], { [field]: value }, "Saved", { [field]: shown[field] });
    shown[field] = value;
  };
  const name = el("input", {
    id: "name",
    maxlength: 200,
    ".value": c.name,
    change: change("name", () => name.value.trim()),
  });
  const note = el("textarea", {
    id: "note",
    rows: 2,
    maxlength: 2000,
    ".value": c.note,
    change: change("note", () => note.value),
  });
  const tags = el("input", {
    id: "tags",
    maxlength: 400,
    ".value": c.tags.join(", "),
    placeholder: "separated by commas",
    change: change("tags", () =>
      [
        ...new Set(
          tags.value
            .split(",")
            .map((tag) => tag.trim())
            .filter(Boolean),
        ),
      ].sort(),
    ),
  });
  return el(
    "section",
    { class: "panel editor", id: "editor" },
    el(
      "div",
      { class: "row", id: "decision" },
      decisionButtons(c),
      el(
        "span",
        { class: "soft small" },
        "then the next undecided: ",
        el("kbd", {}, "k"),
        " ",
        el("kbd", {}, "x"),
      ),
    ),
    el("label", {}, "Name", name),
    el("label", {}, "Tags", tags),
    el("label", {}, "Note", note),
    c.excluded_members.length
      ? el(
          "p",
          { class: "small" },
          `${plural(c.excluded_members.length, "member")} left out of training.`,
        )
      : null,
  );
}
// The view of a class follows changes without losing the keyboard.
addEventListener("classeschange", ({ detail: labels }) => {
  if (!location.hash.startsWith("#/class/") && !location.hash.startsWith("#/compare/")) return;
  const here = location.hash.split("/").slice(2).map(Number);
  if (!labels.some((label) => here.includes(label))) return;
  const editing = typing(document.activeElement),
    [label] = here;
  if (location.hash.startsWith("#/class/")) {
    if (!editing) document.getElementById("editor")?.replaceWith(editor(data.classes[label]));
    const head = main.querySelector("h2");
    const c = data.classes[label];
    head?.replaceChildren(
      titleOf(c),
      ...(c.name ? [el("span", { class: "soft" }, ` (class ${label})`)] : []),
    );
    head?.nextElementSibling?.replaceChildren(...[gradeMark(c), stateMark(c)].filter(Boolean));
  } else route();
  for (const list of sheetsShown)
    for (const tile of list.children) {
      const index = Number(tile.dataset.index),
        c = list.classOf;
      if (tile.classList.contains("left-out") === isLeftOut(c, index)) continue;
      const had = tile.contains(document.activeElement),
        fresh = memberTile(c, index);
      fresh.querySelector("button").tabIndex = tile.querySelector("button").tabIndex;
      tile.replaceWith(fresh);
      if (had) fresh.querySelector("button").focus();
    }
});
