// Copy buttons: shown only where they work.
"use strict";
if (navigator.clipboard) {
  const show = () => document.querySelectorAll("button.copy[hidden]").forEach((button) => { button.hidden = false; });
  show();
  document.addEventListener("beaker:updated", show);
  document.addEventListener("click", async (event) => {
    const button = event.target.closest("button.copy");
    if (!button) return;
    try {
      await navigator.clipboard.writeText(button.dataset.copy);
      button.textContent = "Copied";
      button.classList.add("done");
    } catch {
      button.textContent = "Not allowed";
    }
    setTimeout(() => { button.textContent = "Copy"; button.classList.remove("done"); }, 1600);
  });
}
