// Before the first paint: the theme and language that were chosen last, so that neither flashes.
(function () {
  var root = document.documentElement;
  try {
    var theme = localStorage.getItem('fine-theme');
    var language = localStorage.getItem('fine-language');
  } catch (_) {
    /* storage may be forbidden; then the system decides */
  }
  if (theme !== 'light' && theme !== 'dark') {
    theme = matchMedia('(prefers-color-scheme: dark)').matches ? 'dark' : 'light';
  }
  root.setAttribute('data-mantine-color-scheme', theme);
  root.lang = language || (/^ko/i.test(navigator.language) ? 'ko' : 'en');
})();
