// The numbers that the page carries, and the reader's choices.

const DATA = JSON.parse(at("data").textContent);
const rows = DATA.rows;
rows.forEach((row, number) => {
  row.number = number;
});
const ranks = [...new Set(rows.flatMap((row) => Object.keys(row.coupling)))].sort((a, b) => a - b);
const state = {
  tab: "overview",
  row: Math.max(
    rows.findIndex((row) => row.tables.length),
    0,
  ),
  document: null,
  rank: String((rows.find((row) => row.coupling_rank !== null) || {}).coupling_rank ?? ranks[0] ?? ""),
  score: "",
  axis: "coupling",
  // Where a group has no score of its own, its tasks are listed beside it.
  level: rows.some((row) => row.group && !known((row.scores[row.main] || [null])[0])) ? "all" : "top",
  filter: "",
  search: "",
  answer: "all",
  compare: false,
  miscoupling: false,
  scatterTask: "",
  columns: null,
};

/** Invert Python's pack(): rows of a square matrix, NaN where undefined. */
function unpack(packed) {
  const bytes = atob(packed);
  const values = Array.from({ length: bytes.length / 2 }, (_, i) => {
    const digits = bytes.charCodeAt(2 * i) | (bytes.charCodeAt(2 * i + 1) << 8);
    return digits === 0xffff ? NaN : digits / 10000;
  });
  const layers = Math.round(Math.sqrt(values.length));
  return Array.from({ length: layers }, (_, row) => values.slice(row * layers, (row + 1) * layers));
}
const quantity = () => (state.miscoupling ? "miscoupling" : "coupling");
/** Turn a stored miscoupling into the quantity that is shown. */
const asShown = (value) => (known(value) && !state.miscoupling ? 1 - value : value);
const pairsShown = (matrix) => matrix.map((row, i) => row.map((value, j) => (i === j ? NaN : asShown(value))));
/** Return the shown quantity of unrelated layers. */
const chanceShown = (rank) => (known(DATA.chance[rank]) ? asShown(1 - DATA.chance[rank]) : null);

/** Average [matrix, weight] pairs, entry by entry over what is defined. */
function weightedMean(parts) {
  return parts[0][0].map((line, i) =>
    line.map((_, j) => {
      const defined = parts.filter(([matrix]) => Number.isFinite(matrix[i][j]));
      const total = defined.reduce((sum, [, weight]) => sum + weight, 0);
      return defined.reduce((sum, [matrix, weight]) => sum + (matrix[i][j] * weight) / total, defined.length ? 0 : NaN);
    }),
  );
}

/** Pool the profiles of several tables, as independent samples of documents; null if there are none. */
function pooledProfile(parts) {
  if (!parts.length) return null;
  const total = parts.reduce((sum, [, weight]) => sum + weight, 0);
  const pooled = {};
  for (const of of ["jacobian", "basis"]) {
    pooled[of] = parts[0][0][of].map((_, i) =>
      parts.every(([profile]) => known(profile[of][i]))
        ? asShown(parts.reduce((sum, [profile, weight]) => sum + (profile[of][i] * weight) / total, 0))
        : null,
    );
    pooled[of + "_stderr"] = parts[0][0][of].map((_, i) =>
      parts.every(([profile]) => known(profile[of + "_stderr"][i]))
        ? Math.sqrt(parts.reduce((sum, [profile, weight]) => sum + ((profile[of + "_stderr"][i] * weight) / total) ** 2, 0))
        : null,
    );
  }
  return pooled;
}

/** Return the coupling of trained less untrained weights over the documents of both: mean, error, number. */
function differenceOf(row, rank) {
  const parts = row.tables
    .map((number) => DATA.tables[number].untrained?.difference[rank])
    .filter((part) => part && known(part.difference));
  const n = parts.reduce((sum, part) => sum + part.paired, 0);
  if (!n) return [null, null, 0];
  const weighted = (of) => parts.reduce((sum, part) => sum + of(part) * (part.paired / n), 0);
  const error = parts.every((part) => known(part.difference_stderr))
    ? Math.sqrt(parts.reduce((sum, part) => sum + ((part.difference_stderr * part.paired) / n) ** 2, 0))
    : null;
  return [weighted((part) => part.difference), error, n];
}
const worstOf = (row) => {
  const worst = row.tables.map((number) => DATA.tables[number].worst_certificate).filter(known);
  return worst.length ? Math.max(...worst) : null;
};
/** Return mean and error of a reading at the chosen rank. */
const readingOf = (row, reading) => row.readings[reading.name]?.[reading.of_rank ? state.rank : ""] || [null, null];

/** Join a row's tables: a group's mean weighs each task by its measured documents. */
function contents(row, rank) {
  const tables = row.tables.map((number) => DATA.tables[number]);
  const measured = tables.filter((table) => table.mean[rank]);
  const documentsMeasured = measured.reduce((sum, table) => sum + table.measured, 0);
  const matrix = measured.length
    ? weightedMean(measured.map((table) => [unpack(table.mean[rank]), table.measured]))
    : null;
  const withNorms = tables.filter((table) => table.norms);
  const count = withNorms.reduce((sum, table) => sum + table.total, 0);
  const norms = withNorms.length
    ? withNorms[0].norms.map((_, i) =>
        withNorms.reduce((sum, table) => sum + (table.norms[i] * table.total) / count, 0),
      )
    : null;
  const profile = pooledProfile(measured.map((table) => [table.profile[rank], table.measured]));
  const twins = tables.filter((table) => table.untrained && table.untrained.profile[rank]);
  const untrained = pooledProfile(twins.map((table) => [table.untrained.profile[rank], table.untrained.coupling[rank][2]]));
  const documents = tables.flatMap((table) => table.documents.map((part) => ({ ...part, table })));
  const prompts = tables.reduce((sum, table) => sum + table.total, 0);
  return { matrix: matrix && pairsShown(matrix), profile, untrained, norms, documents, prompts, documentsMeasured };
}
