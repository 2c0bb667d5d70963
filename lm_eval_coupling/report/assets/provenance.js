// Fourth view: how it was measured.

function flat(value, name = "") {
  if (value !== null && typeof value === "object" && !Array.isArray(value)) {
    return Object.entries(value).flatMap(([key, member]) => flat(member, name ? `${name}: ${key}` : key));
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
  at("provenance").replaceChildren(
    ...DATA.provenance.map((run, i) =>
      element(
        "div",
        {},
        element("h2", {}, rows.find((row) => row.run === i).label),
        ...(run.run_id ? [] : [element("p", { class: "note" }, "Scored without measuring coupling.")]),
        element(
          "div",
          { class: "wide" },
          element(
            "table",
            {},
            element(
              "tbody",
              {},
              ...flat(run).map(([name, value]) =>
                element("tr", {}, element("th", { scope: "row" }, name.replaceAll("_", " ")), element("td", {}, value)),
              ),
            ),
          ),
        ),
      ),
    ),
  );
}
