// Third view: prompts, answers and their layers, document by document.

const LISTED = 300;
const verdict = (answer) =>
  !answer ? null : answer.right === true ? "right" : answer.right === false ? "wrong" : null;

function renderDocuments() {
  const row = rows[state.row];
  const { documents, prompts } = contents(row, state.rank);
  documents.forEach((document, number) => {
    document.number = number;
  });
  const words = state.search.toLowerCase().split(/\s+/).filter(Boolean);
  const matching = documents.filter((one) => {
    const text = `${one.text} ${(one.answer && one.answer.given) || ""}`.toLowerCase();
    return (
      words.every((word) => text.includes(word)) && (state.answer === "all" || verdict(one.answer) === state.answer)
    );
  });
  const limits = [`${matching.length} of ${prompts} measured prompts.`];
  if (documents.length < prompts)
    limits.push(`This page holds ${documents.length} of them (at most ${DATA.limit} per task; see --documents).`);
  if (matching.length > LISTED) limits.push(`The first ${LISTED} are listed: search to see others.`);
  if (documents.length && documents.every((one) => !one.answer))
    limits.push("Answers are known where lm-eval ran with --log_samples.");
  at("documents-note").textContent = limits.join(" ");
  const several = row.tables.length > 1;
  sortable(
    at("document-list"),
    [
      {
        name: "Document",
        value: (one) => one.number,
        cell: (one) =>
          `${several ? one.table.task + " " : ""}${one.id}${one.prompt ? `, prompt ${one.prompt + 1}` : ""}`,
      },
      {
        name: "Coupling",
        numeric: true,
        value: (one) => one.coupling[state.rank],
        cell: (one) => fixed(one.coupling[state.rank]),
      },
      { name: "Right?", value: (one) => verdict(one.answer), cell: (one) => mark(one.answer) },
      { name: "Prompt", text: true, value: (one) => one.text, cell: (one) => ending(one.text) },
      { name: "Answer", text: true, value: (one) => one.answer && one.answer.given },
    ],
    matching.slice(0, LISTED),
    { current: (one) => one.number === state.document, open: (one) => openDocument(one.number) },
  );
  // Without a document beside it, the list takes the whole width.
  at("document-pair").classList.toggle("single", !documents[state.document]);
  renderDocument(documents[state.document]);
}

function mark(answer) {
  const word = verdict(answer);
  return word ? element("span", { class: word }, (word === "right" ? "✓ " : "✗ ") + word) : "–";
}

function openDocument(number) {
  state.document = number;
  renderDocuments();
  remember();
  at("document").focus({ preventScroll: true });
  at("document").scrollIntoView({ block: "nearest" });
}

function renderDocument(one) {
  const holder = at("document");
  if (!one)
    return holder.replaceChildren(
      element("p", { class: "note" }, "Choose a document to see its prompt, answer and layers."),
    );
  const { answer, table } = one;
  const headline = String(table.headline);
  const part = (title, ...nodes) => [element("h3", {}, title), ...nodes];
  const text = (words) => element("div", { class: "prompt", dir: "auto", tabindex: "0" }, words);
  const facts = [`prompt ${one.prompt + 1} (${one.kind}), measured at token ${one.position + 1} of ${one.tokens}`];
  facts.push(
    ...Object.entries(one.coupling).map(
      ([rank, value]) => `coupling ${fixed(value)} at K = ${rank} (chance ${table.chance[rank].toFixed(4)})`,
    ),
  );
  if (known(one.line_shape_score))
    facts.push(`line-shape score ${fixed(one.line_shape_score, 3)}`, `expodistance ${fixed(one.expodistance, 3)}`);
  const heat = element("div", { class: "plot", id: "document-heat", role: "group" });
  holder.replaceChildren(
    element("h2", {}, `${table.task}, document ${one.id}`),
    element("p", { class: "note" }, facts.join("; ") + "."),
    ...(one.reason ? [element("p", {}, "Note: " + one.reason)] : []),
    ...part(
      "Prompt",
      ...(one.cut ? [element("p", { class: "note" }, `${one.cut} earlier characters are left out.`)] : []),
      text(one.text),
    ),
    ...(one.picture ? [element("img", { class: "picture", src: one.picture, alt: one.text })] : []),
    ...(answer
      ? part(
          "Answer",
          element(
            "p",
            {},
            mark(answer),
            " ",
            Object.entries(answer.scores)
              .map(([name, value]) => `${name.replace(/,none$/, "")} ${short(value)}`)
              .join(", "),
          ),
        )
      : []),
    ...(answer && known(answer.given) ? [text(answer.given)] : []),
    ...(answer && known(answer.generated) ? part("Generated text", text(answer.generated)) : []),
    ...(answer && known(answer.expected) ? part("Expected", text(answer.expected)) : []),
    ...(answer && answer.options.length > 1 ? part("Choices", choices(answer)) : []),
    ...part(`${sentence(quantity())} of every pair of layers, K = ${headline}`, heat),
    ...(one.words ? directionWords(part, one.words) : []),
  );
  if (one.matrix) heatMap(heat, pairsShown(unpack(one.matrix)), headline);
  else clear(heat, "No layer-by-layer matrix was measured.");
}

function directionWords(part, directions) {
  const attributes = { id: "document-words", class: "wide tall", role: "region", tabindex: "0" };
  const holder = element("div", { ...attributes, "aria-label": "Words of directions" });
  const note =
    "The vocabulary nearest to each layer's top left singular vectors at the measured token, and to their opposites. " +
    "Signs of singular vectors have no meaning.";
  sortable(
    holder,
    [
      { name: "Layer", numeric: true, value: (one) => one.layer },
      { name: "Direction", numeric: true, value: (one) => one.k },
      { name: "σ", numeric: true, value: (one) => one.sigma },
      { name: "Words", text: true, value: (one) => one.words },
      { name: "Words of the opposite", text: true, value: (one) => one.opposite },
    ],
    directions,
    {},
  );
  return part("Words of the coupled directions", element("p", { class: "note" }, note), holder);
}

function choices(answer) {
  const lines = answer.options.map(([text, likelihood]) =>
    element(
      "tr",
      {},
      element("td", { class: "text", dir: "auto" }, text),
      element("td", { class: "number" }, fixed(likelihood, 2)),
    ),
  );
  return element(
    "div",
    { class: "wide" },
    element(
      "table",
      {},
      element(
        "thead",
        {},
        element(
          "tr",
          {},
          element("th", { scope: "col" }, "Choice"),
          element("th", { scope: "col", class: "number" }, "Log-likelihood"),
        ),
      ),
      element("tbody", {}, ...lines),
    ),
  );
}
