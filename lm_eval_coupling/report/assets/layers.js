// Second view: one model on one task, layer by layer.

function renderLayers() {
  const row = rows[state.row];
  const found = contents(row, state.rank);
  at("layers-missing").textContent = row.tables.length
    ? ""
    : "No coupling table of this run was found, hence no layers: it was scored only, or its tables lie in another folder.";
  const rivals = state.compare ? rows.filter((other) => other.task === row.task && other.tables.length) : [row];
  at("heat-caption").textContent =
    `Miscoupling of every pair of layers, mean over ${found.documentsMeasured} documents`;
  if (found.matrix) heatMap(at("heat"), found.matrix, state.rank);
  else clear(at("heat"), "No layer-by-layer matrix was measured.");
  renderProfile(row, rivals);
  renderNorms(row, rivals, found);
  const [difference, error, n] = differenceOf(row, state.rank);
  at("untrained").textContent = known(difference)
    ? `Trained less untrained weights, over the ${n} documents of both: ${signed(difference)} ± ${fixed(error)}.`
    : "";
  renderOtherNumbers(row);
  renderLayerNumbers(found);
}

/** What a task has one number of, beside coupling. */
function renderOtherNumbers(row) {
  const there = DATA.readings.filter((reading) => !reading.of_rank && known(readingOf(row, reading)[0]));
  at("regularity").closest("details").hidden = !there.length;
  const of = (reading) => readingOf(row, reading);
  const mean = { name: "Mean", numeric: true, value: (one) => of(one)[0], error: (one) => of(one)[1], cell: (one) => withError(...of(one)) };
  sortable(at("regularity"), [{ name: "Number of a prompt", value: (one) => sentence(one.label) }, mean], there, {});
}

const SIDES = { jacobian: "its Jacobian, others' bases", basis: "its basis, others' Jacobians" };

function renderProfile(row, rivals) {
  const traces = [];
  let number = 0;
  const add = (profile, of, name, dash) => {
    const values = profile[of];
    const x = state.compare ? depths(values.length) : values.map((_, i) => i + 1);
    traces.push(...band(values, profile[of + "_stderr"], number, x));
    const curve = line(values, name, number++, { x });
    traces.push(dash ? { ...curve, line: { ...curve.line, dash } } : curve);
  };
  for (const rival of rivals) {
    const { profile, untrained } = contents(rival, state.rank);
    if (!profile) continue;
    if (state.compare) {
      add(profile, "jacobian", rival.label);
      continue;
    }
    for (const [of, name] of Object.entries(SIDES)) add(profile, of, name);
    number = 0; // the colours of the trained weights, dashed
    if (untrained) for (const [of, name] of Object.entries(SIDES)) add(untrained, of, `untrained: ${name}`, "dash");
  }
  if (!traces.length) return clear(at("profile"), "No layer was measured.");
  const chance = chanceOf(state.rank).miscoupling;
  const ends = traces.flatMap((trace) => trace.x);
  traces.push(levelLine(`chance ${chance.toFixed(3)}`, [Math.min(...ends), Math.max(...ends)], [chance, chance]));
  draw(
    at("profile"),
    traces,
    {
      height: 440,
      showlegend: true,
      xaxis: { title: { text: state.compare ? "relative depth" : "layer" } },
      yaxis: { title: { text: `mean miscoupling, K = ${state.rank}` } },
    },
    `Mean miscoupling of each layer with the others, ${row.label} on ${row.task}; bands are one standard error.`,
  );
}

function renderNorms(row, rivals, found) {
  const traces = [];
  if (!state.compare) {
    for (const one of found.documents.filter((document) => document.norms).slice(0, 30)) {
      traces.push({
        type: "scatter",
        mode: "lines",
        y: one.norms,
        hoverinfo: "skip",
        showlegend: false,
        line: { width: 1, color: "rgba(128,128,128,0.35)" },
      });
    }
  }
  rivals.forEach((rival, i) => {
    const norms = rival === row ? found.norms : contents(rival, state.rank).norms;
    if (norms)
      traces.push(
        line(norms, state.compare ? rival.label : "mean", i, state.compare ? { x: depths(norms.length) } : {}),
      );
  });
  if (!traces.length) return clear(at("norms"), "No norms were measured.");
  draw(
    at("norms"),
    traces,
    {
      height: 420,
      showlegend: state.compare,
      xaxis: { title: { text: state.compare ? "relative depth" : "after block (0: embedding)" } },
      yaxis: { title: { text: "norm" }, type: "log" },
    },
    `Norm of the residual stream over depth, ${row.label} on ${row.task}.`,
  );
}

function renderLayerNumbers(found) {
  if (!found.profile) return at("layer-numbers").replaceChildren();
  const lines = found.profile.jacobian.map((_, i) => ({ layer: i + 1, i }));
  const column = (name, profile, of) => ({
    name,
    numeric: true,
    value: (one) => profile[of][one.i],
    error: (one) => profile[of + "_stderr"][one.i],
    cell: (one) => withError(profile[of][one.i], profile[of + "_stderr"][one.i]),
  });
  sortable(
    at("layer-numbers"),
    [
      { name: "Layer", numeric: true, value: (one) => one.layer },
      ...Object.entries(SIDES).map(([of, name]) => column(name[0].toUpperCase() + name.slice(1), found.profile, of)),
      ...(found.untrained
        ? Object.entries(SIDES).map(([of, name]) => column(`Untrained: ${name}`, found.untrained, of))
        : []),
      { name: "Norm after it", numeric: true, value: (one) => found.norms && found.norms[one.i + 1] },
    ],
    lines,
    {},
  );
}
