"use strict";
// Decisions on classes: keep, exclude, name, tag, note; leave single members out. Every change is saved
// at once with the value that it replaces, so two windows never overwrite each other.

const FIELDS = ["name", "note", "tags", "excluded", "kept", "excluded_members"];
const past = [],
  future = []; // changes that can be undone, and done again: [{label, before, after}]
let saving = Promise.resolve();

const pickFields = (c, fields) => Object.fromEntries(fields.map((field) => [field, c[field]]));
const tell = (labels) => {
  dispatchEvent(new CustomEvent("classeschange", { detail: labels }));
  showProgress();
};
// Change classes: `changes` are {label, before, after}. Shown at once, taken back if it cannot be saved.
function commit(changes) {
  for (const { label, after } of changes) Object.assign(data.classes[label], after);
  tell(changes.map((change) => change.label));
  const body = {
    changes: Object.fromEntries(changes.map((c) => [c.label, c.after])),
    was: Object.fromEntries(changes.map((c) => [c.label, c.before])),
  };
  saving = saving.then(async () => {
    let reply = null;
    try {
      reply = await fetch("annotation", {
        method: "PUT",
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify(body),
      });
    } catch {
      /* the server has stopped */
    }
    if (reply?.ok)
      return adopt(
        await reply.json(),
        changes.map((c) => c.label),
      );
    for (const { label, before } of changes) Object.assign(data.classes[label], before);
    tell(changes.map((c) => c.label));
    past.length = future.length = 0; // they no longer lead from what is saved
    const typed = changes.flatMap(({ after }) => [after.name, after.note]).filter(Boolean);
    toast(
      (reply === null
        ? "Not saved: semgen browse does not answer. Is it still running?"
        : `Not saved: ${await reply.text()}`) + (typed.length ? ` You typed: ${typed[0]}` : ""),
      { error: true },
    );
    if (reply?.status === 409) await follow();
  });
  return saving;
}
// The same for a new change, which can be undone.
function apply(changes) {
  past.push(changes);
  future.length = 0;
  commit(changes);
}
// `shown`: what the window showed when the change was begun, where that may be older than what is known now.
function decide(labels, after, words, shown = {}) {
  const changes = labels
    .map((label) => {
      const c = data.classes[label],
        full = { ...after };
      if (full.excluded) full.kept = false;
      if (full.kept) full.excluded = false;
      return { label, before: { ...pickFields(c, Object.keys(full)), ...shown }, after: full };
    })
    .filter(({ before, after: now }) => JSON.stringify(before) !== JSON.stringify(now));
  if (!changes.length) return;
  apply(changes);
  toast(
    `${words}: ${labels.length === 1 ? titleOf(data.classes[labels[0]]) : plural(labels.length, "class", "classes")}`,
    { action: ["Undo", undo] },
  );
}
const turnRound = (changes) =>
  changes.map(({ label, before, after }) => ({ label, before: after, after: before }));
function undo() {
  const changes = past.pop();
  if (!changes) return toast("Nothing to undo.");
  const back = turnRound(changes);
  future.push(changes);
  commit(back);
  toast(`Undone: ${plural(changes.length, "change")}`);
}
function redo() {
  const changes = future.pop();
  if (!changes) return toast("Nothing to redo.");
  past.push(changes);
  commit(changes);
  toast(`Done again: ${plural(changes.length, "change")}`);
}
// Take what is saved, for classes that are not being changed here.
function adopt(notes, labels = null) {
  const fresh = {
    name: "",
    note: "",
    tags: [],
    excluded: false,
    kept: false,
    excluded_members: [],
  };
  const changed = [];
  for (const c of labels ? labels.map((label) => data.classes[label]) : data.classes) {
    const now = { ...fresh, ...(notes[c.label] ?? {}) };
    if (JSON.stringify(pickFields(c, FIELDS)) === JSON.stringify(pickFields(now, FIELDS))) continue;
    Object.assign(c, pickFields(now, FIELDS));
    changed.push(c.label);
  }
  if (changed.length) tell(changed);
  return changed;
}
// Follow changes of other windows and of the command line.
async function follow() {
  let reply = null;
  try {
    reply = await fetch("annotation");
  } catch {
    return;
  }
  if (!reply.ok) return;
  const changed = adopt(await reply.json());
  if (changed.length)
    toast(
      `Changed elsewhere: ${changed.length === 1 ? titleOf(data.classes[changed[0]]) : plural(changed.length, "class", "classes")}`,
    );
}
let waiting = false;
async function followNow() {
  if (waiting || document.hidden) return;
  waiting = true;
  await saving;
  await follow();
  waiting = false;
}

// Buttons and keys of one or of several classes.
const keep = (labels) => decide(labels, { kept: true, excluded: false }, "Kept");
const exclude = (labels) => decide(labels, { excluded: true, kept: false }, "Excluded");
const reopen = (labels) => decide(labels, { excluded: false, kept: false }, "Undecided again");

function leaveOut(c, index) {
  if (index === 0) return toast("The reference defines the class: exclude the class instead.");
  const scan = c.members.scan[index],
    out = c.excluded_members.includes(scan);
  decide(
    [c.label],
    {
      excluded_members: out
        ? c.excluded_members.filter((row) => row !== scan)
        : [...c.excluded_members, scan].sort((a, b) => a - b),
    },
    out ? "Member taken back" : "Member left out",
  );
}

if (data.live) {
  setInterval(followNow, 3000);
  addEventListener("focus", followNow);
}
