// Sets the remembered theme before anything is drawn; a classic script in the head, so that no page flashes.
try {
  const theme = localStorage.getItem("weft-theme");
  if (theme === "dark" || theme === "light") document.documentElement.dataset.theme = theme;
} catch {
  document.documentElement.removeAttribute("data-theme"); // storage is forbidden: follow the system
}
