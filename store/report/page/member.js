"use strict";
// One member, large: three planes of its crop, and its place in the scan.

function openMember(c, index) {
  const scan = c.members.scan[index],
    at = { axial: 0.5, coronal: 0.5, sagittal: 0.5 };
  let scale = 0;
  const [depth, height, width] = data.shape,
    total = (plane) =>
      data.live ? { axial: depth, coronal: height, sagittal: width }[plane] : data.slices[plane];
  const load = (plane) =>
    data.live
      ? bytesOf(`crop/${splitOf(c, index)}-${c.members.rows[index][scale]}`).then((volume) =>
          sliceOf(volume, data.shape, plane, at[plane]),
        )
      : memberSlice(c, index, plane, at[plane]);
  const most = Math.min(380, innerWidth - 60);
  const views = Object.keys(PLANES).map((plane) => {
    const image = picture(
      () => load(plane),
      fitted(planeMm(c, plane, index), most),
      `${PLANES[plane][0]} plane of the crop`,
      { of: c, plane, mm: planeMm(c, plane, index)[0], cross: [0, 0] },
    );
    const slider = el("input", {
      type: "range",
      min: 0,
      max: total(plane) - 1,
      ".value": Math.floor(total(plane) / 2),
      "aria-label": `Slice, ${plane}`,
      input: () => move(plane, Number(slider.value)),
    });
    const words = el("span", { class: "small soft" });
    image.addEventListener(
      "wheel",
      (event) => {
        event.preventDefault();
        move(plane, Number(slider.value) + (event.deltaY < 0 ? 1 : -1));
      },
      { passive: false },
    );
    return { plane, image, slider, words };
  });
  const update = () => {
    for (const { plane, image, slider, words } of views) {
      const [x, y] = {
        axial: [at.sagittal, at.coronal],
        coronal: [at.sagittal, 1 - at.axial],
        sagittal: [at.coronal, 1 - at.axial],
      }[plane];
      image.extras.cross = [x, y];
      words.textContent = `${Number(slider.value) + 1} of ${total(plane)}`;
      refresh(image);
    }
  };
  const move = (plane, slice) => {
    const found = views.find((v) => v.plane === plane),
      kept = Math.max(0, Math.min(total(plane) - 1, slice));
    found.slider.value = kept;
    at[plane] = shareOf(kept, total(plane));
    update();
  };
  let active = "axial";
  const words = memberWords(c, index);
  const box = openDialog(
    `${titleOf(c)}: ${scanName(scan)}`,
    [
      el(
        "p",
        { class: "row small" },
        el("span", {}, `${splitOf(c, index)}, distance ${number(c.members.distance[index])}`),
        data.match &&
          c.members.score[index] !== null &&
          el(
            "span",
            { class: isWeak(c, index) ? "fair" : null },
            `match ${number(c.members.score[index])}, there and back ${number(c.members.cycle[index], 1)} mm`,
          ),
        words.map((word) => el("b", { class: word === "reference" ? "good" : "bad" }, word)),
        data.paths && el("span", { class: "soft" }, data.paths[scan]),
      ),
      el(
        "div",
        { class: "row top planes" },
        views.map(({ image, slider, words: at_, plane }) =>
          el(
            "figure",
            {
              click: () => {
                active = plane;
              },
            },
            image,
            el("figcaption", { class: "row" }, PLANES[plane][0], slider, at_),
          ),
        ),
        el(
          "figure",
          {},
          el("span", { class: "places" }, placePictures(c, index, Math.min(170, most))),
          el(
            "figcaption",
            {},
            `Place in the scan, ${data.scans[scan].size.join(" × ")} voxels of ${data.scans[scan].spacing.map((v) => number(v)).join(" × ")} mm`,
          ),
        ),
      ),
      el(
        "p",
        { class: "row" },
        data.live &&
          c.members.rows[index].length > 1 &&
          choice(
            "Scale",
            [
              [0, "Scale 0", "The base crop"],
              [1, "Scale 1", "A wider or shifted crop of the same place"],
              [2, "Scale 2", "Another one"],
            ].slice(0, c.members.rows[index].length),
            0,
            (value) => {
              scale = value;
              for (const { plane, image } of views) {
                const mm = planeMm(c, plane, index, scale);
                image.extras.mm = mm[0];
                reshape(image, fitted(mm, most));
              }
              update();
            },
          ),
        data.live && index > 0 && leaveOutButton(c, index),
        data.live &&
          window.openViewer &&
          el(
            "button",
            {
              type: "button",
              id: "in-3d",
              click: () =>
                openViewer(c.label, {
                  split: splitOf(c, index),
                  row: c.members.rows[index][0],
                  scan,
                }),
            },
            "In the scan, in 3-D",
          ),
      ),
    ],
    {},
    { class: "member" },
  );
  const near = (by) => {
    const order = orderMembers(c),
      next = order[order.indexOf(index) + by];
    if (next !== undefined) {
      box.close();
      openMember(c, next);
    }
  };
  const stepActive = (by) =>
    move(active, Number(views.find((v) => v.plane === active).slider.value) + by);
  Object.assign(box.keys, {
    ArrowLeft: ["Previous member", () => near(-1)],
    ArrowRight: ["Next member", () => near(1)],
    ArrowUp: ["Next slice", () => stepActive(1)],
    ArrowDown: ["Previous slice", () => stepActive(-1)],
    p: [
      "Turn another plane",
      () => {
        active = { axial: "coronal", coronal: "sagittal", sagittal: "axial" }[active];
      },
    ],
    ...(data.live && index > 0
      ? { o: ["Leave this member out of training, or take it back", () => leaveOut(c, index)] }
      : {}),
  });
  box.addEventListener("close", () =>
    main.querySelector(`.tile[data-index="${index}"] button`)?.focus(),
  );
  update();
}
