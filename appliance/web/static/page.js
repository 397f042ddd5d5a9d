// On every page: nothing of a page that was left is shown again, and the question in the corner closes with Escape.

const root = document.documentElement;

// A page that the browser kept aside is hidden before it is put away, and asked for anew when it comes back.
addEventListener("pagehide", () => root.classList.add("left"));
addEventListener("pageshow", (event) => {
  if (event.persisted) location.reload();
});

const forget = document.querySelector("#forget");
if (forget) {
  addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || !forget.open) return;
    forget.open = false;
    forget.querySelector("summary").focus();
    event.stopImmediatePropagation();
  });
  addEventListener("pointerdown", (event) => {
    if (forget.open && !forget.contains(event.target)) forget.open = false;
  });
}
