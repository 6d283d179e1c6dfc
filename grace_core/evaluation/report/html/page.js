"use strict";
// Tables sort by a click on a head; a row of published figures stays below the row it belongs to.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const first = column === 0 ? "ascending" : "descending";
      const other = column === 0 ? "descending" : "ascending";
      const order = head.ariaSort === first ? other : first;
      heads.forEach((each) => each.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", order);
      const body = table.tBodies[0];
      const groups = [];
      for (const row of body.rows) {
        if (row.classList.contains("published")) groups[groups.length - 1].push(row);
        else groups.push([row]);
      }
      const value = (group) => group[0].cells[column].dataset.value ?? "";
      const sign = order === "ascending" ? 1 : -1;
      groups.sort((a, b) => {
        const one = value(a), two = value(b);
        if (one === "" || two === "") return (one === "") - (two === "");
        const numbers = [Number(one), Number(two)];
        const text = numbers.some(Number.isNaN);
        return sign * (text ? one.localeCompare(two) : numbers[0] - numbers[1]);
      });
      body.append(...groups.flat());
    });
  });
}
