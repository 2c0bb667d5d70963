// Fourth view: how a run was measured.

function flatten(value, name = "") {
  if (value !== null && typeof value === "object" && !Array.isArray(value)) {
    return Object.entries(value).flatMap(([key, member]) => flatten(member, name ? `${name}: ${key}` : key));
  }
  return known(value)
    ? [
        [
          name,
          Array.isArray(value)
            ? value.join(", ")
            : Number.isInteger(value)
              ? String(value)
              : typeof value === "number"
                ? short(value)
                : String(value),
        ],
      ]
    : [];
}

function renderProvenance() {
  const row = rows[state.row];
  const run = DATA.provenance[row.run];
  const lines = flatten(run).map(([name, value]) => ({ name: name.replaceAll("_", " "), value }));
  at("provenance-title").textContent = `${row.label}, ${run.file}`;
  at("provenance-note").textContent = run.run_id ? "" : "Scored without measuring coupling.";
  sortable(
    at("provenance-table"),
    [
      { name: "What", value: (one) => one.name },
      { name: "Value", text: true, value: (one) => one.value },
    ],
    lines,
    {},
  );
}
