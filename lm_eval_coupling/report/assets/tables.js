// Tables that are sorted by a click on a header.

const sorting = {};

/** Fill `holder` with a sortable table. A column is {name, value, error?, cell?, numeric?, text?, title?}. */
function sortable(holder, columns, items, { current, open }) {
  const order = (sorting[holder.id] ??= { column: null, down: false });
  const sorted = [...items];
  const by = columns.find((column) => column.name === order.column);
  if (by) {
    const sign = order.down ? -1 : 1;
    sorted.sort((a, b) => {
      const [x, y] = [by.value(a), by.value(b)];
      if (!known(x) || !known(y)) return known(x) ? -1 : known(y) ? 1 : 0; // missing values come last
      return sign * (typeof x === "number" ? x - y : String(x).localeCompare(String(y), undefined, { numeric: true }));
    });
  }
  const header = columns.map((column) => {
    const active = column === by;
    const arrow = active ? (order.down ? " ↓" : " ↑") : "";
    const button = element(
      "button",
      {
        title: column.title,
        onclick: () => {
          order.down = active ? !order.down : Boolean(column.numeric);
          order.column = column.name;
          sortable(holder, columns, items, { current, open });
          [...holder.querySelectorAll("th button")].find((b) => b.dataset.name === column.name).focus();
        },
      },
      column.name + arrow,
    );
    button.dataset.name = column.name;
    return element(
      "th",
      {
        scope: "col",
        class: column.numeric && "number",
        "aria-sort": active ? (order.down ? "descending" : "ascending") : "none",
      },
      button,
    );
  });
  const body = sorted.map((item) => {
    const cells = columns.map((column, i) => {
      const content = column.cell
        ? column.cell(item)
        : column.numeric
          ? short(column.value(item))
          : (column.value(item) ?? "–");
      if (i === 0) {
        return element(
          "th",
          { scope: "row" },
          open
            ? element(
                "button",
                {
                  class: "open",
                  onclick: (event) => {
                    event.stopPropagation();
                    open(item);
                  },
                },
                content,
              )
            : content,
        );
      }
      return element(
        "td",
        { class: column.numeric ? "number" : column.text ? "text" : null, dir: column.text && "auto" },
        content,
      );
    });
    const line = element("tr", { "aria-current": current && current(item) ? "true" : null }, ...cells);
    if (open)
      line.addEventListener("click", () => {
        if (!String(getSelection())) open(item);
      });
    return line;
  });
  const name = holder.getAttribute("aria-label") || holder.id;
  const save = element("button", { class: "save", onclick: () => download(`${name}.csv`, csvOf(columns, sorted)) }, "CSV");
  save.setAttribute("aria-label", `Download as CSV: ${name}`);
  holder.replaceChildren(
    save,
    element("table", {}, element("thead", {}, element("tr", {}, ...header)), element("tbody", {}, ...body)),
  );
}
